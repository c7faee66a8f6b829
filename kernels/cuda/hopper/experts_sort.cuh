// A block's own list of which pairs are each expert's, where tokens are few: all that a product waits for is what they chose.
//
//   chosen ── a bit for each token, under its expert ── counted ── the plan ── a pair's place: where its expert's begin, and how many
//                                                                              of that expert's tokens come before its own
//
// 1. All blocks of both products get the same list, an expert's pairs in ascending order as experts_lists.cuh has them in memory: what gate_up
//    leaves at a place, down finds there.
// 2. A thread has a pair, and an expert. For more pairs than threads the lists in memory are quicker, a kernel more included.
#pragma once

#include "experts_lists.cuh"
#include "hopper.cuh"

struct Sort {
    static constexpr unsigned THREADS = 256, TOKENS = 16; // of 16 experts at most
    unsigned *chose;        // [E]: bits of the tokens that did
    unsigned short *listed; // [T P]: pairs by place
    unsigned expert = NOBODY, token = 0;

    __device__ __forceinline__ Sort(unsigned *chose, unsigned short *listed) : chose(chose), listed(listed) {}

    // backend-cuda/src/ops/experts/hopper.rs has the same.
    __device__ __forceinline__ static bool takes(const Routing &routing) { return routing.tokens <= TOKENS; }

    // Waits for nobody.
    __device__ __forceinline__ void clear() const { chose[threadIdx.x] = 0; }

    // How many pairs expert `threadIdx.x` has.
    __device__ __forceinline__ unsigned count(const Routing &routing) {
        if (threadIdx.x < routing.tokens * routing.per_token) {
            expert = __ldcg(routing.chosen + threadIdx.x);
            token = threadIdx.x / routing.per_token;
        }
        sync_threads(1, THREADS);
        if (expert != NOBODY)
            atomicOr(chose + expert, 1u << token);
        sync_threads(1, THREADS);
        return __popc(chose[threadIdx.x]);
    }

    // Behind a barrier; expert e's places begin at begins[e].
    __device__ __forceinline__ void list(const unsigned *begins) const {
        if (expert != NOBODY)
            listed[begins[expert] + __popc(chose[expert] & ((1u << token) - 1))] = threadIdx.x;
    }
};
