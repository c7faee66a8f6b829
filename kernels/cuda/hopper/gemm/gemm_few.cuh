// few_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y, where tokens are few and a launch's
// time is its weights' way from memory.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   block    64 GROUPS rows of w by N tokens, OWN slices of the columns, one or a pair: GROUPS warpgroups that
//            multiply, a warp that fetches, a warp that computes the tokens' scales. wgmma.cuh has a wrapper for each N, a multiple of 8
//   cluster  TILES neighbouring row tiles times all slices: rank = (tile * slices + slice) / OWN; or twice that, with the next
//            tokens or the next rows: two blocks beside each other have a slice in common
//   grid     (ceil(tokens / N) * cluster, clusters for all rows)   block 128 GROUPS + 64 threads, or 128 (DEALT)
//   shared   stages * (64 GROUPS + N) * 128 bytes; 2 barriers a stage; N floats
//   moves    rows * cols * 2 bytes of w, for each N tokens, from memory once: neighbouring clusters have the same rows of w;
//            x again in each cluster, from L2
//
//   fetching warp      w into every stage ── wait for the kernel before ── x into every stage ── … ring …
//   multiplying warps                        wait ──────────── wgmma k16 by k16 ─ ── sums to shared memory ─┐
//   all                cluster barrier ── each rank takes every R-th token, adds its slices, epilogue <─────┘
//
// A source file for each epilogue, gemm_few_*.cu, so that the driver compiles them side by side.
//
// 1. Each slice is summed from zero, k16 by k16 (wgmma), slices are added in fp32 in pairs, and these in pairs again (Shape): one
//    order for every number of tokens, gemm_pair.cuh's and gemm_many.cuh's too.
// 2. The sums lie over the ring, which is idle by then: every fetch was waited for, and every read of it is behind the
//    named barrier. No block leaves the second cluster barrier, so none ends, while another reads its sums.
// 3. Two blocks fit a multiprocessor, but for the largest, so the next kernel's weights arrive while this one's sums are added.
#pragma once

#include "hopper/fp8/fp8_ring.cuh"
#include "hopper/gemm/ring.cuh"
#include "hopper/gemm/share_out.cuh"

__device__ __forceinline__ float2 plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float4 plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

__device__ __forceinline__ void load_sums(float2 &sum, unsigned at, unsigned rank) { sum = load_remote(at, rank); }
__device__ __forceinline__ void load_sums(float4 &sum, unsigned at, unsigned rank) { sum = load_four_remote(at, rank); }

// T places' outputs: the sums that ranks first, first + 1, … have, all on their way at once, added in pairs, then pairs of pairs.
// With PAIR, every other rank.
template <int SHARERS, int PAIR, int T, class Floats>
__device__ __forceinline__ void add_shares(Floats (&sum)[T], const unsigned (&at)[T], const unsigned (&first)[T], unsigned sharers) {
    Floats part[SHARERS][T];
#pragma unroll
    for (int s = 0; s < SHARERS; s++)
        if (s < sharers)
#pragma unroll
            for (int i = 0; i < T; i++)
                load_sums(part[s][i], at[i], first[i] + s * PAIR);
    if constexpr (SHARERS > 2)
#pragma unroll
        for (int apart = 1; apart < SHARERS / 2; apart *= 2)
#pragma unroll
            for (int s = 0; s < SHARERS; s += 2 * apart)
                if (s + apart < sharers)
#pragma unroll
                    for (int i = 0; i < T; i++)
                        part[s][i] = plus(part[s][i], part[s + apart][i]);
#pragma unroll
    for (int i = 0; i < T; i++)
        sum[i] = part[0][i];
    if constexpr (SHARERS > 1)
        if (SHARERS / 2 < sharers)
#pragma unroll
            for (int i = 0; i < T; i++)
                sum[i] = plus(sum[i], part[SHARERS / 2][i]);
}

// How many tokens a warp takes side by side, of N that WARPS share. Up to 64 they are N / 16, which is all that a warp of qkv gets, but
// two where there are four slices to add; of more, as many as it gets up to four. All of eight at once are slower than three.
template <int N, int WARPS, class Epilogue> struct SideBySide {
    static constexpr int ALL = (N + WARPS - 1) / WARPS;
    static constexpr int T = N < 64 ? N / 16 : N < 88 ? (Epilogue::SLICES > 2 ? 2 : 4) : ALL <= 4 ? ALL : 3;
};

__device__ __forceinline__ const TensorMap *fetched(const TensorMap &w) { return &w; }
__device__ __forceinline__ const Fp8Matrix &fetched(const Fp8Matrix &w) { return w; }

// Whom a block has beside itself in its cluster, with a slice in common: nobody; who has the next tokens, for whom it fetches half of
// its rows of w; or the next rows of w, half of its tokens.
enum class Beside { NOBODY, NEXT_TOKENS, NEXT_ROWS };

