// The warp that fills decode's ring on Hopper, by bulk copies (attention_ring.cuh).
#pragma once
#include "attention/attention_stages.cuh"
#include "fp8_rows.cuh"
#include "place.cuh"

// How often a half looks for blocks of the other's that have not begun their last turn, each time about a microsecond.
#define LOOKS 32

// Rows of a step before a row, of the same sequence (core's speculation.rs).
#define DRAFTS_MAX 15

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
