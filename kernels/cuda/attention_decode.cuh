// attention_decode: one token a row over its row's pages; out[row, head] = softmax(q K^T / sqrt(head_dim)) V.
//
//   q, out  [rows, kv_heads * group, head_dim] bf16      k, v  pages (attention.cuh)
//   plan    [rows + 1] words: tiles of 16 tokens in the rows before; the sum behind the last
//   grid    any (one CTA a multiprocessor)      block WARPS * 32      shared WARPS * STAGES * (TILE_BYTES + 8)
//   moves   sum of kv_len * kv_heads * head_dim * 4 bytes: every key and value once for its group of queries
//
// A unit of work is a leaf of one (row, item), an item being a kv head with up to eight of its queries. Units are
// numbered by row, item, leaf, and weighed by their tiles; warp w takes those that begin in its share of the total,
// an equal one for each. It streams their tiles, first a leaf's keys, then its values, through a ring of its own,
// and never waits for another warp:
//
//   feed   -> [tile | tile | tile | ...] ->  scores, softmax, output  ->  state      leaves 0.. of an item, folded
//   (next unit's pages looked up ahead)                                   partial    a later leaf, on its own
//
// An item that a warp has whole goes from the state to `out`. Where a cut goes through an item, the warp before the cut
// leaves its state in memory and the ones behind it each leaf; who arrives last folds them in order (attention.cuh's
// order, so that no bit shows where the cuts were).
//
// 1. Tiles that do not hold the row's newest token are fetched before the dependent-launch wait: only that token's key
//    and value, and q, come from the kernel before.
// 2. Values behind the sequence's end are zeroed in the ring: p is 0 there, but 0 times what a page held before may be NaN.
// 3. Memory for partials is SLOTS a warp: its state, and SLOTS - 1 leaves of the item that it begins within. Where shares
//    are longer than that (`capped`), a cut moves to where only so many leaves are left.
#pragma once
#include "attention.cuh"
#include "attention_ring.cuh"

struct DecodeArgs {
    const unsigned *plan;
    const Row *rows;
    const unsigned *page_table;
    const bf16 *q, *k, *v;
    bf16 *out;
    float4 *partials;
    unsigned *arrived;
    unsigned row_count, table_width, page_shift, kv_heads, group, slots;
    unsigned splits, items, cost;
    unsigned warps, share, longer; // a share is `share` tiles; the first `longer` shares have one more
    bool capped;

    // Returns how many warps of a block work: as many as there are leaves for, so that few warps have longer rings each.
    template <int WARPS> __device__ __forceinline__ unsigned derive() {
        splits = (group + 7) / 8;
        items = kv_heads * splits;
        cost = plan[row_count] * items;
        const unsigned leaves = cost / LEAF_TILES + 1;
        const unsigned working = BULK_COPIES ? min(max((leaves + gridDim.x - 1) / gridDim.x, 2), WARPS) : WARPS;
        warps = gridDim.x * working;
        share = cost / warps;
        longer = cost % warps;
        // Where no sequence has more leaves than there are slots, there is nothing to cap.
        capped = share / LEAF_TILES + 3 > slots && (table_width << page_shift) > slots * LEAF;
        return working;
    }
    __device__ __forceinline__ unsigned share_begin(unsigned warp) const { return warp * share + min(warp, longer); }
    // The warp in whose share a position lies.
    __device__ __forceinline__ unsigned share_of(unsigned position) const {
        const unsigned in_longer = longer * (share + 1);
        return position < in_longer ? position / (share + 1) : longer + (position - in_longer) / share;
    }
    // The first leaf that begins at or behind tile `tile` of an item with `tiles` tiles, moved as 3. says.
    __device__ __forceinline__ unsigned cut(unsigned tile, unsigned tiles) const {
        const unsigned leaves = (tiles + LEAF_TILES - 1) / LEAF_TILES, leaf = (tile + LEAF_TILES - 1) / LEAF_TILES;
        return capped && leaf > 0 && leaf + slots <= leaves ? leaves + 1 - slots : min(leaf, leaves);
    }
    __device__ __forceinline__ unsigned head(unsigned item) const {
        return splits == 1 ? item : item / splits;
    }
    // Index of the item's first query among all heads, and how many it has.
    __device__ __forceinline__ unsigned first_query(unsigned item) const {
        return splits == 1 ? item * group : item / splits * group + item % splits * 8;
    }
    __device__ __forceinline__ unsigned queries(unsigned item) const {
        return splits == 1 ? group : min(8u, group - item % splits * 8);
    }
    // float4s of a partial: for each pair of queries HD / 2 of o and one of (m, m, l, l).
    __device__ __forceinline__ unsigned pairs() const { return (min(group, 8u) + 1) / 2; }
};

