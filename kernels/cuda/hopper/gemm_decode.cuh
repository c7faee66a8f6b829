// decode_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y, where tokens are few and a launch's
// time is its weights' way from memory.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   block    64 GROUPS rows of w by N tokens, one slice of the columns: a warp that fetches, GROUPS warpgroups that multiply
//   cluster  TILES neighbouring row tiles times all slices: rank = tile * slices + slice
//   grid     (clusters for all rows * cluster, ceil(tokens / N))   block 128 GROUPS + 32 threads
//   shared   stages * (64 GROUPS + N) * 128 bytes; 2 barriers a stage; N floats
//   moves    rows * cols * 2 bytes of w for each N tokens; x again in each cluster, from L2
//
//   fetching warp      w into every stage ── wait for the kernel before ── x into every stage ── … ring …
//   multiplying warps                        wait ──────────── wgmma k16 by k16 ─ ── sums to shared memory ─┐
//   all                cluster barrier ── each rank takes every R-th token, adds its slices, epilogue <─────┘
//
// A source file for each epilogue, gemm_decode_*.cu, so that the driver compiles them side by side.
//
// 1. Each slice is summed from zero, k16 by k16 (wgmma), slices are added in fp32 in their order: one order for every
//    number of tokens, and gemm_prefill.cu's.
// 2. The sums lie over the ring, which is idle by then: every fetch was waited for, and every read of it is behind the
//    named barrier. No block leaves the second cluster barrier, so none ends, while another reads its sums.
// 3. Two blocks fit a multiprocessor, so the next kernel's weights arrive while this one's sums are added.
#pragma once

#include "dependent.cuh"
#include "epilogue.cuh"
#include "hopper.cuh"

template <int GROUPS, int N> struct Plan {
    static constexpr int ROWS = 64 * GROUPS, W_BYTES = ROWS * 128, STAGE_BYTES = W_BYTES + N * 128;
    static constexpr int MULTIPLIERS = 128 * GROUPS, STAGED = ROWS + 4; // floats between two tokens' sums
};

// A block's share of the columns and the shared memory that it passes through.
template <int GROUPS, int N> struct Ring {
    unsigned base, full, empty, stages, first, blocks;

    __device__ __forceinline__ unsigned stage(unsigned i) const { return base + i * Plan<GROUPS, N>::STAGE_BYTES; }

    // The fetching thread's work.
    __device__ __forceinline__ void fetch(const TensorMap *w, const TensorMap *x, unsigned m0, unsigned n0) const {
        const unsigned ahead = blocks < stages ? blocks : stages;
        for (unsigned i = 0; i < ahead; i++) {
            barrier_expect(full + 8 * i, Plan<GROUPS, N>::STAGE_BYTES);
            bulk_fetch(stage(i), w, (first + i) * 64, m0, full + 8 * i, EVICT_FIRST);
        }
        dependent_wait();
        for (unsigned i = 0; i < ahead; i++)
            bulk_fetch(stage(i) + Plan<GROUPS, N>::W_BYTES, x, (first + i) * 64, n0, full + 8 * i, EVICT_LAST);
        unsigned at = 0, parity = 0;
        for (unsigned i = ahead; i < blocks; i++) {
            barrier_wait(empty + 8 * at, parity);
            barrier_expect(full + 8 * at, Plan<GROUPS, N>::STAGE_BYTES);
            bulk_fetch(stage(at), w, (first + i) * 64, m0, full + 8 * at, EVICT_FIRST);
            bulk_fetch(stage(at) + Plan<GROUPS, N>::W_BYTES, x, (first + i) * 64, n0, full + 8 * at, EVICT_LAST);
            if (++at == stages) {
                at = 0;
                parity ^= 1;
            }
        }
    }

    // A multiplying warpgroup's work: the slice's sums of its 64 rows.
    __device__ __forceinline__ void multiply(float (&sum)[N / 2]) const {
        const unsigned group = threadIdx.x / 128;
        const bool speaks = threadIdx.x % 32 == 0;
        unsigned at = 0, parity = 0, before = 0;
        for (unsigned i = 0; i < blocks; i++) {
            barrier_wait(full + 8 * at, parity);
            const unsigned long long a = tile_descriptor(stage(at) + group * 64 * 128);
            const unsigned long long b = tile_descriptor(stage(at) + Plan<GROUPS, N>::W_BYTES);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma(sum, a + 2 * k, b + 2 * k, i > 0 || k > 0);
            wgmma_commit();
            wgmma_wait<1>(); // the block before is multiplied: its stage is free
            if (i > 0 && speaks)
                barrier_arrive(empty + 8 * before);
            before = at;
            if (++at == stages) {
                at = 0;
                parity ^= 1;
            }
        }
        wgmma_wait<0>();
        hold(sum);
    }
};