// How w is kept, and its way into shared memory.
template <int GROUPS, int N, Beside BESIDE, class Matrix> struct RingOf {
    using Type = Ring<GROUPS, N, BESIDE == Beside::NOBODY ? 1 : 2, BESIDE == Beside::NEXT_ROWS>;
};
template <int GROUPS, int N> struct RingOf<GROUPS, N, Beside::NOBODY, Fp8Matrix> {
    using Type = Fp8Ring<GROUPS, N>;
};
// Do 128 rows of a block share a multiprocessor's registers with another block?
template <class Matrix> constexpr bool TIGHT = false;
template <> constexpr bool TIGHT<Fp8Matrix> = true;

// Are sums over its columns made in groups of these, so that it matters which they are?
template <class Matrix> constexpr bool IN_GROUPS = false;

// What else the scaling warp fetches: of these matrices nothing.
template <class R>
__device__ __forceinline__ void fetch_beside(const R &, const TensorMap &, unsigned, unsigned, unsigned, unsigned) {}
template <class R>
__device__ __forceinline__ void fetch_beside(const R &, const Fp8Matrix &, unsigned, unsigned, unsigned, unsigned) {}

// Where a tile of so many rows from row m on is taken to begin: so that no more than 63 of its rows lie behind the matrix, if it has as
// many, for the copy engine is slow to make up rows. Those before m are another tile's outputs, which who stores eight a lane leaves out.
template <class Epilogue> __device__ __forceinline__ unsigned within(const Shape &shape, unsigned m, unsigned rows) {
    const unsigned end = (shape.rows + 63) / 64 * 64;
    return !IS_WIDE<Epilogue> ? m : end > rows ? min(m, end - rows) : 0;
}

// Are registers dealt anew? Of all tokens of a batch a thread has up to 128 sums: then it is a whole warpgroup that fetches, which
// gives most of its registers away.
template <int N, Beside BESIDE, class Epilogue> constexpr bool DEALT = N > 128 && BESIDE == Beside::NEXT_ROWS && Epilogue::SLICES > 2;

template <int GROUPS, int TILES, int N, int OWN, Beside BESIDE, class Matrix, class Epilogue>
__device__ __forceinline__ void multiply_few(const Matrix &w, const TensorMap *x, const Shape &shape, unsigned stages,
                                       const Epilogue &epilogue) {
    using R = typename RingOf<GROUPS, N, BESIDE, Matrix>::Type;
    using S = Sums<GROUPS, N>;
    constexpr int PAIR = BESIDE == Beside::NOBODY ? 1 : 2;
    constexpr bool SAME_TOKENS = BESIDE == Beside::NEXT_ROWS;
    extern __shared__ __align__(1024) unsigned char shared[];
    dependent_launch();
    const unsigned ranks = cluster_size() / PAIR, cluster = cluster_rank(), rank = cluster / PAIR, second = cluster % PAIR;
    const unsigned sharers = shape.slices / OWN, slice = rank % sharers * OWN;
    const unsigned of_tokens = blockIdx.x / (ranks * PAIR), n0 = (SAME_TOKENS ? of_tokens : of_tokens * PAIR + second) * N;
    const unsigned tile0 = (SAME_TOKENS ? blockIdx.y * PAIR + second : blockIdx.y) * TILES;
    const unsigned out0 = within<Epilogue>(shape, tile0 * R::ROWS, TILES * R::ROWS), m0 = out0 + rank / sharers * R::ROWS;
    const unsigned base = (shared_address(shared) + 1023) & ~1023u;
    float *staged = reinterpret_cast<float *>(shared + (base - shared_address(shared)));
    const R ring(base, stages, second, rank * PAIR);
    float *scales = staged + (stages * R::STAGE_BYTES + 16 * stages) / 4;
    const unsigned first = shape.slice_begin(slice), blocks = shape.slice_begin(slice + OWN) - first, warp = threadIdx.x / 32;
    if (threadIdx.x == R::MULTIPLIERS) {
        prefetch_map(x);
        ring.init_barriers();
    }
    if (PAIR == 1)
        __syncthreads();
    else
        cluster_sync();
    if (warp >= R::MULTIPLIERS / 32) {
        if constexpr (DEALT<N, BESIDE, Epilogue>)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(GROUPS == 3 ? 32 : 40));
        if (threadIdx.x == R::MULTIPLIERS)
            ring.fetch(fetched(w), x, first, blocks, m0, n0);
        if (warp == R::MULTIPLIERS / 32 + 1) {
            scale_rows<N>(epilogue, shape, n0, scales);
            fetch_beside(ring, w, first, blocks, m0, n0);
        }
        __syncwarp();
        cluster_sync();
    } else {
        if constexpr (DEALT<N, BESIDE, Epilogue>)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(GROUPS == 3 ? 160 : 232));
        constexpr int BLOCKS = GROUPS * TILES, WARPS = 4 * BLOCKS * Epilogue::SLICES / OWN;
        using Out = EitherWidth<N, BLOCKS, (N + WARPS - 1) / WARPS, SideBySide<N, WARPS, Epilogue>::T, TIGHT<Matrix>, Epilogue>;
        // Of an odd number of tiles the last one's neighbour has none: it takes no tokens, or stores none of them.
        const bool is_none = SAME_TOKENS && out0 >= shape.rows;
        Out out(shape, rank + ranks * warp, ranks * 4 * GROUPS, out0, is_none ? shape.tokens : n0, tile0 * R::ROWS);
        if (Epilogue::EARLY)
            out.fetch(epilogue, shape.rows);
        dependent_wait();
        if (!Epilogue::EARLY)
            out.fetch(epilogue, shape.rows);
        float sum[OWN][N / 2] = {};
        RingPosition position(blocks, stages);
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if constexpr (IN_GROUPS<Matrix>)
                ring.multiply(position, w, shape.slice_begin(slice + i), shape.slice_begin(slice + i + 1), sum[i]);
            else
                ring.multiply(position, shape.slice_begin(slice + i + 1) - shape.slice_begin(slice + i), sum[i]);
        if constexpr (OWN == 2)
