// What fills the ring of experts_products.cuh: w, and x in boxes or row by row.
#pragma once

#include "dependent.cuh"
#include "hopper/experts/experts_units.cuh"

// Where x is: a map of its rows, or where they begin.
struct RowsOfX {
    const TensorMap *map;
    __device__ __forceinline__ void prefetch() const { prefetch_map(map); }
};
struct RowsOfTokens {
    const __nv_bfloat16 *begin;
    __device__ __forceinline__ void prefetch() const {}
};

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
