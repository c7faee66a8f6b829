// A group's ring of layers_attend.cuh, where it lies in shared memory, and the warp that fills it.
//
//   fill      a stage's pages, two thirds of the stages on their way at once (three quarters in fp8), or all; the next turn is taken when
//             one begins, read a unit later, its pages are looked up another unit later: three round trips that nothing waits for
//
// 1. Keys and values of a turn whose phase is not ready are on their way before: the queries' copy, which the first keys' stage expects,
//    waits, and the leaf with the newest token, which in fp8 comes later. While the queries are owed, each wait of the filling warp looks at
//    the flag too.
// 2. A wait by parity is never two rounds ahead of its stage: who fills waits for each stage's `empty` in turn.
#pragma once

#include "attention/attention_work.cuh"
#include "fp8_rows.cuh"
#include "hopper/layers/layers_flags.cuh"
#include "place.cuh"

constexpr unsigned READERS = 4; // warps of a group that read
// Halves of more rows have all stages on their way: their products end long before attention does, and may wait the longer for memory.
constexpr unsigned FLIGHT_ROWS = 64;
constexpr unsigned LEAF_PAGES = LEAF / PAGE, LOOKED_UP = 32 / LEAF_PAGES; // leaves whose pages a warp's lanes hold
constexpr unsigned ITEM_PARTIAL = HEAD_DIM / 2 + 1;                               // float4s of a partial
static_assert(GROUP == 2, "a pair of queries a kv head");

