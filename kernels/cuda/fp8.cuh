// fp8: words of four e4m3 codes become bf16 numbers, times a scale, in registers.
//
//   code    s eeee mmm          moved to bf16's places    s 0000 eeee mmm 0000: the number times 2^-120
//   number  bf16(code * scale)  one rounding, by the product with 2^120 * scale, which is a bf16 number for scales up to 239
//
// Subnormal codes are subnormal bf16 numbers then, and the product makes them normal ones. A code that is none (0x7f) becomes 480: a
// row with what is no number has a scale that is none.
#pragma once
#include <cuda_bf16.h>

// 2^120 times two scales: e4m3's exponent, in bf16's place, is less by 120.
__device__ __forceinline__ unsigned fp8_lifted(unsigned scales) {
    unsigned lifted;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(lifted) : "r"(scales), "r"(0x7b807b80u));
    return lifted;
}

// A word's codes 1 and 3, and 0 and 2, times lifted scales, rounded to bf16.
__device__ __forceinline__ void fp8_widen(unsigned &odd, unsigned &even, unsigned word, unsigned scales) {
    const unsigned up = word << 8;
    const unsigned a = (word >> 4 & 0x07f007f0u) | (word & 0x80008000u), b = (word << 4 & 0x07f007f0u) | (up & 0x80008000u);
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(odd) : "r"(a), "r"(scales));
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(even) : "r"(b), "r"(scales));
}

__device__ __forceinline__ uint4 fp8_load_words(unsigned address) {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address)
                 : "memory");
    return words;
}
