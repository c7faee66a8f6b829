// attention_work: what decode has to do, in pieces that the host's plan names.
//
//   plan      count, `beside`, 6 words unused, then `count` segments of 8 words (Segment)
//   segment   some leaves of a row's window, one after the other; a row is one segment, or several where the work is short
//   turn      a (segment, item), items fastest; an item is a kv head with up to eight of its queries, or HEADS neighbouring kv
//             heads with all of theirs, eight at most
//   unit      a leaf of a turn
//
// A row that is one segment needs nobody else. Of a row that was cut, the first segment leaves its folded state in memory
// and the later ones each leaf as a partial, `total` of them from `base` on; who arrives last folds them in order. So that one
// state is enough, that first segment lies in one span or ends with one.
#pragma once
#include "attention/attention.cuh"
#include "words.cuh"

struct Segment {
    unsigned row, slot, kv_len;
    unsigned first, leaves;   // leaves of the row
    unsigned base, at, total; // the row's first partial, the segment's first one, and how many the row has

    __device__ __forceinline__ bool is_whole_row() const { return total == 0; }
    // Is it the row's first, which leaves its folded state?
    __device__ __forceinline__ bool begins_row() const { return at == base; }
    // How many of the row's partials are the segment's.
    __device__ __forceinline__ unsigned partials() const { return begins_row() ? 1 : leaves; }
    // The leaf that is the row's second partial.
    __device__ __forceinline__ unsigned second_partial() const { return begins_row() ? first + leaves : first + 1 - (at - base); }
};
static_assert(sizeof(Segment) == 32, "the host's layout");

// A kernel parameter: backend-cuda/src/ops/attention/params.rs declares the same fields.
struct DecodeParams {
    const unsigned *plan;
    const unsigned *page_table;
    const bf16 *q, *k, *v;
    bf16 *out;
    float4 *partials;
    unsigned *arrived; // a word for each (row, item), then the number of turns taken
    const unsigned *other_plan, *other_taken; // of a divided step's other half: its plan, its number of turns taken; or null
    unsigned arrived_count, table_width, page_shift, kv_heads, group, window;
};

struct DecodeArgs : DecodeParams {
    unsigned groups, splits, items, turns, dealt; // dealt: how many of the turns are those of blocks' numbers
    bool beside; // prefill rows, whose attention is the kernel before and has let this one begin behind its wait

    // What comes before attention has ended; beside prefill rows it had when this kernel began.
    __device__ __forceinline__ void wait() const {
        if (!beside)
            dependent_wait();
    }
    // Attention of the prefill rows beside has ended.
    __device__ __forceinline__ void wait_beside() const {
        if (beside)
            dependent_wait();
    }

    // From here on a group is the queries of HEADS kv heads, and there are `groups` of them.
    template <int HEADS> __device__ __forceinline__ void derive() {
        groups = kv_heads / HEADS;
        group *= HEADS;
        splits = (group + 7) / 8;
        items = groups * splits;
        turns = plan[0] * items;
        beside = plan[1] != 0;
        dealt = beside ? 0 : min(gridDim.x, turns);
    }
    // The item's group.
    __device__ __forceinline__ unsigned group_of(unsigned item) const { return splits == 1 ? item : item / splits; }
    // How many partials of a row and item have been counted.
    __device__ __forceinline__ unsigned *arrived_of(unsigned row, unsigned item) const { return arrived + row * items + item; }
    // Index of the item's first query among all heads, and how many it has.
    __device__ __forceinline__ unsigned first_query(unsigned item) const {
        return splits == 1 ? item * group : item / splits * group + item % splits * 8;
    }
    __device__ __forceinline__ unsigned queries(unsigned item) const {
        return splits == 1 ? group : min(8u, group - item % splits * 8);
    }
    // Of a group's HEADS kv heads, the query's own.
    template <int HEADS> __device__ __forceinline__ unsigned head_of(unsigned query) const {
        static_assert(HEADS <= 2, "a query is one of the first half or of the second");
        return HEADS == 2 && 2 * query >= group ? 1 : 0;
    }
    __device__ __forceinline__ size_t query_offset(unsigned row, unsigned item, unsigned head_dim) const {
        return ((size_t)row * groups * group + first_query(item)) * head_dim;
    }
    // float4s of a partial: for each pair of queries HD / 2 of o and one of (m, m, l, l).
    __device__ __forceinline__ unsigned pairs() const { return (min(group, 8u) + 1) / 2; }
};

// A leaf of a (segment, item).
struct Unit {
    Segment segment;
    unsigned item, leaf;
    static constexpr unsigned BYTES = 48, SPARE = 40; // in shared memory; and where 8 bytes of that are not used

    __device__ __forceinline__ unsigned tiles() const {
        return min((segment.kv_len - leaf * LEAF + TILE - 1) / TILE, LEAF_TILES);
    }
    __device__ __forceinline__ bool is_first() const { return leaf == segment.first; }
    __device__ __forceinline__ bool is_last() const { return leaf + 1 == segment.first + segment.leaves; }
    __device__ __forceinline__ bool ends_span() const { return (leaf + 1) % SPAN_LEAVES == 0; }
    // Is it of the span that the segment begins in?
    __device__ __forceinline__ bool is_of_first_span() const { return (leaf ^ segment.first) < SPAN_LEAVES; }
    // Behind the last of the turn?
    __device__ __forceinline__ bool is_past() const { return leaf == segment.first + segment.leaves; }
    __device__ __forceinline__ bool is_end() const { return segment.leaves == 0; }

    // The first of a turn.
    __device__ __forceinline__ void begin(const DecodeArgs &args, unsigned turn) {
        const uint4 *words = reinterpret_cast<const uint4 *>(args.plan + 8) + turn / args.items * 2;
        const uint4 a = words[0], b = words[1];
        segment = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        item = turn % args.items;
        leaf = segment.first;
    }
    // To shared memory, and from there.
    __device__ __forceinline__ void store(unsigned address) const {
        store_words(address, {segment.row, segment.slot, segment.kv_len, segment.first});
        store_words(address + 16, {segment.leaves, segment.base, segment.at, segment.total});
        store_words(address + 32, {item, leaf, 0, 0});
    }
    __device__ __forceinline__ void load(unsigned address) {
        const uint4 a = load_words(address), b = load_words(address + 16), c = load_words(address + 32);
        segment = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        item = c.x;
        leaf = c.y;
    }
};
