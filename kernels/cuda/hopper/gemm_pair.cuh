// pair_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y, for a batch of decode rows that two
// tiles of tokens or more hold.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   block    64 GROUPS rows of w by N tokens, all columns: GROUPS warpgroups that multiply, a warp that fetches, a warp that
//            computes the tokens' scales
//   cluster  two blocks with the same rows of w and neighbouring tiles of tokens; each fetches half of w for both
//   grid     (2 * pairs of tiles of tokens, row tiles)   block 128 GROUPS + 64 threads
//   shared   stages * (64 GROUPS + N) * 128 bytes; 2 barriers a stage; N floats
//   moves    rows * cols * 2 bytes of w, for each 2 N tokens, from memory once; x once for each tile of rows, from L2
//
// Where gemm_decode.cuh's blocks share out the columns, each of these has the whole sum: no sums cross the cluster, which
// costs more than the columns' bandwidth as soon as there are many of them.
//
// 1. The sums have gemm_decode.cuh's order: each slice from zero, slices added in their order.
// 2. The sums lie over the ring, idle by then, as there. A pair's second tile may lie behind the last token: it helps to
//    fetch and stores nothing.
// 3. One block fills a multiprocessor: the bytes on their way into it, not the bandwidth, bound how fast it gets them.
#pragma once

#include "ring.cuh"
#include "share_out.cuh"

template <int GROUPS, int N, class Epilogue>
__device__ __forceinline__ void pair(const TensorMap *w, const TensorMap *x, const Shape &shape, unsigned stages,
                                     const Epilogue &epilogue) {
    using R = Ring<GROUPS, N, 2>;
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
        constexpr int T = (N + 4 * GROUPS - 1) / (4 * GROUPS); // all of a warp's tokens at once
        ShareOut<N, GROUPS, T, Epilogue> out(shape, warp, 4 * GROUPS, m0, n0);
        if (Epilogue::EARLY)
            out.fetch(epilogue, shape.rows);
        dependent_wait();
        if (!Epilogue::EARLY)
            out.fetch(epilogue, shape.rows);
        float sum[N / 2] = {}, total[N / 2] = {};
        typename R::Position position(shape.blocks(), stages);
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
            out.take(epilogue, shape, scales, [&](float2(&sum)[T], const unsigned(&token)[T], unsigned b) {
#pragma unroll
                for (int i = 0; i < T; i++)
                    sum[i] = S::read(staged, token[i], b);
            });
    }
}

#define PAIR(NAME, GROUPS, N, EPILOGUE)                                                                                      \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 64, 1)                                                       \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Shape shape, unsigned stages,             \
         EPILOGUE epilogue) {                                                                                                \
        pair<GROUPS, N>(&w, &x, shape, stages, epilogue);                                                                    \
    }
