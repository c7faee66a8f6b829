// A leaf's arithmetic as a warpgroup of attention_prefill does it for its 64 queries. They are the rows of every product: a thread has
// lane / 4 of its warp's 16 and the one 8 further on, and of each 8 columns 2 (lane % 4) and the next. TILES: of the leaf's first ones.
//
//   S ── scaled (FP8) ── masked ── m ── P ── rounded, scaled (FP8) ── O, l ── folded ──> PrefillState
#pragma once
#include "fp8_rows.cuh"
#include "hopper/attention/prefill_shared.cuh"
#include "hopper/attention/prefill_state.cuh"

// Scores of the part's queries and a leaf's first tiles.
template <int HD, bool FP8, int TILES>
__device__ __forceinline__ void score_part(float (&s)[TILES * 8], unsigned queries, unsigned keys) {
    using S = Shared<HD, FP8>;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HD / 16; k++) {
        const unsigned long long a = tile_descriptor_at(queries + k / 4 * S::QUERY_HALF + k % 4 * 32);
        const unsigned long long b = tile_descriptor_at(keys + k / 4 * S::HALF + k % 4 * 32);
        if constexpr (FP8)
            wgmma_halves(s, a, b, k > 0);
        else
            wgmma(s, a, b, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
}

// The scales of a thread's columns of a tile: two beside each other, and two 8 further on.
__device__ __forceinline__ void load_scales(unsigned (&scales)[2], unsigned scales_of_tile) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(scales[0]), "=r"(scales[1])
                 : "r"(scales_of_tile + threadIdx.x % 4 * 8)
                 : "memory");
}

// Scores of codes become those of keys.
template <int TILES> __device__ __forceinline__ void scale_scores(float (&s)[TILES * 8], unsigned scales) {
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        unsigned pairs[2];
        load_scales(pairs, scales + j * (TILE * 2));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const unsigned pair = pairs[i / 4];
            s[8 * j + i] = __fmul_rn(s[8 * j + i], __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16));
        }
    }
}

// Probabilities become those of codes.
template <int TILES> __device__ __forceinline__ void scale_probabilities(unsigned (&p)[TILES][4], unsigned scales) {
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        unsigned pairs[2];
        load_scales(pairs, scales + j * (TILE * 2));
#pragma unroll
        for (int i = 0; i < 4; i++)
            asm volatile("mul.rn.f16x2 %0, %0, %1;" : "+r"(p[j][i]) : "r"(pairs[i / 2]));
    }
}

// Scores of tokens behind those that the rows attend to: of the sequence's first `limit`. The leaf begins at `begin`.
template <int COUNT>
__device__ __forceinline__ void mask_behind(float (&s)[COUNT], const unsigned (&limit)[2], unsigned begin, const unsigned &lane) {
    const int end[2] = {(int)(limit[0] - begin - lane % 4 * 2), (int)(limit[1] - begin - lane % 4 * 2)};
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        s[i] = i / 4 * 8 + i % 2 < end[i / 2 % 2] ? s[i] : minus_infinity();
}

// Scores of tokens before their windows.
template <int COUNT>
__device__ __forceinline__ void mask_before(float (&s)[COUNT], const unsigned (&limit)[2], const unsigned &window, unsigned begin,
                                            const unsigned &lane) {
    const int first[2] = {(int)(limit[0] - begin - lane % 4 * 2) - (int)window,
                          (int)(limit[1] - begin - lane % 4 * 2) - (int)window};
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        s[i] = i / 4 * 8 + i % 2 >= first[i / 2 % 2] ? s[i] : minus_infinity();
}

// The maxima of a thread's two rows.
template <int COUNT> __device__ __forceinline__ void row_maxima(float (&m)[2], const float (&s)[COUNT]) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[i] = s[i];
#pragma unroll
    for (int i = 4; i < COUNT; i++)
        x[i % 4] = fmaxf(x[i % 4], s[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = fmaxf(x[2 * i], x[2 * i + 1]);
        m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 1));
        m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 2));
    }
}

