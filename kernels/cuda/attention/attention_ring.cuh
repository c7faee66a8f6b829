// attention_ring: keys and values on their way from pages to a block's warps, through a ring of stages in shared memory.
//
//   stage   a section of a unit's keys, or of its values: a tile for each warp that reads; beside a turn's first keys the unit itself
//   order   keys, values, keys, values, ... of unit after unit; behind the last, keys of a unit that says `is_end`
//   queries a turn's, in a ring of their own: they come with the first keys
//
// On Hopper a warp of its own fills the ring: each lane copies a page's share of a leaf (the bytes as they lie, swizzled
// already), which completes on the stage's `full`; threads that have read a stage arrive at its `empty`. Bytes are read once,
// so L2 is told to evict them first. A block's first turn is its number; from then on it takes whichever is next, so that
// blocks that memory serves better do more. Beside prefill rows, whose blocks give way one by one, it takes its first turn so too.
// Elsewhere all threads copy 16 bytes each, one stage ahead, and turns are dealt round.
//
// 1. Copies of older tokens start before the dependent-launch wait: only the keys and values of the row's newest token and of the
//    drafts before it, which are rows of their own, and queries come from the kernel before.
// 2. A turn is taken by counting `taken` up. A block stops at the first turn that does not exist, and so counts once in
//    vain; the last such count sets `taken` to 0 for the next launch. It takes its next turn with the last unit of the one at
//    hand: sooner, and turns would go to who began first, not to who ends first. A half's blocks take it when they begin one,
//    because the other half asks whether all are taken. Three blocks and five turns; a count gives what `taken` was, and turn 3 + that:
//
//      block 0   turn 0    0: turn 3      3: no turn 6, it stops
//      block 1   turn 1          1: turn 4               4: no turn 7, it stops; the last of 2 + 3 counts, so `taken` is 0 again
//      block 2   turn 2                2: no turn 5, it stops
//
// 3. A half of a divided step that begins while the other attends waits, its ring full, until the other's blocks work on their
//    last turns: memory serves who is ahead, whose products wait for it. It waits only while turns are left that any block of
//    the other's takes, and who has taken one does not wait: so one of both goes on, whichever blocks of theirs found room.
//    The kernel behind a half may start when its blocks have filled their last stage, not sooner: it would sit on the place of
//    the other's products.
// 4. Two thirds of a ring, rounded up, are on the way: more would wait in line before memory, with everything that others ask for behind.
// 5. Two neighbouring heads of 64 dims lie side by side in a stage, all tokens of the one before those of the other.
#pragma once
#include "attention/attention_work.cuh"
#include "fp8_rows.cuh"
#include "place.cuh"

#if __CUDA_ARCH__ >= 900
#define BULK_COPIES 1
#else
#define BULK_COPIES 0
#endif

// How often a half looks for blocks of the other's that have not begun their last turn, each time about a microsecond.
#define LOOKS 32

// Rows of a step before a row, of the same sequence (core's speculation.rs).
#define DRAFTS_MAX 15

#define DECODE_READERS (DECODE_WARPS * 32)

// A barrier of the warps that read.
__device__ __forceinline__ void readers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(DECODE_READERS) : "memory"); }

// Where things lie in shared memory. HEADS kv heads share a stage.
template <int HD, int HEADS, int STAGES, bool FP8> struct Stages {
    static constexpr unsigned SECTION = DECODE_WARPS * TILE, SECTIONS = LEAF / SECTION; // tokens of a stage; stages of a leaf
    static constexpr unsigned TILE_BYTES = TILE * HD * (FP8 ? 1 : 2), SCALE_BYTES = FP8 ? 2 : 0;
    static constexpr unsigned HEAD_BYTES = DECODE_WARPS * TILE_BYTES, QUERY_BYTES = 8 * HD * 2;
    static constexpr unsigned BYTES = HEADS * (HEAD_BYTES + SECTION * SCALE_BYTES);
    // Turns that have stages in the ring at once: their first keys are a unit apart at least.
    static constexpr unsigned TURNS = (STAGES + 2 * SECTIONS - 1) / (2 * SECTIONS);
    // Who arrives at a stage's `full`: a lane that says how many bytes bulk copies bring, and all that copy scales.
    static constexpr unsigned FILLERS = FP8 ? 33 : 1;
    unsigned base;

    __device__ __forceinline__ unsigned tokens(unsigned stage) const { return base + stage * BYTES; }
    // A scale for each token, of fp8.
    __device__ __forceinline__ unsigned scales(unsigned stage, unsigned head) const {
        return tokens(stage) + HEADS * HEAD_BYTES + head * SECTION * SCALE_BYTES;
    }
    __device__ __forceinline__ unsigned queries(unsigned turn) const { return base + STAGES * BYTES + turn * QUERY_BYTES; }
    __device__ __forceinline__ unsigned unit(unsigned stage) const {
        return base + STAGES * BYTES + TURNS * QUERY_BYTES + stage * Unit::BYTES;
    }
    __device__ __forceinline__ unsigned full(unsigned stage) const { return unit(STAGES) + stage * 16; }
    __device__ __forceinline__ unsigned empty(unsigned stage) const { return full(stage) + 8; }
    // Beside a turn's last values: have all others that share the row been counted?
    __device__ __forceinline__ unsigned others_arrived(unsigned stage) const { return unit(stage) + Unit::SPARE; }
    __device__ __forceinline__ unsigned end() const { return full(STAGES); }
};