// 16 bytes, by the thread itself; it arrives at a barrier when what it has copied so is there.
__device__ __forceinline__ void copy_16(unsigned to, const void *from, unsigned long long policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}
__device__ __forceinline__ void arrive_copied(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// A group's shared memory. FP8: keys and values are kept so (fp8_rows.cuh); a leaf has half the bytes then, and takes longer: so more
// groups are at work at once.
template <bool FP8> struct Attender {
    unsigned base, group;
    static constexpr unsigned GROUPS = FP8 ? 3 : 2;
    static constexpr unsigned STAGES = FP8 ? 4 : 3, FLIGHT = (STAGES * 2 + 2) / 3; // of a ring; on their way at once
    static constexpr unsigned TOKEN_BYTES = HEAD_DIM * (FP8 ? 1 : 2), TILE_BYTES = TILE * TOKEN_BYTES, SCALES = FP8 ? LEAF * 2 : 0;
    // Who arrives at a stage's `full`: a lane that says how many bytes bulk copies bring, and lanes that copy 16 bytes of scales each.
    static constexpr unsigned COPIERS = SCALES / 16, FILLERS = 1 + COPIERS;
    static constexpr unsigned STAGE = LEAF_TILES * TILE_BYTES, QUERIES = GROUP * HEAD_DIM * 2, PROBABILITIES = LEAF_TILES * 256;
    static constexpr unsigned KEPT = 3 * 16 * READERS * 8, ENDED = (2 * LAYERS_MAX + 1) * 4;
    static constexpr unsigned BESIDE = SCALES + QUERIES + 64 + 16;
    static constexpr unsigned SCRATCH = PROBABILITIES + READERS * 32 + 16 + KEPT + (ENDED + 15) / 16 * 16;
    static constexpr unsigned ALL = GROUPS * STAGES * (STAGE + BESIDE) + GROUPS * SCRATCH;

    __device__ __forceinline__ unsigned of(unsigned stage) const { return group * STAGES + stage; }
    __device__ __forceinline__ unsigned tokens(unsigned stage) const { return base + of(stage) * STAGE; }
    __device__ __forceinline__ unsigned scales(unsigned stage) const { return base + GROUPS * STAGES * STAGE + of(stage) * SCALES; }
    __device__ __forceinline__ unsigned queries(unsigned stage) const {
        return base + GROUPS * STAGES * (STAGE + SCALES) + of(stage) * QUERIES;
    }
    __device__ __forceinline__ unsigned unit(unsigned stage) const {
        return base + GROUPS * STAGES * (STAGE + SCALES + QUERIES) + of(stage) * 64;
    }
    __device__ __forceinline__ unsigned full(unsigned stage) const {
        return base + GROUPS * STAGES * (STAGE + SCALES + QUERIES + 64) + of(stage) * 16;
    }
    __device__ __forceinline__ unsigned empty(unsigned stage) const { return full(stage) + 8; }
    __device__ __forceinline__ unsigned probabilities() const { return base + GROUPS * STAGES * (STAGE + BESIDE) + group * SCRATCH; }
    __device__ __forceinline__ unsigned maxima() const { return probabilities() + PROBABILITIES; }
    __device__ __forceinline__ unsigned is_last() const { return maxima() + READERS * 32; }
    __device__ __forceinline__ unsigned kept() const { return is_last() + 16; }
    // How many turns of a phase the group's warps have ended, each counting.
    __device__ __forceinline__ unsigned ended(unsigned phase) const { return kept() + KEPT + phase * 4; }
    // The phase that the group is in.
    __device__ __forceinline__ unsigned phase() const { return ended(2 * LAYERS_MAX); }
};
static_assert(Attender<false>::ALL <= LAYERS_SHARED && Attender<true>::ALL <= LAYERS_SHARED, "a multiprocessor's shared memory");

// A (segment, kv head) of a phase.
struct Turn {
    Segment segment;
    unsigned item, phase;
};

// The warp that fills a group's ring.
template <bool FP8> struct Filler {
    using Shared = Attender<FP8>;
    static constexpr unsigned STAGES = Shared::STAGES, FLIGHT = Shared::FLIGHT, TOKEN_BYTES = Shared::TOKEN_BYTES, TILE_BYTES = Shared::TILE_BYTES;
    const Layers &args;
    const Flags flags;
    const Shared shared;
    const unsigned lane, attenders, phases;
    const unsigned *plans[2];
    unsigned turns[2]; // of a half's phase
    unsigned long long policy;
    Place<STAGES> place;
    // The last phases whose queries, and whose newest keys and values too, are known to be there: the launches before have made the first layer's.
    unsigned asked_to = 1, ready_to = 1;
    Turn turn, next;
    unsigned ticket, pages, pages_behind, pages_of_next; // the lane's
    enum { TAKEN, READ, LOOKED } step;
    bool owes = false; // the turn's queries, to
    unsigned owed;     // this stage

    __device__ __forceinline__ Filler(const Layers &args, Shared shared, unsigned lane, unsigned attenders)
        : args(args), flags(args), shared(shared), lane(lane), attenders(attenders), phases(flags.phases()) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            plans[half] = args.batch + args.plan_offset[half];
            turns[half] = *plans[half] * KV_HEADS;
        }
    }
    __device__ __forceinline__ void take() {
        if (lane == 0)
            ticket = atomicAdd(flags.taken(), 1);
        step = TAKEN;
    }
    // Reads turn n of all phases'.
    __device__ __forceinline__ void read(unsigned n) {
        const unsigned all = turns[0] + turns[1], layer = all == 0 ? args.count : n / all, of_layer = n - layer * all;
        const unsigned half = of_layer >= turns[0], of_half = of_layer - (half ? turns[0] : 0);
        next.phase = 2 * layer + half;
        next.item = of_half % KV_HEADS;
        if (next.phase < phases) {
            const uint4 *words = reinterpret_cast<const uint4 *>((half ? plans[1] : plans[0]) + 8) + of_half / KV_HEADS * 2;
            const uint4 a = __ldg(words), b = __ldg(words + 1);
            next.segment = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        }
        step = READ;
    }
    __device__ __forceinline__ void read_taken() { read(attenders + __shfl_sync(FULL_WARP, ticket, 0)); }
    __device__ __forceinline__ unsigned look_up(const Segment &segment, unsigned leaf) const {
        const unsigned page = leaf * LEAF_PAGES + lane;
        return page * PAGE < segment.kv_len ? __ldg(args.page_table + (size_t)segment.slot * args.table_width + page) : 0;
    }
    __device__ __forceinline__ void look_up_next() {
        if (next.phase < phases)
            pages_of_next = look_up(next.segment, next.segment.first);
        step = LOOKED;
    }
    // Looks whether the phase's queries, newest keys and values are there, by every second lane.
    __device__ __forceinline__ void look(unsigned phase) {
        if (phase <= ready_to)
            return;
        const unsigned there = __ballot_sync(FULL_WARP, seen(flags.ended(phase - 2, lane % 2)) == MULTIPLIERS / 2), queries = 0x55555555;
        __syncwarp();
        if ((there & queries) == queries)
            asked_to = phase;
        if (there == FULL_WARP)
            ready_to = phase;
        fence_before_fetch();
    }
    __device__ __forceinline__ bool is_asked(unsigned phase) {
        if (phase > asked_to)
            look(phase);
        return phase <= asked_to;
    }
    __device__ __forceinline__ void pay() {
        if (owes && elected()) {
            const __nv_bfloat16 *q =
                args.q + (size_t)(turn.segment.row + (turn.phase % 2) * args.rows[0]) * Q_WIDTH + turn.item * (GROUP * HEAD_DIM);
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             shared.queries(owed)),
                         "l"(q), "r"(Shared::QUERIES), "r"(shared.full(owed))
                         : "memory");
        }
        owes = false;
        __syncwarp();
    }
    __device__ __forceinline__ void await_queries() {
        while (!is_asked(turn.phase))
            ;
        pay();
    }
    __device__ __forceinline__ void await_newest() {
        while (turn.phase > ready_to) {
            look(turn.phase);
            if (owes && turn.phase <= asked_to)
                pay();
        }
        pay();
    }
    __device__ __forceinline__ void await_stage(unsigned barrier, unsigned parity) {
        if (owes)
            while (!__any_sync(FULL_WARP, barrier_passed(barrier, parity)))
                if (is_asked(turn.phase)) {
                    pay();
                    break;
                }
        await(barrier, parity);
    }
    // A leaf's keys or values, of the tokens that are there: what a stage has behind them is old, and nobody minds it. The lanes have the
    // leaf's pages in turn.
    __device__ __forceinline__ void fill(const char *from, unsigned leaf, unsigned tokens, unsigned page, bool begins_unit,
                                         bool begins_turn) {
        await_stage(shared.empty(place.at), place.parity ^ 1);
        const unsigned before = place.at >= FLIGHT ? place.at - FLIGHT : place.at + STAGES - FLIGHT;
        if (args.padded <= FLIGHT_ROWS)
            await_stage(shared.full(before), place.parity ^ (before > place.at));
        if (begins_unit && lane == 0) {
            const Segment &s = turn.segment;
            store_words(shared.unit(place.at), {s.row, s.slot, s.kv_len, s.first});
            store_words(shared.unit(place.at) + 16, {s.leaves, s.base, s.at, s.total});
            store_words(shared.unit(place.at) + 32, {turn.item, leaf, turn.phase, 0});
        }
        __syncwarp();
        constexpr unsigned PAGE_BYTES = KV_HEADS * PAGE * (HEAD_DIM * (FP8 ? 1 : 2) + (FP8 ? 2 : 0));
        static_assert(PAGE_BYTES % 128 == 0 && PAGE == TILE, "pages begin where fp8_page_bytes says, and a copy is a tile");
        const char *pages_at[LEAF_PAGES];
#pragma unroll
        for (int i = 0; i < LEAF_PAGES; i++)
            pages_at[i] = from + (size_t)__shfl_sync(FULL_WARP, page, i) * PAGE_BYTES + turn.item * TILE_BYTES;
        if constexpr (FP8) { // too few for the copy engine, which takes one copy after the other
            const unsigned tile = lane / 2;
            const char *scales = from + (size_t)__shfl_sync(FULL_WARP, page, tile) * PAGE_BYTES + KV_HEADS * TILE_BYTES +
                                 (turn.item * PAGE + lane % 2 * 8) * 2;
            if (lane < Shared::COPIERS) {
                if (tile * TILE < tokens)
                    copy_16(shared.scales(place.at) + lane * 16, scales, policy);
                arrive_copied(shared.full(place.at));
            }
        }
        if (elected()) {
            const unsigned to = shared.tokens(place.at), full = shared.full(place.at);
            barrier_expect(full, tokens * TOKEN_BYTES + (begins_turn ? Shared::QUERIES : 0));
            if (tokens == LEAF) {
#pragma unroll
                for (int i = 0; i < LEAF_PAGES; i++)
                    bulk_fetch_bytes(to + i * TILE_BYTES, pages_at[i], TILE_BYTES, full, policy);
            } else {
#pragma unroll
                for (int i = 0; i < LEAF_PAGES; i++)
                    if (i * TILE < tokens)
                        bulk_fetch_bytes(to + i * TILE_BYTES, pages_at[i], min(tokens - i * TILE, TILE) * TOKEN_BYTES, full, policy);
            }
        }
        __syncwarp();
        if (begins_turn) {
            owes = true;
            owed = place.at;
            if (is_asked(turn.phase))
                pay();
        }
        place.advance();
    }
    __device__ __forceinline__ void run_turn() {
        const Segment &segment = turn.segment;
        const Layer &layer = args.layers[turn.phase / 2];
        const char *k = reinterpret_cast<const char *>(layer.k), *v = reinterpret_cast<const char *>(layer.v);
        for (unsigned i = 0; i < segment.leaves; i++) {
            const unsigned leaf = segment.first + i;
            if (i % LOOKED_UP == 0) {
                if (i > 0)
                    pages = pages_behind;
                if (i + LOOKED_UP < segment.leaves)
                    pages_behind = look_up(segment, leaf + LOOKED_UP);
            }
            const unsigned tokens = min(segment.kv_len - leaf * LEAF, (unsigned)LEAF);
            if ((leaf + 1) * LEAF >= segment.kv_len)
                await_newest();
            const unsigned page = __shfl_sync(FULL_WARP, pages, i % LOOKED_UP * LEAF_PAGES + lane % LEAF_PAGES);
#pragma unroll 1
            for (int values = 0; values < 2; values++)
                fill(values ? v : k, leaf, tokens, page, !values, !values && i == 0);
            if (step == TAKEN)
                read_taken();
            else if (step == READ)
                look_up_next();
        }
        if (owes)
            await_queries();
        if (step == TAKEN)
            read_taken();
        if (step == READ)
            look_up_next();
    }
    __device__ __forceinline__ void run(unsigned first) {
        read(first);
        look_up_next();
        while (next.phase < phases) {
            turn = next;
            pages = pages_of_next;
            take();
            run_turn();
        }
        await(shared.empty(place.at), place.parity ^ 1);
        if (lane == 0) {
            store_words(shared.unit(place.at) + 16, {0, 0, 0, 0}); // a turn of no leaves: the end
            barrier_arrive(shared.full(place.at));
        }
        __syncwarp();
        if constexpr (FP8)
            if (lane < Shared::COPIERS)
                barrier_arrive(shared.full(place.at));
    }
};
