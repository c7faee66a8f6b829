// attention_prefill: many tokens a row, each over its row's positions up to its own.
//
//   q, out  [tokens, kv_heads * group, head_dim] bf16      k, v  pages (attention.cuh)      q, k, v as the copy engine's maps
//   FP8     k and v are wide pages of codes, in f16 (fp8_pages.cu); their scales lie in the pages in fp8
//   plan    count, tokens of an item, blocks that take turns, then (row, first token, span, place) for each piece
//   piece   an item, and all that it sees or what it sees of a span of positions
//   turn    a piece and a kv head, heads fastest
//   grid    at most a block a multiprocessor, which takes whichever turn is next
//   block   PARTS warpgroups that attend, and one whose warps take turns, fetch keys, fetch values, and answer
//   shared  64 queries a warpgroup; a ring of STAGES keys or values of a leaf; ones; parts, turns and barriers
//   kept    [place][PARTS][HD / 8 + 1][128] float4: a thread's state of a part, o and then (m, m, l, l); a place for each block,
//           and one for each piece of a span and kv head
//   arrived [place][PARTS][4] words: how many spans of a warp's queries are kept; at that of the first; zero between launches
//   moves   each turn reads the keys and values up to its last token, mostly from L2; 4 * head_dim operations a (query, key)
//
// A query is a row of the products here; tokens and dims are columns. A part, which is a warpgroup's share of an item, is as
// many tokens as have up to 64 queries in the group of one kv head: token by token, so that queries beside each other end
// at about the same position. An item is up to PARTS parts beside each other, which share every key and value. Where items
// are too few for the device, the host splits keys and values, span by span:
//
//   split    span ──┬─ kept ─ count ──┬── not the last: the next turn
//            span ──┤                 └── all spans of the queries, folded in their order ──> out
//            span ──┘
//   whole    leaf, leaf, ... folded ── at a span's end into what is kept ── ... ──> out
//
//   scores   S [64 queries, 128 tokens] = Q K^T        wgmma, both from shared memory
//   P        in the registers that are wgmma's left operand: those of S, two columns a word
//   FP8      queries and P are f16; S is multiplied by its columns' keys' scales, and P, behind l, by its columns' values'
//   output   O [64 queries, 64 dims] = P V             wgmma, P from registers, 64 dims after the other
//   l        P times ones, 8 columns of them           wgmma, with the output's last dims
//
//   take ── taken/read of each slot ──> fetch, answer
//   fetch ── full/empty of each stage ──> attend       keys, values, keys, values, ... of leaf after leaf, turn after turn
//   answer ── asked/answered of each part ──^          its queries, and what else a warpgroup has to know
//
//   prefill_work.cuh     pieces and parts              prefill_attend.cuh   a warpgroup's way through its parts
//   prefill_shared.cuh   shared memory                 prefill_leaf.cuh     a leaf's arithmetic
//   prefill_fetch.cuh    take, fetch, answer           prefill_state.cuh    what is folded and kept
//
// 1. wgmma sums k16 by k16 like mma, and which operand is which does not matter to a sum: the bits are attention.cuh's.
// 2. A warpgroup does one thing after the other, and waits for nobody but the ring and its queries: softmax and folding of
//    some run beside products of others. Two that keep more in flight each fall in step, and are slower.
// 3. A warpgroup skips leaves that lie behind all of its queries or before all of their windows, and pairs of tiles of its last
//    leaf.
// 4. Values behind the item's last token or before its window are zeroed in shared memory: their probability is 0, and 0 times
//    what a page holds may be NaN. Each warpgroup does so for itself: all write the same.
// 5. A part's queries may be asked for when its last scores are there: those of the next turn come while it ends.
// 6. Rows that are no query's give garbage, which stays in its row and is not stored.
// 7. A block's first turn is its number; from then on it takes one by counting `taken` up. It stops at the first turn that does not
//    exist, and so counts once in vain; the last such count sets `taken` to 0 for the next launch.
// 8. A warp's queries are its own business: it keeps them before its lane 0 counts, which releases them and acquires those of
//    the spans counted before; who counts last folds all. No block waits for another.
// 9. Which piece is first, and where its pages are, is looked up before the dependent-launch wait. Behind that decode rows'
//    attention may start, which reads at once what was before this kernel.
// 10. Two states would not fit the registers: of a whole piece that sees several spans, the folded ones are in memory, too.
#pragma once
#include "hopper/attention/prefill_attend.cuh"
#include "hopper/attention/prefill_fetch.cuh"

// Two ones for wgmma.
template <bool FP8> __device__ __forceinline__ void store_ones(unsigned at) {
    asm volatile("st.shared.u32 [%0], %1;\nfence.proxy.async.shared::cta;" ::"r"(at), "r"(ONES<FP8>) : "memory");
}

template <int HD, bool FP8> __device__ __forceinline__ void prefill(const PrefillArgs &args, unsigned char *start) {
    if (blockIdx.x >= args.blocks())
        return;
    const Shared<HD, FP8> shared = {(shared_address(start) + 1023) & ~1023u};
    if (threadIdx.x == 0)
        shared.init_barriers();
    if (threadIdx.x < 64)
        store_ones<FP8>(shared.ones() + threadIdx.x * 4);
    __syncthreads();
    if (threadIdx.x < 128 * PARTS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ATTENDING));
        attend(args, shared);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FETCHING));
        const unsigned warp = threadIdx.x / 32 - 4 * PARTS, lane = threadIdx.x % 32;
        if (warp < 2)
            fetch(args, shared, warp, lane);
        else if (warp == 2)
            answer(args, shared, lane);
        else if (lane == 0)
            take_turns(args, shared);
    }
}