#if BULK_COPIES

__device__ __forceinline__ void wait_for(unsigned barrier, unsigned parity) {
    unsigned done;
    do
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    while (!done);
}

// 16 bytes, by the thread itself; it arrives at a barrier when what it has copied so is there.
__device__ __forceinline__ void copy_16(unsigned to, const void *from, unsigned long long policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}
__device__ __forceinline__ void arrive_copied(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void bulk_copy(unsigned to, const void *from, unsigned bytes, unsigned barrier,
                                          unsigned long long policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// The filling warp.
template <int HD, int HEADS, int STAGES, bool FP8> struct Filler {
    using S = Stages<HD, HEADS, STAGES, FP8>;
    static constexpr unsigned FLIGHT = (2 * STAGES + 2) / 3; // stages that may be on their way at once
    static constexpr unsigned OF_UNIT = 2 * S::SECTIONS;     // stages of a unit: its keys', then its values'
    static constexpr unsigned ROW_BYTES = S::TILE_BYTES / TILE;
    const DecodeArgs &args;
    S stages;
    Place<STAGES> place;
    Place<S::TURNS> turn; // of queries
    unsigned lane;
    unsigned long long policy;
    unsigned step, head, first;   // the lane's copy of a leaf: of so many tokens, of which head, and the leaf's that it begins with
    unsigned scales_head, eighth; // and its eight scales
    unsigned page_bytes;

    __device__ __forceinline__ Filler(const DecodeArgs &args, S stages, unsigned lane) : args(args), stages(stages), lane(lane) {
        constexpr unsigned MOST = S::SECTION == 128 ? 7 : 6;
        static_assert(S::SECTION == 1 << MOST, "a copy has a page's tokens, or a section's");
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        const unsigned shift = min(args.page_shift, MOST), copies = LEAF >> shift; // of a head's leaf
        step = 1 << shift;
        head = lane / copies;
        first = lane % copies * step;
        scales_head = lane / (LEAF / 8);
        eighth = lane % (LEAF / 8) * 8;
        const unsigned rows = args.kv_heads << args.page_shift;
        page_bytes = FP8 ? fp8_page_bytes<HD>(rows) : rows * ROW_BYTES;
    }

    // A unit's, of which the lane knows where its copies come from: in bytes from the first page on.
    struct Source {
        Unit unit;
        unsigned page;
        size_t rows, scales;
        unsigned tokens; // that the lane copies
    };
    // Begins a load of the page that the lane copies from.
    __device__ __forceinline__ void look_up(Source &source) const {
        const Unit &unit = source.unit;
        const unsigned token = unit.leaf * LEAF + first;
        source.page = 0;
        if (head < HEADS && token < unit.segment.kv_len)
            source.page = args.page_table[(size_t)unit.segment.slot * args.table_width + (token >> args.page_shift)];
    }
    // Bytes to a head's row of such a page, and to its scale.
    __device__ __forceinline__ size_t at(unsigned page, unsigned row, unsigned row_bytes) const {
        return (size_t)page * page_bytes + row * row_bytes;
    }
    __device__ __forceinline__ unsigned row_of(const Unit &unit, unsigned head, unsigned token) const {
        return ((args.group_of(unit.item) * HEADS + head) << args.page_shift) + (token & ((1u << args.page_shift) - 1));
    }
    // What follows of the page.
    __device__ __forceinline__ void locate(Source &source) const {
        const Unit &unit = source.unit;
        const unsigned there = unit.tiles() * TILE, begin = unit.leaf * LEAF;
        source.rows = at(source.page, row_of(unit, head, begin + first), ROW_BYTES);
        source.tokens = head < HEADS && first < there ? min(step, there - first) : 0;
        if constexpr (FP8) {
            const unsigned page = __shfl_sync(FULL_WARP, source.page, eighth / step);
            source.scales = at(page, row_of(unit, scales_head, begin + eighth), 2) + (args.kv_heads << args.page_shift) * HD;
        }
    }
    // Have all others that share the row left their partials in memory? A look that need not be the last.
    __device__ __forceinline__ bool others_arrived(const Unit &unit) const {
        if (!unit.is_last() || unit.segment.is_whole_row())
            return false;
        unsigned arrived;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(args.arrived_of(unit.segment.row, unit.item))
                     : "memory");
        return arrived + unit.segment.partials() == unit.segment.total;
    }
    // Says what the stage there will hold: the unit's stage `part`.
    __device__ __forceinline__ void announce(const Unit &unit, unsigned part, Place<STAGES> there, bool others = false) const {
        const unsigned before = part % S::SECTIONS * DECODE_WARPS, tiles = unit.tiles(); // tiles of the leaf
        unsigned bytes = tiles > before ? min(tiles - before, DECODE_WARPS) * S::TILE_BYTES * HEADS : 0;
        if (part == 0 && unit.is_first())
            bytes += args.queries(unit.item) * HD * 2;
        if (lane == 0) {
            if (part == 0 && unit.is_first())
                unit.store(stages.unit(there.at));
            if (part == S::SECTIONS)
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(stages.others_arrived(there.at)), "r"(others ? 1 : 0) : "memory");
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(stages.full(there.at)), "r"(bytes)
                         : "memory");
        }
        __syncwarp();
    }
    // Does the kernel before write to any of the row's `tokens` tokens from `begin` on?
    __device__ __forceinline__ bool is_newest(const Unit &unit, unsigned begin, unsigned tokens) const {
        return unit.leaf * LEAF + begin + tokens + DRAFTS_MAX >= unit.segment.kv_len;
    }
    // Starts the copies of a stage: those that the kernel before does not write to, or those that it does. Scales are copied eight a
    // lane: a page's are too few for the copy engine, which takes one lane's copy after the other.
    __device__ __forceinline__ void copy(const Source &source, unsigned part, Place<STAGES> there, bool older, bool newer,
                                         unsigned turn) const {
        const Unit &unit = source.unit;
        const char *kept = reinterpret_cast<const char *>(part < S::SECTIONS ? args.k : args.v);
        const unsigned full = stages.full(there.at), section = part % S::SECTIONS;
        if constexpr (FP8) {
            const bool is_here = scales_head < HEADS && eighth / S::SECTION == section && eighth < unit.tiles() * TILE;
            if (is_here && (is_newest(unit, eighth & ~(TILE - 1), TILE) ? newer : older))
                copy_16(stages.scales(there.at, scales_head) + eighth % S::SECTION * 2, kept + source.scales, policy);
            if (newer)
                arrive_copied(full);
        }
        if (source.tokens > 0 && first / S::SECTION == section && (is_newest(unit, first, step) ? newer : older))
            bulk_copy(stages.tokens(there.at) + head * S::HEAD_BYTES + first % S::SECTION * ROW_BYTES, kept + source.rows,
                      source.tokens * ROW_BYTES, full, policy);
        if (part == 0 && newer && unit.is_first()) {
            if (lane == 0)
                bulk_copy(stages.queries(turn), args.q + args.query_offset(unit.segment.row, unit.item, HD),
                          args.queries(unit.item) * HD * 2, full, policy);
        }
        __syncwarp();
    }
    __device__ __forceinline__ void fill(const Source &source, unsigned part) {
        wait_for(stages.empty(place.at), place.parity ^ 1);
        const unsigned before = place.at >= FLIGHT ? place.at - FLIGHT : place.at + STAGES - FLIGHT;
        wait_for(stages.full(before), place.parity ^ (before > place.at));
        copy(source, part, place, true, true, turn.at); // on their way while the look at others is
        const Unit &unit = source.unit;
        announce(unit, part, place, part == S::SECTIONS && lane == 0 && others_arrived(unit));
        if (part == 0 && unit.is_first())
            turn.advance();
        place.advance();
    }
    // Fills the whole ring, as far as the first turn does: before the wait what the kernel before does not write, behind it
    // the rest. Leaves `source` where to go on, and says how many of that unit's stages are in the ring already.
    __device__ __forceinline__ unsigned fill_first(Source &source) {
        constexpr unsigned UNITS = (STAGES + OF_UNIT - 1) / OF_UNIT;
        Source of[UNITS]; // their units are `source`'s, but for the leaf
        unsigned filled = 0;
        const Place<STAGES> begin = place;
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            of[i] = source;
            of[i].unit.leaf += i;
            look_up(of[i]);
        }
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            Source &at_hand = of[i / OF_UNIT];
            if (i % OF_UNIT == 0) {
                if (at_hand.unit.is_past())
                    break;
                locate(at_hand);
            }
            announce(at_hand.unit, i % OF_UNIT, place);
            copy(at_hand, i % OF_UNIT, place, true, false, turn.at);
            place.advance();
            filled++;
        }
        args.wait();
        Place<STAGES> there = begin;
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            if (i >= filled)
                break;
            copy(of[i / OF_UNIT], i % OF_UNIT, there, false, true, turn.at);
            there.advance();
        }
        turn.advance();
        const bool in_part = filled % OF_UNIT > 0;
        source = of[UNITS - 1];
        source.unit.leaf = of[0].unit.leaf + filled / OF_UNIT;
        return in_part ? filled % OF_UNIT : 0;
    }
    // Waits from when a block of the other half has taken a turn until all its blocks work on their last one, or some
    // microseconds after its last turn was taken, if not all its blocks are there.
    __device__ __forceinline__ void give_way() const {
        const unsigned turns = *args.other_plan * args.items, counted = turns - min(gridDim.x, turns);
        unsigned taken, looks = 0;
        do {
            asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(taken) : "l"(args.other_taken) : "memory");
            looks += taken >= counted;
        } while (taken > 0 && taken < turns && looks < LOOKS);
        __syncwarp();
    }
    __device__ __forceinline__ unsigned take_turn() const {
        unsigned *taken = args.arrived + args.arrived_count;
        return lane == 0 ? atomicAdd(taken, 1) : 0;
    }
    // The first unit of the turn that was taken, or the end.
    __device__ __forceinline__ void begin_taken(Unit &unit, unsigned &taken) const {
        taken = __shfl_sync(FULL_WARP, taken, 0);
        if (args.dealt + taken < args.turns)
            unit.begin(args, args.dealt + taken);
        else
            unit.segment.leaves = 0;
    }
    // Fills the ring with `source`'s turn and those behind it, up to the end.
    __device__ __forceinline__ void fill_turns(Source &source, unsigned &taken) {
        const bool at_begin = args.other_taken != nullptr;
        Unit &unit = source.unit;
        unsigned part = fill_first(source);
        if (at_begin)
            give_way();
        bool has_taken = at_begin || unit.is_past();
        if (has_taken)
            taken = take_turn();
        if (unit.is_past()) { // the ring held all of the first turn
            begin_taken(unit, taken);
            has_taken = at_begin && !unit.is_end();
            if (has_taken)
                taken = take_turn();
        }
        if (part == 0 && !unit.is_end())
            look_up(source);
        while (!unit.is_end()) {
            if (!has_taken && unit.is_last()) {
                taken = take_turn();
                has_taken = true;
            }
            if (part == 0)
                locate(source);
#pragma unroll 1
            for (; part < S::SECTIONS; part++)
                fill(source, part);
            // What comes next, and where it lies, is asked for while this unit's values wait for room.
            Source next = source;
            next.unit.leaf++;
            if (next.unit.is_past())
                begin_taken(next.unit, taken);
            if (!next.unit.is_end())
                look_up(next);
#pragma unroll 1
            for (; part < OF_UNIT; part++)
                fill(source, part);
            part = 0;
            const bool begins = unit.is_last();
            source = next;
            if (begins) {
                has_taken = at_begin && !unit.is_end();
                if (has_taken)
                    taken = take_turn();
            }
        }
        if (at_begin)
            dependent_launch();
    }
    __device__ __forceinline__ void run() {
        Source source;
        Unit &unit = source.unit;
        unsigned taken;
        if (args.dealt > 0) {
            unit.begin(args, blockIdx.x);
        } else {
            taken = take_turn();
            begin_taken(unit, taken);
        }
        if (!unit.is_end())
            fill_turns(source, taken);
        if (lane == 0 && args.dealt + taken == args.turns + min(gridDim.x, args.turns) - 1)
            args.arrived[args.arrived_count] = 0;
        wait_for(stages.empty(place.at), place.parity ^ 1);
        if constexpr (FP8)
            arrive_copied(stages.full(place.at)); // of none
        if (lane == 0) {
            unit.store(stages.unit(place.at));
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(stages.full(place.at)) : "memory");
        }
    }
};

