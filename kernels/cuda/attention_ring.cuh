// attention_ring: keys and values on their way from pages to a block's warps, through a ring of stages in shared memory.
//
//   stage   the keys of a unit, or its values: up to 128 tokens; beside keys the unit itself and, at a turn's first, its queries
//   order   keys, values, keys, values, ... of unit after unit; behind the last, keys of a unit that says `is_end`
//
// On Hopper a warp of its own fills the ring: each lane copies a page's share of a leaf (the bytes as they lie, swizzled
// already), which completes on the stage's `full`; threads that have read a stage arrive at its `empty`. Bytes are read once,
// so L2 is told to evict them first. A block's first turn is its number; from then on it takes whichever is next, so that
// blocks that memory serves better do more. Elsewhere all threads copy 16 bytes each, one stage ahead, and turns are dealt
// round.
//
// 1. Copies of older tokens start before the dependent-launch wait: only the keys and values of the row's newest token and of the
//    drafts before it, which are rows of their own, and queries come from the kernel before.
// 2. A turn is taken by counting `taken` up. A block stops at the first turn that does not exist, and so counts once in
//    vain; the last such count sets `taken` to 0 for the next launch. It takes its next turn with the last unit of the one at
//    hand: sooner, and turns would go to who began first, not to who ends first. A half's blocks take it when they begin one,
//    because the other half asks whether all are taken.
// 3. A half of a divided step that begins while the other attends waits, its ring full, until the other's blocks work on their
//    last turns: memory serves who is ahead, whose products wait for it. It waits only while turns are left that any block of
//    the other's takes, and who has taken one does not wait: so one of both goes on, whichever blocks of theirs found room.
//    The kernel behind a half may start when its blocks have filled their last stage, not sooner: it would sit on the place of
//    the other's products.
// 4. Two thirds of a ring, rounded up, are on the way: more would wait in line before memory, with everything that others ask for behind.
// 5. Two neighbouring heads of 64 dims lie side by side in a stage, all tokens of the one before those of the other.
#pragma once
#include "attention_work.cuh"
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

#define DECODE_WARPS 8
#define DECODE_READERS (DECODE_WARPS * 32)

// A barrier of the warps that read.
__device__ __forceinline__ void readers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(DECODE_READERS) : "memory"); }

