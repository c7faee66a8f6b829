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

// A tile of keys as operands, and what a lane knows of all tiles. FP8: widened in registers.
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
};

// Puts a tile's probabilities, as a B operand, where all warps find them: `at` is the lane's eight bytes.
template <int HD> __device__ __forceinline__ void store_probabilities(unsigned at, const float (&s)[4], const float (&m)[2]) {
    const float c = score_scale<HD>();
    unsigned p[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            x[i] = exp2_approx(__fmaf_rn(s[2 * half + i], c, m[i] == minus_infinity() ? 0.0f : -__fmul_rn(m[i], c)));
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
        p[half] = transposed(*reinterpret_cast<const unsigned *>(&pair));
    }
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(p[0]), "r"(p[1]) : "memory");
}
__device__ __forceinline__ void load_probabilities(unsigned (&p)[2], unsigned at) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(p[0]), "=r"(p[1]) : "r"(at) : "memory");
}

// Zeroes what belongs to tokens from `valid` on in a tile of values.
__device__ __forceinline__ void zero_behind(unsigned (&a)[4], unsigned valid, const unsigned &lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned token = lane % 4 * 2 + i / 2 * 8;
        a[i] &= token + 1 < valid ? 0xffffffffu : token < valid ? 0xffffu : 0;
    }
}
// Zeroes what belongs to the first `hidden` tokens in a tile of values.
__device__ __forceinline__ void zero_before(unsigned (&a)[4], unsigned hidden, const unsigned &lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned token = lane % 4 * 2 + i / 2 * 8;
        a[i] &= token >= hidden ? 0xffffffffu : token + 1 >= hidden ? 0xffff0000u : 0;
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
