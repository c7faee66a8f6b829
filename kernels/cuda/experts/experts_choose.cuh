// A token's experts: the P largest of its logits, ascending by number, and their shares.
#pragma once

#include "step/batch.cuh"
#include "epilogue.cuh"
#include "experts/experts_lists.cuh"

constexpr int EXPERTS_A_LANE = 8;   // 256 at most

// A float's bits as an unsigned number of the same order, at least 1; -0 counts as 0.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);
    return max(bits >> 31 ? ~bits : bits | 0x80000000u, 1u);
}

// The float that has been ordered.
__device__ __forceinline__ float unordered(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// A warp takes token t, of this slot and with these logits; a lane 8 neighbouring experts.
__device__ __forceinline__ void choose(const Routing &routing, unsigned t, unsigned slot, const float *logits) {
    const unsigned lane = threadIdx.x % 32;
    unsigned short *chosen = routing.chosen + (size_t)t * routing.per_token;
    float *shares = routing.shares + (size_t)t * routing.per_token;
    if (slot == routing.nobody) {
        if (lane < routing.per_token) {
            chosen[lane] = NOBODY;
            shares[lane] = 0.0f;
        }
        return;
    }
    float logit[EXPERTS_A_LANE];
    unsigned key[EXPERTS_A_LANE], index[EXPERTS_A_LANE]; // largest first; 0: not there, or chosen
#pragma unroll
    for (int i = 0; i < EXPERTS_A_LANE; i++) {
        const unsigned expert = EXPERTS_A_LANE * lane + i;
        logit[i] = expert < routing.experts ? logits[expert] : 0.0f;
        key[i] = expert < routing.experts ? ordered(logit[i]) : 0;
        index[i] = i;
    }
#pragma unroll
    for (int round = 0; round < EXPERTS_A_LANE; round++)
#pragma unroll
        for (int i = round % 2; i + 1 < EXPERTS_A_LANE; i += 2) {
            const bool swap = key[i] < key[i + 1]; // equal ones stay in order
            const unsigned first_key = key[i], first_index = index[i];
            key[i] = swap ? key[i + 1] : first_key;
            index[i] = swap ? index[i + 1] : first_index;
            key[i + 1] = swap ? first_key : key[i + 1];
            index[i + 1] = swap ? first_index : index[i + 1];
        }
    unsigned taken = 0; // bits of chosen ones
    float largest = 0.0f;
    for (unsigned j = 0; j < routing.per_token; j++) {
        const unsigned most = __reduce_max_sync(0xffffffffu, key[0]);
        const bool owns = lane == __ffs(__ballot_sync(0xffffffffu, key[0] == most)) - 1;
        if (j == 0)
            largest = unordered(most);
        taken |= owns ? 1u << index[0] : 0;
#pragma unroll
        for (int i = 0; i < EXPERTS_A_LANE; i++) {
            const bool is_last = i + 1 == EXPERTS_A_LANE;
            key[i] = !owns ? key[i] : is_last ? 0 : key[is_last ? i : i + 1];
            index[i] = owns && !is_last ? index[is_last ? i : i + 1] : index[i];
        }
    }
    float weight[EXPERTS_A_LANE], sum[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < EXPERTS_A_LANE; i++) {
        weight[i] = expf(logit[i] - largest);
        const bool counts = routing.normalized ? taken >> i & 1 : EXPERTS_A_LANE * lane + i < routing.experts;
        sum[0] += counts ? weight[i] : 0.0f;
    }
    warp_sums(sum);
    unsigned place = __popc(taken);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned before = __shfl_up_sync(0xffffffffu, place, step);
        place += lane >= step ? before : 0;
    }
    place -= __popc(taken);
#pragma unroll
    for (int i = 0; i < EXPERTS_A_LANE; i++)
        if (taken >> i & 1) {
            chosen[place] = EXPERTS_A_LANE * lane + i;
            if (routing.bits != nullptr)
                atomicOr(routing.bits + (EXPERTS_A_LANE * lane + i) * ((routing.tokens + 31) / 32) + t / 32, 1u << t % 32);
            shares[place] = weight[i] / sum[0];
            place++;
        }
}
