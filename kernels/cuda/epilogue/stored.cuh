// Sums that are stored as they are (epilogue.cuh).
#pragma once
#include <cuda_fp16.h>

#include "epilogue/taken.cuh"

struct Head {
    __half *out; // [samples, rows]
    static constexpr bool SCALED = false;
    static constexpr int SLICES = 1; // at most
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    template <int BLOCKS> struct Ahead {};

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned, unsigned, unsigned, unsigned) const { return {}; }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned rows, unsigned lane) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            if (i >= taken.count)
                break;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const unsigned m = m0 + 64 * b + 2 * lane;
                __half *at = out + (size_t)taken.token(i) * rows + m;
                const __half2 pair = __floats2half2_rn(clamped(v[i][b].x), clamped(v[i][b].y));
                if (rows % 2 == 0 && m < rows) {
                    *reinterpret_cast<__half2 *>(at) = pair;
                } else {
                    // An odd vocabulary: pairs are not aligned.
                    if (m < rows)
                        at[0] = pair.x;
                    if (m + 1 < rows)
                        at[1] = pair.y;
                }
            }
        }
    }

    __device__ __forceinline__ static float clamped(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }
};

struct Linear {
    __nv_bfloat16 *out; // [tokens, rows]
    static constexpr bool SCALED = false;
    static constexpr int SLICES = 1; // at most
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    template <int BLOCKS> struct Ahead {};

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned, unsigned, unsigned, unsigned) const { return {}; }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned rows, unsigned lane) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            if (i >= taken.count)
                break;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const unsigned m = m0 + 64 * b + 2 * lane;
                __nv_bfloat16 *at = out + (size_t)taken.token(i) * rows + m;
                if (rows % 2 == 0 && m < rows) {
                    store_pair(at, v[i][b].x, v[i][b].y);
                } else {
                    if (m < rows)
                        at[0] = __float2bfloat16_rn(v[i][b].x);
                    if (m + 1 < rows)
                        at[1] = __float2bfloat16_rn(v[i][b].y);
                }
            }
        }
    }
};
