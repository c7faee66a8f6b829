// Gates and ups become what the down projection takes (epilogue.cuh).
#pragma once
#include "epilogue/row_norm.cuh"
#include "epilogue/taken.cuh"

struct GateUp {
    RowNorm norm;
    __nv_bfloat16 *out; // [tokens, intermediate]
    unsigned intermediate, reserved;
    static constexpr bool SCALED = true;
    static constexpr int SLICES = 1; // at most
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned token) const { return norm.scale(token); }
    template <int COUNT> __device__ __forceinline__ void scales(const unsigned (&token)[COUNT], float (&scale)[COUNT]) const {
        norm.scales(token, scale);
    }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    template <int BLOCKS> struct Ahead {};

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned, unsigned, unsigned, unsigned) const { return {}; }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned, unsigned lane) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            // Of 8 lanes, the first 4 hold 8 gates, the last 4 their ups.
            const unsigned m = (m0 + 64 * b) / 2 + lane / 8 * 8 + lane % 4 * 2;
            const bool stores = lane % 8 < 4 && m < intermediate;
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float2 g = v[i][b];
                const float2 u = {__shfl_xor_sync(0xffffffffu, g.x, 4), __shfl_xor_sync(0xffffffffu, g.y, 4)};
                if (stores && i < taken.count)
                    store_pair(out + (size_t)taken.token(i) * intermediate + m, silu(g.x) * u.x, silu(g.y) * u.y);
            }
        }
    }

    __device__ __forceinline__ static float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
};
