// The entry points of decode attention, made from a set's constants: DECODE_WARPS that read, DECODE_STAGES(dims), DECODE_BLOCKS
// a multiprocessor.
#pragma once
#include "attention/attention_decode.cuh"

#define DECODE_THREADS (DECODE_READERS + 32 * BULK_COPIES)

extern __shared__ __align__(1024) unsigned char shared_memory[];

#define ATTENTION_DECODE(NAME, HD, HEADS, WINDOW, FP8)                                                                     \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS)                                         \
    NAME(const __grid_constant__ DecodeParams params) {                                                                 \
        if (params.other_taken == nullptr)                                                                              \
            dependent_launch();                                                                                         \
        const DecodeArgs args = {params};                                                                               \
        decode<HD, HEADS, DECODE_STAGES((HD) * (HEADS)), WINDOW, FP8>(args, shared_memory);                             \
    }
