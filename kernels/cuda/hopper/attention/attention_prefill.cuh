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
#include "attention/attention_leaf.cuh"
#include "hopper/hopper.cuh"
#include "place.cuh"
#include "hopper/transpose.cuh"

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

// Turns that are taken ahead, and warps that each of them is for.
constexpr unsigned TURNS = 2, READERS = 3;

// Addresses in shared memory.
template <int HD, bool FP8> struct Shared {
    static constexpr unsigned STAGES = 5 * 128 / HD, HALF = LEAF * 128, STAGE_BYTES = HD / 64 * HALF;
    static constexpr unsigned QUERY_HALF = PART_QUERIES * 128, QUERY_BYTES = HD / 64 * QUERY_HALF;
    static constexpr unsigned SCALE_BYTES = FP8 ? 2 : 0; // of a token
    unsigned base;

    __device__ __forceinline__ unsigned queries(unsigned part) const { return base + part * QUERY_BYTES; }
    __device__ __forceinline__ unsigned stage(unsigned i) const { return queries(PARTS) + i * STAGE_BYTES; }
    __device__ __forceinline__ unsigned ones() const { return stage(STAGES); }
    __device__ __forceinline__ unsigned part(unsigned i) const { return ones() + 256 + i * sizeof(Part); }
    __device__ __forceinline__ unsigned turn(unsigned slot) const { return part(PARTS) + slot * 16; }
    // Barriers, in pairs.
    __device__ __forceinline__ unsigned taken(unsigned slot) const { return turn(TURNS) + slot * 16; }
    __device__ __forceinline__ unsigned read(unsigned slot) const { return taken(slot) + 8; }
    __device__ __forceinline__ unsigned asked(unsigned part) const { return taken(TURNS) + part * 16; }
    __device__ __forceinline__ unsigned answered(unsigned part) const { return asked(part) + 8; }
    __device__ __forceinline__ unsigned full(unsigned stage) const { return asked(PARTS) + stage * 16; }
    __device__ __forceinline__ unsigned empty(unsigned stage) const { return full(stage) + 8; }
    // A stage's, in the order that fp8_rows.cuh has of 16.
    __device__ __forceinline__ unsigned scales(unsigned stage) const { return full(STAGES) + stage * LEAF * SCALE_BYTES; }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < TURNS; i++) {
            barrier_init(taken(i), 1);
            barrier_init(read(i), 32 * READERS);
        }
        for (unsigned i = 0; i < PARTS; i++) {
            barrier_init(answered(i), 1);
            barrier_init(asked(i), 128);
        }
        for (unsigned i = 0; i < STAGES; i++) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), 128 * PARTS);
        }
        barrier_init_fence();
    }
};

// A thread takes turns for the warps that fetch and answer, up to the first that does not exist.
template <int HD, bool FP8> __device__ __forceinline__ void take_turns(const PrefillArgs &args, const Shared<HD, FP8> &shared) {
    const unsigned turns = args.turns(), blocks = args.blocks();
    Place<TURNS> place;
    unsigned turn = blockIdx.x;
    while (true) {
        barrier_wait(shared.read(place.at), place.parity ^ 1); // passes in the first round
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared.turn(place.at)), "r"(turn) : "memory");
        barrier_arrive(shared.taken(place.at));
        if (turn >= turns)
            break;
        if (turn == blockIdx.x) {
            dependent_wait();
            dependent_launch();
        }
        turn = blocks + atomicAdd(args.taken, 1);
        if (turn == turns + blocks - 1)
            *args.taken = 0;
        place.advance();
    }
}

// A warp's next turn.
template <int HD, bool FP8> __device__ __forceinline__ unsigned next_turn(const Shared<HD, FP8> &shared, Place<TURNS> &place) {
    unsigned turn;
    barrier_wait(shared.taken(place.at), place.parity);
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(turn) : "r"(shared.turn(place.at)) : "memory");
    barrier_arrive(shared.read(place.at));
    place.advance();
    return turn;
}

