// A tile of a matrix in fp8 on its way from shared memory to wgmma's left operand; fp8_ring.cuh says how it lies there.
#pragma once

#include "fp8.cuh"
#include "words.cuh"

// What a lane has of a tile's 64 columns: of rows 16 w + l / 4 and 8 further on, w its warp of the warpgroup.
struct Fp8Part {
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
            fp8_widen(a[k][0], a[k][2], lows[2 * HALF + k], scales[0]);
            fp8_widen(a[k][1], a[k][3], highs[2 * HALF + k], scales[1]);
        }
    }
};
