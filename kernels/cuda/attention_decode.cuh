// attention_decode: one token a row over its row's pages; out[row, head] = softmax(q K^T / sqrt(head_dim)) V.
//
//   q, out  [rows, kv_heads * group, head_dim] bf16      k, v  pages (attention.cuh), or FP8 ones (fp8_rows.cuh)
//   plan    attention_work.cuh      grid any      block 256 threads that read, and on Hopper a warp that fills the ring
//   moves   sum of min(kv_len, window) * kv_heads * head_dim * 4 bytes: every key and value once for its group of queries
//
// A block works on one unit at a time, all warps together, so that a unit is short and blocks end together:
//
//   keys      warp w scores tile w                   maxima of all tiles  ── barrier ──> probabilities of tile w
//   values    warp w makes m-tile w of the output    probabilities of all tiles  <── barrier ──┘
//   then      folded into the state, or stored as a partial (attention_merge.cuh)
//
// 1. Every order of summation is attention.cuh's: tile w's scores over the dims, an m-tile's output over the tiles.
// 2. Values behind the sequence's end or before its window are zeroed in registers: p is 0 there, but 0 times what a page holds
//    may be NaN.
// 3. Maxima and probabilities have one place each: who writes the next unit's is behind a barrier that everyone reaches
//    after reading this unit's.
// 4. Of FP8 a tile is widened in registers to the bf16 numbers that it means: from there on all is the same, bit by bit.
#pragma once
#include "attention_merge.cuh"

// A tile of keys.
template <int HD, bool FP8> struct Keys : Fp8Keys<HD> {
    using Fp8Keys<HD>::Fp8Keys;
};
template <int HD> struct Keys<HD, false> {
    unsigned tile, lane;

    __device__ __forceinline__ Keys(unsigned tile, unsigned, unsigned lane) : tile(tile), lane(lane) {}
    __device__ __forceinline__ void load(unsigned (&a)[4], unsigned k) const { load_keys<HD>(a, tile, k, lane); }
};

// A warp that reads, and the leaf at hand. Without a WINDOW rows see all positions up to their own, and nothing asks.
// Of HEADS kv heads side by side keys are rows of HEADS * HD dims: a query is zero in those of heads that are not its own, which
// changes no bit of a sum. Its output in their dims is nobody's.
template <int HD, int HEADS, int STAGES, bool WINDOW, bool FP8> struct Decoder {
    static constexpr unsigned PARTS = HD / 16, M_TILES = HEADS * PARTS; // of 16 dims, of a head and of all
    const DecodeArgs &args;
    Ring<HD, HEADS, STAGES, FP8> ring;
    unsigned probabilities, maxima, flag; // shared memory: [tiles][lane] 8 bytes, [tiles][8] floats, a word
    unsigned warp, lane;
    unsigned q[M_TILES][2];
    State state; // of the span at hand; that of the spans before it lies in shared memory

    static constexpr unsigned STATE_BYTES = DECODE_READERS * sizeof(State), SCRATCH = LEAF_TILES * (256 + 32) + 16 + STATE_BYTES;

    __device__ __forceinline__ Decoder(const DecodeArgs &args, Stages<HD, HEADS, STAGES, FP8> stages, unsigned warp, unsigned lane)
        : args(args), ring(args, stages), probabilities(stages.end()), maxima(probabilities + LEAF_TILES * 256),
          flag(maxima + LEAF_TILES * 32), warp(warp), lane(lane) {
        state.clear();
    }

    // The turn's queries as B operands; columns without a query are zeros.
    __device__ __forceinline__ void load_queries(const Unit &unit) {
        const unsigned row = ring.stages.queries(ring.place.at) + lane / 4 * (HD * 2) + lane % 4 * 4;
        const bool exists = lane / 4 < args.queries(unit.item);
#pragma unroll
        for (int k = 0; k < M_TILES; k++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool own = HEADS == 1 || args.head_of<HEADS>(lane / 4) == k / PARTS;
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(q[k][half]) : "r"(row + k % PARTS * 32 + half * 16) : "memory");
                q[k][half] = exists && own ? q[k][half] : 0;
            }
    }
    // The first position that a row of so many sees.
    __device__ __forceinline__ unsigned first_seen(const Unit &unit) const {
        const unsigned kv_len = unit.segment.kv_len;
        return WINDOW && kv_len > args.window ? kv_len - args.window : 0;
    }
    // Scores of the warp's tile; -infinity behind the sequence's end and before its window.
    __device__ __forceinline__ void score_tile(float (&s)[4], const Unit &unit) const {
        s[0] = s[1] = s[2] = s[3] = 0.0f;
        if (warp < unit.tiles()) {
            const unsigned tile = ring.stages.tokens(ring.place.at) + warp * ring.stages.TILE_BYTES;
#pragma unroll
            for (int head = 0; head < HEADS; head++) {
                const unsigned scales = ring.stages.scales(ring.place.at, head) + warp * TILE * 2;
                Keys<HD, FP8> keys(tile + head * ring.stages.HEAD_BYTES, scales, lane);
#pragma unroll
                for (int k = 0; k < PARTS; k++) {
                    unsigned a[4];
                    keys.load(a, k);
                    mma(s, a, q[head * PARTS + k]);
                }
            }
        }
        const unsigned token = unit.leaf * LEAF + warp * TILE + lane / 4, seen = first_seen(unit);
        if (token >= unit.segment.kv_len || token < seen)
            s[0] = s[1] = minus_infinity();
        if (token + 8 >= unit.segment.kv_len || token + 8 < seen)
            s[2] = s[3] = minus_infinity();
    }
    // The leaf's maxima, from those of all tiles.
    __device__ __forceinline__ void share_maxima(float (&m)[2], const float (&s)[4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = fmaxf(s[i], s[i + 2]);
            m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 4));
            m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 8));
            m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 16));
        }
        const unsigned at = maxima + lane % 4 * 8;
        if (lane < 4)
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + warp * 32), "f"(m[0]), "f"(m[1]) : "memory");
        readers_barrier();
