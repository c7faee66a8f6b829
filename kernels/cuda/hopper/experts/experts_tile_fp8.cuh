// A tile of an expert's matrix in fp8 on its way from shared memory to wgmma's left operand, as f16.
//
//   w        [rows / 64][cols / 64] tiles of 4,224 bytes: [64 rows][64 codes], then a row's scale each, 64 times it, f16
//   a row's codes   word c of columns 16 k on lies at byte 16 c + 4 k: columns 2 c, 2 c + 1, 2 c + 8, 2 c + 9 of those 16, so that 16 bytes
//                   are what a lane has of four wgmmas
//   element  f16(code * scale): a conversion makes f16 numbers of two codes, exactly, and a product scales both, with one rounding
//
// 1. That is 4 instructions a word of four codes, where making bf16 numbers of bits (fp8.cuh) takes 7; and 11 bits in place of 8.
// 2. An element is 64 times what it stands for, and an input a 64th (experts_f16.cuh): a sum is what it is. So elements of scales from
//    2^-20 on, and those of 2^-14 on without a bit less, are numbers of f16.
// 3. What is no number stays so.
#pragma once

#include "words.cuh"

// What a lane has of a tile's 64 columns: of rows 16 w + l / 4 and 8 further on, w its warp of the warpgroup.
struct ExpertPart {
    static constexpr unsigned TILE_BYTES = 64 * 64 + 64 * 2;
    uint4 low, high;
    unsigned scales[2]; // of either row, twice

    __device__ __forceinline__ void load(unsigned tile) {
        const unsigned lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
        const unsigned codes = tile + row * 64 + lane % 4 * 16;
        low = load_words(codes);
        high = load_words(codes + 8 * 64);
#pragma unroll
        for (unsigned i = 0; i < 2; i++) {
            unsigned short scale;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scale) : "r"(tile + 64 * 64 + (row + 8 * i) * 2) : "memory");
            scales[i] = scale * 0x10001u;
        }
    }

    // For two wgmmas, of the tile's first 32 columns or the others.
    template <int HALF> __device__ __forceinline__ void widen(unsigned (&a)[2][4]) const {
        const unsigned lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            widen(a[k][0], a[k][2], lows[2 * HALF + k], scales[0]);
            widen(a[k][1], a[k][3], highs[2 * HALF + k], scales[1]);
        }
    }

  private:
    __device__ __forceinline__ static void widen(unsigned &first, unsigned &second, unsigned word, unsigned scales) {
        asm("{\n"
            ".reg .b16 low, high;\n"
            ".reg .b32 x, y;\n"
            "mov.b32 {low, high}, %2;\n"
            "cvt.rn.f16x2.e4m3x2 x, low;\n"
            "cvt.rn.f16x2.e4m3x2 y, high;\n"
            "mul.rn.f16x2 %0, x, %3;\n"
            "mul.rn.f16x2 %1, y, %3;\n"
            "}" : "=r"(first), "=r"(second) : "r"(word), "r"(scales));
    }
};
