// The products of a layer's experts, whatever their weights are stored as (`FORM`): experts_products.cu has them in bf16,
// experts_products_fp8.cu in fp8; experts.cu has what comes before and behind.
//
//   gather     gathered[place] = x[token of the pair], where pairs are many         grid T P / 8           block 256
//   gate_up    activated[place] = silu(gate) * up                                   grid: all SMs          block 320
//   down       given[pair] = w x                                                    likewise
//
//   w          E matrices of `rows` by `cols`, gate and up's rows by turns of 8, as FORM has them
//   a unit     128 rows of one expert's w by a tile of its pairs, all columns
//   few        tiles of up to 64 pairs, by wgmma of 16, 32 or 64: as many as there are; fp8: 32, and where there are more blocks than
//              multiprocessors two on each. Else a block has one to itself: it asks for more than half of the shared memory
//   many       tiles of up to 256 pairs, by 32 or a multiple; fp8: 192, by 64. Clusters of two have neighbouring rows, each fetches half the pairs
//   moves      the w of experts that somebody chose, once from memory; for each tile after the first, from L2
//
//   few, a warp         w, w, w … ──────────────────────────────────── ring: w, x ──> full
//        another        wait for the kernel before ── x, x, x … ────────^
//                       gate_up's x by all its lanes, 16 bytes of a token's row each, for the copy engine takes box after box; down's by boxes
//   many, one warp      w, w, w … ── wait ── x, x, x … in boxes, then w and x by turns
//   two warpgroups      64 rows each: wgmma k16 by k16 (the form's `multiply`) ── empty ── sums ── 16 bits, turned, in shared memory ── rows of 64 or
//                       128 bytes to memory, while the next unit is fetched
//
// 1. Rows of w are wgmma's M and pairs its N in both: a sum has the same order whatever the tile, and all columns are one slice.
//    So a token's bits depend neither on its place nor on the pairs beside it.
// 2. Counts are found as the kernel runs (experts_plan.cuh), of bits (experts_sort.cuh) or of lists in memory: the grid is the
//    same whatever that is.
// 3. `gather` and both products let the next kernel start behind their own wait. So what lies before the kernel in front is
//    done when a product behind one of them starts: it makes its plan and fetches w before its wait, and down's w comes while
//    gate_up ends. Without a gather gate_up waits first.
// 4. Behind an expert's last pair lie the next expert's, what an earlier step left, or what the ring had: they make sums that are
//    not stored.
// 5. A thread's gate and up lie in rows 8 apart of one wgmma: nothing is exchanged for them. `stmatrix.trans` turns 8 outputs of
//    8 pairs, so that a pair's outputs lie side by side.
#pragma once

#include "dependent.cuh"
#include "epilogue.cuh"
#include "experts/experts.cuh"
#include "hopper/experts/experts_plan.cuh"
#include "hopper/experts/experts_sort.cuh"
#include "hopper/hopper.cuh"
#include "hopper/pairs.cuh"
#include "place.cuh"

// w as FORM has it; PAIRS of a tile, fetched BOX at a time by each of SHARERS blocks; ROUND of them are turned at once. A BOX of 1 stands
// for rows that lie apart: those of the pairs' tokens.
template <class FORM, int PAIRS_, int BOX_, int SHARERS_, int STAGES_, int ROUND_, int BESIDE_> struct Tiling {
    using Form = FORM;
    static constexpr unsigned PAIRS = PAIRS_, BOX = BOX_, SHARERS = SHARERS_, STAGES = STAGES_, ROUND = ROUND_, BESIDE = BESIDE_;
    // A stage has a block of columns of w, at whose end x begins, 64 columns of all pairs at a time.
    static constexpr unsigned ROWS = 128, X_AT = (FORM::W_BYTES + 1023) / 1024 * 1024, X_BYTES = PAIRS * 128;
    static constexpr unsigned STAGE_BYTES = X_AT + FORM::COLS / 64 * X_BYTES;
    static constexpr unsigned WARPS = 8, MULTIPLIERS = 256, TURNED_BYTES = ROUND * 128;
    static constexpr bool BY_TOKEN = BOX == 1;
    static constexpr bool SORTS = SHARERS == 1; // lists the pairs of few tokens by itself
    static constexpr bool DEALT = SHARERS > 1;  // units as clusters become free; else block b takes units b, b + blocks, …
    // Do lanes of a warp read of a stage by themselves, its w or its unit's number, beside what wgmma reads?
    static constexpr bool READ_BY_LANES = FORM::READ_BY_LANES || DEALT;
    // Of BY_TOKEN: stages by which rows of x that lanes have copied are handed over later than they were asked for. 0: as they come, and each
    // warp that multiplies says that wgmma is to see them.
    static constexpr unsigned HANDED_OVER = FORM::READ_BY_LANES ? 2 : 0;
    static_assert(HANDED_OVER < STAGES, "else who fills the ring waits for room in a stage that it has not handed over");
    // Pairs that a tile is multiplied with: the least number, and the one behind each.
    static constexpr int LEAST = SHARERS == 1 ? 16 : FORM::READ_BY_LANES ? 64 : 32;
    __device__ __forceinline__ static constexpr int behind(int width) { return SHARERS == 1 ? 2 * width : width + LEAST; }
    using Plan = ExpertPlan<PAIRS, LEAST>;
};

