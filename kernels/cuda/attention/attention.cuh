// attention: the arithmetic that decode and prefill share, so that a token's bits do not depend on which of them ran,
// nor on how the work was split.
//
// A sequence's positions are cut into spans of 2048, a span into 16 leaves of 128, a leaf into tiles of 16. Tokens are the
// rows of every product and queries its columns, in n-tiles of 8:
//
//   scores   S^T [16 tokens, 8] += K [16 tokens, 16 dims] * Q^T [16 dims, 8]          over the dims in order
//   m        max over the leaf        p = bf16(exp2(s * c - m * c)),  c = log2(e) / sqrt(head_dim)
//   output   O^T [16 dims, 8] += V^T [16 dims, 16 tokens] * P [16 tokens, 8]          over the tiles in order
//   l        the same product with ones in V's place
//   fold     m' = max(m, m_leaf), o = o * exp2((m - m') c) + o_leaf * exp2((m_leaf - m') c), l likewise; leaf by leaf of
//            a span, then spans in the same way, one by one
//   result   bf16(o * (1 / l))
//
// Of keys and values in fp8, K and V are codes, as f16 numbers, with a scale a token beside them, Q and P are f16, and
//
//   scores   are multiplied by their keys' scales, before all else
//   output   O^T += V^T * f16(P * scales), where values' scales are kept times 2^8; a leaf's is multiplied by 2^-8
//   l        is that of P without scales
//
// Which operand is which does not matter to a sum, nor whether mma or wgmma adds it up: Hopper's prefill has queries as rows.
//
// A leaf starts from zero, a span from nothing, and only folding joins them: a fixed order whatever the split. A tile, leaf
// or span that is masked altogether may be skipped: adding it changes no bit (p is +0, and what is empty is folded with weight
// -0, the state with weight 1); nor does folding into nothing.
//
// A query at position p sees the positions from p + 1 - window up to its own. What lies before is masked as what lies behind
// is; its pages may be somebody else's by now, so neither its keys nor its values may reach a sum.
//
// Keys and values lie in pages, [page][kv head][page_size][head_dim] bf16 (in fp8 as fp8_rows.cuh has them); the 16-byte chunk c
// of token t is stored at chunk c ^ (t & 7), so that eight rows of one chunk lie in different banks when ldmatrix reads them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "step/batch.cuh"
#include "dependent.cuh"

#define LEAF 128
#define TILE 16
#define LEAF_TILES 8
#define SPAN_LEAVES 16
#define SPAN (SPAN_LEAVES * LEAF)
#define FULL_WARP 0xffffffffu

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// log2(e) / sqrt(head_dim)
template <int HD> __device__ __forceinline__ float score_scale() {
    static_assert(HD == 64 || HD == 128, "head_dim");
    return HD == 64 ? 0.18033688011112042f : 0.12751743082459868f;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of f16 numbers, which is what keys and values in fp8, queries and probabilities beside them become.
template <bool FP8> __device__ __forceinline__ void mma_kept(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if constexpr (!FP8)
        mma(d, a, b);
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Two ones, in bf16 or in f16.
template <bool FP8> constexpr unsigned ONES = FP8 ? 0x3c003c00 : 0x3f803f80;

// A pair of bf16 numbers in f16.
__device__ __forceinline__ unsigned halves_of(unsigned pair) {
    unsigned halves;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(__uint_as_float(pair & 0xffff0000u)), "f"(__uint_as_float(pair << 16)));
    return halves;
}

// Two numbers, rounded to bf16 or to f16.
template <bool FP8> __device__ __forceinline__ unsigned rounded_pair(float x, float y) {
    if constexpr (FP8) {
        const __half2 pair = __floats2half2_rn(x, y);
        return *reinterpret_cast<const unsigned *>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
        return *reinterpret_cast<const unsigned *>(&pair);
    }
}

__device__ __forceinline__ void ldmatrix(unsigned (&a)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address));
}

__device__ __forceinline__ void ldmatrix_transposed(unsigned (&a)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address));
}

// The transpose of an 8 x 8 matrix of bf16 whose row lane / 4, columns 2 (lane % 4) and the next, a lane holds.
__device__ __forceinline__ unsigned transposed(unsigned x) {
    unsigned y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// A tile of keys as the A operand, tokens x dims: matrices (tokens 0-7, dims 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
template <int HD> __device__ __forceinline__ void load_keys(unsigned (&a)[4], unsigned tile, unsigned k, unsigned lane) {
    ldmatrix(a, tile + (lane & 15) * (HD * 2) + (((2 * k + (lane >> 4)) ^ (lane & 7)) << 4));
}

// A tile of values as the A operand, dims x tokens: matrices (dims 0-7, tokens 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
template <int HD> __device__ __forceinline__ void load_values(unsigned (&a)[4], unsigned tile, unsigned d, unsigned lane) {
    const unsigned token = (lane & 7) + ((lane >> 4) << 3);
    ldmatrix_transposed(a, tile + token * (HD * 2) + (((2 * d + ((lane >> 3) & 1)) ^ (lane & 7)) << 4));
}

// What folding a leaf with maximum `leaf` into a state with maximum m multiplies each of them with. m becomes the
// maximum of both.
struct Weights {
    float state, leaf;
};

template <int HD> __device__ __forceinline__ Weights fold_maximum(float &m, float leaf) {
    const float c = score_scale<HD>(), both = fmaxf(m, leaf);
    const bool empty = leaf == minus_infinity();
    const Weights weights = {empty ? 1.0f : exp2_approx(__fmul_rn(__fsub_rn(m, both), c)),
                             empty ? -0.0f : exp2_approx(__fmul_rn(__fsub_rn(leaf, both), c))};
    m = both;
    return weights;
}

__device__ __forceinline__ float folded(float state, float leaf, Weights w) {
    return __fmaf_rn(leaf, w.leaf, __fmul_rn(state, w.state));
}
