// The entry points of decode attention, made from a set's constants: DECODE_WARPS that read, DECODE_STAGES(dims), DECODE_BLOCKS
// a multiprocessor.
#pragma once
#include "attention_decode.cuh"

#define DECODE_THREADS (DECODE_READERS + 32 * BULK_COPIES)

extern __shared__ __align__(1024) unsigned char shared_memory[];

#define ATTENTION_DECODE(NAME, HD, HEADS, WINDOW, FP8)                                                                     \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS) NAME(                                   \
        const unsigned *batch, unsigned plan_offset, const unsigned *page_table, unsigned table_width,                  \
        unsigned page_shift, unsigned kv_heads, unsigned group, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, \
        float4 *partials, unsigned *arrived, unsigned arrived_count, const unsigned *other_plan,                        \
        const unsigned *other_taken, unsigned window) {                                                                 \
        if (other_taken == nullptr)                                                                                     \
            dependent_launch();                                                                                         \
        DecodeArgs args = {};                                                                                           \
        args.plan = batch + plan_offset;                                                                                \
        args.page_table = page_table;                                                                                   \
        args.table_width = table_width;                                                                                 \
        args.page_shift = page_shift;                                                                                   \
        args.kv_heads = kv_heads;                                                                                       \
        args.group = group;                                                                                             \
        args.window = window;                                                                                           \
        args.q = q;                                                                                                     \
        args.k = k;                                                                                                     \
        args.v = v;                                                                                                     \
        args.out = out;                                                                                                 \
        args.partials = partials;                                                                                       \
        args.arrived = arrived;                                                                                         \
        args.arrived_count = arrived_count;                                                                             \
        args.other_plan = other_plan;                                                                                   \
        args.other_taken = other_taken;                                                                                 \
        decode<HD, HEADS, DECODE_STAGES((HD) * (HEADS)), WINDOW, FP8>(args, shared_memory);                             \
    }
