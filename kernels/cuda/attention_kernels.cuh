// The entry points of attention, made from a set's constants: DECODE_STAGES(head_dim), DECODE_BLOCKS a
// multiprocessor, PREFILL_BUFFERS.
#pragma once
#include "attention_decode.cuh"
#include "attention_prefill.cuh"

#define DECODE_THREADS (DECODE_READERS + 32 * BULK_COPIES)

extern __shared__ __align__(1024) unsigned char shared_memory[];

#define ATTENTION_KERNELS(HD)                                                                                           \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS, DECODE_BLOCKS) attention_decode_##HD(                  \
        const unsigned *batch, unsigned plan_offset, const unsigned *page_table, unsigned table_width,                  \
        unsigned page_shift, unsigned kv_heads, unsigned group, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, \
        float4 *partials, unsigned *arrived, unsigned arrived_count) {                                                  \
        dependent_launch();                                                                                             \
        DecodeArgs args = {};                                                                                           \
        args.plan = batch + plan_offset;                                                                                \
        args.page_table = page_table;                                                                                   \
        args.table_width = table_width;                                                                                 \
        args.page_shift = page_shift;                                                                                   \
        args.kv_heads = kv_heads;                                                                                       \
        args.group = group;                                                                                             \
        args.q = q;                                                                                                     \
        args.k = k;                                                                                                     \
        args.v = v;                                                                                                     \
        args.out = out;                                                                                                 \
        args.partials = partials;                                                                                       \
        args.arrived = arrived;                                                                                         \
        args.arrived_count = arrived_count;                                                                             \
        decode<HD, DECODE_STAGES(HD)>(args, shared_memory);                                                             \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1) attention_prefill_##HD(                            \
        const unsigned *batch, unsigned plan_offset, unsigned rows_offset, const unsigned *page_table,                  \
        unsigned table_width, unsigned page_shift, unsigned kv_heads, unsigned group, const bf16 *q, const bf16 *k,      \
        const bf16 *v, bf16 *out) {                                                                                     \
        dependent_launch();                                                                                             \
        const PrefillArgs args = {batch + plan_offset, reinterpret_cast<const Row *>(batch + rows_offset),              \
                                  page_table, q, k, v, out, table_width, page_shift, kv_heads, group};                  \
        prefill<HD, PREFILL_BUFFERS>(args, shared_memory);                                                              \
    }
