// A kernel of experts_products.cuh at compile time, and where things lie in its shared memory.
#pragma once

#include "hopper/experts/experts_plan.cuh"
#include "hopper/hopper.cuh"
#include "place.cuh"

// w as FORM has it; PAIRS of a tile, fetched BOX at a time by each of SHARERS blocks; ROUND of them are turned at once. A BOX of 1 stands
// for rows that lie apart: those of the pairs' tokens.
template <class FORM, int PAIRS_, int BOX_, int SHARERS_, int STAGES_, int ROUND_, int BESIDE_> struct Tiling {
    using Form = FORM;
    static constexpr unsigned PAIRS = PAIRS_, BOX = BOX_, SHARERS = SHARERS_, STAGES = STAGES_, ROUND = ROUND_, BESIDE = BESIDE_;
    // A stage has a block of columns of w, at whose end x begins, 64 columns of all pairs at a time.
    static constexpr unsigned ROWS = 128, X_AT = (FORM::W_BYTES + 1023) / 1024 * 1024, X_BYTES = PAIRS * 128;
    static constexpr unsigned STAGE_BYTES = X_AT + FORM::COLS / 64 * X_BYTES;
    static constexpr unsigned WARPS = 8, MULTIPLIERS = 256, TURNED_BYTES = ROUND * 128;
    static constexpr bool BY_TOKEN = BOX == 1;
    static constexpr bool SORTS = SHARERS == 1; // lists the pairs of few tokens by itself
    static constexpr bool DEALT = SHARERS > 1;  // units as clusters become free; else block b takes units b, b + blocks, …
    // Do lanes of a warp read of a stage by themselves, its w or its unit's number, beside what wgmma reads?
    static constexpr bool READ_BY_LANES = FORM::READ_BY_LANES || DEALT;
    // Of BY_TOKEN: stages by which rows of x that lanes have copied are handed over later than they were asked for. 0: as they come, and each
    // warp that multiplies says that wgmma is to see them.
    static constexpr unsigned HANDED_OVER = FORM::READ_BY_LANES ? 2 : 0;
    static_assert(HANDED_OVER < STAGES, "else who fills the ring waits for room in a stage that it has not handed over");
    // Pairs that a tile is multiplied with: the least number, and the one behind each.
    static constexpr int LEAST = SHARERS == 1 ? 16 : FORM::READ_BY_LANES ? 64 : 32;
    __device__ __forceinline__ static constexpr int behind(int width) { return SHARERS == 1 ? 2 * width : width + LEAST; }
    using Plan = ExpertPlan<PAIRS, LEAST>;
};

// The same as barrier_wait, asking now and then.
__device__ __forceinline__ void barrier_wait_at_ease(unsigned barrier, unsigned parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra there;\n"
                 "nanosleep.u32 100;\n"
                 "bra again;\n"
                 "there:\n"
                 "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Addresses in shared memory: the ring, its barriers, a warpgroup's turned outputs, what is known of its pairs.
template <class T> struct Shared {
    static constexpr unsigned RING = T::STAGES * T::STAGE_BYTES;
    unsigned ring, turned, full, empty;
    unsigned *known;

    // As many bytes as backend-cuda/src/ops/experts/hopper.rs asks for, what aligns the ring to 1024 bytes included.
    __device__ __forceinline__ explicit Shared(unsigned char *start) {
        ring = (shared_address(start) + 1023) & ~1023u;
        start += ring - shared_address(start);
        turned = ring + RING + threadIdx.x / 128 * T::TURNED_BYTES;
        start += RING + 2 * T::TURNED_BYTES;
        known = reinterpret_cast<unsigned *>(start) + threadIdx.x / 128 * T::PAIRS;
        full = shared_address(start) + 2 * T::PAIRS * 4;
        empty = full + 8 * T::STAGES;
    }
    __device__ __forceinline__ unsigned stage(unsigned i) const { return ring + i * T::STAGE_BYTES; }

    // Waits until a stage is there for wgmma. What lanes have copied came another way than what the copy engine did.
    __device__ __forceinline__ void wait(const Place<T::STAGES> &place) const {
        barrier_wait(full + 8 * place.at, place.parity);
        if (T::BY_TOKEN && T::HANDED_OVER == 0)
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    // Waits until a stage is to be filled again. Who widens what comes should have the multiprocessor meanwhile.
    __device__ __forceinline__ void wait_for_room(const Place<T::STAGES> &place) const {
        if (T::Form::READ_BY_LANES)
            barrier_wait_at_ease(empty + 8 * place.at, place.parity ^ 1);
        else
            barrier_wait(empty + 8 * place.at, place.parity ^ 1);
    }

    // A warp and its wgmma have read a stage. Other blocks write x alone there.
    __device__ __forceinline__ void release(unsigned at) const {
        const unsigned lane = threadIdx.x % 32;
        if (T::READ_BY_LANES)
            __syncwarp();
        if (lane == 0)
            barrier_arrive(empty + 8 * at);
        if (T::SHARERS > 1 && lane < T::SHARERS && lane != cluster_rank())
            barrier_arrive_at(empty + 8 * at, lane);
    }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < T::STAGES; i++) {
            barrier_init(full + 8 * i, T::BY_TOKEN ? 33 : 1);
            barrier_init(empty + 8 * i, T::SHARERS * T::WARPS);
        }
        barrier_init_fence();
    }
};
