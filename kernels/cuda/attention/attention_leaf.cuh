// A leaf as decode's warps make it, and what it is folded into: the parts of attention.cuh's arithmetic that both ways of decode have in
// common, that of a launch a layer (attention_decode.cuh) and that beside products (hopper/layers/layers_attend_read.cuh).
//
//   keys ── scores of the warp's tiles ── maxima of all tiles ── probabilities, where all warps find them ── values ── State
//   State   of a leaf, folded into that of a span, folded into that of the spans before it
//   Element of a partial, folded likewise when a row's partials are merged
#pragma once

#include "attention/attention.cuh"
#include "fp8_rows.cuh"
#include "words.cuh"

// A tile of keys as operands, and what a lane knows of all tiles. FP8: codes, as f16 numbers, and scales.
template <int HD, bool FP8> struct Keys : Fp8Keys<HD> {
    using Fp8Keys<HD>::Fp8Keys;
    using Lane = Fp8Lane<HD>;
};
template <int HD> struct Keys<HD, false> {
    unsigned tile, lane;
    struct Lane {
        unsigned lane;

        __device__ __forceinline__ Lane(unsigned lane, unsigned, unsigned) : lane(lane) {}
    };

    __device__ __forceinline__ Keys(unsigned tile, unsigned, Lane lane) : tile(tile), lane(lane.lane) {}
    __device__ __forceinline__ void load(unsigned (&a)[4], unsigned k) const { load_keys<HD>(a, tile, k, lane); }
    __device__ __forceinline__ float scale(bool) const { return 1.0f; }
};

// Sums of values in fp8 without the lift that their scales have.
template <int COUNT> __device__ __forceinline__ void lower(float (&o)[COUNT][4]) {
#pragma unroll
    for (int k = 0; k < COUNT; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            o[k][i] = __fmul_rn(o[k][i], 1.0f / scale_lift());
}

// The leaf's maxima of the lane's two queries, from those of all warps' tiles; `maxima` has 8 queries of each warp, and `sync` is for all.
template <unsigned WARPS, int TILES, class Sync>
__device__ __forceinline__ void share_maxima(float (&m)[2], const float (&s)[TILES][4], unsigned maxima, const unsigned &warp,
                                             const unsigned &lane, const Sync &sync) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = fmaxf(s[0][i], s[0][i + 2]);
#pragma unroll
        for (int tile = 1; tile < TILES; tile++)
            m[i] = fmaxf(m[i], fmaxf(s[tile][i], s[tile][i + 2]));
        m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 4));
        m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 8));
        m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 16));
    }
    const unsigned at = maxima + lane % 4 * 8;
    if (lane < 4)
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + warp * 32), "f"(m[0]), "f"(m[1]) : "memory");
    sync();
#pragma unroll
    for (int j = 0; j < WARPS; j++) {
        float x, y;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(at + j * 32) : "memory");
        m[0] = fmaxf(m[0], x);
        m[1] = fmaxf(m[1], y);
    }
}

// Puts a tile's probabilities, as a B operand, where all warps find them: `at` is the lane's eight bytes.
template <int HD, bool FP8> __device__ __forceinline__ void store_probabilities(unsigned at, const float (&s)[4], const float (&m)[2]) {
    const float c = score_scale<HD>();
    unsigned p[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            x[i] = exp2_approx(__fmaf_rn(s[2 * half + i], c, m[i] == minus_infinity() ? 0.0f : -__fmul_rn(m[i], c)));
        p[half] = transposed(rounded_pair<FP8>(x[0], x[1]));
    }
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(p[0]), "r"(p[1]) : "memory");
}
__device__ __forceinline__ void load_probabilities(unsigned (&p)[2], unsigned at) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(p[0]), "=r"(p[1]) : "r"(at) : "memory");
}

// Of a lane's tokens of a tile, 2 (lane % 4) + 8 half and the next one, those before `valid`, and those from `hidden` on.
__device__ __forceinline__ unsigned before(unsigned valid, unsigned half, const unsigned &lane) {
    const unsigned token = lane % 4 * 2 + half * 8;
    return token + 1 < valid ? 0xffffffffu : token < valid ? 0xffffu : 0;
}
__device__ __forceinline__ unsigned from(unsigned hidden, unsigned half, const unsigned &lane) {
    const unsigned token = lane % 4 * 2 + half * 8;
    return token >= hidden ? 0xffffffffu : token + 1 >= hidden ? 0xffff0000u : 0;
}
// Zeroes what belongs to tokens from `valid` on in a tile of values.
__device__ __forceinline__ void zero_behind(unsigned (&a)[4], unsigned valid, const unsigned &lane) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        a[i] &= before(valid, i / 2, lane);
}
// Zeroes what belongs to the first `hidden` tokens in a tile of values.
__device__ __forceinline__ void zero_before(unsigned (&a)[4], unsigned hidden, const unsigned &lane) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        a[i] &= from(hidden, i / 2, lane);
}

