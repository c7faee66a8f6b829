// The blocks of layers_divide.cuh that attend: turn after turn (attention_work.cuh), phase after phase, in two groups of four warps that
// read, three where keys and values are in fp8, each with a ring of its own and a warp that fills it.
//
//   shared    a group's ring: STAGES stages of a leaf's keys or values, 32 KiB, or 16 and scales; beside each a turn's queries, the unit,
//             `full`, `empty` (layers_attend_ring.cuh)
//             a group's probabilities, maxima, states of spans, and how many turns its warps have ended in each phase
//   fill      layers_attend_ring.cuh      read      layers_attend_read.cuh
//   tell      adds what the groups have ended to the phase's `done`: the release takes a microsecond, which no other warp may wait
//
// A turn counts in `done` when its output, or its last partial, is in memory: the turn that merges a row counts behind the others.
#pragma once

#include "hopper/layers/layers_attend_read.cuh"

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