// Which pair has a place: as this block has listed them (experts_sort.cuh), or as they lie in memory.
struct PairOf {
    const unsigned short *listed; // null: in memory
    const unsigned *pairs;

    __device__ __forceinline__ unsigned operator[](unsigned place) const {
        return listed != nullptr ? listed[place] : __ldcg(pairs + place);
    }
};

// Four matrices of 8 pairs by 8 outputs; this lane says where the 8 outputs of `pair` go.
__device__ __forceinline__ void store_turned(unsigned turned, unsigned pair, unsigned chunk, const unsigned (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     turned + pair * 128 + ((chunk ^ pair % 8) << 4)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// What is multiplied: `w` [E][rows, cols], and what becomes of it.
// x is [T, hidden], and a pair's row its token's, or [T P, hidden], gathered. It and what lies between the products are 16 bits an element, as
// the form has its `inputs`.
struct GateUpOfExperts {
    __nv_bfloat16 *activated; // [T P, intermediate]
    unsigned *tickets;        // 0 between launches; see Dealer
    static constexpr unsigned CHUNKS = 4; // of 8 outputs, of a warpgroup's rows

    __device__ __forceinline__ unsigned rows(const Routing &routing) const { return routing.stored; }
    __device__ __forceinline__ unsigned cols(const Routing &routing) const { return routing.hidden; }
    // What is known of a pair: its token's scale.
    __device__ __forceinline__ unsigned known(const Routing &routing, unsigned pair) const {
        return __float_as_uint(__ldcg(routing.scales + pair / routing.per_token));
    }
    // Turns COUNT pairs of a warp's sums from `first` on, 32 at most.
    template <class FORM, int N, int COUNT>
    __device__ __forceinline__ void turn(const float (&sum)[N], unsigned first, const unsigned *known, unsigned turned) const {
        const unsigned lane = threadIdx.x % 32, chunk = threadIdx.x / 32 % 4;
        unsigned words[4] = {};
#pragma unroll
        for (int i = 0; i < COUNT / 8; i++) {
            const float *d = sum + first / 2 + 4 * i;
            const float2 scale = *reinterpret_cast<const float2 *>(known + first + 8 * i + lane % 4 * 2);
            const float gate[2] = {__fmul_rn(d[0], scale.x), __fmul_rn(d[1], scale.y)};
            const float up[2] = {__fmul_rn(d[2], scale.x), __fmul_rn(d[3], scale.y)};
            words[i] = FORM::inputs(GateUp::silu(gate[0]) * up[0], GateUp::silu(gate[1]) * up[1]);
        }
        store_turned(turned, first + lane, chunk, words);
    }
    __device__ __forceinline__ __nv_bfloat16 *to(const Routing &routing, unsigned place, unsigned, unsigned m) const {
        return m / 2 < routing.intermediate ? activated + (size_t)place * routing.intermediate + m / 2 : nullptr;
    }

};

struct DownOfExperts {
    __nv_bfloat16 *given; // [T P, hidden]
    unsigned *tickets;    // likewise
    static constexpr unsigned CHUNKS = 8;

    __device__ __forceinline__ unsigned rows(const Routing &routing) const { return routing.hidden; }
    __device__ __forceinline__ unsigned cols(const Routing &routing) const { return routing.intermediate; }
    // Which pair it is.
    __device__ __forceinline__ unsigned known(const Routing &, unsigned pair) const { return pair; }
    template <class, int N, int COUNT>
    __device__ __forceinline__ void turn(const float (&sum)[N], unsigned first, const unsigned *, unsigned turned) const {
        const unsigned lane = threadIdx.x % 32, chunk = threadIdx.x / 32 % 4 * 2 + lane / 8 % 2;
#pragma unroll
        for (int half = 0; half < COUNT / 16; half++) {
            const float *d = sum + first / 2 + 8 * half;
            unsigned words[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                words[i] = bf16_word(d[2 * i], d[2 * i + 1]);
            store_turned(turned, first + 16 * half + lane / 16 * 8 + lane % 8, chunk, words);
        }
    }
    __device__ __forceinline__ __nv_bfloat16 *to(const Routing &routing, unsigned, unsigned pair, unsigned m) const {
        return m < routing.hidden ? given + (size_t)pair * routing.hidden + m : nullptr;
    }
};

// The same as barrier_wait, asking now and then.
__device__ __forceinline__ void barrier_wait_at_ease(unsigned barrier, unsigned parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra there;\n"
                 "nanosleep.u32 100;\n"
                 "bra again;\n"
                 "there:\n"
                 "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Addresses in shared memory: the ring, its barriers, a warpgroup's turned outputs, what is known of its pairs.
template <class T> struct Shared {
    static constexpr unsigned RING = T::STAGES * T::STAGE_BYTES;
    unsigned ring, turned, full, empty;
    unsigned *known;

    // As many bytes as backend-cuda/src/ops/experts/hopper.rs asks for, what aligns the ring to 1024 bytes included.
    __device__ __forceinline__ explicit Shared(unsigned char *start) {
        ring = (shared_address(start) + 1023) & ~1023u;
        start += ring - shared_address(start);
        turned = ring + RING + threadIdx.x / 128 * T::TURNED_BYTES;
        start += RING + 2 * T::TURNED_BYTES;
        known = reinterpret_cast<unsigned *>(start) + threadIdx.x / 128 * T::PAIRS;
        full = shared_address(start) + 2 * T::PAIRS * 4;
        empty = full + 8 * T::STAGES;
    }
    __device__ __forceinline__ unsigned stage(unsigned i) const { return ring + i * T::STAGE_BYTES; }

    // Waits until a stage is there for wgmma. What lanes have copied came another way than what the copy engine did.
    __device__ __forceinline__ void wait(const Place<T::STAGES> &place) const {
        barrier_wait(full + 8 * place.at, place.parity);
        if (T::BY_TOKEN && T::HANDED_OVER == 0)
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    // Waits until a stage is to be filled again. Who widens what comes should have the multiprocessor meanwhile.
    __device__ __forceinline__ void wait_for_room(const Place<T::STAGES> &place) const {
        if (T::Form::READ_BY_LANES)
            barrier_wait_at_ease(empty + 8 * place.at, place.parity ^ 1);
        else
            barrier_wait(empty + 8 * place.at, place.parity ^ 1);
    }

    // A warp and its wgmma have read a stage. Other blocks write x alone there.
    __device__ __forceinline__ void release(unsigned at) const {
        const unsigned lane = threadIdx.x % 32;
        if (T::READ_BY_LANES)
            __syncwarp();
        if (lane == 0)
            barrier_arrive(empty + 8 * at);
        if (T::SHARERS > 1 && lane < T::SHARERS && lane != cluster_rank())
            barrier_arrive_at(empty + 8 * at, lane);
    }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < T::STAGES; i++) {
            barrier_init(full + 8 * i, T::BY_TOKEN ? 33 : 1);
            barrier_init(empty + 8 * i, T::SHARERS * T::WARPS);
        }
        barrier_init_fence();
    }
};

// The plan, by all of the first 256 threads, which know how many pairs the expert of their number has. Nobody reads it before the block's
// next barrier.
template <class T> __device__ __forceinline__ void make_plan(typename T::Plan &plan, unsigned pairs, unsigned experts, unsigned across) {
    __shared__ unsigned pairs_of_warp[T::WARPS], tiles_of_warp[T::WARPS];
    const unsigned e = threadIdx.x, warp = e / 32, lane = e % 32;
    unsigned end = pairs, tiles = T::Plan::tiles_of(pairs);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned pairs_before = __shfl_up_sync(0xffffffffu, end, step);
        const unsigned tiles_before = __shfl_up_sync(0xffffffffu, tiles, step);
        end += lane >= step ? pairs_before : 0;
        tiles += lane >= step ? tiles_before : 0;
    }
    if (lane == 31)
        pairs_of_warp[warp] = end, tiles_of_warp[warp] = tiles;
    sync_threads(1, T::MULTIPLIERS);
    for (unsigned w = 0; w < warp; w++)
        end += pairs_of_warp[w], tiles += tiles_of_warp[w];
    if (e < experts) {
        plan.begins[e + 1] = end;
        plan.tiles[e + 1] = tiles;
    }
    if (e == 0)
        plan.begins[0] = plan.tiles[0] = 0, plan.experts = experts, plan.across = across;
}

// Of pairs that are listed in memory.
__device__ __forceinline__ unsigned pairs_in_memory(const Routing &routing) {
    const unsigned e = threadIdx.x;
    return e < routing.experts ? __ldcg(routing.begins + e + 1) - __ldcg(routing.begins + e) : 0;
}

// Counts for the statistics what dispatch would have: by one block of one product, a layer, and its experts that have pairs.
__device__ __forceinline__ void count_read(const Routing &routing, unsigned pairs) {
    const unsigned warp_has = __popc(__ballot_sync(0xffffffffu, pairs > 0));
    if (routing.read == nullptr || blockIdx.x > 0 || threadIdx.x % 32 > 0)
        return;
    atomicAdd(routing.read + 1, (unsigned long long)warp_has);
    if (threadIdx.x == 0)
        atomicAdd(routing.read, 1ull);
}

// Units of many pairs differ in size, so a cluster that is done takes the next one that nobody has: its first block draws a ticket
// for both. Numbers go to the fetching threads through slots, and from them to those that multiply beside each stage.
//
// The first units are the clusters' own numbers, and each cluster that has one draws until there is none: as many tickets as there
// are units, so the counter is back at 0 when the last one is drawn.
template <class T> struct Dealer {
    static constexpr unsigned SLOTS = 8; // a block is at most as many units ahead as there are stages
    static constexpr unsigned NONE = 0xffffffffu;
    unsigned number_of, slots, full, *tickets; // of each stage: the unit's number; words, and their barriers

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < SLOTS; i++)
            barrier_init(full + 8 * i, 1);
    }
    __device__ __forceinline__ unsigned draw(unsigned units) const {
        return gridDim.x / T::SHARERS + atomicInc(tickets, units - 1);
    }
    __device__ __forceinline__ void send(unsigned turn, unsigned number) const {
        const unsigned slot = turn % SLOTS;
        for (unsigned rank = 0; rank < T::SHARERS; rank++)
            store_remote(slots + 4 * slot, number, full + 8 * slot, rank);
    }
    __device__ __forceinline__ unsigned receive(unsigned turn) const {
        const unsigned slot = turn % SLOTS;
        barrier_expect(full + 8 * slot, 4);
        barrier_wait(full + 8 * slot, turn / SLOTS % 2);
        return load(slots + 4 * slot);
    }
    __device__ __forceinline__ void note(unsigned stage, unsigned number) const {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(number_of + 4 * stage), "r"(number) : "memory");
    }
    __device__ __forceinline__ unsigned noted(unsigned stage) const { return load(number_of + 4 * stage); }

  private:
    __device__ __forceinline__ static unsigned load(unsigned at) {
        unsigned value;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
        return value;
    }
};

