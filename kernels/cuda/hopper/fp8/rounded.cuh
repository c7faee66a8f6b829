// Products whose both operands are e4m3 codes: rounded inputs, as a checkpoint in fp8 means them.
//
//   y[t, m] = sum over groups k of 128, 256 or 512 columns of  scale[m / 8, k] * scale[t, k] * (sum over the group's of w[m, c] x[t, c])
//
//   codes      [rows, cols] e4m3 of both; to the copy engine and to shared memory rows of cols / 2 words of 16 bits: a Shape counts
//              those, so a block of 64 words is 128 columns, and rings, tiles and descriptors are those of bf16
//   x scales   [ceil(cols / 128), pitch] f32: a token's, of a block; the same of a group's blocks, or of all where whole rows are rounded
//   w scales   [ceil(cols / 128), groups] f32: of 8 rows of w; a tile's of 128 rows by 128 or 256, or ones where each row has a scale
//   row scale  f32, of a row of w, where it has one for all columns: the last factor
//
// 1. Tensor cores keep some 14 bits of a sum of codes' products: they start from zero for each group of blocks whose scales are the
//    same, of one block to four, and for each slice; four instructions a block, of 32 columns. What they have is added in f32 by one
//    fma with both scales' product. That chain is the same for any number of tokens and whichever operand is the left one. Each
//    instruction cuts its sum off towards zero: where all terms have one sign 256 columns come out 0.2% too small and 512 0.5%, where
//    they have both by less than a bf16 shows.
// 2. Slices, whole blocks, are added in a binary tree (Shape), then the row's scale is multiplied in, once.
#pragma once

#include "epilogue.cuh"
#include "hopper/hopper.cuh"
#include "hopper/gemm/wide.cuh"
#include "shape.cuh"

// Where both operands' scales lie: a kernel's parameter.
struct CodeScales {
    const float *x, *w;
    unsigned pitch, groups;
    unsigned shift, reserved; // 2^shift blocks of columns are a group, whose scales are one

    // Where the group that block i is of ends, or all blocks do.
    __device__ __forceinline__ unsigned group_end(unsigned i, unsigned end) const { return min(((i >> shift) + 1) << shift, end); }
};

// An epilogue whose tokens' scales are in the sums already.
template <class E> struct Rounded : E {
    const float *row_scales; // [rows of w], or null
    static constexpr int SLICES = 2; // at most: enough for few tokens to fill the device

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    template <int COUNT> __device__ __forceinline__ void scales(const unsigned (&)[COUNT], float (&scale)[COUNT]) const {
#pragma unroll
        for (int t = 0; t < COUNT; t++)
            scale[t] = 1.0f;
    }

    // Of rows m and m + 1, of which there are so many.
    __device__ __forceinline__ float2 row_scales_at(unsigned m, unsigned rows) const {
        return m < rows ? *reinterpret_cast<const float2 *>(row_scales + m) : float2{0.0f, 0.0f};
    }

    template <int T, int BLOCKS, class Ahead>
    __device__ __forceinline__ void store(const Ahead (&ahead)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned rows, unsigned lane) const {
        if (row_scales != nullptr)
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const float2 by = row_scales_at(m0 + 64 * b + 2 * lane, rows);
#pragma unroll
                for (int i = 0; i < T; i++)
                    v[i][b] = {__fmul_rn(v[i][b].x, by.x), __fmul_rn(v[i][b].y, by.y)};
            }
        E::template store<T, BLOCKS>(ahead, v, taken, m0, rows, lane);
    }
};

// By eight outputs of one token a lane, if the epilogue has that. Beside two sets of sums there are registers for the angles of two tokens' heads.
template <class E> inline constexpr bool IS_WIDE<Rounded<E>> = IS_WIDE<E>;
template <bool NORMED> inline constexpr int AT_ONCE<Rounded<QkvOf<NORMED, false>>> = 2;
template <class E> struct Wide<Rounded<E>> : Wide<E> {
    template <int COUNT>
    __device__ __forceinline__ static void store(const Rounded<E> &epilogue, const typename Wide<E>::Ahead (&ahead)[COUNT],
                                                 float (&v)[COUNT][8], const Piece (&at)[COUNT], unsigned rows, unsigned lane) {
        if (epilogue.row_scales != nullptr)
#pragma unroll
            for (int i = 0; i < COUNT; i++)
#pragma unroll
                for (int pair = 0; pair < 4; pair++) {
                    const float2 by = epilogue.row_scales_at(at[i].m + pair / 2 * Wide<E>::apart(epilogue) + pair % 2 * 2, rows);
                    v[i][2 * pair] = __fmul_rn(v[i][2 * pair], by.x);
                    v[i][2 * pair + 1] = __fmul_rn(v[i][2 * pair + 1], by.y);
                }
        Wide<E>::store(epilogue, ahead, v, at, rows, lane);
    }
};

__device__ __forceinline__ float load_scale(unsigned at) {
    float scale;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale) : "r"(at) : "memory");
    return scale;
}
__device__ __forceinline__ float2 load_two_scales(unsigned at) {
    float2 two;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "r"(at) : "memory");
    return two;
}

// Fetches 16 bytes of scales. A copy engine's copy of so few takes as long as one of a box, of which it starts one after the other.
__device__ __forceinline__ void fetch_scales(unsigned to, const float *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// The lane arrives when all that it fetched is there.
__device__ __forceinline__ void arrive_with_scales(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
