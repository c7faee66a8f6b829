// pair_*, trio_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y, for a batch of decode rows that two
// tiles of tokens or more hold.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   block    64 GROUPS rows of w by N tokens, all columns: GROUPS warpgroups that multiply, a warp that fetches, a warp that
//            computes the tokens' scales
//   cluster  two blocks, or three, with the same rows of w and neighbouring tiles of tokens; each fetches its share of w for all
//   grid     (blocks of all clusters along the tokens, row tiles)   block 128 GROUPS + 64 threads
//   shared   stages * (64 GROUPS + N) * 128 bytes; 2 barriers a stage; N floats
//   moves    rows * cols * 2 bytes of w, for each cluster's tokens, from memory once; x once for each tile of rows, from L2
//
// Where gemm_few.cuh's blocks share out the columns, each of these has the whole sum: no sums cross the cluster, which
// costs more than the columns' bandwidth as soon as there are many of them.
//
// 1. The sums have gemm_few.cuh's order: each slice from zero, slices added in their order.
// 2. The sums lie over the ring, idle by then, as there. A cluster's last tile may lie behind the last token: it helps to
//    fetch and stores nothing.
// 3. One block fills a multiprocessor: the bytes on their way into it, not the bandwidth, bound how fast it gets them.
// 4. What a block multiplies with costs shared memory, which gives 128 bytes a cycle, more cycles than the tensor cores: 128 rows by
//    64 tokens and 16 columns 112, where those take 64; by 128 tokens 160. So where two tiles of tokens leave a third of the
//    multiprocessors idle, three are quicker.
#pragma once

#include "hopper/gemm/ring.cuh"
#include "hopper/gemm/share_out.cuh"

template <int GROUPS, int N, int SHARERS, class Epilogue>
__device__ __forceinline__ void together(const TensorMap *w, const TensorMap *x, const Shape &shape, unsigned stages,
                                         const Epilogue &epilogue) {
    using R = Ring<GROUPS, N, SHARERS>;
    using S = Sums<GROUPS, N>;
    extern __shared__ __align__(1024) unsigned char shared[];
    dependent_launch();
    const unsigned rank = cluster_rank(), m0 = blockIdx.y * R::ROWS, n0 = blockIdx.x * N;
    const unsigned base = (shared_address(shared) + 1023) & ~1023u, warp = threadIdx.x / 32;
    float *staged = reinterpret_cast<float *>(shared + (base - shared_address(shared)));
    const R ring(base, stages, rank);
    float *scales = staged + (stages * R::STAGE_BYTES + 16 * stages) / 4;
    if (threadIdx.x == R::MULTIPLIERS) {
        prefetch_map(x);
        ring.init_barriers();
    }
    cluster_sync();
    if (warp >= R::MULTIPLIERS / 32) {
        if (threadIdx.x == R::MULTIPLIERS)
            ring.fetch(w, x, 0, shape.blocks(), m0, n0);
        if (warp > R::MULTIPLIERS / 32)
            scale_rows<N>(epilogue, shape, n0, scales);
        __syncthreads();
    } else {
        // All of a warp's tokens at once, if they fit its registers.
        constexpr int ALL = (N + 4 * GROUPS - 1) / (4 * GROUPS), T = ALL <= 8 ? ALL : (ALL + 1) / 2;
        using Out = EitherWidth<N, GROUPS, ALL, T, false, Epilogue>;
        Out out(shape, warp, 4 * GROUPS, m0, n0);
        if (Epilogue::EARLY)
            out.fetch(epilogue, shape.rows);
        dependent_wait();
        if (!Epilogue::EARLY)
            out.fetch(epilogue, shape.rows);
        float sum[N / 2] = {}, total[N / 2] = {};
        RingPosition position(shape.blocks(), stages);
        for (unsigned slice = 0; slice < shape.slices; slice++) {
            ring.multiply(position, shape.slice_begin(slice + 1) - shape.slice_begin(slice), sum);
#pragma unroll
            for (int i = 0; i < N / 2; i++)
                total[i] = slice == 0 ? sum[i] : total[i] + sum[i];
        }
        sync_threads(1, R::MULTIPLIERS);
        S::write(staged, total);
        __syncthreads();
        while (out.n < out.count)
            if constexpr (IS_WIDE<Epilogue>)
                out.take(epilogue, shape, scales, [&](float4(&sum)[Out::PLACES], const unsigned(&token)[Out::PLACES],
                                                        const unsigned(&row)[Out::PLACES]) {
#pragma unroll
                    for (int i = 0; i < Out::PLACES; i++)
                        sum[i] = *reinterpret_cast<const float4 *>(staged + token[i] * S::STAGED + row[i]);
                });
            else
                out.take(epilogue, shape, scales, [&](float2(&sum)[Out::PLACES], const unsigned(&token)[Out::PLACES], unsigned b) {
#pragma unroll
                    for (int i = 0; i < Out::PLACES; i++)
                        sum[i] = S::read(staged, token[i], b);
                });
    }
}

#define TOGETHER(NAME, GROUPS, N, SHARERS, EPILOGUE)                                                                         \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 64, 1)                                                       \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Shape shape, unsigned stages,             \
         EPILOGUE epilogue) {                                                                                                \
        together<GROUPS, N, SHARERS>(&w, &x, shape, stages, epilogue);                                                       \
    }
#define PAIR(NAME, GROUPS, N, EPILOGUE) TOGETHER(NAME, GROUPS, N, 2, EPILOGUE)
#define TRIO(NAME, GROUPS, N, EPILOGUE) TOGETHER(NAME, GROUPS, N, 3, EPILOGUE)
