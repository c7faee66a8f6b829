// Sums added to the residual stream (epilogue.cuh).
#pragma once
#include "epilogue/taken.cuh"
#include "segment.cuh"

struct Residual {
    __nv_bfloat16 *residual; // [tokens, rows]
    float *sumsq;            // [tokens, segments_of(rows)]
    static constexpr bool SCALED = false;
    static constexpr int SLICES = 4; // at most
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    // The residual stream as it was.
    template <int BLOCKS> struct Ahead {
        __nv_bfloat162 old[BLOCKS];
    };

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned token, unsigned m0, unsigned rows, unsigned lane) const {
        const __nv_bfloat162 *at =
            reinterpret_cast<const __nv_bfloat162 *>(residual + (size_t)token * rows + m0 + 2 * lane);
        Ahead<BLOCKS> ahead;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
            ahead.old[b] = m0 + 64 * b + 2 * lane < rows ? at[32 * b] : __nv_bfloat162();
        return ahead;
    }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&ahead)[T], float2 (&v)[T][BLOCKS], const Taken &taken,
                                          unsigned m0, unsigned rows, unsigned lane) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const unsigned m = m0 + 64 * b + 2 * lane;
            if (m0 + 64 * b >= rows)
                break;
            float squares[T];
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float2 old = __bfloat1622float2(ahead[i].old[b]);
                const __nv_bfloat162 sum = __floats2bfloat162_rn(old.x + v[i][b].x, old.y + v[i][b].y);
                const float2 x = __bfloat1622float2(sum);
                squares[i] = m < rows ? fmaf(x.x, x.x, __fmul_rn(x.y, x.y)) : 0.0f;
                if (i < taken.count && m < rows)
                    *reinterpret_cast<__nv_bfloat162 *>(residual + (size_t)taken.token(i) * rows + m) = sum;
            }
            warp_sums(squares);
#pragma unroll
            for (int i = 0; i < T; i++)
                if (i < taken.count && lane == 0)
                    sumsq[(size_t)taken.token(i) * segments_of(rows) + m0 / SEGMENT + b] = squares[i];
        }
    }
};