// A warp fetches keys (`values` 0) or values (1), to every other stage: a lane copies 64 dims of a page's share of a leaf, the
// bytes as they lie, swizzled already, and their scales.
template <int HD, bool FP8>
__device__ __forceinline__ void fetch(const PrefillArgs &args, const Shared<HD, FP8> &shared, unsigned values, unsigned lane) {
    using S = Shared<HD, FP8>;
    constexpr unsigned HALVES = HD / 64;
    const unsigned step = min(1u << args.page_shift, LEAF), half = lane % HALVES, token = lane / HALVES * step;
    const TensorMap *map = values ? args.v : args.k;
    Place<TURNS> turns;
    Place<S::STAGES> place;
    if (values)
        place.advance();
    bool waits = true;
    for (unsigned turn; (turn = next_turn(shared, turns)) < args.turns();) {
        const Piece piece(args, turn);
        const unsigned kv_end = piece.kv_end();
        const unsigned *pages = args.page_table + (size_t)piece.row.slot * args.table_width;
        for (unsigned begin = piece.kv_begin(args.window) / LEAF * LEAF; begin < kv_end; begin += LEAF) {
            const bool copies = token < LEAF && begin + token < kv_end;
            const unsigned page = copies ? pages[(begin + token) >> args.page_shift] : 0;
            const unsigned in_page = (begin + token) & ((1u << args.page_shift) - 1);
            const unsigned line = ((page * args.kv_heads + piece.head) << args.page_shift) + in_page;
            const unsigned full = shared.full(place.at);
            if (waits)
                dependent_wait();
            waits = false;
            barrier_wait(shared.empty(place.at), place.parity ^ 1); // passes in the first round
            if (lane == 0)
                barrier_expect(full, (min(kv_end - begin, LEAF) + step - 1) / step * step * (HD * 2 + S::SCALE_BYTES));
            __syncwarp();
            if (copies)
                bulk_fetch(shared.stage(place.at) + half * S::HALF + token * 128, map, half * 64, line, full, EVICT_NORMAL);
            if (FP8 && copies && half == 0) {
                const unsigned rows = args.kv_heads << args.page_shift;
                const char *scales = (values ? args.kept_pages.v : args.kept_pages.k) + (size_t)page * fp8_page_bytes<HD>(rows) +
                                     rows * HD + ((piece.head << args.page_shift) + in_page) * S::SCALE_BYTES;
                bulk_fetch_bytes(shared.scales(place.at) + token * S::SCALE_BYTES, scales, step * S::SCALE_BYTES, full, EVICT_NORMAL);
            }
            place.advance();
            place.advance();
        }
    }
}

__device__ __forceinline__ void store_part(unsigned at, const Part &part) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\nst.shared.v4.u32 [%0 + 16], {%5, %6, %7, %8};" ::"r"(at),
                 "r"(part.token), "r"(part.count), "r"(part.position), "r"(part.head), "r"(part.kv_end), "r"(part.kv_begin),
                 "r"(part.span), "r"(part.place)
                 : "memory");
}

__device__ __forceinline__ Part load_part(unsigned at) {
    Part part;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%8];\nld.shared.v4.u32 {%4, %5, %6, %7}, [%8 + 16];"
                 : "=r"(part.token), "=r"(part.count), "=r"(part.position), "=r"(part.head), "=r"(part.kv_end),
                   "=r"(part.kv_begin), "=r"(part.span), "=r"(part.place)
                 : "r"(at)
                 : "memory");
    return part;
}

// A warp answers warpgroups that ask for their next part.
template <int HD, bool FP8>
__device__ __forceinline__ void answer(const PrefillArgs &args, const Shared<HD, FP8> &shared, unsigned lane) {
    using S = Shared<HD, FP8>;
    const unsigned part_tokens = args.part_tokens(), bytes = part_tokens * args.group * HD * 2;
    Place<TURNS> turns;
    unsigned parity = 1; // passes in the first round
    bool waits = true;
    for (unsigned turn; (turn = next_turn(shared, turns)) < args.turns(); parity ^= 1) {
        const Piece piece(args, turn);
        if (waits)
            dependent_wait();
        waits = false;
#pragma unroll 1
        for (unsigned i = 0; i < PARTS && lane == 0; i++) {
            const unsigned first = piece.first + i * part_tokens, rest = piece.end > first ? piece.end - first : 0;
            const Part part = {piece.row.first_token + first, min(rest, part_tokens), piece.row.position + first, piece.head,
                               piece.kv_end(), piece.kv_begin(args.window), piece.span, piece.place};
            barrier_wait(shared.asked(i), parity);
            store_part(shared.part(i), part);
            if (part.count == 0) {
                barrier_arrive(shared.answered(i));
                continue;
            }
            barrier_expect(shared.answered(i), bytes);
#pragma unroll
            for (int half = 0; half < HD / 64; half++)
                bulk_fetch(shared.queries(i) + half * S::QUERY_HALF, args.q, half * 64, piece.head * args.group, part.token,
                           shared.answered(i), EVICT_FIRST);
        }
    }
    for (unsigned i = 0; i < PARTS && lane == 0; i++) {
        barrier_wait(shared.asked(i), parity);
        store_part(shared.part(i), Part());
        barrier_arrive(shared.answered(i));
    }
}

