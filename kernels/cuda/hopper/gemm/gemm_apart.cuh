// apart_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y, as gemm_few.cuh has it, where the blocks that have
// a tile's slices do not meet in a cluster, but in memory.
//
//   block    64 GROUPS rows of w by N tokens, one of PARTS slices of the columns
//   cluster  two blocks with the same slice and the next tokens or the next rows of w: each fetches half of what both need
//   grid     (a cluster's blocks * parts * clusters along the tokens, clusters along the rows)   block 128 GROUPS + 64 threads
//   shared   stages * (64 GROUPS + N) * 128 bytes; 2 barriers a stage; GROUPS words
//   sums     [tiles][PARTS: of which tokens][PARTS: whose][warps][MOST eights of tokens][lanes] float4: as the tensor core's registers
//            have them
//   arrived  [tiles][PARTS: of which tokens][GROUPS] words: how many warps' sums are there; zero between launches
//
//   multiply ── sums of others' tokens to memory, count ── all of own there, soon? ──┬── yes: added ── to shared memory ── epilogue
//                                                                                    └── no: own to memory too, count ── who counts last adds
//
// 1. A multiprocessor holds one such block. Clusters of four leave some free, those of two none; and of as many blocks as there are
//    multiprocessors each does the same, at the end too, where split.cuh's last one adds what all have left.
// 2. The sums' order is gemm_few.cuh's.
// 3. A warpgroup's sums are its own business: of its 64 rows it adds what the same one of the other blocks has.
// 4. Who waits may wait for a block that has no multiprocessor yet, because others' kernels have it, and these might wait likewise. So
//    it looks a few times only, and nobody ever waits for what does not come. Then it leaves its own sums as well, and counts
//    LEFT for them. Each that counts learns what was there before, so exactly one finds that nothing is missing: of tokens that were left,
//    who counted last; of others, whose they are.
// 5. Sums are stored before they are counted, by an addition that releases them: a warp's own, behind __syncwarp, by the lane that counts; a
//    warpgroup's that are left, behind its barrier, by one thread. Who finds all there has acquired them, by its look or by a fence
//    behind its addition, before the warpgroup's barrier behind which all read. Loads and stores pass L1 by.
// 6. Who takes tokens sets their count to zero when all its warps have read: by then nobody adds to it or looks at it. The next launch
//    adds behind its wait for this one.
// 7. Blocks end without a cluster barrier: of a ring nothing is on its way behind the last product (ring.cuh, 3).
#pragma once

#include "hopper/gemm/gemm_few.cuh"
#include "hopper/gemm/split.cuh"

__device__ __forceinline__ unsigned add_releasing(unsigned *word, unsigned value) {
    unsigned before;
    asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
    return before;
}
__device__ __forceinline__ unsigned load_acquiring(const unsigned *word) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

