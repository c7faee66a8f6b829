// The warpgroup of attention_prefill that does not attend: one thread takes turns; a warp fetches their keys, another their values; a
// third tells the others their parts, and fetches their queries.
#pragma once
#include "dependent.cuh"
#include "fp8_rows.cuh"
#include "hopper/attention/prefill_shared.cuh"
#include "place.cuh"

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