// Which of a cluster's blocks this is.
template <class T> __device__ __forceinline__ unsigned rank() { return T::SHARERS == 1 ? 0 : cluster_rank(); }

// The first row of an expert's w that is this block's.
template <class T> __device__ __forceinline__ unsigned first_row(const Unit &unit) {
    return (unit.rows * T::SHARERS + rank<T>()) * T::ROWS;
}

// Where x is: a map of its rows, or where they begin.
struct RowsOfX {
    const TensorMap *map;
    __device__ __forceinline__ void prefetch() const { prefetch_map(map); }
};
struct RowsOfTokens {
    const __nv_bfloat16 *begin;
    __device__ __forceinline__ void prefetch() const {}
};

// A block's units where they are not dealt out.
template <class T, class Do> __device__ __forceinline__ void for_units(const typename T::Plan &plan, Do &&take) {
    for (unsigned number = blockIdx.x; number < plan.units(); number += gridDim.x)
        take(plan.unit(number));
}

// Pairs that are fetched in boxes.
template <class T> __device__ __forceinline__ unsigned fetched(const Unit &unit) {
    constexpr unsigned AT_ONCE = T::BOX * T::SHARERS;
    return (unit.count + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
}

// Block `block` of a unit's w to a stage, by one lane; what comes of x in boxes is expected with it.
template <class T>
__device__ __forceinline__ void fetch_w(const Shared<T> &shared, const typename T::Form &w, const Unit &unit, unsigned at,
                                        unsigned rows, unsigned block, unsigned blocks) {
    const unsigned barrier = shared.full + 8 * at;
    barrier_expect(barrier, T::Form::W_BYTES + (T::BY_TOKEN ? 0 : fetched<T>(unit) * T::Form::COLS * 2));
    w.fetch(shared.stage(at), unit.expert, first_row<T>(unit), rows, block, blocks, barrier,
            T::SHARERS == 1 && unit.tiles == 1 ? EVICT_FIRST : EVICT_NORMAL);
}

// This block's part of x, by one lane.
template <class T>
__device__ __forceinline__ void fetch_boxes(const Shared<T> &shared, const TensorMap *x, const Unit &unit, unsigned at, unsigned block) {
    const unsigned part = fetched<T>(unit) / T::SHARERS, begin = rank<T>() * part;
    const unsigned to = shared.stage(at) + T::X_AT, barrier = shared.full + 8 * at;
    for (unsigned col = 0; col < T::Form::COLS; col += 64)
        for (unsigned box = begin; box < begin + part; box += T::BOX) {
            const unsigned there = to + col / 64 * T::X_BYTES + box * 128, from = block * T::Form::COLS + col;
            if (T::SHARERS == 1)
                bulk_fetch(there, x, from, unit.first + box, barrier, EVICT_LAST);
            else
                bulk_fetch_shared(there, x, from, unit.first + box, barrier, EVICT_NORMAL, (1 << T::SHARERS) - 1);
        }
}

// A warp's work where a block's units are known: one lane fetches w. Nobody writes that, so it waits for no other kernel.
template <class T>
__device__ __forceinline__ void fetch(const Shared<T> &shared, const typename T::Plan &plan, const typename T::Form &w, unsigned rows,
                                      unsigned blocks) {
    Place<T::STAGES> place;
    if (threadIdx.x % 32 == 0)
        for_units<T>(plan, [&](const Unit &unit) {
            for (unsigned i = 0; i < blocks; i++) {
                shared.wait_for_room(place); // passes in the first round
                fetch_w<T>(shared, w, unit, place.at, rows, i, blocks);
                place.advance();
            }
        });
}

// Another warp's: one lane fetches boxes of x.
template <class T>
__device__ __forceinline__ void fetch(const Shared<T> &shared, const typename T::Plan &plan, const RowsOfX &x, const Routing &,
                                      const PairOf &, unsigned blocks) {
    dependent_wait();
    Place<T::STAGES> place;
    if (threadIdx.x % 32 == 0)
        for_units<T>(plan, [&](const Unit &unit) {
            for (unsigned i = 0; i < blocks; i++) {
                shared.wait_for_room(place);
                fetch_boxes<T>(shared, x.map, unit, place.at, i);
                place.advance();
            }
        });
}

// Or all lanes rows of x that lie apart, 16 bytes each. Which the next unit's are is looked up a unit ahead.
template <class T>
__device__ __forceinline__ void fetch(const Shared<T> &shared, const typename T::Plan &plan, const RowsOfTokens &x,
                                      const Routing &routing, const PairOf &pair_of, unsigned blocks) {
    constexpr unsigned OWN = T::PAIRS / 4; // rows that a lane has a part of: lane / 8, 4 behind it, …
    static_assert(T::SHARERS == 1 && T::Form::COLS == 64, "8 lanes fetch a row");
    const unsigned lane = threadIdx.x % 32, c = lane % 8, row = lane / 8, units = plan.units();
    const unsigned swizzled[2] = {row * 128 + ((c ^ row) << 4), row * 128 + ((c ^ (row + 4)) << 4)};
    const auto look_up = [&](const Unit &unit, unsigned(&pairs)[OWN]) {
#pragma unroll
        for (unsigned n = 0; n < OWN; n++)
            if (4 * n < unit.count)
                pairs[n] = pair_of[unit.first + min(4 * n + row, unit.count - 1)]; // fours of rows are whole
    };
    // What lanes copy comes another way than what the copy engine brings and wgmma reads.
    Place<T::STAGES> place, copied;
    unsigned copies = 0;
    const auto hand_over = [&] {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(shared.full + 8 * copied.at);
        copied.advance();
    };
    unsigned number = blockIdx.x, pairs[OWN] = {};
    const __nv_bfloat16 *from[OWN];
    Unit next = {};
    if (number < units)
        look_up(next = plan.unit(number), pairs);
    while (number < units) {
        const unsigned count = uniform(next.count);
#pragma unroll
        for (unsigned n = 0; n < OWN; n++) {
            from[n] = x.begin + (size_t)(pairs[n] / routing.per_token) * routing.hidden + 8 * c;
            asm volatile("" : "+l"(from[n])); // else it is computed anew for each stage
        }
        number += gridDim.x;
        if (number < units)
            look_up(next = plan.unit(number), pairs);
        for (unsigned i = 0; i < blocks; i++) {
            shared.wait_for_room(place);
            const unsigned stage = shared.stage(place.at) + T::X_AT, bytes = i * 64 + 8 * c < routing.hidden ? 16 : 0;
            unsigned to[2] = {stage + swizzled[0], stage + swizzled[1]};
            asm volatile("" : "+r"(to[0]), "+r"(to[1]));
#pragma unroll
            for (unsigned n = 0; n < OWN; n++) {
                if (4 * n >= count)
                    break;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to[n % 2] + n * 512), "l"(from[n]), "r"(bytes)
                             : "memory");
                from[n] += 64;
            }
            if constexpr (T::HANDED_OVER == 0) {
                asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared.full + 8 * place.at) : "memory");
            } else {
                asm volatile("cp.async.commit_group;" ::: "memory");
                if (++copies > T::HANDED_OVER) {
                    asm volatile("cp.async.wait_group %0;" ::"n"(T::HANDED_OVER) : "memory");
                    hand_over();
                }
            }
            place.advance();
        }
    }
    if constexpr (T::HANDED_OVER > 0) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        for (unsigned i = min(copies, T::HANDED_OVER); i > 0; i--)
            hand_over();
    }
}

