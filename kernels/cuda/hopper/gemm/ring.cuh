// How a block of few tokens' products gets its share of both operands and multiplies it: a ring of stages in shared memory, filled by
// one thread, emptied by GROUPS warpgroups of 64 rows of w each.
//
//   stage    64 GROUPS rows of w, then N tokens, 64 columns of each: tiles as hopper.cuh describes them
//   sharers  blocks of a cluster that need the same w at the same time: each fetches its part for all of them, or, where its rows
//            are no such parts, they take turns, a stage each; or two that need the same tokens, and fetch half of them each
//
//   fetch ── full[stage] ──> multiply ── empty[stage] of every sharer ──> fetch
//
// 1. What the kernel before wrote is x alone: w is on its way before the wait for that kernel.
// 2. A stage is filled again when the warps of all sharers are done with it, because what they share goes to all of them at once.
// 3. A stage that is not filled again is not released either. So whatever a block sends to another, a fetch or a release, is
//    waited for there before that one ends; and kernels begin with a cluster barrier, so that it has its barriers by then.
#pragma once

#include "dependent.cuh"
#include "hopper/hopper.cuh"
#include "place.cuh"

// A warpgroup's 64 rows times N tokens. Of more than a block of three such groups can give an instruction, it takes two halves.
template <int GROUPS, int N>
__device__ __forceinline__ void multiply_unit(float (&sum)[N / 2], unsigned long long a, unsigned long long b, bool add) {
    if constexpr (GROUPS > 2 && N > 192) {
        float(&halves)[2][N / 4] = reinterpret_cast<float(&)[2][N / 4]>(sum);
        wgmma(halves[0], a, b, add);
        wgmma(halves[1], a, b + N / 2 * 128 / 16, add);
    } else {
        wgmma(sum, a, b, add);
    }
}

template <int GROUPS, int N, int SHARERS, bool SAME_TOKENS = false> struct Ring {
    static constexpr int ROWS = 64 * GROUPS, W_BYTES = ROWS * 128, STAGE_BYTES = W_BYTES + N * 128;
    static constexpr int MULTIPLIERS = 128 * GROUPS, PART = (SAME_TOKENS ? N : ROWS) / SHARERS;
    static constexpr bool IN_PARTS = PART * SHARERS == (SAME_TOKENS ? N : ROWS) && PART % 8 == 0; // whole groups of the swizzle
    static_assert(IN_PARTS || !SAME_TOKENS, "blocks take turns at rows of w alone");
    unsigned base, full, empty, stages;
    unsigned rank, first_rank; // which of the sharers, and the first one's rank in the cluster

    __device__ __forceinline__ Ring(unsigned base, unsigned stages, unsigned rank, unsigned first_rank = 0)
        : base(base), full(base + stages * STAGE_BYTES), empty(full + 8 * stages), stages(stages), rank(rank), first_rank(first_rank) {}

    __device__ __forceinline__ unsigned stage(unsigned i) const { return base + i * STAGE_BYTES; }
    // The sharers' ranks, a bit each.
    __device__ __forceinline__ unsigned short all() const { return ((1 << SHARERS) - 1) << first_rank; }

    // One thread's call, before any other member's.
    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < stages; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 4 * GROUPS * SHARERS);
        }
        barrier_init_fence();
    }

    // Block i of those that the ring gets, from column `col` on.
    __device__ __forceinline__ void fetch_w(const TensorMap *w, unsigned at, unsigned i, unsigned col, unsigned m0) const {
        barrier_expect(full + 8 * at, STAGE_BYTES);
        if constexpr (SHARERS == 1 || SAME_TOKENS)
            bulk_fetch(stage(at), w, col, m0, full + 8 * at, EVICT_FIRST);
        else if constexpr (IN_PARTS)
            bulk_fetch_shared(stage(at) + rank * PART * 128, w, col, m0 + rank * PART, full + 8 * at, EVICT_FIRST, all());
        else if (i % SHARERS == rank)
            bulk_fetch_shared(stage(at), w, col, m0, full + 8 * at, EVICT_FIRST, all());
    }

    __device__ __forceinline__ void fetch_x(const TensorMap *x, unsigned at, unsigned col, unsigned n0) const {
        const unsigned to = stage(at) + W_BYTES;
        if constexpr (SAME_TOKENS)
            bulk_fetch_shared(to + rank * PART * 128, x, col, n0 + rank * PART, full + 8 * at, EVICT_LAST, all());
        else
            bulk_fetch(to, x, col, n0, full + 8 * at, EVICT_LAST);
    }

    // The fetching thread's work: `blocks` blocks of 64 columns from block `first` on.
    __device__ __forceinline__ void fetch(const TensorMap *w, const TensorMap *x, unsigned first, unsigned blocks, unsigned m0,
                                          unsigned n0) const {
        const unsigned ahead = blocks < stages ? blocks : stages;
        for (unsigned i = 0; i < ahead; i++)
            fetch_w(w, i, i, (first + i) * 64, m0);
        dependent_wait();
        for (unsigned i = 0; i < ahead; i++)
            fetch_x(x, i, (first + i) * 64, n0);
        RingPlace place;
        for (unsigned i = ahead; i < blocks; i++) {
            barrier_wait(empty + 8 * place.at, place.parity);
            fetch_w(w, place.at, i, (first + i) * 64, m0);
            fetch_x(x, place.at, (first + i) * 64, n0);
            place.advance(stages);
        }
    }

    // A warp's call: the stage may be filled again, if that is to happen.
    __device__ __forceinline__ void release(RingPosition &position, unsigned at) const {
        const unsigned lane = threadIdx.x % 32;
        if (lane < SHARERS && position.refills > 0) {
            if (SHARERS == 1)
                barrier_arrive(empty + 8 * at);
            else
                barrier_arrive_at(empty + 8 * at, first_rank + lane);
        }
        position.refills -= position.refills > 0;
    }

    // A multiplying warpgroup's work: the sums of its 64 rows over the next `blocks` blocks of columns, from zero.
    __device__ __forceinline__ void multiply(RingPosition &position, unsigned blocks, float (&sum)[N / 2]) const {
        const unsigned group = threadIdx.x / 128;
        unsigned before = 0;
        hold(sum); // else the compiler zeroes it between two wgmmas, and must put them in a row
        for (unsigned i = 0; i < blocks; i++) {
            barrier_wait(full + 8 * position.at, position.parity);
            const unsigned long long a = tile_descriptor(stage(position.at) + group * 64 * 128);
            const unsigned long long b = tile_descriptor(stage(position.at) + W_BYTES);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
                multiply_unit<GROUPS, N>(sum, a + 2 * k, b + 2 * k, i > 0 || k > 0);
            wgmma_commit();
            if (i > 0) {
                wgmma_wait<1>(); // the block before is multiplied
                release(position, before);
            }
            before = position.at;
            position.advance(stages);
        }
        wgmma_wait<0>();
        hold(sum);
        release(position, before);
    }
};
