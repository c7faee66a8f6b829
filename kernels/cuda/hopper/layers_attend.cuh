// The blocks of layers_divide.cuh that attend: turn after turn (attention_work.cuh), phase after phase, in two groups of four warps that
// read, three where keys and values are in fp8, each with a ring of its own and a warp that fills it.
//
//   shared    a group's ring: STAGES stages of a leaf's keys or values, 32 KiB, or 16 and scales; beside each a turn's queries, the unit,
//             `full`, `empty`
//             a group's probabilities, maxima, states of spans, and how many turns its warps have ended in each phase
//   fill      a stage's pages, two thirds of the stages on their way at once (three quarters in fp8), or all; the next turn is taken when one begins, read a unit later, its
//             pages are looked up another unit later: three round trips that nothing waits for
//   read      attention_decode.cuh's sums, bit by bit: a warp scores tiles w and w + 4, makes m-tiles 2 w and 2 w + 1
//   tell      adds what the groups have ended to the phase's `done`: the release takes a microsecond, which no other warp may wait
//
// 1. Keys and values of a turn whose phase is not ready are on their way before: the queries' copy, which the first keys' stage expects,
//    and the leaf with the newest token wait. While the queries are owed, each wait of the filling warp looks at the flag too.
// 2. A wait by parity is never two rounds ahead of its stage: who fills waits for each stage's `empty` in turn.
// 3. A turn counts in `done` when its output, or its last partial, is in memory: the turn that merges a row counts behind the others.
#pragma once

#include "attention_work.cuh"
#include "fp8_rows.cuh"
#include "layers_flags.cuh"
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
    unsigned ready_to = 1; // the last phase that is known to be ready: today's kernels have made the first layer's queries
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
    // Are the phase's queries, newest keys and values there? Each lane looks; then the warp agrees.
    __device__ __forceinline__ bool is_ready(unsigned phase) {
        if (phase > ready_to && seen(flags.ended(phase - 2, QKV)) == MULTIPLIERS) {
            ready_to = phase;
            fence_before_fetch();
        }
        return __all_sync(FULL_WARP, phase <= ready_to);
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
    __device__ __forceinline__ void await_phase() {
        while (!is_ready(turn.phase))
            ;
        pay();
    }
    __device__ __forceinline__ void await_stage(unsigned barrier, unsigned parity) {
        if (owes)
            while (!__any_sync(FULL_WARP, barrier_passed(barrier, parity)))
                if (is_ready(turn.phase)) {
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
            if (is_ready(turn.phase))
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
                await_phase();
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
            await_phase();
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

// A row's state, or a leaf's, as a warp holds it: two m-tiles of the output, and m and l, which all warps have alike.
struct Sum {
    float m[2], l[2], o[2][4];

    __device__ __forceinline__ void clear() {
        m[0] = m[1] = minus_infinity();
        l[0] = l[1] = 0.0f;
#pragma unroll
        for (int k = 0; k < 2; k++)
            o[k][0] = o[k][1] = o[k][2] = o[k][3] = 0.0f;
    }
    __device__ __forceinline__ void fold(const Sum &leaf) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Weights w = fold_maximum<HEAD_DIM>(m[i], leaf.m[i]);
            l[i] = folded(l[i], leaf.l[i], w);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                o[k][i] = folded(o[k][i], leaf.o[k][i], w);
                o[k][i + 2] = folded(o[k][i + 2], leaf.o[k][i + 2], w);
            }
        }
    }
};

// What a partial holds of one query and dim.
struct Element {
    float m, l, o;

    __device__ __forceinline__ static Element nothing() { return {minus_infinity(), 0.0f, 0.0f}; }
    __device__ __forceinline__ void fold(Element leaf) {
        const Weights w = fold_maximum<HEAD_DIM>(m, leaf.m);
        l = folded(l, leaf.l, w);
        o = folded(o, leaf.o, w);
    }
};

