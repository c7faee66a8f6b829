// fp8: words of four e4m3 codes become bf16 numbers, times a scale, in registers.
//
//   code        s eeee mmm
//   moved       s 0000 eeee mmm 0000: where bf16 has its bits, the number times 2^-120
//   packed      of two codes, in each half of a word: s eee S eeee mmm EMMM, where the one is in its place already and the other one
//               (S eee EMMM) is two shifts away
//   number      bf16(code * scale), one rounding, by the product with 2^120 * scale, a lifted scale, which is a bf16 number for
//               scales up to 239
//
// Subnormal codes are subnormal bf16 numbers then, and the product makes them normal ones. A code that is none (0x7f) becomes 480:
// 64 columns of a row that have one have a scale that is none (fp8_tiles.rs).
#pragma once
#include <cuda_bf16.h>

// A packed word's codes 1 and 3, and 0 and 2, times lifted scales, rounded to bf16.
__device__ __forceinline__ void fp8_widen(unsigned &odd, unsigned &even, unsigned word, unsigned scales) {
    const unsigned a = word & 0x87f087f0u, b = (word << 4 & 0x80f080f0u) | (word >> 4 & 0x07000700u);
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(odd) : "r"(a), "r"(scales));
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(even) : "r"(b), "r"(scales));
}
