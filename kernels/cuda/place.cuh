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

// A place in such a ring that has as many stages as a launch says.
struct RingPlace {
    unsigned at = 0, parity = 0;

    __device__ __forceinline__ void advance(unsigned stages) {
        if (++at == stages) {
            at = 0;
            parity ^= 1;
        }
    }
};

// Where who reads is in that ring, and how many stages will yet be filled again.
struct RingPosition : RingPlace {
    unsigned refills;

    __device__ __forceinline__ RingPosition(unsigned blocks, unsigned stages) : refills(blocks > stages ? blocks - stages : 0) {}
};
