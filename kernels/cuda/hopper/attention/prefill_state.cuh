// What a warpgroup of attention_prefill has folded so far, and how it is kept in memory.
#pragma once
#include "attention/attention.cuh"

// What a warpgroup has folded so far: a thread has rows lane / 4 and 8 further on of its warp's 16, o as wgmma has it.
template <int HD> struct PrefillState {
    float m[2], l[2], o[HD / 2];

    __device__ __forceinline__ PrefillState() {
        m[0] = m[1] = minus_infinity();
        l[0] = l[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < HD / 2; i++)
            o[i] = 0.0f;
    }
    // In memory a thread's words lie 128 threads apart.
    __device__ __forceinline__ void keep(float4 *at) const {
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            __stcg(at + i * 128, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
        __stcg(at + HD / 8 * 128, make_float4(m[0], m[1], l[0], l[1]));
    }
    // Folds the state and a kept one, which comes before it or behind it.
    template <bool BEFORE> __device__ __forceinline__ void fold_kept(const float4 *at) {
        const float4 known = __ldcg(at + HD / 8 * 128);
        const float kept_m[2] = {known.x, known.y}, kept_l[2] = {known.z, known.w};
        Weights weights[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float both = BEFORE ? kept_m[i] : m[i];
            weights[i] = fold_maximum<HD>(both, BEFORE ? m[i] : kept_m[i]);
            m[i] = both;
            l[i] = BEFORE ? folded(kept_l[i], l[i], weights[i]) : folded(l[i], kept_l[i], weights[i]);
        }
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
            const float4 four = __ldcg(at + i * 128);
            const float kept[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float &own = o[4 * i + j];
                own = BEFORE ? folded(kept[j], own, weights[j / 2]) : folded(own, kept[j], weights[j / 2]);
            }
        }
    }
};
