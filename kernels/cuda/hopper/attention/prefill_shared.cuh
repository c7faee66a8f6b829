// Where what a block of attention_prefill shares lies in its shared memory: queries, the ring, parts, turns, and their barriers.
#pragma once
#include "hopper/attention/prefill_work.cuh"

// Turns that are taken ahead, and warps that each of them is for.
constexpr unsigned TURNS = 2, READERS = 3;

// Addresses in shared memory.
template <int HD, bool FP8> struct Shared {
    static constexpr unsigned STAGES = 5 * 128 / HD, HALF = LEAF * 128, STAGE_BYTES = HD / 64 * HALF;
    static constexpr unsigned QUERY_HALF = PART_QUERIES * 128, QUERY_BYTES = HD / 64 * QUERY_HALF;
    static constexpr unsigned SCALE_BYTES = FP8 ? 2 : 0; // of a token
    unsigned base;

    __device__ __forceinline__ unsigned queries(unsigned part) const { return base + part * QUERY_BYTES; }
    __device__ __forceinline__ unsigned stage(unsigned i) const { return queries(PARTS) + i * STAGE_BYTES; }
    __device__ __forceinline__ unsigned ones() const { return stage(STAGES); }
    __device__ __forceinline__ unsigned part(unsigned i) const { return ones() + 256 + i * sizeof(Part); }
    __device__ __forceinline__ unsigned turn(unsigned slot) const { return part(PARTS) + slot * 16; }
    // Barriers, in pairs.
    __device__ __forceinline__ unsigned taken(unsigned slot) const { return turn(TURNS) + slot * 16; }
    __device__ __forceinline__ unsigned read(unsigned slot) const { return taken(slot) + 8; }
    __device__ __forceinline__ unsigned asked(unsigned part) const { return taken(TURNS) + part * 16; }
    __device__ __forceinline__ unsigned answered(unsigned part) const { return asked(part) + 8; }
    __device__ __forceinline__ unsigned full(unsigned stage) const { return asked(PARTS) + stage * 16; }
    __device__ __forceinline__ unsigned empty(unsigned stage) const { return full(stage) + 8; }
    // A stage's, in the order that fp8_rows.cuh has of 16.
    __device__ __forceinline__ unsigned scales(unsigned stage) const { return full(STAGES) + stage * LEAF * SCALE_BYTES; }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < TURNS; i++) {
            barrier_init(taken(i), 1);
            barrier_init(read(i), 32 * READERS);
        }
        for (unsigned i = 0; i < PARTS; i++) {
            barrier_init(answered(i), 1);
            barrier_init(asked(i), 128);
        }
        for (unsigned i = 0; i < STAGES; i++) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), 128 * PARTS);
        }
        barrier_init_fence();
    }
};

__device__ __forceinline__ void store_part(unsigned at, const Part &part) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\nst.shared.v4.u32 [%0 + 16], {%5, %6, %7, %8};" ::"r"(at),
                 "r"(part.token), "r"(part.count), "r"(part.position), "r"(part.head), "r"(part.kv_end), "r"(part.kv_begin),
                 "r"(part.span), "r"(part.place)
                 : "memory");
}

__device__ __forceinline__ Part load_part(unsigned at) {
    Part part;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%8];\nld.shared.v4.u32 {%4, %5, %6, %7}, [%8 + 16];"
                 : "=r"(part.token), "=r"(part.count), "=r"(part.position), "=r"(part.head), "=r"(part.kv_end),
                   "=r"(part.kv_begin), "=r"(part.span), "=r"(part.place)
                 : "r"(at)
                 : "memory");
    return part;
}