// A lane's work where units are dealt out: it draws them, and fetches w and x.
template <class T>
__device__ __forceinline__ void fetch_dealt(const Shared<T> &shared, const typename T::Plan &plan, const Dealer<T> &dealer,
                                            const typename T::Form &w, const TensorMap *x, unsigned rows, unsigned blocks) {
    const unsigned units = plan.units();
    unsigned number = blockIdx.x / T::SHARERS, turn = 0;
    Unit unit = {};
    const auto fetch_block = [&](unsigned at, unsigned i) {
        dealer.note(at, number);
        fetch_w<T>(shared, w, unit, at, rows, i, blocks);
    };
    unsigned ahead = 0; // blocks of columns of the first unit, whose w comes before the wait
    Place<T::STAGES> place;
    if (number < units) {
        unit = plan.unit(number);
        ahead = min(T::STAGES, blocks);
        for (unsigned i = 0; i < ahead; i++)
            fetch_block(i, i);
    }
    dependent_wait();
    for (unsigned i = 0; i < ahead; i++) {
        fetch_boxes<T>(shared, x, unit, i, i);
        place.advance();
    }
    for (; number < units; ahead = 0) {
        unit = plan.unit(number);
        const unsigned drawn = rank<T>() == 0 ? dealer.draw(units) : 0;
        for (unsigned i = ahead; i < blocks; i++) {
            barrier_wait(shared.empty + 8 * place.at, place.parity ^ 1);
            fetch_block(place.at, i);
            fetch_boxes<T>(shared, x, unit, place.at, i);
            place.advance();
        }
        if (rank<T>() == 0)
            dealer.send(turn, drawn);
        number = dealer.receive(turn++);
    }
    barrier_wait(shared.empty + 8 * place.at, place.parity ^ 1);
    dealer.note(place.at, Dealer<T>::NONE);
    barrier_arrive(shared.full + 8 * place.at);
}