// What a warpgroup has folded so far: a thread has rows lane / 4 and 8 further on of its warp's 16, o as wgmma has it.
template <int HD> struct PrefillState {
    float m[2], l[2], o[HD / 2];

    __device__ __forceinline__ PrefillState() {
        m[0] = m[1] = minus_infinity();
        l[0] = l[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < HD / 2; i++)
            o[i] = 0.0f;
    }
    // In memory a thread's words lie 128 threads apart.
    __device__ __forceinline__ void keep(float4 *at) const {
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            __stcg(at + i * 128, make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
        __stcg(at + HD / 8 * 128, make_float4(m[0], m[1], l[0], l[1]));
    }
    // Folds the state and a kept one, which comes before it or behind it.
    template <bool BEFORE> __device__ __forceinline__ void fold_kept(const float4 *at) {
        const float4 known = __ldcg(at + HD / 8 * 128);
        const float kept_m[2] = {known.x, known.y}, kept_l[2] = {known.z, known.w};
        Weights weights[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float both = BEFORE ? kept_m[i] : m[i];
            weights[i] = fold_maximum<HD>(both, BEFORE ? m[i] : kept_m[i]);
            m[i] = both;
            l[i] = BEFORE ? folded(kept_l[i], l[i], weights[i]) : folded(l[i], kept_l[i], weights[i]);
        }
#pragma unroll
        for (int i = 0; i < HD / 8; i++) {
            const float4 four = __ldcg(at + i * 128);
            const float kept[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float &own = o[4 * i + j];
                own = BEFORE ? folded(kept[j], own, weights[j / 2]) : folded(own, kept[j], weights[j / 2]);
            }
        }
    }
};

// Scores of the part's queries and a leaf's first tiles.
template <int HD, bool FP8, int TILES>
__device__ __forceinline__ void score_part(float (&s)[TILES * 8], unsigned queries, unsigned keys) {
    using S = Shared<HD, FP8>;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HD / 16; k++) {
        const unsigned long long a = tile_descriptor_at(queries + k / 4 * S::QUERY_HALF + k % 4 * 32);
        const unsigned long long b = tile_descriptor_at(keys + k / 4 * S::HALF + k % 4 * 32);
        if constexpr (FP8)
            wgmma_halves(s, a, b, k > 0);
        else
            wgmma(s, a, b, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
}

// The scales of a thread's columns of a tile: two beside each other, and two 8 further on.
__device__ __forceinline__ void load_scales(unsigned (&scales)[2], unsigned scales_of_tile) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(scales[0]), "=r"(scales[1])
                 : "r"(scales_of_tile + threadIdx.x % 4 * 8)
                 : "memory");
}

// Scores of codes become those of keys.
template <int TILES> __device__ __forceinline__ void scale_scores(float (&s)[TILES * 8], unsigned scales) {
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        unsigned pairs[2];
        load_scales(pairs, scales + j * (TILE * 2));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const unsigned pair = pairs[i / 4];
            s[8 * j + i] = __fmul_rn(s[8 * j + i], __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16));
        }
    }
}

// Probabilities become those of codes.
template <int TILES> __device__ __forceinline__ void scale_probabilities(unsigned (&p)[TILES][4], unsigned scales) {
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        unsigned pairs[2];
        load_scales(pairs, scales + j * (TILE * 2));
#pragma unroll
        for (int i = 0; i < 4; i++)
            asm volatile("mul.rn.f16x2 %0, %0, %1;" : "+r"(p[j][i]) : "r"(pairs[i / 2]));
    }
}

// The maxima of a thread's two rows.
template <int COUNT> __device__ __forceinline__ void row_maxima(float (&m)[2], const float (&s)[COUNT]) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[i] = s[i];
#pragma unroll
    for (int i = 4; i < COUNT; i++)
        x[i % 4] = fmaxf(x[i % 4], s[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = fmaxf(x[2 * i], x[2 * i + 1]);
        m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 1));
        m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 2));
    }
}

