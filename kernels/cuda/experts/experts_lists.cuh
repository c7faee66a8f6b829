// Which pairs are each expert's: counted anew for each, by a block.
#pragma once

#include "experts/experts.cuh"

constexpr unsigned NOBODY = 0xffff; // in place of an expert's number: no further expert

// The experts' numbers of up to 8 neighbouring pairs, NOBODY behind the last.
struct Numbers {
    uint4 words;
    unsigned first, pairs;

    __device__ __forceinline__ Numbers(const Routing &routing, unsigned chunk, unsigned pairs)
        : words(reinterpret_cast<const uint4 *>(routing.chosen)[chunk]), first(8 * chunk), pairs(pairs) {}
    __device__ __forceinline__ unsigned operator[](unsigned i) const {
        return first + i < pairs ? reinterpret_cast<const unsigned short *>(&words)[i] : NOBODY;
    }
};

// Lists the pairs of an expert, by WARPS warps; a thread takes neighbouring pairs, so that an expert's are in ascending order. It counts those of
// all experts before it too, so it knows where its own begin without asking anybody.
template <unsigned WARPS> __device__ __forceinline__ void list_pairs(const Routing &routing, unsigned expert) {
    __shared__ unsigned below_of[WARPS], own_of[WARPS];
    const unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const unsigned pairs = routing.tokens * routing.per_token, chunks = (pairs + 7) / 8;
    const unsigned each = (chunks + 32 * WARPS - 1) / (32 * WARPS);
    const unsigned begin = min(thread * each, chunks), end = min(begin + each, chunks);
    unsigned below = 0, own = 0;
    for (unsigned at = begin; at < end; at++) {
        const Numbers numbers(routing, at, pairs);
#pragma unroll
        for (unsigned i = 0; i < 8; i++) {
            below += numbers[i] < expert;
            own += numbers[i] == expert;
        }
    }
    unsigned before = own; // own pairs of the threads up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, before, step);
        before += lane >= step ? other : 0;
    }
    unsigned first = __reduce_add_sync(0xffffffffu, below), count = __shfl_sync(0xffffffffu, before, 31);
    before -= own;
    if (lane == 0) {
        below_of[warp] = first;
        own_of[warp] = count;
    }
    __syncthreads();
    first = 0;
    count = 0;
#pragma unroll
    for (unsigned w = 0; w < WARPS; w++) {
        before += w < warp ? own_of[w] : 0;
        first += below_of[w];
        count += own_of[w];
    }
    if (thread == 0) {
        routing.begins[expert] = first;
        if (expert + 1 == routing.experts)
            routing.begins[expert + 1] = first + count;
        if (routing.read != nullptr && expert == 0)
            atomicAdd(routing.read, 1ull);
        if (routing.read != nullptr && count > 0)
            atomicAdd(routing.read + 1, 1ull);
    }
    for (unsigned at = begin; own > 0 && at < end; at++) {
        const Numbers numbers(routing, at, pairs);
#pragma unroll
        for (unsigned i = 0; i < 8; i++)
            if (numbers[i] == expert)
                routing.pairs[first + before++] = numbers.first + i;
    }
}