// A unit's products on their way out, by a warpgroup.
template <class T, int N, class Product>
__device__ __forceinline__ void finish(const Shared<T> &shared, const Routing &routing, const Product &product, const Unit &unit,
                                       const float (&sum)[N / 2], const unsigned (&known)[(N + 127) / 128]) {
    constexpr unsigned ROUND = N < T::ROUND ? N : T::ROUND, AT_ONCE = 128 / Product::CHUNKS;
    const unsigned thread = threadIdx.x % 128, group = threadIdx.x / 128, chunk = thread % Product::CHUNKS;
    const auto sync = [&] { sync_threads(2 + group, 128); };
#pragma unroll
    for (int i = 0; i < (N + 127) / 128; i++)
        if (128 * i + thread < N)
            shared.known[128 * i + thread] = known[i];
    sync();
    // The first output of this lane's 8 in a row of w's; gate_up has half as many outputs as rows.
    const unsigned m = first_row<T>(unit) + 64 * group + 64 / Product::CHUNKS * chunk;
#pragma unroll
    for (int round = 0; round < N; round += ROUND) {
        if (round >= unit.count)
            break;
        const int end = round + ROUND < N ? round + ROUND : N;
#pragma unroll
        for (int first = round; first < end; first += 32)
            product.template turn<typename T::Form, N / 2, (ROUND < 32 ? ROUND : 32)>(sum, first, shared.known, shared.turned - round * 128);
        sync();
#pragma unroll
        for (unsigned p = thread / Product::CHUNKS; p < end - round; p += AT_ONCE) {
            const unsigned n = round + p;
            if (n >= unit.count)
                break;
            uint4 value;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                         : "r"(shared.turned + p * 128 + ((chunk ^ p % 8) << 4)) : "memory");
            __nv_bfloat16 *to = product.to(routing, unit.first + n, shared.known[n], m);
            if (to != nullptr)
                *reinterpret_cast<uint4 *>(to) = value;
        }
        sync();
    }
}