// A leaf of a (row, item), and where it lies among all units.
struct Unit {
    unsigned row, item, leaf;
    unsigned base;                  // position of the item's first leaf, in tiles
    unsigned kv_len, tiles, slot;   // of the row

    __device__ __forceinline__ unsigned position() const { return base + leaf * LEAF_TILES; }
    __device__ __forceinline__ unsigned tiles_here() const { return min(tiles - leaf * LEAF_TILES, LEAF_TILES); }
    __device__ __forceinline__ bool is_last_leaf() const { return (leaf + 1) * LEAF_TILES >= tiles; }

    __device__ __forceinline__ void read_row(const DecodeArgs &args) {
        if (row >= args.row_count)
            return;
        kv_len = args.rows[row].kv_len;
        slot = args.rows[row].slot;
        tiles = (kv_len + TILE - 1) / TILE;
    }
    __device__ __forceinline__ void next_item(const DecodeArgs &args) {
        base += tiles;
        leaf = 0;
        if (++item == args.items) {
            item = 0;
            row++;
            read_row(args);
        }
    }
    __device__ __forceinline__ void next(const DecodeArgs &args) {
        if (is_last_leaf())
            next_item(args);
        else
            leaf++;
    }
};

// The first unit of a warp's share, found by all lanes together.
__device__ __forceinline__ Unit first_unit(const DecodeArgs &args, unsigned warp, unsigned lane) {
    Unit unit = {};
    const unsigned begin = args.share_begin(warp), target = begin / args.items;
    if (begin >= args.cost) {
        unit.base = args.cost;
        unit.row = args.row_count;
        return unit;
    }
    unsigned before = 0;
#pragma unroll 4
    for (unsigned i = 1 + lane; i <= args.row_count; i += 32)
        before += args.plan[i] <= target;
    unit.row = __reduce_add_sync(FULL_WARP, before);
    unit.read_row(args);
    const unsigned row_begin = args.plan[unit.row] * args.items;
    unit.item = (begin - row_begin) / unit.tiles;
    unit.base = row_begin + unit.item * unit.tiles;
    unit.leaf = args.cut(begin - unit.base, unit.tiles);
    if (unit.leaf * LEAF_TILES >= unit.tiles)
        unit.next_item(args);
    return unit;
}

