// A row's logits: keys of their order, and the ways in which threads go through them (sampling.cu).
#pragma once
#include <cuda_fp16.h>

#include "step/edit.cuh"

// f16 bits to a key of the same order, and back; -0 has the key of 0.
__device__ __forceinline__ unsigned key_of(__half logit) {
    const unsigned bits = __half_as_ushort(logit);
    return bits & 0x8000u ? 0x10000u - bits : bits | 0x8000u;
}

__device__ __forceinline__ float logit_of(unsigned key) {
    return __half2float(__ushort_as_half((unsigned short)(key & 0x8000u ? key & 0x7fffu : 0x10000u - key)));
}

// f32 to a key of the same order, and back; likewise.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? 0u - bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : 0u - key);
}

// Calls f(id, logit) for the ids of [begin, end) that fall to this thread, eight neighbours at a time in one load
// where rows are aligned to 16 bytes. `begin` is a multiple of 8.
template <int THREADS, typename F>
__device__ __forceinline__ void for_each_logit(const __half *row, bool aligned, unsigned begin, unsigned end, F f) {
    for (unsigned i = begin + threadIdx.x * 8; i < end; i += THREADS * 8) {
        if (aligned && i + 8 <= end) {
            __half logit[8];
            *reinterpret_cast<uint4 *>(logit) = *reinterpret_cast<const uint4 *>(row + i);
#pragma unroll
            for (int j = 0; j < 8; j++)
                f(i + j, logit[j]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (i + j < end)
                    f(i + j, row[i + j]);
        }
    }
}

// The eight logits from i on, minus infinity from `end` on.
__device__ __forceinline__ void load_eight(__half (&logit)[8], const __half *row, bool aligned, unsigned i, unsigned end) {
    if (aligned && i + 8 <= end)
        *reinterpret_cast<uint4 *>(logit) = *reinterpret_cast<const uint4 *>(row + i);
    else
#pragma unroll
        for (int j = 0; j < 8; j++)
            logit[j] = i + j < end ? row[i + j] : __ushort_as_half(FORBIDDEN);
}

// What a block draws from: the logits [begin, end) of a row.
struct Chunk {
    const __half *row;
    bool aligned;
    unsigned begin, end;

    // Calls f(logits, i) for each eight logits, from i on, that fall to this thread. Gives the largest of them, NaN if one is.
    template <typename F>
    __device__ __forceinline__ __half each_eight(F f) const {
        __half2 largest = __half2half2(__ushort_as_half(FORBIDDEN));
        for (unsigned first = begin; first < end; first += 256 * 8) {
            const unsigned i = first + threadIdx.x * 8;
            __half logit[8];
            load_eight(logit, row, aligned, i, end);
#pragma unroll
            for (int j = 0; j < 8; j += 2)
                largest = __hmax2_nan(largest, __halves2half2(logit[j], logit[j + 1]));
            f(logit, i);
        }
        return __hmax_nan(__low2half(largest), __high2half(largest));
    }
};

// Is one of the eight not below `least`?
__device__ __forceinline__ bool reaches(const __half (&logit)[8], float least) {
    bool any = false;
#pragma unroll
    for (int j = 0; j < 8; j++)
        any |= __half2float(logit[j]) >= least;
    return any;
}
