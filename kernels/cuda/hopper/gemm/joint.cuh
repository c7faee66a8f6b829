// Tiles of which two blocks of a cluster have half of the columns each, one slice or a pair, where whole tiles are too few to give every
// multiprocessor one: a warp and the one in the other block that has the same tokens swap half of their sums.
//
//   block 0   slices 0, 1 ──┬── rows 0 … 63 ──────── + ── epilogue
//                           └── rows 64 … 127 ──┐    │
//   block 1   slices 2, 3 ──┬── rows 0 … 63 ────┼────┘
//                           └── rows 64 … 127 ──┴─── + ── epilogue
//
// 1. Both sums are those of a subtree (Shape), so that their sum is what one block has of all slices, whoever adds it.
// 2. What a warp gets lies over a stage of its own block's ring that is not filled again. The other block's warps know that it is idle when
//    each of this one's has opened it, while the last products are on their way.
// 3. A block ends when it has what the other sends: its warps' openings, without which none of its own sends, then their sums. So nothing
//    is on its way to a block that has ended, and no barrier is needed at the kernel's end.
#pragma once

#include "hopper/hopper.cuh"

// Barriers of WARPS warps that multiply: one each for what it gets, then one for all of the other block's.
template <unsigned WARPS> struct Meeting {
    static constexpr unsigned SUMS = 32 * 32 * 4; // bytes that a warp gets
    static constexpr unsigned BYTES = (WARPS + 1) * 8;
    unsigned barriers;

    __device__ __forceinline__ unsigned opened() const { return barriers + 8 * WARPS; }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < WARPS; i++)
            barrier_init(barriers + 8 * i, 1);
        barrier_init(opened(), WARPS);
    }
    // A warp's call: its block's place is idle as far as it is concerned.
    __device__ __forceinline__ void open(unsigned other) const {
        if (threadIdx.x % 32 == 0)
            barrier_arrive_at(opened(), other);
    }
    // Sums of half `half` of the rows, those of the other block added: its ones come to `here`, the rest goes to `there`.
    __device__ __forceinline__ void swap(const float (&sum)[64], float (&y)[32], unsigned half, unsigned here, unsigned there,
                                         unsigned other) const {
        const unsigned barrier = barriers + threadIdx.x / 32 * 8, lane = threadIdx.x % 32 * 16;
        if (threadIdx.x % 32 == 0)
            barrier_expect(barrier, SUMS);
        barrier_wait(opened(), 0);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float4 first = {sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
            const float4 second = {sum[32 + 4 * i], sum[33 + 4 * i], sum[34 + 4 * i], sum[35 + 4 * i]};
            store_remote(there + lane + 512 * i, half == 0 ? second : first, barrier, other);
            const float4 own = half == 0 ? first : second;
            y[4 * i] = own.x, y[4 * i + 1] = own.y, y[4 * i + 2] = own.z, y[4 * i + 3] = own.w;
        }
        barrier_wait(barrier, 0);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float4 more = load_shared(here + lane + 512 * i);
            y[4 * i] += more.x, y[4 * i + 1] += more.y, y[4 * i + 2] += more.z, y[4 * i + 3] += more.w;
        }
    }
};