// Scores become probabilities, not yet rounded.
template <int HD, int COUNT> __device__ __forceinline__ void exponentials(float (&s)[COUNT], const float (&m)[2]) {
    const float c = score_scale<HD>();
    const float offset[2] = {m[0] == minus_infinity() ? 0.0f : -__fmul_rn(m[0], c),
                             m[1] == minus_infinity() ? 0.0f : -__fmul_rn(m[1], c)};
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        s[i] = exp2_approx(__fmaf_rn(s[i], c, offset[i / 2 % 2]));
    hold(s);
}

// Zeroes rows `first` to `end` of a leaf's values and their scales, for the warpgroup's own products.
template <int HD, bool FP8>
__device__ __forceinline__ void zero_rows(unsigned values, unsigned scales, unsigned first, unsigned end, unsigned part) {
    constexpr unsigned CHUNKS = HD / 8;
    if (FP8)
        for (unsigned i = first + threadIdx.x % 128; i < end; i += 128)
            asm volatile("st.shared.u16 [%0], %1;" ::"r"(scales + (i / TILE * TILE + fp8_scale_at(i % TILE)) * 2), "h"((unsigned short)0)
                         : "memory");
    for (unsigned i = first * CHUNKS + threadIdx.x % 128; i < end * CHUNKS; i += 128)
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(values + i % CHUNKS / 8 * Shared<HD, FP8>::HALF +
                                                                      i / CHUNKS * 128 + i % 8 * 16),
                     "r"(0)
                     : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    sync_threads(1 + part, 128);
}

