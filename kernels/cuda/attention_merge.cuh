// attention_merge: rows that several blocks share; the last of them to arrive folds what all left in memory.
//
//   partial   [pairs of queries][HD / 2] float4 of o, in the order (m-tile, lane / 4), then [pairs] float4 (m, m, l, l);
//             queries of a pair have the same kv head
//   partials  (a row's base + 0: the state behind its first segment; 1, 2, ...: each later leaf) * items + item
//
// 1. A block's partials are written before its readers' barrier, and thread 0's count releases them and acquires those that
//    were counted before; so the block that counts last sees all. It sets the count to 0 for the next launch.
// 2. Partials are folded in the order of their leaves, span by span, whoever wrote them and whenever.
// 3. A block that finds all others counted when it fetches its last values is the last: it keeps its own last partial, and
//    neither counts nor waits for memory but for the others' partials.
#pragma once
#include "attention_ring.cuh"

// What a warp holds of a state or leaf: m-tile `warp` of o, and m and l, which all warps have alike. Columns as in attention.cuh.
struct State {
    float m[2], l[2], o[4];

    __device__ __forceinline__ void clear() {
        m[0] = m[1] = minus_infinity();
        l[0] = l[1] = o[0] = o[1] = o[2] = o[3] = 0.0f;
    }
    template <int HD> __device__ __forceinline__ void fold(const State &leaf) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Weights w = fold_maximum<HD>(m[i], leaf.m[i]);
            l[i] = folded(l[i], leaf.l[i], w);
            o[i] = folded(o[i], leaf.o[i], w);
            o[i + 2] = folded(o[i + 2], leaf.o[i + 2], w);
        }
    }
};

template <int HD, int HEADS>
__device__ __forceinline__ void store_partial(const DecodeArgs &args, unsigned index, unsigned item, const State &state,
                                              unsigned warp, unsigned lane) {
    const unsigned pairs = args.pairs(), pair = lane % 4;
    float4 *partial = args.partials + ((size_t)index * args.items + item) * (pairs * (HD / 2 + 1));
    if (pair >= pairs)
        return;
    if (warp < HEADS * (HD / 16) && args.head_of<HEADS>(2 * pair) == warp / (HD / 16))
        partial[pair * (HD / 2) + warp % (HD / 16) * 8 + lane / 4] = make_float4(state.o[0], state.o[1], state.o[2], state.o[3]);
    if (warp == 0 && lane < 4)
        partial[pairs * (HD / 2) + pair] = make_float4(state.m[0], state.m[1], state.l[0], state.l[1]);
}

// out = o * (1 / l) of a warp's dims.
template <int HD, int HEADS>
__device__ __forceinline__ void write_out(const DecodeArgs &args, const Unit &unit, const State &state, unsigned warp,
                                          unsigned lane) {
    bf16 *out = args.out + args.query_offset(unit.segment.row, unit.item, HD) + warp % (HD / 16) * 16 + lane / 4;
    if (warp >= HEADS * (HD / 16))
        return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned query = lane % 4 * 2 + i;
        const float inverse = __frcp_rn(state.l[i]);
        if (query >= args.queries(unit.item) || args.head_of<HEADS>(query) != warp / (HD / 16))
            continue;
        out[query * HD] = __float2bfloat16_rn(__fmul_rn(state.o[i], inverse));
        out[query * HD + 8] = __float2bfloat16_rn(__fmul_rn(state.o[i + 2], inverse));
    }
}

// What a partial holds of one query and dim.
struct Element {
    float m, l, o;

    __device__ __forceinline__ static Element nothing() { return {minus_infinity(), 0.0f, 0.0f}; }
    // Of a state, whose element `second` of a pair of queries the four lanes of a quad hold among them: lane q takes o[q].
    __device__ __forceinline__ static Element of(const State &state, unsigned pair, unsigned second, unsigned lane) {
        const unsigned from = (lane & ~3u) + pair;
        const auto get = [&](float value) { return __shfl_sync(FULL_WARP, value, from); };
        const float m[2] = {get(state.m[0]), get(state.m[1])}, l[2] = {get(state.l[0]), get(state.l[1])};
        const float o[4] = {get(state.o[0]), get(state.o[1]), get(state.o[2]), get(state.o[3])};
        const unsigned q = lane % 4;
        return {second ? m[1] : m[0], second ? l[1] : l[0], q < 2 ? (q == 0 ? o[0] : o[1]) : (q == 2 ? o[2] : o[3])};
    }
    template <int HD> __device__ __forceinline__ void fold(Element leaf) {
        const Weights w = fold_maximum<HD>(m, leaf.m);
        l = folded(l, leaf.l, w);
        o = folded(o, leaf.o, w);
    }
};