// Fetches the tiles of a warp's units one after the other; the pages of the unit after are looked up meanwhile.
template <int HD, int STAGES> struct Feed {
    Unit unit, ahead;
    unsigned page, page_ahead; // lane i: the page of the unit's i-th tile
    unsigned tile, end;

    __device__ __forceinline__ unsigned look_up(const DecodeArgs &args, const Unit &of, unsigned lane) const {
        if (of.position() >= end || lane >= of.tiles_here())
            return 0;
        const unsigned index = (of.leaf * LEAF + lane * TILE) >> args.page_shift;
        return args.page_table[(size_t)of.slot * args.table_width + index];
    }
    __device__ __forceinline__ void begin(const DecodeArgs &args, const Unit &first, unsigned end_, unsigned lane) {
        end = end_;
        tile = 0;
        unit = ahead = first;
        page = look_up(args, unit, lane);
        ahead.next(args);
        page_ahead = look_up(args, ahead, lane);
    }
    // Does the tile fetched next hold the row's newest token?
    __device__ __forceinline__ bool is_newest_next() const {
        const unsigned here = unit.tiles_here(), t = tile >= here ? tile - here : tile;
        return unit.position() < end && unit.leaf * LEAF_TILES + t + 1 == unit.tiles;
    }
    __device__ __forceinline__ void fetch(const DecodeArgs &args, Ring<HD, STAGES> &ring, unsigned lane) {
        if (unit.position() >= end) {
            ring.fill_nothing();
            return;
        }
        const unsigned here = unit.tiles_here(), t = tile >= here ? tile - here : tile;
        const unsigned token = (unit.leaf * LEAF + t * TILE) & ((1u << args.page_shift) - 1);
        const size_t block = (size_t)__shfl_sync(FULL_WARP, page, t) * args.kv_heads + args.head(unit.item);
        const bf16 *pages = tile >= here ? args.v : args.k;
        ring.fill(pages + ((block << args.page_shift) + token) * HD, lane);
        if (++tile == 2 * here) {
            tile = 0;
            unit = ahead;
            page = page_ahead;
            ahead.next(args);
            page_ahead = look_up(args, ahead, lane);
        }
    }
};

// The part of an item's attention that is folded so far; columns as in attention.cuh.
template <int HD> struct State {
    float m[1][2], l[1][4], o[HD / 16][1][4];

    __device__ __forceinline__ void clear() {
        m[0][0] = m[0][1] = minus_infinity();
        l[0][0] = l[0][1] = l[0][2] = l[0][3] = 0.0f;
#pragma unroll
        for (int d = 0; d < HD / 16; d++)
            o[d][0][0] = o[d][0][1] = o[d][0][2] = o[d][0][3] = 0.0f;
    }
    __device__ __forceinline__ void fold(const State &leaf) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Weights w = fold_maximum<HD>(m[0][i], leaf.m[0][i]);
            l[0][i] = folded(l[0][i], leaf.l[0][i], w);
#pragma unroll
            for (int d = 0; d < HD / 16; d++) {
                o[d][0][i] = folded(o[d][0][i], leaf.o[d][0][i], w);
                o[d][0][i + 2] = folded(o[d][0][i + 2], leaf.o[d][0][i + 2], w);
            }
        }
    }
};

// A partial in memory: [pairs][HD / 2] float4 of o, in the order (m-tile, lane / 4), then [pairs] float4 (m, m, l, l).
template <int HD>
__device__ __forceinline__ void store_partial(const DecodeArgs &args, unsigned index, const State<HD> &state,
                                              unsigned lane) {
    const unsigned pairs = args.pairs(), pair = lane % 4;
    float4 *partial = args.partials + (size_t)index * (pairs * (HD / 2 + 1));
    if (pair >= pairs)
        return;
#pragma unroll
    for (int d = 0; d < HD / 16; d++)
        partial[pair * (HD / 2) + d * 8 + lane / 4] =
            make_float4(state.o[d][0][0], state.o[d][0][1], state.o[d][0][2], state.o[d][0][3]);
    if (lane < 4)
        partial[pairs * (HD / 2) + pair] = make_float4(state.m[0][0], state.m[0][1], state.l[0][0], state.l[0][1]);
}

