// The stages of decode's ring, and where they lie in shared memory (attention_ring.cuh).
#pragma once
#include "attention/attention_work.cuh"

#define DECODE_READERS (DECODE_WARPS * 32)

// A barrier of the warps that read.
__device__ __forceinline__ void readers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(DECODE_READERS) : "memory"); }

// Where things lie in shared memory. HEADS kv heads share a stage.
template <int HD, int HEADS, int STAGES, bool FP8> struct Stages {
    static constexpr unsigned SECTION = DECODE_WARPS * TILE, SECTIONS = LEAF / SECTION; // tokens of a stage; stages of a leaf
    static constexpr unsigned TILE_BYTES = TILE * HD * (FP8 ? 1 : 2), SCALE_BYTES = FP8 ? 2 : 0;
    static constexpr unsigned HEAD_BYTES = DECODE_WARPS * TILE_BYTES, QUERY_BYTES = 8 * HD * 2;
    static constexpr unsigned BYTES = HEADS * (HEAD_BYTES + SECTION * SCALE_BYTES);
    // Turns that have stages in the ring at once: their first keys are a unit apart at least.
    static constexpr unsigned TURNS = (STAGES + 2 * SECTIONS - 1) / (2 * SECTIONS);
    // Who arrives at a stage's `full`: a lane that says how many bytes bulk copies bring, and all that copy scales.
    static constexpr unsigned FILLERS = FP8 ? 33 : 1;
    unsigned base;

    __device__ __forceinline__ unsigned tokens(unsigned stage) const { return base + stage * BYTES; }
    // A scale for each token, of fp8.
    __device__ __forceinline__ unsigned scales(unsigned stage, unsigned head) const {
        return tokens(stage) + HEADS * HEAD_BYTES + head * SECTION * SCALE_BYTES;
    }
    __device__ __forceinline__ unsigned queries(unsigned turn) const { return base + STAGES * BYTES + turn * QUERY_BYTES; }
    __device__ __forceinline__ unsigned unit(unsigned stage) const {
        return base + STAGES * BYTES + TURNS * QUERY_BYTES + stage * Unit::BYTES;
    }
    __device__ __forceinline__ unsigned full(unsigned stage) const { return unit(STAGES) + stage * 16; }
    __device__ __forceinline__ unsigned empty(unsigned stage) const { return full(stage) + 8; }
    // Beside a turn's last values: have all others that share the row been counted?
    __device__ __forceinline__ unsigned others_arrived(unsigned stage) const { return unit(stage) + Unit::SPARE; }
    __device__ __forceinline__ unsigned end() const { return full(STAGES); }
};
