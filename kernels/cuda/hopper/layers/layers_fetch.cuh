// The two that fetch for a block that multiplies (layers_multiply.cuh): the thread of weights, and the warp of activations.
#pragma once

#include "hopper/layers/layers_multiplier.cuh"

// A box of weights, whose map has four dimensions.
__device__ __forceinline__ void fetch_weights(unsigned to, const TensorMap *map, unsigned col, unsigned parity, unsigned fours,
                                              unsigned barrier, unsigned long long policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to), "l"(map), "r"(col), "r"(0), "r"(parity), "r"(fours), "r"(barrier),
                 "l"(policy)
                 : "memory");
}
// The thread that fetches weights.
struct WeightFetcher {
    const Multiplying &of;
    Place<W_STAGES> place;
    unsigned long long policy = EVICT_NORMAL;

    template <int PRODUCT> __device__ __forceinline__ void fetch(const TensorMap *map) {
        using T = Tile<PRODUCT>;
#pragma unroll 1
        for (unsigned chunk = 0; chunk < T::CHUNKS; chunk += T::AT_ONCE) {
            const unsigned full = of.shared.w_full(place.at), to = of.shared.w(place.at);
            await(of.shared.w_empty(place.at), place.parity ^ 1);
            barrier_expect(full, T::AT_ONCE * T::N * 128);
#pragma unroll
            for (unsigned i = 0; i < T::AT_ONCE; i++) {
                const unsigned col = of.chunk<PRODUCT>(chunk + i) * 64, at = to + i * T::N * 128;
                if (T::ADDS)
                    fetch_weights(at, map, col, of.parity(), 16 * of.segment(), full, policy);
                else if (PRODUCT == QKV)
                    fetch_weights(at, map, col, of.rank, 32 * (of.block / 2), full, policy);
                else
                    fetch_weights(at, map, col, 0, 24 * of.block, full, policy);
            }
            place.advance();
        }
    }
    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (unsigned phase = 0; phase < of.flags.chains(); phase++) {
            const Layer *layer = of.args.layers + phase / 2;
            policy = phase % 2 ? EVICT_FIRST : EVICT_NORMAL;
            fetch<O>(&layer->o);
            fetch<GATE_UP>(&layer->gate_up);
            fetch<DOWN>(&layer->down);
            if (phase + 2 < of.flags.phases())
                fetch<QKV>(&layer[1].qkv);
        }
    }
};

// The warp that fetches activations.
struct ActivationFetcher {
    const Multiplying &of;
    const unsigned lane;
    Place<X_STAGES> place;

    // What is there already, or comes part by part.
    template <int PRODUCT> __device__ __forceinline__ void fetch(const TensorMap *map, const unsigned *parts = nullptr) {
        using T = Tile<PRODUCT>;
        constexpr unsigned PART_CHUNKS = T::COLS / 64 / Flags::PARTS;
        const unsigned first = T::ADDS ? of.rank * T::CHUNKS : 0, at_once = of.x_chunks(), rows = of.padded / 2;
        const bool in_turns = T::ADDS && of.beside();
        unsigned there = 0;
#pragma unroll 1
        for (unsigned chunk = 0; chunk < T::CHUNKS; chunk += at_once) {
            const unsigned full = of.shared.x_full(place.at), last = in_turns ? of.chunk<PRODUCT>(chunk + at_once - 1) : first + chunk + at_once - 1;
            await(of.shared.x_empty(place.at), place.parity ^ 1);
            if (parts && there * PART_CHUNKS <= last) {
                while ((there = of.flags.parts(parts, first / PART_CHUNKS)) * PART_CHUNKS <= last)
                    ;
                fence_before_fetch();
            }
            if (lane == 0) {
                barrier_expect(full, at_once * of.padded * 128);
#pragma unroll 1
                for (unsigned i = 0; i < at_once; i++) {
                    const unsigned to = of.shared.x(place.at) + i * of.padded * 128, col = of.chunk<PRODUCT>(chunk + i) * 64;
                    if (T::ADDS) {
                        bulk_fetch(to, map, col, 0, full, EVICT_NORMAL);
                        bulk_fetch(to + rows * 128, map, col, rows, full, EVICT_NORMAL);
                    } else {
                        bulk_fetch_shared(to + of.rank * rows * 128, map, col, of.rank * rows, full, EVICT_NORMAL, 3);
                    }
                }
            }
            __syncwarp();
            place.advance();
        }
    }
    __device__ __forceinline__ void run() {
        const Flags &flags = of.flags;
        const unsigned turns[2] = {of.args.batch[of.args.plan_offset[0]] * KV_HEADS, of.args.batch[of.args.plan_offset[1]] * KV_HEADS};
#pragma unroll 1
        for (unsigned phase = 0; phase < flags.chains(); phase++) {
            const unsigned half = phase % 2;
            flags.wait(flags.done(phase), half ? turns[1] : turns[0]);
            fence_before_fetch();
            fetch<O>(of.maps.attended + half);
            fetch<GATE_UP>(of.maps.residual + half, flags.parts_of(phase, O));
            fetch<DOWN>(of.maps.activated + half, flags.parts_of(phase, GATE_UP));
            if (phase + 2 < flags.phases())
                fetch<QKV>(of.maps.residual + half, flags.parts_of(phase, DOWN));
        }
    }
};