// out = o * (1 / l) for dims `dim` and dim + 8, and a pair of queries; o as in a partial.
template <int HD>
__device__ __forceinline__ void write_out(const DecodeArgs &args, const Unit &unit, unsigned pair, unsigned dim, float4 o,
                                          float inverse0, float inverse1) {
    const unsigned queries = args.queries(unit.item);
    const size_t heads = (size_t)args.kv_heads * args.group;
    bf16 *out = args.out + (unit.row * heads + args.first_query(unit.item) + 2 * pair) * HD + dim;
    if (2 * pair < queries) {
        out[0] = __float2bfloat16_rn(__fmul_rn(o.x, inverse0));
        out[8] = __float2bfloat16_rn(__fmul_rn(o.z, inverse0));
    }
    if (2 * pair + 1 < queries) {
        out[HD] = __float2bfloat16_rn(__fmul_rn(o.y, inverse1));
        out[HD + 8] = __float2bfloat16_rn(__fmul_rn(o.w, inverse1));
    }
}

// The partials of an item in the order of its leaves.
struct Partials {
    unsigned warp, leaf, from, until, tiles, base, leaves;

    __device__ __forceinline__ Partials(const DecodeArgs &args, const Unit &unit)
        : warp(args.share_of(unit.base)), leaf(0), from(0), until(0), tiles(unit.tiles), base(unit.base),
          leaves((unit.tiles + LEAF_TILES - 1) / LEAF_TILES) {}

    __device__ __forceinline__ bool are_left() const { return leaf < leaves; }
    // The leaf that warp `warp + 1` begins with, or the end of the item.
    __device__ __forceinline__ unsigned end_of_share(const DecodeArgs &args) const {
        return args.cut(args.share_begin(warp + 1) - base, tiles);
    }
    // Index of the next one.
    __device__ __forceinline__ unsigned next(const DecodeArgs &args) {
        if (leaf == 0) {
            leaf = until = end_of_share(args);
            return warp * args.slots;
        }
        while (leaf >= until) {
            warp++;
            from = until;
            until = end_of_share(args);
        }
        return warp * args.slots + 1 + (leaf++ - from);
    }
};

#define MERGED_AT_ONCE 4

// Folds an item's partials, and writes its output. Each lane folds 4 elements at a time, many partials in flight.
template <int HD>
__device__ __forceinline__ void merge(const DecodeArgs &args, const Unit &unit, unsigned lane) {
    const unsigned pairs = args.pairs(), size = pairs * (HD / 2 + 1);
#pragma unroll 1
    for (unsigned e = lane; e < pairs * (HD / 2); e += 32) {
        const unsigned pair = e / (HD / 2);
        Partials partials(args, unit);
        float4 o = {}, ml = {};
        bool first = true;
        while (partials.are_left()) {
            float4 o_leaf[MERGED_AT_ONCE], ml_leaf[MERGED_AT_ONCE];
            unsigned count = 0;
#pragma unroll
            for (int i = 0; i < MERGED_AT_ONCE; i++)
                if (partials.are_left()) {
                    const float4 *partial = args.partials + (size_t)partials.next(args) * size;
                    o_leaf[i] = __ldcg(partial + e);
                    ml_leaf[i] = __ldcg(partial + pairs * (HD / 2) + pair);
                    count++;
                }
#pragma unroll
            for (int i = 0; i < MERGED_AT_ONCE; i++)
                if (i < count) {
                    if (first) {
                        o = o_leaf[i];
                        ml = ml_leaf[i];
                        first = false;
                        continue;
                    }
                    const Weights w0 = fold_maximum<HD>(ml.x, ml_leaf[i].x), w1 = fold_maximum<HD>(ml.y, ml_leaf[i].y);
                    ml.z = folded(ml.z, ml_leaf[i].z, w0);
                    ml.w = folded(ml.w, ml_leaf[i].w, w1);
                    o.x = folded(o.x, o_leaf[i].x, w0);
                    o.y = folded(o.y, o_leaf[i].y, w1);
                    o.z = folded(o.z, o_leaf[i].z, w0);
                    o.w = folded(o.w, o_leaf[i].w, w1);
                }
        }
        const unsigned rest = e % (HD / 2);
        write_out<HD>(args, unit, pair, rest / 8 * 16 + rest % 8, o, __frcp_rn(ml.z), __frcp_rn(ml.w));
    }
}

