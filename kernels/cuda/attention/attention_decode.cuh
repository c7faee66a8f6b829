// attention_decode: one token a row over its row's pages; out[row, head] = softmax(q K^T / sqrt(head_dim)) V.
//
//   q, out  [rows, kv_heads * group, head_dim] bf16      k, v  pages (attention.cuh), or FP8 ones (fp8_rows.cuh)
//   plan    attention_work.cuh      grid any      block DECODE_WARPS warps that read, and on Hopper one that fills the ring
//   moves   sum of min(kv_len, window) * kv_heads * head_dim * 4 bytes: every key and value once for its group of queries
//
// A block works on one unit at a time, all warps together, so that a unit is short and blocks end together:
//
//   keys      warp w scores a tile of each stage         maxima of all tiles  ── barrier ──> probabilities of its tiles
//   values    warp w makes some m-tiles of the output    probabilities of all tiles  <── barrier ──┘
//   then      folded into the state, or stored as a partial (attention_merge.cuh)
//
// 1. Every order of summation is attention.cuh's: a tile's scores over the dims, an m-tile's output over the tiles.
// 2. Values behind the sequence's end or before its window are zeroed in registers: p is 0 there, but 0 times what a page holds
//    may be NaN.
// 3. Maxima, probabilities and queries have one place each: who writes the next unit's is behind a barrier that everyone reaches
//    after reading this unit's.
// 4. Of FP8 operands are codes as f16 numbers, and queries and probabilities beside them are f16; scales multiply scores and
//    probabilities (attention.cuh).
#pragma once
#include "attention/attention_merge.cuh"