// The ring as a thread that reads sees it.
template <int HD, int HEADS, int STAGES, bool FP8> struct Ring {
    const Stages<HD, HEADS, STAGES, FP8> stages;
    Place<STAGES> place;

    __device__ __forceinline__ Ring(const DecodeArgs &, Stages<HD, HEADS, STAGES, FP8> stages) : stages(stages) {}
    // Waits for the next stage.
    __device__ __forceinline__ void take() { wait_for(stages.full(place.at), place.parity); }
    // Have all others that share the row been counted, as far as is known? At a turn's last values.
    __device__ __forceinline__ bool others_arrived() const {
        unsigned others;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(others) : "r"(stages.others_arrived(place.at)) : "memory");
        return others;
    }
    // Gives the stage at hand back, when the thread has read what it wants of it.
    __device__ __forceinline__ void release() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(stages.empty(place.at)) : "memory");
        place.advance();
    }
};

template <int HD, int HEADS, int STAGES, bool FP8>
__device__ __forceinline__ void prepare(const Stages<HD, HEADS, STAGES, FP8> &stages) {
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(stages.full(i)), "n"(Stages<HD, HEADS, STAGES, FP8>::FILLERS) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(stages.empty(i)), "n"(DECODE_READERS) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
}

#else

template <int HD, int HEADS, int STAGES, bool FP8> struct Ring {
    static_assert(HEADS == 1 && STAGES == 2 && !FP8, "one is read, one is filled");
    const DecodeArgs &args;
    const Stages<HD, HEADS, STAGES, FP8> stages;
    Place<STAGES> place;
    Unit ahead; // whose keys or values are copied next
    unsigned turn;
    bool values;
    static_assert(Stages<HD, HEADS, STAGES, FP8>::SECTIONS == 1 && Stages<HD, HEADS, STAGES, FP8>::TURNS == 1, "a stage is a leaf");

    __device__ __forceinline__ Ring(const DecodeArgs &args, Stages<HD, HEADS, STAGES, FP8> stages)
        : args(args), stages(stages), turn(blockIdx.x), values(false) {
        ahead.begin(args, turn);
        copy_next(0);
    }
    __device__ __forceinline__ void copy(unsigned to, const bf16 *from, bool copies) const {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copies ? 16 : 0) : "memory");
    }
    __device__ __forceinline__ void copy_tokens(unsigned stage) const {
        constexpr unsigned CHUNKS = HD / 8;
        const unsigned tokens = ahead.tiles() * TILE, chunk = threadIdx.x % CHUNKS;
        const unsigned *pages = args.page_table + (size_t)ahead.segment.slot * args.table_width;
        for (unsigned t = threadIdx.x / CHUNKS; t < tokens; t += DECODE_READERS / CHUNKS) {
            const unsigned token = ahead.leaf * LEAF + t, in_page = token & ((1u << args.page_shift) - 1);
            const bool exists = token < ahead.segment.kv_len;
            const unsigned page = exists ? pages[token >> args.page_shift] : 0;
            const size_t row = (((size_t)page * args.kv_heads + args.group_of(ahead.item)) << args.page_shift) + in_page;
            copy(stages.tokens(stage) + (t * CHUNKS + chunk) * 16, (values ? args.v : args.k) + row * HD + chunk * 8, exists);
        }
    }
    __device__ __forceinline__ void copy_queries() const {
        const unsigned chunk = threadIdx.x;
        if (chunk < args.queries(ahead.item) * (HD / 8))
            copy(stages.queries(0) + chunk * 16,
                 args.q + args.query_offset(ahead.segment.row, ahead.item, HD) + chunk * 8, true);
    }
    // Starts the copies of what follows, and goes on.
    __device__ __forceinline__ void copy_next(unsigned stage) {
        if (!values && threadIdx.x == 0 && (ahead.is_end() || ahead.is_first()))
            ahead.store(stages.unit(stage));
        if (!ahead.is_end()) {
            copy_tokens(stage);
            if (!values && ahead.is_first())
                copy_queries();
            values = !values;
            if (!values)
                advance();
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ __forceinline__ void advance() {
        ahead.leaf++;
        if (!ahead.is_past())
            return;
        turn += gridDim.x;
        if (turn < args.turns)
            ahead.begin(args, turn);
        else
            ahead.segment.leaves = 0;
    }
    __device__ __forceinline__ void take() {
        readers_barrier(); // everyone is done with the other stage
        copy_next(place.at ^ 1);
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        readers_barrier();
    }
    __device__ __forceinline__ bool others_arrived() const { return false; }
    __device__ __forceinline__ void release() { place.advance(); }
};

template <int HD, int HEADS, int STAGES, bool FP8> __device__ __forceinline__ void prepare(const Stages<HD, HEADS, STAGES, FP8> &) {}

#endif