// Scores become probabilities, not yet rounded.
template <int HD, int COUNT> __device__ __forceinline__ void exponentials(float (&s)[COUNT], const float (&m)[2]) {
    const float c = score_scale<HD>();
    const float offset[2] = {m[0] == minus_infinity() ? 0.0f : -__fmul_rn(m[0], c),
                             m[1] == minus_infinity() ? 0.0f : -__fmul_rn(m[1], c)};
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        s[i] = exp2_approx(__fmaf_rn(s[i], c, offset[i / 2 % 2]));
    hold(s);
}

// Zeroes rows `first` to `end` of a leaf's values and their scales, for the warpgroup's own products.
template <int HD, bool FP8>
__device__ __forceinline__ void zero_rows(unsigned values, unsigned scales, unsigned first, unsigned end, unsigned part) {
    constexpr unsigned CHUNKS = HD / 8;
    if (FP8)
        for (unsigned i = first + threadIdx.x % 128; i < end; i += 128)
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(scales + (i / TILE * TILE + fp8_scale_at(i % TILE)) * 2), "h"((unsigned short)0)
                         : "memory");
    for (unsigned i = first * CHUNKS + threadIdx.x % 128; i < end * CHUNKS; i += 128)
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(values + i % CHUNKS / 8 * Shared<HD, FP8>::HALF +
                                                                      i / CHUNKS * 128 + i % 8 * 16),
                     "r"(0)
                     : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    sync_threads(1 + part, 128);
}

// Sums of a leaf's probabilities, folded into the state.
template <int HD> __device__ __forceinline__ void fold_sums(PrefillState<HD> &state, float (&l)[4], const Weights (&weights)[2]) {
    hold(l);
    state.l[0] = folded(state.l[0], l[0], weights[0]);
    state.l[1] = folded(state.l[1], l[2], weights[1]);
}

// 64 dims of a leaf's output, folded into the state.
template <int HD, bool FP8>
__device__ __forceinline__ void fold_dims(PrefillState<HD> &state, int half, float (&o)[32], const Weights (&weights)[2]) {
    hold(o);
#pragma unroll
    for (int i = 0; i < 32; i++)
        state.o[32 * half + i] =
            folded(state.o[32 * half + i], FP8 ? __fmul_rn(o[i], 1.0f / scale_lift()) : o[i], weights[i / 2 % 2]);
}

// Output and sums of the probabilities of a leaf with maxima m, folded into the state. At `ones` lies the operand that makes l of P.
template <int TILES, int HD>
__device__ __forceinline__ void fold(PrefillState<HD> &state, const unsigned (&p)[TILES][4], const float (&m)[2], unsigned values,
                                     unsigned ones) {
    const Weights weights[2] = {fold_maximum<HD>(state.m[0], m[0]), fold_maximum<HD>(state.m[1], m[1])};
    float l[4];
#pragma unroll
    for (int half = 0; half < HD / 64; half++) {
        float o[32];
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < TILES; j++)
            wgmma_transposed(o, p[j], tile_descriptor_at(values + half * Shared<HD, false>::HALF + j * TILE * 128), j > 0);
#pragma unroll
        for (int j = 0; half == HD / 64 - 1 && j < TILES; j++)
            wgmma(l, p[j], small_descriptor(ones), j > 0);
        wgmma_commit();
        wgmma_wait<0>();
        fold_dims<HD, false>(state, half, o, weights);
    }
    fold_sums(state, l, weights);
}

// The same of codes. l comes first: then P is multiplied by the values' scales.
template <int TILES, int HD>
__device__ __forceinline__ void fold_codes(PrefillState<HD> &state, unsigned (&p)[TILES][4], const float (&m)[2], unsigned values,
                                           unsigned scales, unsigned ones) {
    const Weights weights[2] = {fold_maximum<HD>(state.m[0], m[0]), fold_maximum<HD>(state.m[1], m[1])};
    float l[4];
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < TILES; j++)
        wgmma_halves(l, p[j], small_descriptor(ones), j > 0);
    wgmma_commit();
    wgmma_wait<0>();
    fold_sums(state, l, weights);
    scale_probabilities<TILES>(p, scales);
#pragma unroll
    for (int half = 0; half < HD / 64; half++) {
        float o[32];
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < TILES; j++)
            wgmma_transposed_halves(o, p[j], tile_descriptor_at(values + half * Shared<HD, true>::HALF + j * TILE * 128), j > 0);
        wgmma_commit();
        wgmma_wait<0>();
        fold_dims<HD, true>(state, half, o, weights);
    }
}