// Says that `leaves` of the item's leaves are in memory; the last to say so merges them all.
template <int HD>
__device__ __forceinline__ void arrive(const DecodeArgs &args, const Unit &unit, unsigned leaves, unsigned lane) {
    unsigned *arrived = args.arrived + unit.row * args.items + unit.item;
    unsigned before = 0;
    __threadfence();
    __syncwarp();
    if (lane == 0)
        before = atomicAdd(arrived, leaves);
    before = __shfl_sync(FULL_WARP, before, 0);
    if (before + leaves < (unit.tiles + LEAF_TILES - 1) / LEAF_TILES)
        return;
    if (lane == 0)
        *arrived = 0;
    __threadfence();
    merge<HD>(args, unit, lane);
}

template <int HD>
__device__ __forceinline__ void load_queries(unsigned (&q)[HD / 16][1][2], const DecodeArgs &args, const Unit &unit,
                                             unsigned lane) {
    const unsigned column = lane / 4;
    const size_t heads = (size_t)args.kv_heads * args.group;
    const bf16 *query = args.q + (unit.row * heads + args.first_query(unit.item) + column) * HD;
    if (column >= args.queries(unit.item))
        query = nullptr;
#pragma unroll
    for (int k = 0; k < HD / 16; k++)
        load_query<HD>(q[k][0], query, k, lane);
}

// Zeroes the rows from `valid` on of a tile of values.
template <int HD> __device__ __forceinline__ void zero_rows(unsigned tile, unsigned valid, unsigned lane) {
#pragma unroll 1
    for (unsigned chunk = valid * (HD / 8) + lane; chunk < TILE * (HD / 8); chunk += 32)
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(tile + chunk * 16), "r"(0) : "memory");
    written_before_next_copy();
    __syncwarp();
}

// A warp: its ring, its feed, and the leaf at hand.
template <int HD, int STAGES> struct Decoder {
    const DecodeArgs &args;
    Ring<HD, STAGES> ring;
    Feed<HD, STAGES> feed;
    unsigned q[HD / 16][1][2];
    unsigned lane;

    // Fetches as many tiles as were taken, once all lanes have read those. A loop: its body is long.
    __device__ __forceinline__ void refill(unsigned taken) {
        __syncwarp();
#pragma unroll 1
        for (unsigned i = 0; i < taken; i++)
            feed.fetch(args, ring, lane);
    }
    // Fills the ring, waiting for the kernel before no earlier than needed; then the queries may be read.
    __device__ __forceinline__ void begin(const Unit &unit) {
        bool has_waited = false;
#pragma unroll 1
        for (unsigned i = 0; i < ring.stages; i++) {
            if (!has_waited && feed.is_newest_next()) {
                dependent_wait();
                has_waited = true;
            }
            feed.fetch(args, ring, lane);
        }
        if (!has_waited)
            dependent_wait();
        load_queries<HD>(q, args, unit, lane);
    }
    // The leaf's scores, two tiles at a time for the sake of latency; -infinity behind the sequence's end.
    __device__ __forceinline__ void scores(float (&s)[LEAF_TILES][1][4], const Unit &unit) {
        const unsigned here = unit.tiles_here();
#pragma unroll
        for (int j = 0; j < LEAF_TILES; j++) {
            if (j % 2 == 0 && j < here) {
                const unsigned tile = ring.take(), other = j + 1 < here ? ring.take() : tile;
                score_two<HD>(s[j], s[j + 1], q, tile, other, lane);
                refill(j + 1 < here ? 2 : 1);
            }
            const unsigned token = unit.leaf * LEAF + j * TILE + lane / 4;
            if (token >= unit.kv_len)
                s[j][0][0] = s[j][0][1] = minus_infinity();
            if (token + 8 >= unit.kv_len)
                s[j][0][2] = s[j][0][3] = minus_infinity();
        }
    }
    // Adds the values of the tile with the leaf's token `first`, weighted by p.
    __device__ __forceinline__ void add_tile(State<HD> &leaf, const unsigned (&p)[1][2], unsigned first, unsigned kv_len) {
        const unsigned tile = ring.take();
        if (first + TILE > kv_len)
            zero_rows<HD>(tile, kv_len - first, lane);
        add_sums<1>(leaf.l, p);
#pragma unroll
        for (int d = 0; d < HD / 16; d++)
            add_values<HD, 1>(leaf.o[d], p, tile, d, lane);
    }
    __device__ __forceinline__ void values(State<HD> &leaf, const unsigned (&p)[LEAF_TILES][1][2], const Unit &unit) {
        const unsigned here = unit.tiles_here(), first = unit.leaf * LEAF;
#pragma unroll
        for (int j = 0; j < LEAF_TILES; j += 2) {
            if (j >= here)
                break;
            add_tile(leaf, p[j], first + j * TILE, unit.kv_len);
            if (j + 1 < here)
                add_tile(leaf, p[j + 1], first + (j + 1) * TILE, unit.kv_len);
            refill(j + 1 < here ? 2 : 1);
        }
    }
    // The leaf's own state; loads the queries of the item after where this leaf is the item's last here.
    __device__ __forceinline__ void attend(State<HD> &leaf, const Unit &unit, bool is_last_here, const Unit &after) {
        float s[LEAF_TILES][1][4];
        unsigned p[LEAF_TILES][1][2];
        scores(s, unit);
        if (is_last_here && after.position() < feed.end)
            load_queries<HD>(q, args, after, lane);
        leaf.clear();
        softmax<HD, 1>(p, leaf.m, s);
        values(leaf, p, unit);
    }
};