// Where things lie in shared memory. HEADS kv heads share a stage.
template <int HD, int HEADS, int STAGES, bool FP8> struct Stages {
    static constexpr unsigned TILE_BYTES = TILE * HD * (FP8 ? 1 : 2), SCALE_BYTES = FP8 ? 2 : 0;
    static constexpr unsigned HEAD_BYTES = LEAF_TILES * TILE_BYTES, QUERY_BYTES = 8 * HD * 2;
    static constexpr unsigned BYTES = HEADS * (HEAD_BYTES + LEAF * SCALE_BYTES);
    unsigned base;

    __device__ __forceinline__ unsigned tokens(unsigned stage) const { return base + stage * BYTES; }
    // A scale for each token, of fp8.
    __device__ __forceinline__ unsigned scales(unsigned stage, unsigned head) const {
        return tokens(stage) + HEADS * HEAD_BYTES + head * LEAF * SCALE_BYTES;
    }
    __device__ __forceinline__ unsigned queries(unsigned stage) const {
        return base + STAGES * BYTES + stage * QUERY_BYTES;
    }
    __device__ __forceinline__ unsigned unit(unsigned stage) const {
        return base + STAGES * (BYTES + QUERY_BYTES) + stage * Unit::BYTES;
    }
    __device__ __forceinline__ unsigned full(unsigned stage) const {
        return base + STAGES * (BYTES + QUERY_BYTES + Unit::BYTES) + stage * 16;
    }
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

__device__ __forceinline__ void bulk_copy(unsigned to, const bf16 *from, unsigned bytes, unsigned barrier,
                                          unsigned long long policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// The filling warp.
template <int HD, int HEADS, int STAGES, bool FP8> struct Filler {
    static constexpr unsigned FLIGHT = (2 * STAGES + 2) / 3; // stages that may be on their way at once
    const DecodeArgs &args;
    Stages<HD, HEADS, STAGES, FP8> stages;
    Place<STAGES> place;
    unsigned lane;
    unsigned long long policy;
    unsigned page; // of the lane's copy

    __device__ __forceinline__ Filler(const DecodeArgs &args, Stages<HD, HEADS, STAGES, FP8> stages, unsigned lane)
        : args(args), stages(stages), lane(lane), page(0) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }
    // A leaf of a head is 1 << shares() copies. A lane's: of which head, of how many tokens, and the leaf's that it begins with.
    __device__ __forceinline__ unsigned shares() const { return 7 - min(args.page_shift, 7u); }
    __device__ __forceinline__ unsigned head() const { return lane >> shares(); }
    __device__ __forceinline__ unsigned step() const { return LEAF >> shares(); }
    __device__ __forceinline__ unsigned first() const { return (lane & ((1u << shares()) - 1)) * step(); }

    __device__ __forceinline__ void look_up(const Unit &unit) {
        const unsigned token = unit.leaf * LEAF + first();
        if (head() < HEADS && token < unit.segment.kv_len)
            page = args.page_table[(size_t)unit.segment.slot * args.table_width + (token >> args.page_shift)];
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
    // Says what the stage there will hold.
    __device__ __forceinline__ void announce(const Unit &unit, bool values, Place<STAGES> there, bool others = false) const {
        unsigned bytes = unit.tiles() * (stages.TILE_BYTES + TILE * stages.SCALE_BYTES) * HEADS;
        if (!values && unit.is_first())
            bytes += args.queries(unit.item) * HD * 2;
        if (lane == 0) {
            if (!values)
                unit.store(stages.unit(there.at));
            else
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(stages.others_arrived(there.at)), "r"(others ? 1 : 0) : "memory");
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(stages.full(there.at)), "r"(bytes)
                         : "memory");
        }
        __syncwarp();
    }
    // Copies rows of the lane's head, whole tiles from row `in_page` of its page on, to where its share of a stage lies.
    __device__ __forceinline__ void copy_tokens(unsigned stage, const bf16 *kept, unsigned kv_head, unsigned in_page,
                                                unsigned rows) const {
        const unsigned to = stages.tokens(stage) + head() * stages.HEAD_BYTES, full = stages.full(stage);
        if constexpr (FP8) {
            const unsigned in_all = args.kv_heads << args.page_shift, row = (kv_head << args.page_shift) + in_page;
            const char *begin = reinterpret_cast<const char *>(kept) + (size_t)page * fp8_page_bytes<HD>(in_all);
            bulk_copy(to + first() * HD, reinterpret_cast<const bf16 *>(begin + row * HD), rows * HD, full, policy);
            bulk_copy(stages.scales(stage, head()) + first() * 2, reinterpret_cast<const bf16 *>(begin + in_all * HD) + row, rows * 2,
                      full, policy);
        } else {
            const size_t block = (size_t)page * args.kv_heads + kv_head;
            bulk_copy(to + first() * HD * 2, kept + ((block << args.page_shift) + in_page) * HD, rows * HD * 2, full, policy);
        }
    }
    // Starts the copies of a stage: those that the kernel before does not write to, or those that it does.
    __device__ __forceinline__ void copy(const Unit &unit, bool values, Place<STAGES> there, bool older, bool newer) const {
        const unsigned begin = unit.leaf * LEAF + first(), end = unit.leaf * LEAF + unit.tiles() * TILE;
        if (head() < HEADS && begin < end) {
            const bool newest = begin + step() + DRAFTS_MAX >= unit.segment.kv_len;
            const unsigned in_page = begin & ((1u << args.page_shift) - 1);
            const unsigned kv_head = args.group_of(unit.item) * HEADS + head();
            if (newest ? newer : older)
                copy_tokens(there.at, values ? args.v : args.k, kv_head, in_page, min(step(), end - begin));
        }
        if (lane == 31 && newer && !values && unit.is_first())
            bulk_copy(stages.queries(there.at), args.q + args.query_offset(unit.segment.row, unit.item, HD),
                      args.queries(unit.item) * HD * 2, stages.full(there.at), policy);
        __syncwarp();
    }
    __device__ __forceinline__ void fill(const Unit &unit, bool values) {
        wait_for(stages.empty(place.at), place.parity ^ 1);
        const unsigned before = (place.at + STAGES - FLIGHT) % STAGES;
        wait_for(stages.full(before), place.parity ^ (before > place.at));
        copy(unit, values, place, true, true); // on their way while the look at others is
        announce(unit, values, place, values && lane == 0 && others_arrived(unit));
        place.advance();
    }
    // Fills the whole ring, as far as the first turn does: before the wait what the kernel before does not write, behind it
    // the rest. Leaves `unit` where to go on, and says whether that unit's keys are in the ring already.
    __device__ __forceinline__ bool fill_first(Unit &unit) {
        unsigned pages[(STAGES + 1) / 2], filled = 0;
        const Unit first = unit;
        const Place<STAGES> begin = place;
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            if (i % 2 == 0) {
                if (unit.is_past())
                    break;
                look_up(unit);
                pages[i / 2] = page;
            }
            announce(unit, i % 2, place);
            copy(unit, i % 2, place, true, false);
            place.advance();
            filled++;
            unit.leaf += i % 2;
        }
        dependent_wait();
        Unit again = first;
        Place<STAGES> there = begin;
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            if (i >= filled)
                break;
            page = pages[i / 2];
            copy(again, i % 2, there, false, true);
            there.advance();
            again.leaf += i % 2;
        }
        return filled % 2;
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
    __device__ __forceinline__ void run() {
        const unsigned blocks = min(gridDim.x, args.turns);
        Unit unit;
        unit.begin(args, blockIdx.x);
        bool has_keys = fill_first(unit);
        const bool at_begin = args.other_taken != nullptr;
        if (at_begin)
            give_way();
        unsigned taken;
        while (true) {
            bool has_taken = at_begin;
            if (at_begin)
                taken = take_turn();
            for (; !unit.is_past(); unit.leaf++) {
                if (!has_taken && unit.is_last()) {
                    taken = take_turn();
                    has_taken = true;
                }
                if (!has_keys) {
                    look_up(unit);
                    fill(unit, false);
                }
                has_keys = false;
                fill(unit, true);
            }
            if (!has_taken) // the ring held all of the first turn
                taken = take_turn();
            taken = __shfl_sync(FULL_WARP, taken, 0);
            if (blocks + taken >= args.turns)
                break;
            unit.begin(args, blocks + taken);
        }
        if (args.other_taken != nullptr)
            dependent_launch();
        if (lane == 0 && taken == args.turns - 1)
            args.arrived[args.arrived_count] = 0;
        unit.segment.leaves = 0;
        wait_for(stages.empty(place.at), place.parity ^ 1);
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
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(stages.full(i)) : "memory");
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
    __device__ __forceinline__ void copy_queries(unsigned stage) const {
        const unsigned chunk = threadIdx.x;
        if (chunk < args.queries(ahead.item) * (HD / 8))
            copy(stages.queries(stage) + chunk * 16,
                 args.q + args.query_offset(ahead.segment.row, ahead.item, HD) + chunk * 8, true);
    }
    // Starts the copies of what follows, and goes on.
    __device__ __forceinline__ void copy_next(unsigned stage) {
        if (!values && threadIdx.x == 0)
            ahead.store(stages.unit(stage));
        if (!ahead.is_end()) {
            copy_tokens(stage);
            if (!values && ahead.is_first())
                copy_queries(stage);
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
