// How the blocks of layers_divide.cuh hand work to each other, by words in memory that count up.
//
//   phase i = 2 * layer + half          attend(i): attention of the half in that layer
//                                       chain(i):  o, gate_up, down and the next layer's qkv of the same rows; none in the last phase
//
//   attend(i) ── done[i] = all turns ──> o(i) ── parts[i][O][…] = 4 blocks ──> gate_up(i) ──> down(i) ──> qkv(i) ─┐
//   attend(i + 2) <──────────────────────────────── ended[i][…] = half of the blocks: queries; keys and values ────┘
//
// Products tell of each other four blocks at a time, those that make what lies together: who multiplies begins with the columns that are
// there, in their order, while the last blocks end.
//
// Why nothing waits for ever. All blocks are resident: each has a multiprocessor to itself, and there are no more than those. Order
// phases by number. attend(i) waits for chain(i - 2) alone; chain(i) for attend(i) and for what the same blocks do before it, chain(i - 1);
// no product waits for attention of a later phase. Turns are handed out in the order of phases, and who attends works in the order in
// which it took them, so none sits on a turn of phase i while it waits for a later phase; a warp that fills a ring and waits for a flag
// has issued every copy of its earlier turns, and owes queries to the turn it waits for alone. Hence the earliest phase that is not
// finished can always go on.
//
// 1. Words are 32 bytes apart, so that who counts one does not delay who looks at another; but for those that a warp looks at together.
// 2. A word is counted up when what it tells of is in memory (release), and looked at with acquire. Who then has the copy engine read that
//    passes a proxy fence in between.
// 3. All are zero between launches: the block that leaves last zeroes them.
#pragma once

#include "hopper/layers/layers_args.cuh"

enum Product { O, GATE_UP, DOWN, QKV };

__device__ __forceinline__ unsigned seen(const unsigned *word) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ void count(unsigned *word, unsigned by) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(by) : "memory");
}

// What other multiprocessors wrote, and this thread has seen the flag of, may now be fetched by the copy engine.
__device__ __forceinline__ void fence_before_fetch() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

struct Flags {
    unsigned *words;
    unsigned layers;
    static constexpr unsigned APART = 8; // words between two that are looked at apart
    static constexpr unsigned PHASE = 64; // a phase's
    static constexpr unsigned PARTS = 16, PART_BLOCKS = MULTIPLIERS / PARTS; // of a product

    __device__ __forceinline__ explicit Flags(const Layers &args) : words(args.flags), layers(args.count) {}

    __device__ __forceinline__ unsigned phases() const { return 2 * layers; }
    // The last attention's products are other kernels': nothing is left to attend to beside them.
    __device__ __forceinline__ unsigned chains() const { return phases() - 1; }
    // Turns taken, beside everyone's first.
    __device__ __forceinline__ unsigned *taken() const { return words; }
    // Blocks that have left.
    __device__ __forceinline__ unsigned *left() const { return words + APART; }
    // Turns of the phase that are attended to.
    __device__ __forceinline__ unsigned *done(unsigned phase) const { return words + 2 * APART + phase * PHASE; }
    // Blocks that have ended queries (0), or keys and values (1): half of all each,
    __device__ __forceinline__ unsigned *ended(unsigned phase, unsigned kind) const { return done(phase) + APART + kind * (APART / 2); }
    // and of each four those that have ended another product.
    __device__ __forceinline__ unsigned *parts_of(unsigned phase, unsigned product) const {
        return done(phase) + 2 * APART + product * PARTS;
    }
    __device__ __forceinline__ unsigned size() const { return 2 * APART + phases() * PHASE; }

    // A warp's call.
    __device__ __forceinline__ void wait(const unsigned *word, unsigned value) const {
        while (seen(word) < value)
            ;
        __syncwarp();
    }
    // The same: to which part all of a product's are there, from part `from` on; each lane looks at one.
    __device__ __forceinline__ unsigned parts(const unsigned *ended, unsigned from) const {
        const bool is_there = seen(ended + threadIdx.x % PARTS) == PART_BLOCKS;
        const unsigned missing = ~__ballot_sync(0xffffffffu, is_there) | 1u << PARTS;
        __syncwarp();
        return __ffs(missing & -1u << from) - 1;
    }
    // A whole block's call, its last. `last` is a word of shared memory.
    __device__ __forceinline__ void leave(unsigned *last) const {
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned before;
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(left()) : "memory");
            *last = before + 1 == gridDim.x;
        }
        __syncthreads();
        if (*last)
            for (unsigned i = threadIdx.x; i < size(); i += blockDim.x)
                words[i] = 0;
    }
};

// Barriers in shared memory.
__device__ __forceinline__ bool barrier_passed(unsigned barrier, unsigned parity) {
    unsigned passed;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(passed)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return passed;
}

__device__ __forceinline__ void await(unsigned barrier, unsigned parity) {
    while (!barrier_passed(barrier, parity))
        ;
}

// One lane of the warp, the same in each call.
__device__ __forceinline__ bool elected() {
    unsigned is;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is));
    return is;
}