// Writes a warpgroup's sums as [token][row].
template <int GROUPS, int N> __device__ __forceinline__ void stage_sums(float *staged, const float (&sum)[N / 2]) {
    const unsigned lane = threadIdx.x % 32, m = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            staged[(8 * j + lane % 4 * 2 + e % 2) * Plan<GROUPS, N>::STAGED + m + e / 2 * 8] = sum[4 * j + e];
}

// Pairs of T tokens' outputs: the slices' sums, all on their way at once, added in their order, from ranks first, first + 1, …
template <int SLICES, int T>
__device__ __forceinline__ void add_slices(float2 (&sum)[T], const unsigned (&at)[T], unsigned first, unsigned slices) {
    float2 part[SLICES][T];
#pragma unroll
    for (int s = 0; s < SLICES; s++)
        if (s < slices)
#pragma unroll
            for (int i = 0; i < T; i++)
                part[s][i] = load_remote(at[i], first + s);
#pragma unroll
    for (int i = 0; i < T; i++)
        sum[i] = part[0][i];
#pragma unroll
    for (int s = 1; s < SLICES; s++)
        if (s < slices)
#pragma unroll
            for (int i = 0; i < T; i++)
                sum[i] = {sum[i].x + part[s][i].x, sum[i].y + part[s][i].y};
}

// How many tokens a warp takes side by side: as many as it gets, as far as their slices' sums fit the registers.
template <int N, class Epilogue> struct SideBySide {
    static constexpr int T = N < 64 ? 1 : Epilogue::SLICES > 2 ? 2 : 4;
};

// What the multiplying warps do at the end: ranks take turns at the block's tokens, a warp a few at once.
template <int GROUPS, int TILES, int N, class Epilogue> struct ShareOut {
    static constexpr int BLOCKS = GROUPS * TILES, T = SideBySide<N, Epilogue>::T;
    typename Epilogue::template Ahead<BLOCKS> ahead[T];
    unsigned n, step, count, m0, n0, lane;

    __device__ __forceinline__ ShareOut(const Shape &shape, unsigned rank, unsigned ranks, unsigned m0, unsigned n0)
        : ahead{}, n(rank + ranks * (threadIdx.x / 32)), step(ranks * 4 * GROUPS),
          count(shape.tokens - n0 < N ? shape.tokens - n0 : N), m0(m0), n0(n0), lane(threadIdx.x % 32) {}

    // Fetches what the tokens at hand need.
    __device__ __forceinline__ void fetch(const Epilogue &epilogue, unsigned rows) {
#pragma unroll
        for (int i = 0; i < T; i++)
            if (n + i * step < count) {
                const unsigned token = n0 + n + i * step;
                ahead[i] = epilogue.template ahead<BLOCKS>(epilogue.where(token), token, m0, rows, lane);
            }
    }
    __device__ __forceinline__ unsigned token_or_first(int i) const { return n + i * step < count ? n + i * step : n; }

    // Adds the slices of the tokens at hand, takes them through the epilogue, and goes on to the next.
    __device__ __forceinline__ void take(const Epilogue &epilogue, const Shape &shape, unsigned base, const float *scales) {
        float2 v[T][BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            unsigned at[T];
            float2 sum[T];
#pragma unroll
            for (int i = 0; i < T; i++)
                at[i] = base + (token_or_first(i) * Plan<GROUPS, N>::STAGED + b % GROUPS * 64 + 2 * lane) * 4;
            add_slices<Epilogue::SLICES>(sum, at, b / GROUPS * shape.slices, shape.slices);
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float scale = Epilogue::SCALED ? scales[token_or_first(i)] : 1.0f;
                v[i][b] = {__fmul_rn(sum[i].x, scale), __fmul_rn(sum[i].y, scale)};
            }
        }
        const Taken taken = {n0 + n, step, (count - n + step - 1) / step};
        epilogue.template store<T, BLOCKS>(ahead, v, taken, m0, shape.rows, lane);
        n += T * step;
        fetch(epilogue, shape.rows);
    }
};

