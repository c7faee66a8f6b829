// Pairs of 16-bit numbers as the words that instructions take.
#pragma once

#include <cuda_bf16.h>

__device__ __forceinline__ unsigned word(__nv_bfloat162 pair) { return *reinterpret_cast<unsigned *>(&pair); }
__device__ __forceinline__ unsigned bf16_word(float x, float y) { return word(__floats2bfloat162_rn(x, y)); }