// A warp that reads, and the leaf at hand. Without a WINDOW rows see all positions up to their own, and nothing asks.
// Of HEADS kv heads side by side keys are rows of HEADS * HD dims: a query is zero in those of heads that are not its own, which
// changes no bit of a sum. Its output in their dims is nobody's.
template <int HD, int HEADS, int STAGES, bool WINDOW, bool FP8> struct Decoder {
    using S = Stages<HD, HEADS, STAGES, FP8>;
    static constexpr unsigned PARTS = MTiles<HD, HEADS>::PARTS, M_TILES = MTiles<HD, HEADS>::ALL, OWN = MTiles<HD, HEADS>::OWN;
    using Leaf = State<OWN>;
    const DecodeArgs &args;
    Ring<HD, HEADS, STAGES, FP8> ring;
    Place<S::TURNS> turn;                 // of queries
    unsigned probabilities, maxima, queries, flag; // shared memory: [tiles][lane] 8 bytes, [warps][8] floats, Queries, a word
    unsigned warp, lane;
    typename Keys<HD, FP8>::Lane places;
    Leaf state; // of the span at hand; that of the spans before it lies in shared memory

    static constexpr unsigned QUERY_BYTES = M_TILES * 256, STATE_BYTES = DECODE_READERS * sizeof(Leaf);
    static constexpr unsigned SCRATCH = LEAF_TILES * 256 + DECODE_WARPS * 32 + QUERY_BYTES + 16 + STATE_BYTES;

    __device__ __forceinline__ Decoder(const DecodeArgs &args, S stages, unsigned warp, unsigned lane)
        : args(args), ring(args, stages), probabilities(stages.end()), maxima(probabilities + LEAF_TILES * 256),
          queries(maxima + DECODE_WARPS * 32), flag(queries + QUERY_BYTES), warp(warp), lane(lane),
          places(lane, warp * OWN % M_TILES % PARTS, OWN) {
        state.clear();
    }

    // A turn's queries as B operands, in registers while keys are multiplied, and from leaf to leaf in shared memory, as pairs of them.
    struct Queries {
        uint4 pairs[M_TILES / 2];

        __device__ __forceinline__ static unsigned at(unsigned queries, unsigned k, unsigned lane) {
            return queries + (k / 2 * 32 + lane) * 16 + k % 2 * 8;
        }
        __device__ __forceinline__ Queries(unsigned queries, unsigned lane) {
#pragma unroll
            for (int i = 0; i < M_TILES / 2; i++)
                pairs[i] = load_words(at(queries, 2 * i, lane));
        }
        __device__ __forceinline__ void get(unsigned (&q)[2], unsigned k) const {
            const uint4 pair = pairs[k / 2];
            q[0] = k % 2 ? pair.z : pair.x;
            q[1] = k % 2 ? pair.w : pair.y;
        }
    };
    // Makes operands of the turn's queries, the warps some each; all are there when it returns. Columns without a query are zeros.
    __device__ __forceinline__ void arrange_queries(const Unit &unit) {
        const unsigned row = ring.stages.queries(turn.at) + lane / 4 * (HD * 2) + lane % 4 * 4;
        const bool exists = lane / 4 < args.queries(unit.item);
        for (unsigned k = warp; k < M_TILES; k += DECODE_WARPS) {
            const bool own = exists && (HEADS == 1 || args.head_of<HEADS>(lane / 4) == k / PARTS);
            unsigned q[2];
#pragma unroll
            for (int half = 0; half < 2; half++)
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(q[half]) : "r"(row + k % PARTS * 32 + half * 16) : "memory");
#pragma unroll
            for (int half = 0; FP8 && half < 2; half++)
                q[half] = halves_of(q[half]);
            asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(Queries::at(queries, k, lane)), "r"(own ? q[0] : 0),
                         "r"(own ? q[1] : 0)
                         : "memory");
        }
        turn.advance();
        readers_barrier();
    }
    // The first position that a row of so many sees.
    __device__ __forceinline__ unsigned first_seen(const Unit &unit) const {
        const unsigned kv_len = unit.segment.kv_len;
        return WINDOW && kv_len > args.window ? kv_len - args.window : 0;
    }
    // Is the whole leaf seen? Then nothing is masked, and nobody asks.
    __device__ __forceinline__ bool is_whole(const Unit &unit) const {
        return (unit.leaf + 1) * LEAF <= unit.segment.kv_len && first_seen(unit) <= unit.leaf * LEAF;
    }
    // Scores of the warp's tile of a section, `index` in the leaf; -infinity behind the sequence's end and before its window.
    __device__ __forceinline__ void score_tile(float (&s)[4], const Queries &own, const Unit &unit, unsigned index, bool whole) const {
        s[0] = s[1] = s[2] = s[3] = 0.0f;
        if (whole || index < unit.tiles()) {
            const unsigned tile = ring.stages.tokens(ring.place.at) + warp * S::TILE_BYTES;
            float scale[HEADS][2];
#pragma unroll
            for (int head = 0; head < HEADS; head++) {
                const unsigned scales = ring.stages.scales(ring.place.at, head) + warp * TILE * 2;
                Keys<HD, FP8> keys(tile + head * S::HEAD_BYTES, scales, places);
#pragma unroll
                for (int k = 0; k < PARTS; k++) {
                    unsigned a[4], q[2];
                    keys.load(a, k);
                    own.get(q, head * PARTS + k);
                    mma_kept<FP8>(s, a, q);
                }
                scale[head][0] = keys.scale(false);
                scale[head][1] = keys.scale(true);
            }
#pragma unroll
            for (int i = 0; FP8 && i < 4; i++)
                s[i] = __fmul_rn(s[i], args.head_of<HEADS>(lane % 4 * 2 + i % 2) ? scale[HEADS - 1][i / 2] : scale[0][i / 2]);
        }
        if (whole)
            return;
        const unsigned token = unit.leaf * LEAF + index * TILE + lane / 4, seen = first_seen(unit);
        if (token >= unit.segment.kv_len || token < seen)
            s[0] = s[1] = minus_infinity();
        if (token + 8 >= unit.segment.kv_len || token + 8 < seen)
            s[2] = s[3] = minus_infinity();
    }
    // Where the lane's part of a tile's probabilities lies.
    __device__ __forceinline__ unsigned probabilities_of(unsigned tile) const { return probabilities + tile * 256 + lane * 8; }
    // Puts the probabilities of the warp's tiles where all find them; all have theirs there when it returns.
    __device__ __forceinline__ void share_probabilities(const float (&s)[S::SECTIONS][4], const float (&m)[2]) const {
#pragma unroll
        for (int part = 0; part < S::SECTIONS; part++)
            store_probabilities<HD, FP8>(probabilities_of(part * DECODE_WARPS + warp), s[part], m);
        readers_barrier();
    }
    // Tile i of the section at hand as the operands that make the warp's m-tiles. Where a block has fewer of these than warps, several have
    // the same.
    __device__ __forceinline__ void load_tile(unsigned (&a)[OWN][4], unsigned i) const {
        const unsigned m_tile = warp * OWN % M_TILES, head = m_tile / PARTS;
        const unsigned tile = ring.stages.tokens(ring.place.at) + head * S::HEAD_BYTES + i * S::TILE_BYTES;
#pragma unroll
        for (int k = 0; k < OWN; k++)
            load_values<HD>(a[k], tile, m_tile % PARTS + k, lane);
    }
    // Adds tile i of the section at hand, in fp8.
    __device__ __forceinline__ void add_codes(Leaf &leaf, float (&l)[4], unsigned i, unsigned probabilities,
                                              const unsigned (&seen)[2]) const {
        const unsigned head = warp * OWN % M_TILES / PARTS;
        const unsigned tile = ring.stages.tokens(ring.place.at) + head * S::HEAD_BYTES + i * S::TILE_BYTES;
        fp8_add_tile<HD>(leaf.o, l, probabilities, tile, ring.stages.scales(ring.place.at, head) + i * TILE * 2, places, seen);
    }
    // Adds a section to the warp's m-tiles of the leaf's output, and to the sums of its probabilities.
    template <bool WHOLE> __device__ __forceinline__ void add_section(Leaf &leaf, float (&l)[4], const Unit &unit, unsigned section) const {
        const unsigned ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
        const unsigned here = unit.tiles();
        const unsigned valid = unit.segment.kv_len - unit.leaf * LEAF; // tokens
        const unsigned seen = first_seen(unit), begin = unit.leaf * LEAF;
        const unsigned hidden = seen > begin ? seen - begin : 0; // of them, the first ones
#pragma unroll
        for (int i = 0; i < DECODE_WARPS; i++) {
            const unsigned j = section * DECODE_WARPS + i;
            if (WHOLE || (j < here && (j + 1) * TILE > hidden)) {
                if constexpr (FP8) {
                    unsigned seen_by[2] = {FULL_WARP, FULL_WARP};
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        if (!WHOLE && (j + 1) * TILE > valid)
                            seen_by[half] &= before(valid - j * TILE, half, lane);
                        if (!WHOLE && j * TILE < hidden)
                            seen_by[half] &= from(hidden - j * TILE, half, lane);
                    }
                    add_codes(leaf, l, i, probabilities_of(j), seen_by);
                    continue;
                }
                unsigned p[2], a[OWN][4];
                load_probabilities(p, probabilities_of(j));
                mma(l, ones, p);
                load_tile(a, i);
#pragma unroll
                for (int k = 0; k < OWN; k++) {
                    if (!WHOLE && (j + 1) * TILE > valid)
                        zero_behind(a[k], valid - j * TILE, lane);
                    if (!WHOLE && j * TILE < hidden)
                        zero_before(a[k], hidden - j * TILE, lane);
                    mma(leaf.o[k], a[k], p);
                }
            }
        }
    }
    // The warp's m-tiles of the leaf's output, and the sums of its probabilities. Of a whole leaf loads of all of a section's tiles
    // are on their way at once.
    __device__ __forceinline__ void add_values(Leaf &leaf, const Unit &unit, bool whole) {
        float l[4] = {};
#pragma unroll
        for (int k = 0; k < OWN; k++)
            leaf.o[k][0] = leaf.o[k][1] = leaf.o[k][2] = leaf.o[k][3] = 0.0f;
#pragma unroll 1
        for (int section = 0; section < S::SECTIONS; section++) {
            if (section > 0)
                ring.take();
            if (FP8 && whole)
                add_section<true>(leaf, l, unit, section);
            else
                add_section<false>(leaf, l, unit, section);
            ring.release();
        }
        leaf.l[0] = l[0];
        leaf.l[1] = l[1];
        if constexpr (FP8)
            lower(leaf.o);
    }
    // Where the thread keeps words `index` of its state of spans that have ended: m-tiles of o, then m and l.
    __device__ __forceinline__ unsigned kept(unsigned index) const { return flag + 16 + (index * DECODE_READERS + threadIdx.x) * 16; }
    // Folds the span at hand into those before it.
    __device__ __forceinline__ void fold_spans() {
        Leaf before = Leaf::loaded([&](unsigned index) { return kept(index); });
        before.template fold<HD>(state);
        state = before;
    }
    // What becomes of a leaf. `others_arrived`: all that share the row, at its segment's last leaf.
    __device__ __forceinline__ void finish(const Leaf &leaf, const Unit &unit, bool others_arrived) {
        const Segment &segment = unit.segment;
        const bool is_last = unit.is_last(), folds = segment.begins_row();
        if (!folds) {
            state = leaf;
        } else {
            state.template fold<HD>(leaf);
            if ((is_last || unit.ends_span()) && !unit.is_of_first_span())
                fold_spans();
        }
        const unsigned index = segment.at + (folds ? 0 : unit.leaf - segment.first);
        bool merges = others_arrived;
        if (is_last && segment.is_whole_row()) {
            write_out<HD, HEADS>(args, unit, state, warp, lane);
        } else if (!others_arrived && (is_last || !folds)) {
            store_partial<HD, HEADS>(args, index, unit.item, state, warp, lane);
            merges = is_last && arrives_last(args, unit, flag);
        }
        if (merges)
            merge<HD, HEADS>(args, unit, others_arrived ? index - segment.base : segment.total, state, lane);
        if (folds && !is_last && unit.ends_span())
            state.store([&](unsigned index) { return kept(index); });
        if (is_last || !folds || unit.ends_span())
            state.clear();
    }
    __device__ __forceinline__ void run() {
        Unit unit;
        for (bool begins = true;; begins = unit.is_last()) {
            Leaf leaf;
            float s[S::SECTIONS][4];
            ring.take();
            if (begins) {
                unit.load(ring.stages.unit(ring.place.at));
                if (unit.is_end())
                    break;
                arrange_queries(unit);
            } else {
                unit.leaf++;
            }
            const bool whole = is_whole(unit);
            const Queries own(queries, lane);
#pragma unroll
            for (int section = 0; section < S::SECTIONS; section++) {
                if (section > 0)
                    ring.take();
                score_tile(s[section], own, unit, section * DECODE_WARPS + warp, whole);
                ring.release();
            }
            share_maxima<DECODE_WARPS>(leaf.m, s, maxima, warp, lane, readers_barrier);
            share_probabilities(s, leaf.m);
            ring.take();
            const bool others_arrived = unit.is_last() && ring.others_arrived();
            add_values(leaf, unit, whole);
            finish(leaf, unit, others_arrived);
        }
    }
};

template <int HD, int HEADS, int STAGES, bool WINDOW, bool FP8>
__device__ __forceinline__ void decode(DecodeArgs args, unsigned char *shared) {
    const Stages<HD, HEADS, STAGES, FP8> stages = {(unsigned)__cvta_generic_to_shared(shared)};
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    args.derive<HEADS>();
    if (blockIdx.x >= args.turns)
        return;
    prepare(stages);
#if BULK_COPIES
    if (warp == DECODE_WARPS) {
        Filler<HD, HEADS, STAGES, FP8>(args, stages, lane).run();
        args.wait_beside();
        return;
    }
    args.wait();
#endif
    Decoder<HD, HEADS, STAGES, WINDOW, FP8>(args, stages, warp, lane).run();
}