// A tile of keys as operands, and what a lane knows of all tiles.
template <bool FP8> struct Keys : Fp8Keys<HEAD_DIM> {
    using Fp8Keys<HEAD_DIM>::Fp8Keys;
    using Lane = Fp8Lane<HEAD_DIM>;
};
template <> struct Keys<false> {
    unsigned tile, lane;
    struct Lane {
        unsigned lane;

        __device__ __forceinline__ Lane(unsigned lane, unsigned, unsigned) : lane(lane) {}
    };

    __device__ __forceinline__ Keys(unsigned tile, unsigned, Lane lane) : tile(tile), lane(lane.lane) {}
    __device__ __forceinline__ void load(unsigned (&a)[4], unsigned k) const { load_keys<HEAD_DIM>(a, tile, k, lane); }
};

// A warp that reads.
template <bool FP8> struct Reader {
    using Shared = Attender<FP8>;
    static constexpr unsigned TILE_BYTES = Shared::TILE_BYTES;
    const Layers &args;
    const Shared shared;
    const unsigned warp, lane;
    const typename Keys<FP8>::Lane places;
    Place<Shared::STAGES> place;
    unsigned q[8][2]; // the turn's queries as B operands
    Sum state;        // of the span at hand; that of the spans before it lies in shared memory
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
            }
    }
    __device__ __forceinline__ Keys<FP8> keys_of(unsigned tile) const {
        return {shared.tokens(place.at) + tile * TILE_BYTES, shared.scales(place.at) + tile * (TILE * 2), places};
    }
    // A tile of values as operands of the warp's m-tiles.
    __device__ __forceinline__ void load_tile(unsigned (&a)[2][4], unsigned tile) const {
        const unsigned at = shared.tokens(place.at) + tile * TILE_BYTES;
        if constexpr (FP8) {
            fp8_load_values<HEAD_DIM>(a, at, shared.scales(place.at) + tile * (TILE * 2), places);
        } else {
#pragma unroll
            for (int k = 0; k < 2; k++)
                load_values<HEAD_DIM>(a[k], at, 2 * warp + k, lane);
        }
    }
    // Scores of the warp's tiles; -infinity behind the sequence's end.
    __device__ __forceinline__ void score(float (&s)[2][4], bool whole) const {
        const unsigned tokens = shared.tokens(place.at), tiles = (segment.kv_len - leaf * LEAF + TILE - 1) / TILE;
#pragma unroll
        for (int j = 0; j < 2; j++)
            s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
        if (FP8 && whole) {
            Keys<FP8> keys[2] = {keys_of(warp), keys_of(warp + READERS)};
#pragma unroll
            for (int k = 0; k < 8; k++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    unsigned a[4];
                    keys[j].load(a, k);
                    mma(s[j], a, q[k]);
                }
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
                Keys<FP8> keys = keys_of(tile);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    unsigned a[4];
                    keys.load(a, k);
                    mma(s[j], a, q[k]);
                }
            }
            if (token >= segment.kv_len)
                s[j][0] = s[j][1] = minus_infinity();
            if (token + 8 >= segment.kv_len)
                s[j][2] = s[j][3] = minus_infinity();
        }
    }
    // The leaf's maxima, from those of all tiles.
    __device__ __forceinline__ void share_maxima(float (&m)[2], const float (&s)[2][4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = fmaxf(fmaxf(s[0][i], s[0][i + 2]), fmaxf(s[1][i], s[1][i + 2]));
            m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 4));
            m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 8));
            m[i] = fmaxf(m[i], __shfl_xor_sync(FULL_WARP, m[i], 16));
        }
        const unsigned at = shared.maxima() + lane % 4 * 8;
        if (lane < 4)
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + warp * 32), "f"(m[0]), "f"(m[1]) : "memory");
        sync();
