// What experts in fp8 are applied to, as f16: what the router leaves of a token, and what lies between gate and up and down.
//
// 1. Each is a 64th of what it stands for, and a weight 64 times (experts_tile_fp8.cuh), so that sums are what they are. Residual streams of
//    trained models, times their norms, and what down gets have elements of 10^3 to 10^5, and more are not ruled out, while f16 ends at
//    65,504. So they may reach 4 million, where they are cut, and from 2^-8 on they have 11 bits, 3 more than bf16; what is smaller is off
//    by 2^-19 at most.
// 2. What is no number stays so.
#pragma once

constexpr float EXPERTS_INPUTS_UNIT = 64.0f;

// Two of them, as a word.
__device__ __forceinline__ unsigned experts_inputs_f16(float x, float y) {
    unsigned word;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(y * (1.0f / EXPERTS_INPUTS_UNIT)), "f"(x * (1.0f / EXPERTS_INPUTS_UNIT)));
    return word;
}