template <int GROUPS, int TILES, int N, class Epilogue>
__device__ __forceinline__ void decode(const TensorMap *w, const TensorMap *x, const Shape &shape, unsigned stages,
                                       const Epilogue &epilogue) {
    using P = Plan<GROUPS, N>;
    extern __shared__ __align__(1024) unsigned char shared[];
    dependent_launch();
    const unsigned ranks = cluster_size(), rank = cluster_rank(), slice = rank % shape.slices;
    const unsigned tile0 = blockIdx.x / ranks * TILES, m0 = (tile0 + rank / shape.slices) * P::ROWS, n0 = blockIdx.y * N;
    const unsigned base = (shared_address(shared) + 1023) & ~1023u;
    float *staged = reinterpret_cast<float *>(shared + (base - shared_address(shared)));
    Ring<GROUPS, N> ring;
    ring.base = base;
    ring.stages = stages;
    ring.full = base + stages * P::STAGE_BYTES;
    ring.empty = ring.full + 8 * stages;
    ring.first = shape.slice_begin(slice);
    ring.blocks = shape.slice_begin(slice + 1) - ring.first;
    float *scales = staged + (stages * P::STAGE_BYTES + 16 * stages) / 4;
    if (threadIdx.x == P::MULTIPLIERS) {
        prefetch_map(x);
        for (unsigned i = 0; i < stages; i++) {
            barrier_init(ring.full + 8 * i, 1);
            barrier_init(ring.empty + 8 * i, 4 * GROUPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= P::MULTIPLIERS) {
        if (threadIdx.x == P::MULTIPLIERS)
            ring.fetch(w, x, m0, n0);
        __syncwarp();
        if (Epilogue::SCALED) { // while the others multiply
            dependent_wait();
            for (unsigned n = threadIdx.x % 32; n < N && n0 + n < shape.tokens; n += 32)
                scales[n] = epilogue.scale(n0 + n);
            __syncwarp();
        }
        cluster_sync();
    } else {
        ShareOut<GROUPS, TILES, N, Epilogue> out(shape, rank, ranks, tile0 * P::ROWS, n0);
        if (Epilogue::EARLY)
            out.fetch(epilogue, shape.rows);
        dependent_wait();
        if (!Epilogue::EARLY)
            out.fetch(epilogue, shape.rows);
        float sum[N / 2] = {};
        ring.multiply(sum);
        sync_threads(1, P::MULTIPLIERS);
        stage_sums<GROUPS, N>(staged, sum);
        __syncwarp();
        cluster_sync();
        while (out.n < out.count)
            out.take(epilogue, shape, base, scales);
        __syncwarp();
    }
    cluster_sync();
}

#define DECODE(NAME, GROUPS, TILES, N, EPILOGUE)                                                                             \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 32, 2)                                                       \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Shape shape, unsigned stages,             \
         EPILOGUE epilogue) {                                                                                                \
        decode<GROUPS, TILES, N>(&w, &x, shape, stages, epilogue);                                                           \
    }
