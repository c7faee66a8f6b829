// What all epilogues have in common: a warp's tokens, its sums, its stores (epilogue.cuh).
#pragma once
#include <cuda_bf16.h>

// The T tokens that a warp has in hand: token first + i * step is stored if i < count.
struct Taken {
    unsigned first, step, count;

    __device__ __forceinline__ unsigned token(unsigned i) const { return first + i * step; }
};

template <int T> __device__ __forceinline__ void warp_sums(float (&value)[T]) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2)
#pragma unroll
        for (int i = 0; i < T; i++)
            value[i] += __shfl_xor_sync(0xffffffffu, value[i], lane);
}

__device__ __forceinline__ void store_pair(__nv_bfloat16 *at, float x, float y) {
    *reinterpret_cast<__nv_bfloat162 *>(at) = __floats2bfloat162_rn(x, y);
}

// What an epilogue that needs nothing beside the token's number knows of it.
struct Nowhere {
    __device__ __forceinline__ Nowhere from_lane(unsigned) const { return {}; }
};
