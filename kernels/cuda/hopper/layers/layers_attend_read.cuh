// The warps of layers_attend.cuh that read a group's ring: scores, probabilities and outputs of leaf after leaf, folded or left as partials.
//
//   read      attention_decode.cuh's sums, bit by bit: a warp scores tiles w and w + 4, makes m-tiles 2 w and 2 w + 1
#pragma once

#include "attention/attention_leaf.cuh"
#include "hopper/layers/layers_attend_ring.cuh"

// A warp that reads.
template <bool FP8> struct Reader {
    using Shared = Attender<FP8>;
    using KeysTile = Keys<HEAD_DIM, FP8>;
    using Sums = State<2>;
    static constexpr unsigned TILE_BYTES = Shared::TILE_BYTES;
    const Layers &args;
    const Shared shared;
    const unsigned warp, lane;
    const typename KeysTile::Lane places;
    Place<Shared::STAGES> place;
    unsigned q[8][2]; // the turn's queries as B operands
    Sums state;       // of the span at hand; that of the spans before it lies in shared memory
    Segment segment;
    unsigned item, leaf, phase;

    __device__ __forceinline__ Reader(const Layers &args, Shared shared, unsigned warp, unsigned lane)
        : args(args), shared(shared), warp(warp), lane(lane), places(lane, 2 * warp, 2) {
        state.clear();
    }
    // Of the group's warps that read.
    __device__ __forceinline__ void sync() const { sync_threads(1 + shared.group, READERS * 32); }

    // Each lane has read the stage.
    __device__ __forceinline__ void release(unsigned stage) const { barrier_arrive(shared.empty(stage)); }
    __device__ __forceinline__ void load_unit() {
        const unsigned at = shared.unit(place.at);
        const uint4 a = load_words(at), b = load_words(at + 16), c = load_words(at + 32);
        segment = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        item = c.x, leaf = c.y, phase = c.z;
    }
    __device__ __forceinline__ void load_queries() {
        const unsigned row = shared.queries(place.at) + lane / 4 * (HEAD_DIM * 2) + lane % 4 * 4;
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                q[k][half] = 0;
                if (lane / 4 < GROUP)
                    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(q[k][half]) : "r"(row + k * 32 + half * 16) : "memory");
                if (FP8)
                    q[k][half] = halves_of(q[k][half]);
            }
    }
    __device__ __forceinline__ KeysTile keys_of(unsigned tile) const {
        return {shared.tokens(place.at) + tile * TILE_BYTES, shared.scales(place.at) + tile * (TILE * 2), places};
    }
    // A tile of values as operands of the warp's m-tiles.
    __device__ __forceinline__ void load_tile(unsigned (&a)[2][4], unsigned tile) const {
        const unsigned at = shared.tokens(place.at) + tile * TILE_BYTES;
#pragma unroll
        for (int k = 0; k < 2; k++)
            load_values<HEAD_DIM>(a[k], at, 2 * warp + k, lane);
    }
    // Adds a tile of values in fp8.
    __device__ __forceinline__ void add_codes(Sums &sum, float (&l)[4], unsigned tile, const unsigned (&seen)[2]) const {
        fp8_add_tile<HEAD_DIM>(sum.o, l, probabilities_of(tile), shared.tokens(place.at) + tile * TILE_BYTES,
                               shared.scales(place.at) + tile * (TILE * 2), places, seen);
    }
    // Scores of codes become those of keys.
    __device__ __forceinline__ void scale(float (&s)[4], const KeysTile &keys) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float scale = keys.scale(half);
            s[2 * half] = __fmul_rn(s[2 * half], scale);
            s[2 * half + 1] = __fmul_rn(s[2 * half + 1], scale);
        }
    }
    // Scores of the warp's tiles; -infinity behind the sequence's end.
    __device__ __forceinline__ void score(float (&s)[2][4], bool whole) const {
        const unsigned tokens = shared.tokens(place.at), tiles = (segment.kv_len - leaf * LEAF + TILE - 1) / TILE;
#pragma unroll
        for (int j = 0; j < 2; j++)
            s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
        if (FP8 && whole) {
            KeysTile keys[2] = {keys_of(warp), keys_of(warp + READERS)};
#pragma unroll
            for (int k = 0; k < 8; k++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    unsigned a[4];
                    keys[j].load(a, k);
                    mma_kept<FP8>(s[j], a, q[k]);
                }
#pragma unroll
            for (int j = 0; j < 2; j++)
                scale(s[j], keys[j]);
            return;
        }
        if (whole) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                unsigned a[4][2][4];
#pragma unroll
                for (int k = 0; k < 4; k++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        load_keys<HEAD_DIM>(a[k][j], tokens + (warp + READERS * j) * TILE_BYTES, 4 * half + k, lane);
#pragma unroll
                for (int k = 0; k < 4; k++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        mma(s[j], a[k][j], q[4 * half + k]);
            }
            return;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const unsigned tile = warp + READERS * j, token = leaf * LEAF + tile * TILE + lane / 4;
            if (tile < tiles) {
                KeysTile keys = keys_of(tile);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    unsigned a[4];
                    keys.load(a, k);
                    mma_kept<FP8>(s[j], a, q[k]);
                }
                if (FP8)
                    scale(s[j], keys);
            }
            if (token >= segment.kv_len)
                s[j][0] = s[j][1] = minus_infinity();
            if (token + 8 >= segment.kv_len)
                s[j][2] = s[j][3] = minus_infinity();
        }
    }
    __device__ __forceinline__ unsigned probabilities_of(unsigned tile) const {
        return shared.probabilities() + tile * 256 + lane * 8;
    }
    // The warp's m-tiles of the leaf's output, and the sums of its probabilities.
    __device__ __forceinline__ void add_values(Sums &sum, bool whole) const {
        const unsigned valid = segment.kv_len - leaf * LEAF;
        const unsigned ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
        float l[4] = {};
#pragma unroll
        for (int k = 0; k < 2; k++)
            sum.o[k][0] = sum.o[k][1] = sum.o[k][2] = sum.o[k][3] = 0.0f;
        if constexpr (FP8) { // registers are for operands
            const unsigned all[2] = {FULL_WARP, FULL_WARP};
            if (whole) {
#pragma unroll
                for (int j = 0; j < LEAF_TILES; j++)
                    add_codes(sum, l, j, all);
            } else {
#pragma unroll
                for (int j = 0; j < LEAF_TILES; j++)
                    if (j * TILE < valid) {
                        const unsigned seen[2] = {before(valid - j * TILE, 0, lane), before(valid - j * TILE, 1, lane)};
                        add_codes(sum, l, j, seen);
                    }
            }
            lower(sum.o);
        } else if (whole) {
            unsigned p[LEAF_TILES][2], a[LEAF_TILES][2][4];
#pragma unroll
            for (int j = 0; j < LEAF_TILES; j++)
                load_probabilities(p[j], probabilities_of(j));
#pragma unroll
            for (int j = 0; j < LEAF_TILES; j++)
                load_tile(a[j], j);
#pragma unroll
            for (int j = 0; j < LEAF_TILES; j++) {
                mma(l, ones, p[j]);
#pragma unroll
                for (int k = 0; k < 2; k++)
                    mma(sum.o[k], a[j][k], p[j]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < LEAF_TILES; j++) {
                if (j * TILE >= valid)
                    continue;
                unsigned p[2];
                load_probabilities(p, probabilities_of(j));
                mma(l, ones, p);
                unsigned a[2][4];
                load_tile(a, j);
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    if ((j + 1) * TILE > valid)
                        zero_behind(a[k], valid - j * TILE, lane);
                    mma(sum.o[k], a[k], p);
                }
            }
        }
        sum.l[0] = l[0];
        sum.l[1] = l[1];
    }
    // Where the thread keeps words `index` of its state of spans that have ended: m-tiles of o, then m and l. Lanes with no query's columns
    // keep nothing, and load what they need not have.
    __device__ __forceinline__ unsigned kept(unsigned index) const {
        return shared.kept() + (index * READERS * 8 + warp * 8 + lane / 4) * 16;
    }
    // Folds the span at hand into those before it.
    __device__ __forceinline__ void fold_spans() {
        Sums before = Sums::loaded([&](unsigned index) { return kept(index); });
        before.fold<HEAD_DIM>(state);
        state = before;
    }
    // Where the row's output of the turn's first query goes.
    __device__ __forceinline__ __nv_bfloat16 *out() const {
        return args.attended + (size_t)(segment.row + (phase % 2 ? args.rows[0] : 0)) * Q_WIDTH + item * (GROUP * HEAD_DIM);
    }
    __device__ __forceinline__ void write_out() const {
        if (lane % 4 != 0)
            return;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float inverse = __frcp_rn(state.l[i]);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                __nv_bfloat16 *at = out() + i * HEAD_DIM + (2 * warp + k) * 16 + lane / 4;
                at[0] = __float2bfloat16_rn(__fmul_rn(state.o[k][i], inverse));
                at[8] = __float2bfloat16_rn(__fmul_rn(state.o[k][i + 2], inverse));
            }
        }
    }
    __device__ __forceinline__ float4 *partial(unsigned index) const {
        return (phase % 2 ? args.partials[1] : args.partials[0]) + ((size_t)index * KV_HEADS + item) * ITEM_PARTIAL;
    }
    __device__ __forceinline__ unsigned *arrived() const {
        return (phase % 2 ? args.arrived[1] : args.arrived[0]) + segment.row * KV_HEADS + item;
    }
    __device__ __forceinline__ void store_partial(unsigned index) const {
        float4 *to = partial(index);
        if (lane % 4 != 0)
            return;
#pragma unroll
        for (int k = 0; k < 2; k++)
            to[(2 * warp + k) * 8 + lane / 4] = make_float4(state.o[k][0], state.o[k][1], state.o[k][2], state.o[k][3]);
        if (warp == 0 && lane == 0)
            to[HEAD_DIM / 2] = make_float4(state.m[0], state.m[1], state.l[0], state.l[1]);
    }
    // Says that all of the turn's partials are in memory. Is it the row's last turn that does?
    __device__ __forceinline__ bool arrives_last() const {
        sync();
        if (warp == 0 && lane == 0) {
            const unsigned count = segment.partials(), before = count_partials(arrived(), count);
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared.is_last()), "r"(before + count == segment.total ? 1 : 0) : "memory");
        }
        sync();
        unsigned is_last;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(is_last) : "r"(shared.is_last()) : "memory");
        return is_last;
    }
    // Folds a row's partials in order, span by span, each thread an element at a time: attention_merge.cuh's loop, which also knows a
    // partial that is not in memory. As one function the compiler made other code of both kernels.
    __device__ __forceinline__ void merge() const {
        const float *partials = reinterpret_cast<const float *>(partial(segment.base));
        const unsigned leaf_of_0 = segment.second_partial() - 1; // the last one of the row's first partial
#pragma unroll 1
        for (unsigned e = warp * 32 + lane; e < GROUP * HEAD_DIM; e += READERS * 32) {
            const unsigned second = e % 2, quad = e / 4, dim = quad / 8 * 16 + quad % 8 + e / 2 % 2 * 8;
            constexpr int AT_ONCE = 8;
            Element merged = Element::nothing(), span = merged;
#pragma unroll 1
            for (int first = -(int)(leaf_of_0 % AT_ONCE); first < (int)segment.total; first += AT_ONCE) {
                Element leaf[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if ((unsigned)(first + i) < segment.total) {
                        const float *from = partials + (size_t)(first + i) * (KV_HEADS * ITEM_PARTIAL * 4);
                        leaf[i] = {__ldcg(from + 2 * HEAD_DIM + second), __ldcg(from + 2 * HEAD_DIM + 2 + second), __ldcg(from + e)};
                    }
                if ((leaf_of_0 + first) % SPAN_LEAVES == 0) {
                    merged.fold<HEAD_DIM>(span);
                    span = Element::nothing();
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if ((unsigned)(first + i) < segment.total)
                        span.fold<HEAD_DIM>(leaf[i]);
            }
            merged.fold<HEAD_DIM>(span);
            out()[second * HEAD_DIM + dim] = __float2bfloat16_rn(__fmul_rn(merged.o, __frcp_rn(merged.l)));
        }
        if (warp == 0 && lane == 0)
            *arrived() = 0;
    }
    // The warp has ended a turn; what it wrote goes before.
    __device__ __forceinline__ void end_turn() const {
        __syncwarp();
        if (lane != 0)
            return;
        asm volatile("red.release.cta.shared::cta.add.u32 [%0], 1;" ::"r"(shared.ended(phase)) : "memory");
        if (warp == 0)
            asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(shared.phase()), "r"(phase) : "memory");
    }
    // What becomes of a leaf.
    __device__ __forceinline__ void finish(const Sums &leaf_sum) {
        const bool is_last = leaf + 1 == segment.first + segment.leaves, folds = segment.begins_row();
        const bool ends_span = (leaf + 1) % SPAN_LEAVES == 0, in_first_span = (leaf ^ segment.first) < SPAN_LEAVES;
        if (!folds) {
            state = leaf_sum;
        } else {
            state.fold<HEAD_DIM>(leaf_sum);
            if ((is_last || ends_span) && !in_first_span)
                fold_spans();
        }
        if (is_last && segment.is_whole_row()) {
            write_out();
        } else if (is_last || !folds) {
            store_partial(segment.at + (folds ? 0 : leaf - segment.first));
            if (is_last && arrives_last())
                merge();
        }
        if (folds && !is_last && ends_span && lane % 4 == 0)
            state.store([&](unsigned index) { return kept(index); });
        if (is_last || !folds || ends_span)
            state.clear();
        if (is_last)
            end_turn();
    }
    __device__ __forceinline__ void run() {
        while (true) {
            await(shared.full(place.at), place.parity);
            load_unit();
            if (segment.leaves == 0)
                break;
            if (leaf == segment.first)
                load_queries();
            const bool whole = (leaf + 1) * LEAF <= segment.kv_len;
            Sums sum;
            float s[2][4];
            score(s, whole);
            release(place.at);
            place.advance();
            share_maxima<READERS>(sum.m, s, shared.maxima(), warp, lane, [&] { sync(); });
#pragma unroll
            for (int j = 0; j < 2; j++)
                store_probabilities<HEAD_DIM, FP8>(probabilities_of(warp + READERS * j), s[j], sum.m);
            await(shared.full(place.at), place.parity);
            sync();
            add_values(sum, whole);
            release(place.at);
            place.advance();
            finish(sum);
        }
        sync();
        if (warp == 0 && lane == 0)
            asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(shared.phase()), "r"(2 * args.count) : "memory");
    }
};
