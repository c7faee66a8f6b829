// What a block of attention_prefill has to do: its turn's piece, and of it a warpgroup's part (attention_prefill.cuh).
#pragma once
#include "attention/attention.cuh"
#include "hopper/hopper.cuh"
#include "step/batch.cuh"

constexpr unsigned PARTS = 3, PART_QUERIES = 64, PREFILL_THREADS = 128 * PARTS + 128;
// Registers of a thread that attends, and of one that fetches: 65536 in all.
constexpr unsigned ATTENDING = 160, FETCHING = 32;

// A kernel parameter: backend-cuda/src/ops/attention/params.rs declares the same fields.
struct PrefillParams {
    const unsigned *plan;
    const Row *rows;
    const unsigned *page_table;
    bf16 *out;
    float4 *kept;
    unsigned *arrived, *taken; // taken: how many turns blocks have taken
    unsigned table_width, page_shift, kv_heads, group, window;
};

// A kernel parameter, too: pages in fp8, for the scales behind their rows.
struct KeptPages {
    const char *k, *v;
};

struct PrefillArgs : PrefillParams {
    const TensorMap *q, *k, *v;
    KeptPages kept_pages;

    __device__ __forceinline__ unsigned turns() const { return plan[0] * kv_heads; }
    __device__ __forceinline__ unsigned item_tokens() const { return plan[1]; }
    __device__ __forceinline__ unsigned blocks() const { return min(plan[2], turns()); }
    __device__ __forceinline__ unsigned part_tokens() const { return PART_QUERIES / group; }
};

// The first position that the token at `position` sees.
__device__ __forceinline__ unsigned first_seen(unsigned position, unsigned window) {
    return position + 1 > window ? position + 1 - window : 0;
}

// A piece's span, where it has all.
constexpr unsigned ALL = 0xffffffff;

// A turn's piece.
struct Piece {
    Row row;
    unsigned first, end, span, head, place; // of the row's tokens; place: where it may keep states

    __device__ __forceinline__ Piece(const PrefillArgs &args, unsigned turn) {
        const unsigned *words = args.plan + 3 + turn / args.kv_heads * 4;
        head = turn % args.kv_heads;
        row = args.rows[words[0]];
        first = words[1];
        end = min(first + args.item_tokens(), row.tokens);
        span = words[2];
        place = span == ALL ? blockIdx.x : words[3] + head;
    }
    // Where what it has begins and ends.
    __device__ __forceinline__ unsigned kv_begin(unsigned window) const {
        return max(first_seen(row.position + first, window), span == ALL ? 0 : span * SPAN);
    }
    __device__ __forceinline__ unsigned kv_end() const {
        return min(row.position + end, span == ALL ? ALL : (span + 1) * SPAN);
    }
};

// What a warpgroup has to know of its part: its first token's index in the step and position, how many tokens it has, and
// what the piece has; an end of 0: there is no more.
struct __align__(16) Part {
    unsigned token = 0, count = 0, position = 0, head = 0, kv_end = 0, kv_begin = 0, span = 0, place = 0;

    __device__ __forceinline__ unsigned end() const { return count ? position + count : 0; }
    // Where what it has to do ends.
    __device__ __forceinline__ unsigned stop() const { return min(end(), kv_end); }
};