// A part's queries become f16 numbers where they lie.
template <int HD, bool FP8> __device__ __forceinline__ void narrow_queries(const Shared<HD, FP8> &shared, unsigned part) {
    for (unsigned i = threadIdx.x % 128 * 16; i < Shared<HD, FP8>::QUERY_BYTES; i += 128 * 16) {
        const uint4 words = load_words(shared.queries(part) + i);
        store_words(shared.queries(part) + i, {halves_of(words.x), halves_of(words.y), halves_of(words.z), halves_of(words.w)});
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    sync_threads(1 + part, 128);
}

// One warpgroup's way through its parts.
template <int HD, bool FP8> struct Attender {
    using S = Shared<HD, FP8>;
    const Shared<HD, FP8> shared;
    const unsigned group, lane, window; // which of the warpgroups
    Place<S::STAGES> place;
    Part part;
    unsigned token[2], query[2]; // of the thread's rows: tokens of the part, and queries of the step counted from its first
    unsigned limit[2];           // positions that they attend to

    __device__ __forceinline__ Attender(const PrefillArgs &args, const Shared<HD, FP8> &shared)
        : shared(shared), group(threadIdx.x / 128), lane(threadIdx.x % 32), window(args.window) {
        const unsigned row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            token[i] = (row + 8 * i) / args.group;
            query[i] = token[i] * args.kv_heads * args.group + (row + 8 * i) % args.group;
        }
    }

    // Waits for the next part; says whether there is one.
    __device__ __forceinline__ bool take(unsigned parity) {
        barrier_wait(shared.answered(group), parity);
        part = load_part(shared.part(group));
        if (FP8 && part.count > 0)
            narrow_queries(shared, group);
        limit[0] = part.position + token[0] + 1;
        limit[1] = part.position + token[1] + 1;
        return part.kv_end > 0;
    }

    // Says whether the state is that of all that the part sees.
    __device__ __forceinline__ bool attend(const PrefillArgs &args, PrefillState<HD> &state) {
        const unsigned stop = part.stop();
        bool keeps = false;
        unsigned begin = part.kv_begin / LEAF * LEAF;
        for (; begin < stop && begin + LEAF + window <= part.position + 1; begin += LEAF)
            skip();
        const bool sees = begin < stop;
        if (!sees)
            barrier_arrive(shared.asked(group));
        for (; begin < stop; begin += LEAF) {
            if (begin % SPAN == 0 && begin > part.kv_begin) {
                keep_span(args, state, keeps);
                keeps = true;
            }
            const unsigned rest = stop - begin;
            if (rest > 96)
                attend_leaf<8>(state, begin);
            else if (rest > 64)
                attend_leaf<6>(state, begin);
            else if (rest > 32)
                attend_leaf<4>(state, begin);
            else
                attend_leaf<2>(state, begin);
        }
        for (; begin < part.kv_end; begin += LEAF)
            skip();
        if (keeps)
            state.template fold_kept<true>(kept(args, part.place));
        return part.span == ALL || (sees && merge(args, state));
    }

    // Where the thread's state is kept.
    __device__ __forceinline__ float4 *kept(const PrefillArgs &args, unsigned place) const {
        return args.kept + ((size_t)place * PARTS + group) * ((HD / 8 + 1) * 128) + threadIdx.x % 128;
    }

    // Folds a span's state into what is kept, if something is; the next span starts from nothing.
    __device__ __forceinline__ void keep_span(const PrefillArgs &args, PrefillState<HD> &state, bool keeps) const {
        float4 *at = kept(args, part.place);
        if (keeps)
            state.template fold_kept<true>(at);
        state.keep(at);
        state = PrefillState<HD>();
    }

    // Keeps the state of one of the spans that the part sees. Who is the last folds all.
    __device__ __forceinline__ bool merge(const PrefillArgs &args, PrefillState<HD> &state) const {
        const unsigned first = first_seen(part.position, window) / SPAN, last = (part.end() - 1) / SPAN;
        const unsigned place = part.place - (part.span - first) * args.kv_heads; // of the first
        unsigned *arrived = args.arrived + (place * PARTS + group) * 4 + threadIdx.x % 128 / 32, before = 0;
        state.keep(kept(args, part.place));
        __syncwarp();
        if (lane == 0)
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
        before = __shfl_sync(FULL_WARP, before, 0);
        __syncwarp(); // what lane 0 acquired the others may read
        if (before < last - first)
            return false;
        if (lane == 0)
            *arrived = 0;
        state = PrefillState<HD>();
#pragma unroll 1
        for (unsigned span = first; span <= last; span++)
            state.template fold_kept<false>(kept(args, place + (span - first) * args.kv_heads));
        return true;
    }

    // Attends to the first tiles of the leaf at `begin` and folds the result.
    template <int TILES> __device__ __forceinline__ void attend_leaf(PrefillState<HD> &state, unsigned begin) {
        float s[TILES * 8], m[2];
        barrier_wait(shared.full(place.at), place.parity);
        score_part<HD, FP8, TILES>(s, shared.queries(group), shared.stage(place.at));
        if constexpr (FP8)
            scale_scores<TILES>(s, shared.scales(place.at));
        pass();
        if (begin + LEAF >= part.stop())
            barrier_arrive(shared.asked(group));
        if (begin + LEAF > part.position + 1)
            mask_behind(s, begin);
        if (begin + window < part.end())
            mask_before(s, begin);
        row_maxima(m, s);
        exponentials<HD>(s, m);
        unsigned p[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES * 4; i++)
            p[i / 4][i % 4] = rounded_pair<FP8>(s[2 * i], s[2 * i + 1]);
        barrier_wait(shared.full(place.at), place.parity);
        const unsigned values = shared.stage(place.at), scales = shared.scales(place.at);
        if (begin + TILES * TILE > part.kv_end)
            zero_rows<HD, FP8>(values, scales, part.kv_end - begin, TILES * TILE, group);
        if (begin < part.kv_begin)
            zero_rows<HD, FP8>(values, scales, 0, part.kv_begin - begin, group);
        if constexpr (FP8)
            fold_codes<TILES>(state, p, m, values, scales);
        else
            fold<TILES>(state, p, m, values);
        pass();
    }

    // Scores of tokens behind those that the rows attend to.
    template <int COUNT> __device__ __forceinline__ void mask_behind(float (&s)[COUNT], unsigned begin) const {
        const int end[2] = {(int)(limit[0] - begin - lane % 4 * 2), (int)(limit[1] - begin - lane % 4 * 2)};
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            s[i] = i / 4 * 8 + i % 2 < end[i / 2 % 2] ? s[i] : minus_infinity();
    }

    // Scores of tokens before their windows.
    template <int COUNT> __device__ __forceinline__ void mask_before(float (&s)[COUNT], unsigned begin) const {
        const int first[2] = {(int)(limit[0] - begin - lane % 4 * 2) - (int)window,
                              (int)(limit[1] - begin - lane % 4 * 2) - (int)window};
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            s[i] = i / 4 * 8 + i % 2 >= first[i / 2 % 2] ? s[i] : minus_infinity();
    }

    // Output and sums of the probabilities of a leaf with maxima m, folded into the state.
    template <int TILES>
    __device__ __forceinline__ void fold(PrefillState<HD> &state, const unsigned (&p)[TILES][4], const float (&m)[2],
                                         unsigned values) const {
        const Weights weights[2] = {fold_maximum<HD>(state.m[0], m[0]), fold_maximum<HD>(state.m[1], m[1])};
        float l[4];
#pragma unroll
        for (int half = 0; half < HD / 64; half++) {
            float o[32];
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < TILES; j++)
                wgmma_transposed(o, p[j], tile_descriptor_at(values + half * S::HALF + j * TILE * 128), j > 0);
#pragma unroll
            for (int j = 0; half == HD / 64 - 1 && j < TILES; j++)
                wgmma(l, p[j], small_descriptor(shared.ones()), j > 0);
            wgmma_commit();
            wgmma_wait<0>();
            hold(o);
#pragma unroll
            for (int i = 0; i < 32; i++)
                state.o[32 * half + i] = folded(state.o[32 * half + i], o[i], weights[i / 2 % 2]);
        }
        hold(l);
        state.l[0] = folded(state.l[0], l[0], weights[0]);
        state.l[1] = folded(state.l[1], l[2], weights[1]);
    }

    // The same of codes.
    template <int TILES>
    __device__ __forceinline__ void fold_codes(PrefillState<HD> &state, unsigned (&p)[TILES][4], const float (&m)[2], unsigned values,
                                               unsigned scales) const {
        const Weights weights[2] = {fold_maximum<HD>(state.m[0], m[0]), fold_maximum<HD>(state.m[1], m[1])};
        float l[4];
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < TILES; j++)
            wgmma_halves(l, p[j], small_descriptor(shared.ones()), j > 0);
        wgmma_commit();
        wgmma_wait<0>();
        hold(l);
        state.l[0] = folded(state.l[0], l[0], weights[0]);
        state.l[1] = folded(state.l[1], l[2], weights[1]);
        scale_probabilities<TILES>(p, scales);
