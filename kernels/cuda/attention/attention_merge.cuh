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
#include "attention/attention_leaf.cuh"
#include "attention/attention_ring.cuh"

// M-tiles of 16 dims, of all of a block's heads: each warp has one, or OWN neighbouring ones of a head.
template <int HD, int HEADS> struct MTiles {
    static constexpr unsigned PARTS = HD / 16, ALL = HEADS * PARTS, OWN = (ALL + DECODE_WARPS - 1) / DECODE_WARPS;
    static_assert(OWN == 1 || ALL == OWN * DECODE_WARPS, "all warps have as many, or one at most");
};

template <int HD, int HEADS, int OWN>
__device__ __forceinline__ void store_partial(const DecodeArgs &args, unsigned index, unsigned item, const State<OWN> &state,
                                              unsigned warp, unsigned lane) {
    using M = MTiles<HD, HEADS>;
    const unsigned pairs = args.pairs(), pair = lane % 4;
    float4 *partial = args.partials + ((size_t)index * args.items + item) * (pairs * (HD / 2 + 1));
    if (pair >= pairs)
        return;
#pragma unroll
    for (int k = 0; k < OWN; k++) {
        const unsigned tile = warp * OWN + k;
        const float(&o)[4] = state.o[k];
        if (tile < M::ALL && args.head_of<HEADS>(2 * pair) == tile / M::PARTS)
            partial[pair * (HD / 2) + tile % M::PARTS * 8 + lane / 4] = make_float4(o[0], o[1], o[2], o[3]);
    }
    if (warp == 0 && lane < 4)
        partial[pairs * (HD / 2) + pair] = make_float4(state.m[0], state.m[1], state.l[0], state.l[1]);
}

// out = o * (1 / l) of a warp's dims.
template <int HD, int HEADS, int OWN>
__device__ __forceinline__ void write_out(const DecodeArgs &args, const Unit &unit, const State<OWN> &state, unsigned warp,
                                          unsigned lane) {
    using M = MTiles<HD, HEADS>;
    bf16 *out = args.out + args.query_offset(unit.segment.row, unit.item, HD) + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned query = lane % 4 * 2 + i;
        const float inverse = __frcp_rn(state.l[i]);
        if (query >= args.queries(unit.item))
            continue;
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const unsigned tile = warp * OWN + k, dim = tile % M::PARTS * 16;
            if (tile >= M::ALL || args.head_of<HEADS>(query) != tile / M::PARTS)
                continue;
            out[query * HD + dim] = __float2bfloat16_rn(__fmul_rn(state.o[k][i], inverse));
            out[query * HD + dim + 8] = __float2bfloat16_rn(__fmul_rn(state.o[k][i + 2], inverse));
        }
    }
}

// Of a state's m-tile k, whose element `second` of a pair of queries the four lanes of a quad hold among them: lane q takes o[q].
template <int OWN>
__device__ __forceinline__ Element element_of(const State<OWN> &state, unsigned k, unsigned pair, unsigned second, unsigned lane) {
    const unsigned from = (lane & ~3u) + pair;
    const auto get = [&](float value) { return __shfl_sync(FULL_WARP, value, from); };
    const float m[2] = {get(state.m[0]), get(state.m[1])}, l[2] = {get(state.l[0]), get(state.l[1])};
    float o[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        o[i] = get(OWN == 1 || k == 0 ? state.o[0][i] : state.o[OWN - 1][i]);
    const unsigned q = lane % 4;
    return {second ? m[1] : m[0], second ? l[1] : l[0], q < 2 ? (q == 0 ? o[0] : o[1]) : (q == 2 ? o[2] : o[3])};
}

// Partials on their way at once: leaves of one span.
#define MERGED_AT_ONCE 8
static_assert(SPAN_LEAVES % MERGED_AT_ONCE == 0, "a span begins with the first of them");

// Folds a row's partials of an item, and writes its output: each thread an element at a time, of its warp's m-tiles, many partials
// in flight. Partial `own` is `state`, not in memory; or none is. Counts none for the next launch.
// The loop is also hopper/layers/layers_attend_read.cuh's: what changes here in order changes there.
template <int HD, int HEADS, int OWN>
__device__ __forceinline__ void merge(const DecodeArgs &args, const Unit &unit, unsigned own, const State<OWN> &state,
                                      unsigned lane) {
    static_assert(OWN <= 2, "two m-tiles a warp");
    using M = MTiles<HD, HEADS>;
    const unsigned pairs = args.pairs(), size = pairs * (HD / 2 + 1) * 4, total = unit.segment.total;
    const unsigned leaf_of_0 = unit.segment.second_partial() - 1; // the last one of the row's first partial
    const float *partials = reinterpret_cast<const float *>(args.partials) +
                            ((size_t)unit.segment.base * args.items + unit.item) * size;
    const unsigned first_tile = threadIdx.x / 32 * OWN;
#pragma unroll 1
    for (unsigned n = threadIdx.x; n < pairs * (HD * 2); n += DECODE_READERS) {
        // Where all warps have m-tiles, a warp's elements are those of its tiles, k of OWN, pair by pair of their head's.
        constexpr bool ALL_HAVE = M::ALL >= DECODE_WARPS;
        const unsigned k = n / DECODE_READERS % OWN, its_pair = first_tile / M::PARTS * (pairs / HEADS) + n / DECODE_READERS / OWN;
        const unsigned its = its_pair * (HD * 2) + (first_tile % M::PARTS + k) * 32 + n % 32, e = ALL_HAVE ? its : n;
        const unsigned pair = e / (HD * 2), second = e % 2, quad = e % (HD * 2) / 4;
        const unsigned m_at = (pairs * (HD / 2) + pair) * 4 + second, l_at = m_at + 2;
        const Element mine = element_of(state, k, pair, second, lane);
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
        const unsigned before = count_partials(args.arrived_of(unit.segment.row, unit.item), count);
        const bool is_last = before + count == unit.segment.total;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(flag), "r"(is_last ? 1 : 0) : "memory");
    }
    readers_barrier();
    unsigned is_last;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(is_last) : "r"(flag) : "memory");
    return is_last;
}