// Where a tile's blocks leave sums for each other: each has a part of the tokens, whole eights of them.
template <int GROUPS, int N, unsigned PARTS> struct Apart {
    static_assert(PARTS == 4, "slices are added in pairs, and these");
    static constexpr unsigned EIGHTS = N / 8, MOST = (EIGHTS + PARTS - 1) / PARTS; // in all, and of a part
    static constexpr unsigned WARP = MOST * 32, BLOCK = 4 * GROUPS * WARP;         // float4s
    static constexpr unsigned ALL = 4 * (PARTS - 1); // warps whose sums are waited for
    static constexpr unsigned LEFT = 64;             // what is counted for tokens that are left to others
    float4 *sums;      // this lane's place
    unsigned *arrived; // this warpgroup's
    unsigned part;

    __device__ __forceinline__ Apart(const Partials &partials, unsigned tile, unsigned part)
        : sums(partials.sums + tile * PARTS * PARTS * BLOCK + threadIdx.x / 32 * WARP + threadIdx.x % 32),
          arrived(partials.arrived + tile * PARTS * GROUPS + threadIdx.x / 128), part(part) {}

    __device__ __forceinline__ static constexpr unsigned first(unsigned part) { return part * EIGHTS / PARTS; }
    __device__ __forceinline__ unsigned *count(unsigned of) const { return arrived + of * GROUPS; }
    __device__ __forceinline__ float4 *place(unsigned of, unsigned whose, unsigned eight) const {
        return sums + (of * PARTS + whose) * BLOCK + eight * 32;
    }

    // Stores the sums of others' tokens, and returns those of its own.
    __device__ __forceinline__ void share_out(const float (&sum)[N / 2], float4 (&own)[MOST]) const {
#pragma unroll
        for (unsigned of = 0; of < PARTS; of++)
#pragma unroll
            for (unsigned j = first(of); j < first(of + 1); j++) {
                const float4 four = {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]};
                if (of == part)
                    own[j - first(of)] = four;
                else
                    __stcg(place(of, part, j - first(of)), four);
            }
    }
    // Stores its own, which are left to others.
    __device__ __forceinline__ void leave(const float4 (&own)[MOST]) const {
        const unsigned eights = first(part + 1) - first(part);
#pragma unroll
        for (unsigned i = 0; i < MOST; i++)
            if (i < eights)
                __stcg(place(part, part, i), own[i]);
    }
    // One thread's call: are all sums of its own tokens there, by so many looks?
    __device__ __forceinline__ bool arrive(unsigned looks) const {
        for (unsigned i = 0; i < looks; i++)
            if (load_acquiring(count(part)) == ALL)
                return true;
        return false;
    }
    // All blocks' sums of a part's tokens, added in pairs and these again.
    __device__ __forceinline__ void add(const float4 (&own)[MOST], unsigned of, float (&total)[4 * MOST]) const {
        const unsigned eights = first(of + 1) - first(of);
        float4 piece[PARTS][MOST];
#pragma unroll
        for (unsigned whose = 0; whose < PARTS; whose++)
#pragma unroll
            for (unsigned i = 0; i < MOST; i++)
                piece[whose][i] = whose == part && of == part ? own[i] : i < eights ? __ldcg(place(of, whose, i)) : float4();
#pragma unroll
        for (unsigned i = 0; i < MOST; i++) {
            const float4 y = plus(plus(piece[0][i], piece[1][i]), plus(piece[2][i], piece[3][i]));
            total[4 * i] = y.x, total[4 * i + 1] = y.y, total[4 * i + 2] = y.z, total[4 * i + 3] = y.w;
        }
    }
};

