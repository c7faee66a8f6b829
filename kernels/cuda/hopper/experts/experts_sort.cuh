// A block's own list of which pairs are each expert's, where tokens are few: it needs no kernel between the router and the products.
//
//   router   a bit for each token, in the words of each expert that it chose                  bits [E, ceil(T / 32)], 0 between layers
//   block    an expert's bits are counted by a thread ── the plan ── a pair's place, by a thread too: where its expert's begin, and how
//            many of the tokens before its own chose that expert
//
// 1. All blocks of both products get the same list, an expert's pairs in ascending order as experts_lists.cuh has them in memory: what gate_up
//    leaves at a place, down finds there.
// 2. experts_combine, which nobody behind it needs the bits for, clears them.
#pragma once

#include "experts/experts_lists.cuh"
#include "hopper/hopper.cuh"

struct Sort {
    static constexpr unsigned THREADS = 256, AT_ONCE = 8; // words that are on their way together
    static constexpr unsigned PAIRS = 2048, WORDS = 1024; // at most; backend-cuda/src/ops/experts/hopper.rs has the same
    static constexpr unsigned OWN = PAIRS / THREADS;      // pairs of a thread: those of its number, THREADS behind it, …
    unsigned *bits;         // [E, ceil(T / 32)]
    unsigned short *listed; // [T P]: pairs by place
    unsigned chosen[OWN];

    __device__ __forceinline__ Sort(unsigned *bits, unsigned short *listed) : bits(bits), listed(listed) {}

    // Else lists lie in memory.
    __device__ __forceinline__ static bool takes(const Routing &routing) { return routing.bits != nullptr; }

    __device__ __forceinline__ static unsigned words(const Routing &routing) { return (routing.tokens + 31) / 32; }

    // How many pairs expert `threadIdx.x` has; what own pairs' experts are comes meanwhile.
    __device__ __forceinline__ unsigned count(const Routing &routing) {
        const unsigned words = Sort::words(routing), begin = threadIdx.x * words, pairs = routing.tokens * routing.per_token;
        unsigned count = 0;
        for (unsigned first = 0; threadIdx.x < routing.experts && first < words; first += AT_ONCE) {
            unsigned word[AT_ONCE];
#pragma unroll
            for (unsigned i = 0; i < AT_ONCE; i++)
                word[i] = first + i < words ? __ldcg(routing.bits + begin + first + i) : 0;
#pragma unroll
            for (unsigned i = 0; i < AT_ONCE; i++) {
                count += __popc(word[i]);
                if (first + i < words)
                    bits[begin + first + i] = word[i];
            }
        }
#pragma unroll
        for (unsigned i = 0; i < OWN; i++) {
            const unsigned pair = threadIdx.x + i * THREADS;
            chosen[i] = pair < pairs ? __ldcg(routing.chosen + pair) : NOBODY;
        }
        return count;
    }

    // Behind a barrier; expert e's places begin at begins[e].
    __device__ __forceinline__ void list(const Routing &routing, const unsigned *begins) const {
        const unsigned words = Sort::words(routing);
#pragma unroll
        for (unsigned i = 0; i < OWN && i * THREADS < routing.tokens * routing.per_token; i++) {
            if (chosen[i] == NOBODY)
                continue;
            const unsigned pair = threadIdx.x + i * THREADS, token = pair / routing.per_token;
            const unsigned *of_expert = bits + chosen[i] * words;
            unsigned place = begins[chosen[i]] + __popc(of_expert[token / 32] & ((1u << token % 32) - 1));
            for (unsigned word = 0; word < token / 32; word++)
                place += __popc(of_expert[word]);
            listed[place] = pair;
        }
    }
};
