// A place in a ring whose stages are passed in turn, each guarded by an mbarrier.
#pragma once

template <unsigned COUNT> struct Place {
    unsigned at = 0, parity = 0; // of the stage, and of the barrier's phase there

    __device__ __forceinline__ void advance() {
        if (++at == COUNT) {
            at = 0;
            parity ^= 1;
        }
    }
};
