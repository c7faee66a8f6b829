// Which units a block of experts_products.cuh takes: the plan that it makes, and the dealing out of units of many pairs.
#pragma once

#include "experts/experts.cuh"
#include "hopper/experts/experts_tiling.cuh"

// Which pair has a place: as this block has listed them (experts_sort.cuh), or as they lie in memory.
struct PairOf {
    const unsigned short *listed; // null: in memory
    const unsigned *pairs;

    __device__ __forceinline__ unsigned operator[](unsigned place) const {
        return listed != nullptr ? listed[place] : __ldcg(pairs + place);
    }
};

// The plan, by all of the first 256 threads, which know how many pairs the expert of their number has. Nobody reads it before the block's
// next barrier.
template <class T> __device__ __forceinline__ void make_plan(typename T::Plan &plan, unsigned pairs, unsigned experts, unsigned across) {
    __shared__ unsigned pairs_of_warp[T::WARPS], tiles_of_warp[T::WARPS];
    const unsigned e = threadIdx.x, warp = e / 32, lane = e % 32;
    unsigned end = pairs, tiles = T::Plan::tiles_of(pairs);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned pairs_before = __shfl_up_sync(0xffffffffu, end, step);
        const unsigned tiles_before = __shfl_up_sync(0xffffffffu, tiles, step);
        end += lane >= step ? pairs_before : 0;
        tiles += lane >= step ? tiles_before : 0;
    }
    if (lane == 31)
        pairs_of_warp[warp] = end, tiles_of_warp[warp] = tiles;
    sync_threads(1, T::MULTIPLIERS);
    for (unsigned w = 0; w < warp; w++)
        end += pairs_of_warp[w], tiles += tiles_of_warp[w];
    if (e < experts) {
        plan.begins[e + 1] = end;
        plan.tiles[e + 1] = tiles;
    }
    if (e == 0)
        plan.begins[0] = plan.tiles[0] = 0, plan.experts = experts, plan.across = across;
}

// Of pairs that are listed in memory.
__device__ __forceinline__ unsigned pairs_in_memory(const Routing &routing) {
    const unsigned e = threadIdx.x;
    return e < routing.experts ? __ldcg(routing.begins + e + 1) - __ldcg(routing.begins + e) : 0;
}

// Counts for the statistics what dispatch would have: by one block of one product, a layer, and its experts that have pairs.
__device__ __forceinline__ void count_read(const Routing &routing, unsigned pairs) {
    const unsigned warp_has = __popc(__ballot_sync(0xffffffffu, pairs > 0));
    if (routing.read == nullptr || blockIdx.x > 0 || threadIdx.x % 32 > 0)
        return;
    atomicAdd(routing.read + 1, (unsigned long long)warp_has);
    if (threadIdx.x == 0)
        atomicAdd(routing.read, 1ull);
}

// Units of many pairs differ in size, so a cluster that is done takes the next one that nobody has: its first block draws a ticket
// for both. Numbers go to the fetching threads through slots, and from them to those that multiply beside each stage.
//
// The first units are the clusters' own numbers, and each cluster that has one draws until there is none: as many tickets as there
// are units, so the counter is back at 0 when the last one is drawn.
template <class T> struct Dealer {
    static constexpr unsigned SLOTS = 8; // a block is at most as many units ahead as there are stages
    static constexpr unsigned NONE = 0xffffffffu;
    unsigned number_of, slots, full, *tickets; // of each stage: the unit's number; words, and their barriers

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < SLOTS; i++)
            barrier_init(full + 8 * i, 1);
    }
    __device__ __forceinline__ unsigned draw(unsigned units) const {
        return gridDim.x / T::SHARERS + atomicInc(tickets, units - 1);
    }
    __device__ __forceinline__ void send(unsigned turn, unsigned number) const {
        const unsigned slot = turn % SLOTS;
        for (unsigned rank = 0; rank < T::SHARERS; rank++)
            store_remote(slots + 4 * slot, number, full + 8 * slot, rank);
    }
    __device__ __forceinline__ unsigned receive(unsigned turn) const {
        const unsigned slot = turn % SLOTS;
        barrier_expect(full + 8 * slot, 4);
        barrier_wait(full + 8 * slot, turn / SLOTS % 2);
        return load(slots + 4 * slot);
    }
    __device__ __forceinline__ void note(unsigned stage, unsigned number) const {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(number_of + 4 * stage), "r"(number) : "memory");
    }
    __device__ __forceinline__ unsigned noted(unsigned stage) const { return load(number_of + 4 * stage); }

  private:
    __device__ __forceinline__ static unsigned load(unsigned at) {
        unsigned value;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
        return value;
    }
};

// Which of a cluster's blocks this is.
template <class T> __device__ __forceinline__ unsigned rank() { return T::SHARERS == 1 ? 0 : cluster_rank(); }

// The first row of an expert's w that is this block's.
template <class T> __device__ __forceinline__ unsigned first_row(const Unit &unit) {
    return (unit.rows * T::SHARERS + rank<T>()) * T::ROWS;
}

// A block's units where they are not dealt out.
template <class T, class Do> __device__ __forceinline__ void for_units(const typename T::Plan &plan, Do &&take) {
    for (unsigned number = blockIdx.x; number < plan.units(); number += gridDim.x)
        take(plan.unit(number));
}