#pragma unroll
            for (int i = 0; i < N / 2; i++)
                sum[0][i] += sum[1][i];
        sync_threads(1, R::MULTIPLIERS);
        S::write(staged, sum[0]);
        __syncwarp();
        cluster_sync();
        while (out.n < out.count)
            if constexpr (IS_WIDE<Epilogue>)
                out.take(epilogue, shape, scales, [&](float4(&sum)[Out::PLACES], const unsigned(&token)[Out::PLACES],
                                                        const unsigned(&row)[Out::PLACES]) {
                    unsigned at[Out::PLACES], first[Out::PLACES];
#pragma unroll
                    for (int i = 0; i < Out::PLACES; i++) {
                        at[i] = base + (token[i] * S::STAGED + row[i] % R::ROWS) * 4;
                        first[i] = row[i] / R::ROWS * sharers * PAIR + second;
                    }
                    add_shares<Epilogue::SLICES / OWN, PAIR>(sum, at, first, sharers);
                });
            else
                out.take(epilogue, shape, scales, [&](float2(&sum)[Out::PLACES], const unsigned(&token)[Out::PLACES], unsigned b) {
                    unsigned at[Out::PLACES], first[Out::PLACES];
#pragma unroll
                    for (int i = 0; i < Out::PLACES; i++) {
                        at[i] = base + S::offset(token[i], b % GROUPS);
                        first[i] = b / GROUPS * sharers * PAIR + second;
                    }
                    add_shares<Epilogue::SLICES / OWN, PAIR>(sum, at, first, sharers);
                });
        __syncwarp();
    }
    cluster_sync_relaxed();
}

// BLOCKS: how many the registers of a multiprocessor hold.
#define FEW_OF(NAME, GROUPS, TILES, N, OWN, BLOCKS, MATRIX, EPILOGUE)                                                        \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 64, BLOCKS)                                                  \
    NAME(const __grid_constant__ MATRIX w, const __grid_constant__ TensorMap x, Shape shape, unsigned stages,             \
         EPILOGUE epilogue) {                                                                                                \
        multiply_few<GROUPS, TILES, N, OWN, Beside::NOBODY>(w, &x, shape, stages, epilogue);                                 \
    }
#define FEW(NAME, GROUPS, TILES, N, EPILOGUE) FEW_OF(NAME, GROUPS, TILES, N, 1, 2, TensorMap, EPILOGUE)
#define FEW_ALONE(NAME, GROUPS, N, OWN, EPILOGUE) FEW_OF(NAME, GROUPS, 1, N, OWN, 1, TensorMap, EPILOGUE)
#define FEW_TWO(NAME, GROUPS, N, OWN, BESIDE, EPILOGUE)                                                                      \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + (DEALT<N, BESIDE, EPILOGUE> ? 128 : 64), 1)                  \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Shape shape, unsigned stages,             \
         EPILOGUE epilogue) {                                                                                                \
        multiply_few<GROUPS, 1, N, OWN, BESIDE>(w, &x, shape, stages, epilogue);                                             \
    }
#define FEW_PAIRED(NAME, GROUPS, N, OWN, EPILOGUE) FEW_TWO(NAME, GROUPS, N, OWN, Beside::NEXT_TOKENS, EPILOGUE)
#define FEW_ROWS_PAIRED(NAME, GROUPS, N, OWN, EPILOGUE) FEW_TWO(NAME, GROUPS, N, OWN, Beside::NEXT_ROWS, EPILOGUE)
#define FEW_FP8(NAME, GROUPS, N, BLOCKS, EPILOGUE) FEW_OF(NAME, GROUPS, 1, N, 1, BLOCKS, Fp8Matrix, EPILOGUE)