#pragma unroll
        for (int j = 0; j < LEAF_TILES; j++) {
            float x, y;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(at + j * 32) : "memory");
            m[0] = fmaxf(m[0], x);
            m[1] = fmaxf(m[1], y);
        }
    }
    // Puts the warp's tile's probabilities where all find them, as B operands; all have theirs there when it returns.
    __device__ __forceinline__ void share_probabilities(const float (&s)[4], const float (&m)[2]) const {
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
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(probabilities + warp * 256 + lane * 8), "r"(p[0]), "r"(p[1])
                     : "memory");
        readers_barrier();
    }
    // The warp's m-tile of the leaf's output, and the sums of its probabilities.
    __device__ __forceinline__ void add_values(State &leaf, const Unit &unit) const {
        if constexpr (FP8)
            if (unit.tiles() == LEAF_TILES && (unit.leaf + 1) * LEAF <= unit.segment.kv_len && first_seen(unit) <= unit.leaf * LEAF)
                return add_whole(leaf);
        const unsigned ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
        const unsigned head = warp % M_TILES / PARTS, here = unit.tiles();
        const unsigned values = ring.stages.tokens(ring.place.at) + head * ring.stages.HEAD_BYTES;
        const unsigned valid = unit.segment.kv_len - unit.leaf * LEAF; // tokens
        const unsigned seen = first_seen(unit), begin = unit.leaf * LEAF;
        const unsigned hidden = seen > begin ? seen - begin : 0; // of them, the first ones
        float l[4] = {};
        leaf.o[0] = leaf.o[1] = leaf.o[2] = leaf.o[3] = 0.0f;
#pragma unroll
        for (int j = 0; j < LEAF_TILES; j++)
            if (j < here && (j + 1) * TILE > hidden) {
                unsigned p[2], a[4];
                asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                             : "=r"(p[0]), "=r"(p[1])
                             : "r"(probabilities + j * 256 + lane * 8)
                             : "memory");
                mma(l, ones, p);
                if constexpr (FP8)
                    fp8_load_values<HD>(a, values + j * ring.stages.TILE_BYTES,
                                        ring.stages.scales(ring.place.at, head) + j * TILE * 2, warp % PARTS, lane);
                else
                    load_values<HD>(a, values + j * ring.stages.TILE_BYTES, warp % PARTS, lane);
                if ((j + 1) * TILE > valid)
                    zero_behind(a, valid - j * TILE);
                if (j * TILE < hidden)
                    zero_before(a, hidden - j * TILE);
                mma(leaf.o, a, p);
            }
        leaf.l[0] = l[0];
        leaf.l[1] = l[1];
    }
    // The same of a leaf of which nothing is masked: nobody asks, so that loads of all tiles are on their way at once.
    __device__ __forceinline__ void add_whole(State &leaf) const {
        const unsigned ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
        const unsigned head = warp % M_TILES / PARTS, values = ring.stages.tokens(ring.place.at) + head * ring.stages.HEAD_BYTES;
        const unsigned scales = ring.stages.scales(ring.place.at, head);
        float l[4] = {};
        leaf.o[0] = leaf.o[1] = leaf.o[2] = leaf.o[3] = 0.0f;
#pragma unroll
        for (int j = 0; j < LEAF_TILES; j++) {
            unsigned p[2], a[4];
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(p[0]), "=r"(p[1]) : "r"(probabilities + j * 256 + lane * 8));
            fp8_load_values<HD>(a, values + j * ring.stages.TILE_BYTES, scales + j * TILE * 2, warp % PARTS, lane);
            mma(l, ones, p);
            mma(leaf.o, a, p);
        }
        leaf.l[0] = l[0];
        leaf.l[1] = l[1];
    }
    // Zeroes what belongs to tokens from `valid` on in a tile of values.
    __device__ __forceinline__ void zero_behind(unsigned (&a)[4], unsigned valid) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned token = lane % 4 * 2 + i / 2 * 8;
            a[i] &= token + 1 < valid ? 0xffffffffu : token < valid ? 0xffffu : 0;
        }
    }
    // Zeroes what belongs to the first `hidden` tokens in a tile of values.
    __device__ __forceinline__ void zero_before(unsigned (&a)[4], unsigned hidden) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned token = lane % 4 * 2 + i / 2 * 8;
            a[i] &= token >= hidden ? 0xffffffffu : token + 1 >= hidden ? 0xffff0000u : 0;
        }
    }
    // Where the thread keeps its state of spans that have ended.
    __device__ __forceinline__ unsigned kept() const { return flag + 16 + threadIdx.x * 16; }
    __device__ __forceinline__ void keep_spans() const {
        store_words(kept(), {__float_as_uint(state.o[0]), __float_as_uint(state.o[1]), __float_as_uint(state.o[2]),
                             __float_as_uint(state.o[3])});
        store_words(kept() + STATE_BYTES / 2, {__float_as_uint(state.m[0]), __float_as_uint(state.m[1]),
                                               __float_as_uint(state.l[0]), __float_as_uint(state.l[1])});
    }
    // Folds the span at hand into those before it.
    __device__ __forceinline__ void fold_spans() {
        const uint4 o = load_words(kept()), ml = load_words(kept() + STATE_BYTES / 2);
        State before = {{__uint_as_float(ml.x), __uint_as_float(ml.y)},
                        {__uint_as_float(ml.z), __uint_as_float(ml.w)},
                        {__uint_as_float(o.x), __uint_as_float(o.y), __uint_as_float(o.z), __uint_as_float(o.w)}};
        before.fold<HD>(state);
        state = before;
    }
    // What becomes of a leaf. `others_arrived`: all that share the row, at its segment's last leaf.
    __device__ __forceinline__ void finish(const State &leaf, const Unit &unit, bool others_arrived) {
        const Segment &segment = unit.segment;
        const bool is_last = unit.is_last(), folds = segment.begins_row();
        if (!folds) {
            state = leaf;
        } else {
            state.fold<HD>(leaf);
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
            keep_spans();
        if (is_last || !folds || unit.ends_span())
            state.clear();
    }
    __device__ __forceinline__ void run() {
        while (true) {
            Unit unit;
            State leaf;
            float s[4];
            ring.take();
            unit.load(ring.stages.unit(ring.place.at));
            if (unit.is_end())
                break;
            if (unit.is_first())
                load_queries(unit);
            score_tile(s, unit);
            ring.release();
            share_maxima(leaf.m, s);
            share_probabilities(s, leaf.m);
            ring.take();
            const bool others_arrived = unit.is_last() && ring.others_arrived();
            add_values(leaf, unit);
            ring.release();
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
        return;
    }
    dependent_wait();
#endif
    Decoder<HD, HEADS, STAGES, WINDOW, FP8>(args, stages, warp, lane).run();
}