template <class T, int N, class Product>
__device__ __forceinline__ void work(const Shared<T> &shared, Place<T::STAGES> &place, const Routing &routing,
                                     const PairOf &pair_of, const Product &product, const Unit &unit, unsigned blocks) {
    const unsigned thread = threadIdx.x % 128;
    unsigned known[(N + 127) / 128];
#pragma unroll
    for (int i = 0; i < (N + 127) / 128; i++) // on its way while the unit is multiplied
        known[i] = 128 * i + thread < unit.count ? product.known(routing, pair_of[unit.first + 128 * i + thread]) : 0;
    float sum[N / 2];
    T::Form::template multiply<T, N>(shared, place, blocks, sum);
    finish<T, N>(shared, routing, product, unit, sum, known);
}

// A unit, by two warpgroups, multiplied with N pairs or more.
template <class T, int N, class Product>
__device__ __forceinline__ void take_unit(const Shared<T> &shared, Place<T::STAGES> &place, const Routing &routing,
                                          const PairOf &pair_of, const Product &product, const Unit &unit, unsigned blocks) {
    if (N >= T::PAIRS || unit.count <= N)
        work<T, N>(shared, place, routing, pair_of, product, unit, blocks);
    else if constexpr (N < T::PAIRS)
        take_unit<T, T::behind(N)>(shared, place, routing, pair_of, product, unit, blocks);
}