template <int HD, int STAGES, int WARPS>
__device__ __forceinline__ void decode(DecodeArgs args, unsigned char *shared) {
    const unsigned lane = threadIdx.x % 32, working = args.derive<WARPS>(), warp = blockIdx.x * working + threadIdx.x / 32;
    if (threadIdx.x / 32 >= working)
        return;
    Unit unit = first_unit(args, warp, lane);
    const unsigned end = args.capped ? first_unit(args, warp + 1, lane).position() : args.share_begin(warp + 1);
    if (unit.position() >= end)
        return;
    Decoder<HD, STAGES> decoder = {args, Ring<HD, STAGES>(shared, threadIdx.x / 32, WARPS, working, lane), {}, {}, lane};
    decoder.feed.begin(args, unit, end, lane);
    decoder.begin(unit);

    State<HD> state;
    state.clear();
    unsigned from = unit.leaf; // the first of the item's leaves that is this warp's
    while (unit.position() < end) {
        Unit after = unit;
        after.next(args);
        const bool is_last_here = unit.is_last_leaf() || after.position() >= end;
        State<HD> leaf;
        decoder.attend(leaf, unit, is_last_here, after);
        if (from == 0)
            state.fold(leaf);
        else
            store_partial<HD>(args, warp * args.slots + 1 + unit.leaf - from, leaf, lane);
        if (is_last_here) {
            if (from == 0 && unit.is_last_leaf()) {
                const float inverse0 = __frcp_rn(state.l[0][0]), inverse1 = __frcp_rn(state.l[0][1]);
#pragma unroll
                for (int d = 0; d < HD / 16; d++)
                    write_out<HD>(args, unit, lane % 4, d * 16 + lane / 4,
                                  make_float4(state.o[d][0][0], state.o[d][0][1], state.o[d][0][2], state.o[d][0][3]),
                                  inverse0, inverse1);
            } else {
                if (from == 0)
                    store_partial<HD>(args, warp * args.slots, state, lane);
                arrive<HD>(args, unit, unit.leaf + 1 - from, lane);
            }
            state.clear();
            from = 0;
        }
        unit = after;
    }
}