#pragma unroll
        for (int j = 0; j < READERS; j++) {
            float x, y;
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(at + j * 32) : "memory");
            m[0] = fmaxf(m[0], x);
            m[1] = fmaxf(m[1], y);
        }
    }
    __device__ __forceinline__ unsigned probabilities_of(unsigned tile) const {
        return shared.probabilities() + tile * 256 + lane * 8;
    }
    // Puts the probabilities of the warp's tiles where all find them, as B operands.
    __device__ __forceinline__ void share_probabilities(const float (&s)[2][4], const float (&m)[2]) const {
        const float c = score_scale<HEAD_DIM>();
#pragma unroll
        for (int j = 0; j < 2; j++) {
            unsigned p[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x[2];
#pragma unroll
                for (int i = 0; i < 2; i++)
                    x[i] = exp2_approx(__fmaf_rn(s[j][2 * half + i], c, m[i] == minus_infinity() ? 0.0f : -__fmul_rn(m[i], c)));
                const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
                p[half] = transposed(*reinterpret_cast<const unsigned *>(&pair));
            }
            asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(probabilities_of(warp + READERS * j)), "r"(p[0]), "r"(p[1])
                         : "memory");
        }
    }
    __device__ __forceinline__ void load_probabilities(unsigned (&p)[2], unsigned tile) const {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(p[0]), "=r"(p[1]) : "r"(probabilities_of(tile)) : "memory");
    }
    // The warp's m-tiles of the leaf's output, and the sums of its probabilities.
    __device__ __forceinline__ void add_values(Sum &sum, bool whole) const {
        const unsigned valid = segment.kv_len - leaf * LEAF;
        const unsigned ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
        float l[4] = {};
#pragma unroll
        for (int k = 0; k < 2; k++)
            sum.o[k][0] = sum.o[k][1] = sum.o[k][2] = sum.o[k][3] = 0.0f;
        if (FP8 && whole) { // registers are for what is widened
#pragma unroll
            for (int j = 0; j < LEAF_TILES; j++) {
                unsigned p[2], a[2][4];
                load_probabilities(p, j);
                mma(l, ones, p);
                load_tile(a, j);
#pragma unroll
                for (int k = 0; k < 2; k++)
                    mma(sum.o[k], a[k], p);
            }
        } else if (whole) {
            unsigned p[LEAF_TILES][2], a[LEAF_TILES][2][4];
#pragma unroll
            for (int j = 0; j < LEAF_TILES; j++)
                load_probabilities(p[j], j);
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
                load_probabilities(p, j);
                mma(l, ones, p);
                unsigned a[2][4];
                load_tile(a, j);
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    if ((j + 1) * TILE > valid)
                        zero_behind(a[k], valid - j * TILE);
                    mma(sum.o[k], a[k], p);
                }
            }
        }
        sum.l[0] = l[0];
        sum.l[1] = l[1];
    }
    // Zeroes what belongs to tokens from `valid` on in a tile of values.
    __device__ __forceinline__ void zero_behind(unsigned (&a)[4], unsigned valid) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned token = lane % 4 * 2 + i / 2 * 8;
            a[i] &= token + 1 < valid ? 0xffffffffu : token < valid ? 0xffffu : 0;
        }
    }
    // Where the thread keeps words `index` of its state of spans that have ended: m-tiles of o, then m and l. Lanes with no query's columns
    // keep nothing, and load what they need not have.
    __device__ __forceinline__ unsigned kept(unsigned index) const {
        return shared.kept() + (index * READERS * 8 + warp * 8 + lane / 4) * 16;
    }
    __device__ __forceinline__ void keep(unsigned index, float a, float b, float c, float d) const {
        if (lane % 4 == 0)
            store_words(kept(index), {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)});
    }
    __device__ __forceinline__ void keep_spans() const {
#pragma unroll
        for (int k = 0; k < 2; k++)
            keep(k, state.o[k][0], state.o[k][1], state.o[k][2], state.o[k][3]);
        keep(2, state.m[0], state.m[1], state.l[0], state.l[1]);
    }
    // Folds the span at hand into those before it.
    __device__ __forceinline__ void fold_spans() {
        const uint4 ml = load_words(kept(2));
        Sum before = {{__uint_as_float(ml.x), __uint_as_float(ml.y)}, {__uint_as_float(ml.z), __uint_as_float(ml.w)}, {}};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint4 o = load_words(kept(k));
            before.o[k][0] = __uint_as_float(o.x), before.o[k][1] = __uint_as_float(o.y);
            before.o[k][2] = __uint_as_float(o.z), before.o[k][3] = __uint_as_float(o.w);
        }
        before.fold(state);
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
            const unsigned count = segment.partials();
            unsigned before;
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrived()), "r"(count) : "memory");
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared.is_last()), "r"(before + count == segment.total ? 1 : 0) : "memory");
        }
        sync();
        unsigned is_last;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(is_last) : "r"(shared.is_last()) : "memory");
        return is_last;
    }
    // Folds a row's partials in order, span by span, each thread an element at a time (attention_merge.cuh).
    __device__ __forceinline__ void merge() const {
        constexpr int AT_ONCE = 8;
        const float *partials = reinterpret_cast<const float *>(partial(segment.base));
        const unsigned leaf_of_0 = segment.second_partial() - 1; // the last one of the row's first partial
#pragma unroll 1
        for (unsigned e = warp * 32 + lane; e < GROUP * HEAD_DIM; e += READERS * 32) {
            const unsigned second = e % 2, quad = e / 4, dim = quad / 8 * 16 + quad % 8 + e / 2 % 2 * 8;
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
                    merged.fold(span);
                    span = Element::nothing();
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    if ((unsigned)(first + i) < segment.total)
                        span.fold(leaf[i]);
            }
            merged.fold(span);
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
    __device__ __forceinline__ void finish(const Sum &leaf_sum) {
        const bool is_last = leaf + 1 == segment.first + segment.leaves, folds = segment.begins_row();
        const bool ends_span = (leaf + 1) % SPAN_LEAVES == 0, in_first_span = (leaf ^ segment.first) < SPAN_LEAVES;
        if (!folds) {
            state = leaf_sum;
        } else {
            state.fold(leaf_sum);
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
        if (folds && !is_last && ends_span)
            keep_spans();
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
            Sum sum;
            float s[2][4];
            score(s, whole);
            release(place.at);
            place.advance();
            share_maxima(sum.m, s);
            share_probabilities(s, sum.m);
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

// The warp that tells: a lane for each group.
template <bool FP8> __device__ __forceinline__ void tell(const Flags &flags, const Attender<FP8> &shared, unsigned lane) {
    if (lane >= Attender<FP8>::GROUPS)
        return;
    const Attender<FP8> own = {shared.base, lane};
    const auto load = [](unsigned at) {
        unsigned value;
        asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
        return value;
    };
    for (unsigned phase = 0; phase < flags.phases(); phase++) {
        unsigned told = 0;
        while (true) {
            const bool is_over = load(own.phase()) > phase;
            const unsigned ended = load(own.ended(phase)) / READERS;
            if (ended != told) {
                count(flags.done(phase), ended - told);
                told = ended;
            } else if (is_over) {
                break;
            } else {
                __nanosleep(64);
            }
        }
    }
}

// An attending block; `index` of `count`.
template <bool FP8> __device__ __forceinline__ void attend(const Layers &args, unsigned base, unsigned index, unsigned blocks) {
    using Shared = Attender<FP8>;
    constexpr unsigned GROUPS = Shared::GROUPS;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (unsigned group = 0; group < GROUPS; group++)
            for (unsigned i = 0; i < Shared::STAGES; i++) {
                const Shared shared = {base, group};
                barrier_init(shared.full(i), Shared::FILLERS);
                barrier_init(shared.empty(i), READERS * 32);
            }
        barrier_init_fence();
    }
    for (unsigned group = 0; group < GROUPS; group++)
        for (unsigned i = threadIdx.x; i <= 2 * LAYERS_MAX; i += blockDim.x)
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(Shared{base, group}.ended(i)), "r"(0) : "memory");
    __syncthreads();
    dependent_wait();
    if (warp < GROUPS * READERS)
        Reader<FP8>(args, {base, warp / READERS}, warp % READERS, lane).run();
    else if (warp < GROUPS * READERS + GROUPS) {
        const unsigned group = warp - GROUPS * READERS;
        Filler<FP8>(args, {base, group}, lane, GROUPS * blocks).run(index + group * blocks);
    } else if (warp == GROUPS * READERS + GROUPS)
        tell<FP8>(Flags(args), {base, 0}, lane);
}