// Partials on their way at once: leaves of one span.
#define MERGED_AT_ONCE 8
static_assert(SPAN_LEAVES % MERGED_AT_ONCE == 0, "a span begins with the first of them");

// Folds a row's partials of an item, and writes its output: each thread an element at a time, many partials in flight. Partial
// `own` is `state`, not in memory; or none is. Counts none for the next launch.
template <int HD, int HEADS>
__device__ __forceinline__ void merge(const DecodeArgs &args, const Unit &unit, unsigned own, const State &state,
                                      unsigned lane) {
    const unsigned pairs = args.pairs(), size = pairs * (HD / 2 + 1) * 4, total = unit.segment.total;
    const unsigned leaf_of_0 = unit.segment.second_partial() - 1; // the last one of the row's first partial
    const float *partials = reinterpret_cast<const float *>(args.partials) +
                            ((size_t)unit.segment.base * args.items + unit.item) * size;
#pragma unroll 1
    for (unsigned n = threadIdx.x; n < pairs * (HD * 2); n += DECODE_READERS) {
        // Of several heads each has warps of its own, which hold its dims.
        constexpr unsigned OWN = DECODE_READERS / HEADS;
        const unsigned here = n % DECODE_READERS / OWN * (pairs / HEADS * (HD * 2)) + n / DECODE_READERS * OWN + n % OWN;
        const unsigned e = HEADS == 1 ? n : here;
        const unsigned pair = e / (HD * 2), second = e % 2, quad = e % (HD * 2) / 4;
        const unsigned m_at = (pairs * (HD / 2) + pair) * 4 + second, l_at = m_at + 2;
        const Element mine = Element::of(state, pair, second, lane);
        Element merged = Element::nothing(), span = merged;
#pragma unroll 1
        for (int first = -(int)(leaf_of_0 % MERGED_AT_ONCE); first < (int)total; first += MERGED_AT_ONCE) {
            Element leaf[MERGED_AT_ONCE];
#pragma unroll
            for (int i = 0; i < MERGED_AT_ONCE; i++)
                if ((unsigned)(first + i) < total && first + i != own) {
                    const float *partial = partials + (size_t)(first + i) * args.items * size;
                    leaf[i] = {__ldcg(partial + m_at), __ldcg(partial + l_at), __ldcg(partial + e)};
                } else {
                    leaf[i] = mine;
                }
            if ((leaf_of_0 + first) % SPAN_LEAVES == 0) {
                merged.fold<HD>(span);
                span = Element::nothing();
            }
#pragma unroll
            for (int i = 0; i < MERGED_AT_ONCE; i++)
                if ((unsigned)(first + i) < total)
                    span.fold<HD>(leaf[i]);
        }
        merged.fold<HD>(span);
        const unsigned query = 2 * pair + second, dim = quad / 8 * 16 + quad % 8 + e / 2 % 2 * 8;
        if (query < args.queries(unit.item))
            args.out[args.query_offset(unit.segment.row, unit.item, HD) + query * HD + dim] =
                __float2bfloat16_rn(__fmul_rn(merged.o, __frcp_rn(merged.l)));
    }
    if (threadIdx.x == 0)
        *args.arrived_of(unit.segment.row, unit.item) = 0;
}

// Says that all of the block's partials of a row and item are in memory. Is it the last that does?
__device__ __forceinline__ bool arrives_last(const DecodeArgs &args, const Unit &unit, unsigned flag) {
    readers_barrier();
    if (threadIdx.x == 0) {
        const unsigned count = unit.segment.partials();
        unsigned before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(args.arrived_of(unit.segment.row, unit.item)), "r"(count)
                     : "memory");
        const bool is_last = before + count == unit.segment.total;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(flag), "r"(is_last ? 1 : 0) : "memory");
    }
    readers_barrier();
    unsigned is_last;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(is_last) : "r"(flag) : "memory");
    return is_last;
}