// Two warpgroups' work.
template <class T, class Product>
__device__ __forceinline__ void consume(const Shared<T> &shared, const typename T::Plan &plan, const Dealer<T> &dealer,
                                        const Routing &routing, const PairOf &pair_of, const Product &product, unsigned blocks) {
    dependent_wait();
    dependent_launch(); // behind the wait: see 3
    Place<T::STAGES> place;
    const auto take = [&](unsigned number) {
        Unit unit = plan.unit(number);
        unit.count = uniform(unit.count);
        take_unit<T, T::LEAST>(shared, place, routing, pair_of, product, unit, blocks);
    };
    if constexpr (T::DEALT) {
        while (true) {
            barrier_wait(shared.full + 8 * place.at, place.parity);
            const unsigned number = uniform(dealer.noted(place.at));
            if (number == Dealer<T>::NONE)
                return;
            take(number);
        }
    } else {
        const unsigned units = uniform(plan.units());
        for (unsigned number = blockIdx.x; number < units; number += gridDim.x)
            take(number);
    }
}

template <class T, class X, class Product>
__device__ __forceinline__ void products(const typename T::Form &w, const X &x, const Routing &routing,
                                         const Product &product) {
    extern __shared__ __align__(1024) unsigned char start[];
    __shared__ typename T::Plan plan;
    __shared__ unsigned long long slots_full[Dealer<T>::SLOTS];
    __shared__ unsigned slots[Dealer<T>::SLOTS], number_of[T::STAGES];
    const Shared<T> shared(start);
    const Dealer<T> dealer = {shared_address(number_of), shared_address(slots), shared_address(slots_full), product.tickets};
    const unsigned rows = product.rows(routing), blocks = (product.cols(routing) + T::Form::COLS - 1) / T::Form::COLS;
    if (threadIdx.x == T::MULTIPLIERS) {
        w.prefetch();
        x.prefetch();
        if (T::DEALT)
            dealer.init_barriers();
        shared.init_barriers();
    }
    const unsigned across = (rows + T::ROWS * T::SHARERS - 1) / (T::ROWS * T::SHARERS);
    PairOf pair_of = {nullptr, routing.pairs};
    if constexpr (T::SORTS) {
        __shared__ unsigned bits[Sort::WORDS];
        __shared__ unsigned short listed[Sort::PAIRS];
        Sort sort(bits, listed);
        const bool plans = threadIdx.x < T::MULTIPLIERS, sorts = Sort::takes(routing);
        if (sorts)
            pair_of.listed = listed;
        if (T::BY_TOKEN)
            dependent_wait(); // the kernel in front makes what is planned by
        if (plans) {
            const unsigned pairs = sorts ? sort.count(routing) : pairs_in_memory(routing);
            if (T::BY_TOKEN && sorts)
                count_read(routing, pairs);
            make_plan<T>(plan, pairs, routing.experts, across);
        }
        __syncthreads();
        if (sorts && plans)
            sort.list(routing, plan.begins);
        if (sorts && threadIdx.x / 32 != T::WARPS) // who fetches w needs no list
            sync_threads(4, T::MULTIPLIERS + 32);
    } else {
        if (threadIdx.x < T::MULTIPLIERS)
            make_plan<T>(plan, pairs_in_memory(routing), routing.experts, across);
        cluster_sync();
    }
    if (uniform(threadIdx.x / 32) < T::WARPS)
        consume<T>(shared, plan, dealer, routing, pair_of, product, blocks);
    else if constexpr (T::DEALT) {
        if (threadIdx.x == T::MULTIPLIERS)
            fetch_dealt<T>(shared, plan, dealer, w, x.map, rows, blocks);
    } else if (threadIdx.x < T::MULTIPLIERS + 32)
        fetch<T>(shared, plan, w, rows, blocks);
    else
        fetch<T>(shared, plan, x, routing, pair_of, blocks);
    __syncwarp();
    if (T::SHARERS > 1)
        cluster_sync(); // what blocks have sent to each other's shared memory is there
}
