// Words on their way to another rank's inbox; exchange.cuh says how they come and go.
#pragma once

// What a word of an inbox is until it has come.
#define EMPTY 0xffffffffu
// What is sent where there is EMPTY: a NaN too, for words and for pairs of 16 bits.
#define NOT_EMPTY 0xffff7fffu

__device__ __forceinline__ float sendable(float x) {
    return __float_as_uint(x) == EMPTY ? __uint_as_float(NOT_EMPTY) : x;
}

__device__ __forceinline__ void push(uint2 *to, uint2 v) {
    asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void push(float2 *to, float2 v) {
    push(reinterpret_cast<uint2 *>(to), {__float_as_uint(v.x), __float_as_uint(v.y)});
}
