// take_batch, begin_step, embed, final_norm: the two ends of a step, where the batch's tokens enter and its sampled rows leave.
//
//   take_batch   batch[:words] = halves[turn, :words]             grid 32                      block 256
//                turn = 1 - turn
//   begin_step   page_table[update.index] = update.page          grid 8                       block 256
//                slots[update.slot] = update.state, rules[update.slot, :] = its words
//   embed        residual[t, :] = table[id(t), :]                grid tokens                  block 128
//                history[location(t)] = id(t)
//                sumsq[t, j] = sum of squares of segment j of residual[t]
//   final_norm   out[r, :] = rms_norm(residual[last(r), :]) * w   grid samples                 block 128
//
//   residual, out [rows, hidden] bf16   table [vocab, hidden] bf16   sumsq [tokens, segments] f32
//   moves: embed tokens * hidden * 4 bytes, final_norm samples * hidden * 4 bytes
//
// 1. A step's launches begin behind everything that came before: take_batch is no dependent launch. begin_step waits for it and
//    only then lets embed start, which may read the batch and the token pool before its own wait. embed lets the next kernel
//    start only once begin_step has ended, so any kernel behind it may read what begin_step wrote (the page table, by attention; the
//    slots, by the sampler) before its own dependent-launch wait, and the batch.
// 2. A batch waits in one of two halves, in turn: it came while the step before ran. Every block looks whose turn it is before it
//    arrives, and the last to arrive passes the turn on: turn [2] is whose it is and how many have arrived. That takes no fence: from
//    where a thread looked it got the count of words that it branches on before its block's barrier, so no value it looked up can come
//    of the arrival that it leads to (No Thin Air, in PTX's memory model); and what is written, batch and turn, is read behind the
//    kernel's end.
// 3. A warp owns whole segments, two elements a lane, so a segment's sum has one order.
#include <cuda_bf16.h>

#include "step/batch.cuh"
#include "dependent.cuh"
#include "segment.cuh"
#include "step/slot.cuh"

extern "C" __global__ void __launch_bounds__(256)
take_batch(const uint4 *halves, unsigned half_quads, unsigned *turn, uint4 *batch) {
    dependent_launch();
    const uint4 *waiting = halves + (size_t)turn[0] * half_quads;
    unsigned i = blockIdx.x * 256 + threadIdx.x;
    const uint4 first = i < half_quads ? waiting[i] : uint4{};
    const unsigned quads = (reinterpret_cast<const Header *>(waiting)->words + 3) / 4;
    if (i < quads)
        batch[i] = first;
    for (i += gridDim.x * 256; i < quads; i += gridDim.x * 256)
        batch[i] = waiting[i];
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&turn[1], 1) == gridDim.x - 1) {
        turn[1] = 0;
        turn[0] ^= 1;
    }
}

extern "C" __global__ void __launch_bounds__(256)
begin_step(const unsigned *batch, unsigned updates_offset, unsigned *page_table, SlotState *slots, unsigned *rules) {
    dependent_wait();
    dependent_launch();
    const Header *header = reinterpret_cast<const Header *>(batch);
    const unsigned pages = header->updates, taken = header->slot_updates;
    const PageUpdate *page = reinterpret_cast<const PageUpdate *>(batch + updates_offset);
    const SlotUpdate *slot = reinterpret_cast<const SlotUpdate *>(page + pages);
    for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < pages; i += gridDim.x * 256)
        page_table[page[i].index] = page[i].page;
    for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < taken; i += gridDim.x * 256)
        slots[slot[i].slot] = slot[i].state;
    const unsigned *words = reinterpret_cast<const unsigned *>(slot + taken);
    for (unsigned i = blockIdx.x; i < taken; i += gridDim.x)
        for (unsigned j = threadIdx.x; j < slot[i].rule_words; j += 256)
            rules[(size_t)slot[i].slot * RULE_WORDS + j] = words[slot[i].rules + j];
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int lane = 16; lane > 0; lane /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}

// The sum over the block's four warps, in warp order, for every thread.
__device__ __forceinline__ float block_sum(float value, float *shared /* [4] */) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = value;
    __syncthreads();
    return (shared[0] + shared[1]) + (shared[2] + shared[3]);
}

extern "C" __global__ void __launch_bounds__(128)
embed(const unsigned *batch, unsigned tokens_offset, const unsigned *token_pool, const __nv_bfloat162 *table,
      unsigned hidden, __nv_bfloat162 *residual, float *sumsq, unsigned *history) {
    const unsigned t = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Token token = reinterpret_cast<const Token *>(batch + tokens_offset)[t];
    const unsigned id = token.id == LAST_TOKEN ? token_pool[token.slot] : token.id;
    dependent_wait();
    dependent_launch();
    if (threadIdx.x == 0)
        history[token.location] = id;
    const unsigned pairs = hidden / 2, segments = segments_of(hidden);
    for (unsigned segment = warp; segment < segments; segment += 4) {
        const unsigned i = segment * 32 + lane;
        float2 x = {0.0f, 0.0f};
        if (i < pairs) {
            const __nv_bfloat162 pair = table[(size_t)id * pairs + i];
            residual[(size_t)t * pairs + i] = pair;
            x = __bfloat1622float2(pair);
        }
        const float sum = warp_sum(fmaf(x.x, x.x, x.y * x.y));
        if (lane == 0)
            sumsq[(size_t)t * segments + segment] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(128)
final_norm(const unsigned *batch, unsigned rows_offset, const __nv_bfloat162 *residual, const __nv_bfloat162 *weight,
           unsigned hidden, float eps, __nv_bfloat162 *out) {
    __shared__ float shared[4];
    dependent_launch();
    const Row *row = reinterpret_cast<const Row *>(batch + rows_offset) + blockIdx.x;
    const unsigned pairs = hidden / 2;
    const __nv_bfloat162 *x = residual + (size_t)(row->first_token + row->tokens - 1) * pairs;
    dependent_wait();
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < pairs; i += 128) {
        const float2 v = __bfloat1622float2(x[i]);
        sum += fmaf(v.x, v.x, v.y * v.y);
    }
    const float scale = rsqrtf(block_sum(sum, shared) / hidden + eps);
    for (unsigned i = threadIdx.x; i < pairs; i += 128) {
        const float2 v = __bfloat1622float2(x[i]), w = __bfloat1622float2(weight[i]);
        out[(size_t)blockIdx.x * pairs + i] = __floats2bfloat162_rn(v.x * scale * w.x, v.y * scale * w.y);
    }
}
