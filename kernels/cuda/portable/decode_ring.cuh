// Decode's ring where there are no bulk copies (attention_ring.cuh): who reads it fills it, too.
#pragma once
#include "attention/attention_stages.cuh"
#include "place.cuh"

template <int HD, int HEADS, int STAGES, bool FP8> struct Ring {
    static_assert(HEADS == 1 && STAGES == 2 && !FP8, "one is read, one is filled");
    const DecodeArgs &args;
    const Stages<HD, HEADS, STAGES, FP8> stages;
    Place<STAGES> place;
    Unit ahead; // whose keys or values are copied next
    unsigned turn;
    bool values;
    static_assert(Stages<HD, HEADS, STAGES, FP8>::SECTIONS == 1 && Stages<HD, HEADS, STAGES, FP8>::TURNS == 1, "a stage is a leaf");

    __device__ __forceinline__ Ring(const DecodeArgs &args, Stages<HD, HEADS, STAGES, FP8> stages)
        : args(args), stages(stages), turn(blockIdx.x), values(false) {
        ahead.begin(args, turn);
        copy_next(0);
    }
    __device__ __forceinline__ void copy(unsigned to, const bf16 *from, bool copies) const {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copies ? 16 : 0) : "memory");
    }
    __device__ __forceinline__ void copy_tokens(unsigned stage) const {
        constexpr unsigned CHUNKS = HD / 8;
        const unsigned tokens = ahead.tiles() * TILE, chunk = threadIdx.x % CHUNKS;
        const unsigned *pages = args.page_table + (size_t)ahead.segment.slot * args.table_width;
        for (unsigned t = threadIdx.x / CHUNKS; t < tokens; t += DECODE_READERS / CHUNKS) {
            const unsigned token = ahead.leaf * LEAF + t, in_page = token & ((1u << args.page_shift) - 1);
            const bool exists = token < ahead.segment.kv_len;
            const unsigned page = exists ? pages[token >> args.page_shift] : 0;
            const size_t row = (((size_t)page * args.kv_heads + args.group_of(ahead.item)) << args.page_shift) + in_page;
            copy(stages.tokens(stage) + (t * CHUNKS + chunk) * 16, (values ? args.v : args.k) + row * HD + chunk * 8, exists);
        }
    }
    __device__ __forceinline__ void copy_queries() const {
        const unsigned chunk = threadIdx.x;
        if (chunk < args.queries(ahead.item) * (HD / 8))
            copy(stages.queries(0) + chunk * 16,
                 args.q + args.query_offset(ahead.segment.row, ahead.item, HD) + chunk * 8, true);
    }
    // Starts the copies of what follows, and goes on.
    __device__ __forceinline__ void copy_next(unsigned stage) {
        if (!values && threadIdx.x == 0 && (ahead.is_end() || ahead.is_first()))
            ahead.store(stages.unit(stage));
        if (!ahead.is_end()) {
            copy_tokens(stage);
            if (!values && ahead.is_first())
                copy_queries();
            values = !values;
            if (!values)
                advance();
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ __forceinline__ void advance() {
        ahead.leaf++;
        if (!ahead.is_past())
            return;
        turn += gridDim.x;
        if (turn < args.turns)
            ahead.begin(args, turn);
        else
            ahead.segment.leaves = 0;
    }
    __device__ __forceinline__ void take() {
        readers_barrier(); // everyone is done with the other stage
        copy_next(place.at ^ 1);
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        readers_barrier();
    }
    __device__ __forceinline__ bool others_arrived() const { return false; }
    __device__ __forceinline__ void release() { place.advance(); }
};

template <int HD, int HEADS, int STAGES, bool FP8> __device__ __forceinline__ void prepare(const Stages<HD, HEADS, STAGES, FP8> &) {}