template <int GROUPS, int N, Beside BESIDE, class Epilogue>
__device__ __forceinline__ void multiply_apart(const TensorMap *w, const TensorMap *x, const Shape &shape, unsigned stages,
                                               const Epilogue &epilogue, const Partials &partials, unsigned looks) {
    static_assert(IS_WIDE<Epilogue> && !Epilogue::SCALED && BESIDE != Beside::NOBODY, "of o and down, by two blocks that share");
    constexpr bool SAME_TOKENS = BESIDE == Beside::NEXT_ROWS;
    constexpr unsigned PARTS = Epilogue::SLICES;
    using R = Ring<GROUPS, N, 2, SAME_TOKENS>;
    using A = Apart<GROUPS, N, PARTS>;
    constexpr int TOKENS = 8 * A::MOST;
    using S = Sums<GROUPS, TOKENS>;
    using Out = EitherWidth<TOKENS, 1, TOKENS / 4, 1, false, Epilogue>;
    extern __shared__ __align__(1024) unsigned char shared[];
    dependent_launch();
    const unsigned second = cluster_rank(), part = blockIdx.x / 2 % PARTS, of_tokens = blockIdx.x / 2 / PARTS;
    const unsigned token_tile = SAME_TOKENS ? of_tokens : of_tokens * 2 + second, n0 = token_tile * N;
    const unsigned row_tile = SAME_TOKENS ? blockIdx.y * 2 + second : blockIdx.y, m0 = row_tile * R::ROWS;
    const unsigned base = (shared_address(shared) + 1023) & ~1023u, warp = threadIdx.x / 32, group = warp / 4, lane = threadIdx.x % 32;
    float *const staged = reinterpret_cast<float *>(shared + (base - shared_address(shared)));
    const R ring(base, stages, second);
    // Whose tokens this warpgroup takes, a bit a part.
    unsigned *const taken = reinterpret_cast<unsigned *>(staged) + (stages * R::STAGE_BYTES + 16 * stages) / 4 + group;
    const unsigned first = shape.slice_begin(part), blocks = shape.slice_begin(part + 1) - first;
    if (threadIdx.x == R::MULTIPLIERS) {
        prefetch_map(x);
        ring.init_barriers();
    }
    if (threadIdx.x < R::MULTIPLIERS)
        *taken = 0;
    cluster_sync();
    if (warp >= R::MULTIPLIERS / 32) {
        if (threadIdx.x == R::MULTIPLIERS)
            ring.fetch(w, x, first, blocks, m0, n0);
        return;
    }
    // A warpgroup's share of the tokens of a part.
    const auto share = [&](unsigned of) {
        Shape until = shape;
        until.tokens = min(shape.tokens, n0 + 8 * A::first(of + 1));
        return Out(until, warp % 4, 4, m0 + 64 * group, n0 + 8 * A::first(of));
    };
    Out out = share(part);
    dependent_wait();
    out.fetch(epilogue, shape.rows);
    float sum[N / 2] = {};
    RingPosition position(blocks, stages);
    ring.multiply(position, blocks, sum);
    if (n0 >= shape.tokens || m0 >= shape.rows)
        return;
    const A apart(partials, row_tile * ((shape.tokens + N - 1) / N) + token_tile, part);
    const auto sync_group = [&] { sync_threads(2 + group, 128); };
    float4 own[A::MOST];
    apart.share_out(sum, own);
    __syncwarp();
    unsigned before = 0;
    if (lane < PARTS && lane != part)
        before = add_releasing(apart.count(lane), 1);
    const bool leads = threadIdx.x % 128 == part;
    if (leads && apart.arrive(looks))
        atomicOr(taken, 1u << part);
    if (before == A::LEFT + A::ALL - 1) { // left by then, and nothing else is missing
        __threadfence();
        atomicOr(taken, 1u << lane);
    }
    sync_group();
    if ((*taken >> part & 1) == 0) {
        apart.leave(own);
        sync_group();
        if (leads && add_releasing(apart.count(part), A::LEFT) == A::ALL) {
            __threadfence();
            atomicOr(taken, 1u << part);
        }
        sync_group();
    }
    sync_threads(1, R::MULTIPLIERS); // the ring is idle
    for (unsigned left = *taken, ready = part; left != 0; left &= left - 1) {
        const unsigned of = __ffs(left) - 1;
        if (of != ready) {
            ready = of;
            out = share(of);
            out.fetch(epilogue, shape.rows);
        }
        float total[4 * A::MOST];
        apart.add(own, of, total);
        S::write(staged, total);
        sync_group();
        if (leads)
            *apart.count(of) = 0;
        while (out.n < out.count)
            out.take(epilogue, shape, nullptr, [&](float4(&sum)[Out::PLACES], const unsigned(&token)[Out::PLACES],
                                                   const unsigned(&row)[Out::PLACES]) {
#pragma unroll
                for (int i = 0; i < Out::PLACES; i++)
                    sum[i] = *reinterpret_cast<const float4 *>(staged + token[i] * S::STAGED + 64 * group + row[i]);
            });
        sync_group(); // the next part's sums lie over these
    }
}

#define APART(NAME, GROUPS, N, BESIDE, EPILOGUE)                                                                             \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 64, 1)                                                       \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Shape shape, unsigned stages,             \
         EPILOGUE epilogue, Partials partials, unsigned looks) {                                                             \
        multiply_apart<GROUPS, N, BESIDE>(&w, &x, shape, stages, epilogue, partials, looks);                                 \
    }
#define APART_TOKENS(NAME, GROUPS, N, EPILOGUE) APART(NAME, GROUPS, N, Beside::NEXT_TOKENS, EPILOGUE)
#define APART_ROWS(NAME, GROUPS, N, EPILOGUE) APART(NAME, GROUPS, N, Beside::NEXT_ROWS, EPILOGUE)
