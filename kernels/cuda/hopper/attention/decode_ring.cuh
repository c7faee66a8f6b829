// Decode's ring on Hopper as who reads it has it (attention_ring.cuh): a warp of its own fills it.
#pragma once
#include "hopper/attention/decode_filler.cuh"

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
