// How ranks, GPUs that compute each step together, hand each other words: a rank stores them into the other's inbox, and that one
// reads the inbox until they are there.
//
//   rank 0   push ──── NVLink ───> inbox of rank 1   take: read until it is not EMPTY, use it, make it EMPTY again
//   rank 1   push ──── NVLink ───> inbox of rank 0   take
//
// 1. A word is its own flag: EMPTY until it has come. So there is no fence, no counter and nothing to wait for but the data, and
//    it does not matter in which order words arrive. EMPTY is a NaN that no arithmetic gives (or two of 16 bits); where a checkpoint
//    has it, another NaN is sent.
// 2. An inbox is EMPTY whenever an exchange begins to push into it. Who takes a word makes it EMPTY; a rank pushes into the same
//    inbox again only after another exchange, in another inbox, in which all ranks had words from all. Those words a rank pushes when its
//    kernel before, and so its taking, has ended. So two inboxes in turn do, and no rank is ever more than one exchange ahead.
//      rank 0   exchange n, inbox A ─ ends ─ n + 1, inbox B: push ──┐           n + 2, inbox A: push
//      rank 1   exchange n, inbox A: take, EMPTY ─ ends ─ n + 1, inbox B: push, take from rank 0 …
//                                                                └─> rank 0 takes it, so rank 1's inbox A is EMPTY
//    Which inbox an exchange has is fixed by its place in the step, so that recorded steps need no counter either.
// 3. Nobody waits for what is not on its way. A grid is no larger than what a GPU holds at once: what is there of other kernels ends
//    by itself, for those before it wait for nobody but it, and those behind it start only when all of its blocks are there
//    (`dependent_launch`). So sums come, for products push them and wait for nobody; embedded rows, columns, and columns of the residual stream, which
//    a kernel pushes before it waits; and the results of two shots, which a block pushes once it has the sums of its share.
// 4. Nobody waits for ever. Who has waited for `patience_ms` writes whom it waited for into `ended`, a word of the host's memory
//    that all ranks read now and then while they wait, and which the host may write too. Once it is not zero nobody waits: a block finds
//    out by PATIENT_LOOKS at one word, and gives up all that are missing. What kernels give is of no use then, and the host says so at
//    the end of the step.
// 5. Where GPUs don't reach each other's memory NCCL fills inboxes between two kernels, the one that sends and the one that takes. Then
//    a word may be anything, and it is there.
#pragma once

#include "exchange/inbox.cuh"

// Looks at a word between two at the clock and the host's memory: some milliseconds.
#define PATIENT_LOOKS 8192u
// Values of `ended`: beside zero, this, by the host; or this and one more than the rank that did not come.
#define ENDED 1u

// A kernel parameter: backend-cuda/src/ops/exchange.rs declares the same fields.
struct Ranks {
    unsigned *inbox[8]; // of this exchange, on each rank, its own too
    unsigned *ended;
    unsigned rank, count, patience_ms;
    unsigned carried; // 1: by others than these kernels (NCCL); what they read is there, and nobody waits
};

__device__ __forceinline__ uint2 sendable(uint2 v) {
    return {v.x == EMPTY ? NOT_EMPTY : v.x, v.y == EMPTY ? NOT_EMPTY : v.y};
}

__device__ __forceinline__ uint4 sendable(uint4 v) {
    const uint2 low = sendable(uint2{v.x, v.y}), high = sendable(uint2{v.z, v.w});
    return {low.x, low.y, high.x, high.y};
}

__device__ __forceinline__ bool is_empty(uint4 v) {
    return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY;
}

__device__ __forceinline__ bool is_empty(uint2 v) { return v.x == EMPTY || v.y == EMPTY; }

__device__ __forceinline__ void push(uint4 *to, uint4 v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint4 look(const uint4 *at) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint2 look(const uint2 *at) {
    uint2 v;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ void empty(uint4 *at) { *at = {EMPTY, EMPTY, EMPTY, EMPTY}; }
__device__ __forceinline__ void empty(uint2 *at) { *at = {EMPTY, EMPTY}; }

// Has a thread of the block given up? Shared, so that it takes no registers.
__shared__ volatile unsigned given_up;

// Called by all threads of a block before any of them waits.
__device__ __forceinline__ void begin_waiting(const Ranks &ranks) {
    if (threadIdx.x == 0)
        given_up = ranks.carried;
    __syncthreads();
}

// How long a thread has waited for a word.
struct Patience {
    unsigned looks = 0;
    unsigned long long since = 0;

    // Called after a look for what rank `from` sends that found nothing: is there to be another?
    __device__ __forceinline__ bool looks_again(const Ranks &ranks, unsigned from) {
        if (given_up)
            return false;
        if (++looks % PATIENT_LOOKS != 0 || waits_on(ranks, from))
            return true;
        given_up = 1;
        return false;
    }

  private:
    __device__ __noinline__ bool waits_on(const Ranks &ranks, unsigned from) {
        unsigned ended;
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(ended) : "l"(ranks.ended) : "memory");
        if (ended != 0)
            return false;
        unsigned long long now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        if (since == 0)
            since = now;
        if (now - since < ranks.patience_ms * 1000000ull)
            return true;
        asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(ranks.ended), "r"(ENDED + 1 + from) : "memory");
        return false;
    }
};

// Waits for what rank `from` sends to `at`.
template <typename V> __device__ __forceinline__ V take(V *at, const Ranks &ranks, unsigned from) {
    Patience patience;
    V v = look(at);
    while (is_empty(v) && patience.looks_again(ranks, from))
        v = look(at);
    empty(at);
    return v;
}