// Adds a tile of values in fp8 to m-tiles of the output, and its probabilities, which lie at `probabilities`, to their sums. Of tokens
// that are not `seen` neither codes nor scales reach a sum.
template <int HD, int COUNT>
__device__ __forceinline__ void fp8_add_tile(float (&o)[COUNT][4], float (&l)[4], unsigned probabilities, unsigned tile, unsigned scales,
                                             const Fp8Lane<HD> &places, const unsigned (&seen)[2]) {
    const unsigned ones[4] = {ONES<true>, ONES<true>, ONES<true>, ONES<true>};
    unsigned p[2], scaled[2], words[COUNT][2];
    load_probabilities(p, probabilities);
    mma_kept<true>(l, ones, p);
    fp8_scale_probabilities<HD>(scaled, p, scales, places);
    fp8_load_values<HD>(words, tile, places);
#pragma unroll
    for (int i = 0; i < 2; i++)
        scaled[i] &= seen[i];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        unsigned a[4];
#pragma unroll
        for (int i = 0; i < 2; i++)
            words[k][i] &= seen[i];
        fp8_values_operand(a, words[k]);
        mma_kept<true>(o[k], a, scaled);
    }
}

// What a warp holds of a state or leaf: m-tiles of o, and m and l, which all warps have alike. Columns as in attention.cuh.
template <int OWN> struct State {
    float m[2], l[2], o[OWN][4];

    __device__ __forceinline__ void clear() {
        m[0] = m[1] = minus_infinity();
        l[0] = l[1] = 0.0f;
#pragma unroll
        for (int k = 0; k < OWN; k++)
            o[k][0] = o[k][1] = o[k][2] = o[k][3] = 0.0f;
    }
    template <int HD> __device__ __forceinline__ void fold(const State &leaf) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Weights w = fold_maximum<HD>(m[i], leaf.m[i]);
            l[i] = folded(l[i], leaf.l[i], w);
#pragma unroll
            for (int k = 0; k < OWN; k++) {
                o[k][i] = folded(o[k][i], leaf.o[k][i], w);
                o[k][i + 2] = folded(o[k][i + 2], leaf.o[k][i + 2], w);
            }
        }
    }
    // To shared memory, and from there: `at` says where four words lie.
    template <typename At> __device__ __forceinline__ void store(const At &at) const {
#pragma unroll
        for (int k = 0; k < OWN; k++)
            store_words(at(k), {__float_as_uint(o[k][0]), __float_as_uint(o[k][1]), __float_as_uint(o[k][2]), __float_as_uint(o[k][3])});
        store_words(at(OWN), {__float_as_uint(m[0]), __float_as_uint(m[1]), __float_as_uint(l[0]), __float_as_uint(l[1])});
    }
    template <typename At> __device__ __forceinline__ static State loaded(const At &at) {
        const uint4 ml = load_words(at(OWN));
        State state = {{__uint_as_float(ml.x), __uint_as_float(ml.y)}, {__uint_as_float(ml.z), __uint_as_float(ml.w)}, {}};
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const uint4 o = load_words(at(k));
            state.o[k][0] = __uint_as_float(o.x);
            state.o[k][1] = __uint_as_float(o.y);
            state.o[k][2] = __uint_as_float(o.z);
            state.o[k][3] = __uint_as_float(o.w);
        }
        return state;
    }
};

// What a partial holds of one query and dim.
struct Element {
    float m, l, o;

    __device__ __forceinline__ static Element nothing() { return {minus_infinity(), 0.0f, 0.0f}; }
    template <int HD> __device__ __forceinline__ void fold(Element leaf) {
        const Weights w = fold_maximum<HD>(m, leaf.m);
        l = folded(l, leaf.l, w);
        o = folded(o, leaf.o, w);
    }
    __device__ __forceinline__ bf16 result() const { return __float2bfloat16_rn(__fmul_rn(o, __frcp_rn(l))); }
};

// Counts partials that are in memory; how many there were before.
__device__ __forceinline__ unsigned count_partials(unsigned *arrived, unsigned count) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrived), "r"(count) : "memory");
    return before;
}