#pragma unroll
        for (int half = 0; half < HD / 64; half++) {
            float o[32];
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < TILES; j++)
                wgmma_transposed_halves(o, p[j], tile_descriptor_at(values + half * S::HALF + j * TILE * 128), j > 0);
            wgmma_commit();
            wgmma_wait<0>();
            hold(o);
#pragma unroll
            for (int i = 0; i < 32; i++)
                state.o[32 * half + i] =
                    folded(state.o[32 * half + i], __fmul_rn(o[i], 1.0f / scale_lift()), weights[i / 2 % 2]);
        }
    }

    // Is done with a leaf that its queries don't see.
    __device__ __forceinline__ void skip() {
        for (int i = 0; i < 2; i++) {
            barrier_wait(shared.full(place.at), place.parity);
            pass();
        }
    }

    // Is done with the stage.
    __device__ __forceinline__ void pass() {
        barrier_arrive(shared.empty(place.at));
        place.advance();
    }

    // Stores the rows: lanes of four exchange words, so that each has 8 dims beside each other.
    __device__ __forceinline__ void store(const PrefillArgs &args, const PrefillState<HD> &state) const {
        const size_t first = ((size_t)part.token * args.kv_heads + part.head) * args.group;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float inverse = __frcp_rn(state.l[i]);
            bf16 *out = args.out + (first + query[i]) * HD + lane % 4 * 8;
#pragma unroll
            for (int n = 0; n < HD / 32; n++) {
                unsigned words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float *o = state.o + (4 * n + j) * 4 + 2 * i;
                    words[j] = rounded_pair<false>(__fmul_rn(o[0], inverse), __fmul_rn(o[1], inverse));
                }
                transpose(words, lane);
                if (token[i] < part.count)
                    *reinterpret_cast<uint4 *>(out + n * 32) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
};

template <int HD, bool FP8> __device__ __forceinline__ void attend(const PrefillArgs &args, const Shared<HD, FP8> &shared) {
    Attender<HD, FP8> attender(args, shared);
    for (unsigned parity = 0; attender.take(parity); parity ^= 1) {
        PrefillState<HD> state;
        if (attender.attend(args, state))
            attender.store(args, state);
    }
}

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
