// Edits of a row's logits, in place, by core's definition (rules.rs): what may not be drawn, biases, penalties.
//
//   history [pages + 1, page_size]     the token at each location of the KV pages; a row reads its sequence by its page table
//   rules [slots + 1, RULE_WORDS]      | id, bias, … | endings … | offsets of bad words … | their tokens … |
//   moves: a row's history, 8 bytes a token, and some logits; the history once for up to 8,192 tokens, else twice a tile
//
//   history   ··a··b··a··|··a··c··         prompt │ output
//   tile      the vocabulary's tokens [0, 6144), [6144, 12288), …, one after the other, a word each:
//             | … | a: IN_PROMPT + 1 | … | c: 1 | …      counted by all threads; then whoever takes a token's word to 0 edits
//                                                        that token's logit, so each is edited once
//
// 1. One block edits a row, in the memory that selection uses afterwards.
// 2. Products and differences are rounded one by one, as the CPU does, so that logits of both differ by their type alone.
// 3. What is no finite number stays what it is.
#pragma once

#include <cuda_fp16.h>

#include "step/batch.cuh"
#include "step/slot.cuh"

#define IN_PROMPT 0x80000000u
#define LOGIT_MAX 65504.0f
// Minus infinity's bits: a token that is never drawn.
#define FORBIDDEN 0xfc00u

// A row's tokens, by position.
struct History {
    const unsigned *pages, *tokens;  // the slot's row of the page table; the history
    unsigned page_bits;

    __device__ __forceinline__ unsigned at(unsigned position) const {
        return tokens[(pages[position >> page_bits] << page_bits) + (position & ((1u << page_bits) - 1))];
    }
};

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

__device__ __forceinline__ __half saturated(float x) {
    return __float2half_rn(fminf(fmaxf(x, -LOGIT_MAX), LOGIT_MAX));
}

__device__ __forceinline__ void forbid(__half &logit) {
    if (is_finite(__half2float(logit)))
        logit = __ushort_as_half(FORBIDDEN);
}

__device__ __forceinline__ void add_bias(__half &logit, float bias) {
    const float x = __half2float(logit);
    if (is_finite(x))
        logit = saturated(__fadd_rn(x, bias));
}

__device__ __forceinline__ void penalize(__half &logit, unsigned count, const SlotState &slot) {
    const float x = __half2float(logit);
    if (!is_finite(x))
        return;
    const float repeated = x > 0.0f ? __fdiv_rn(x, slot.repetition) : __fmul_rn(x, slot.repetition);
    const float frequent = __fsub_rn(repeated, __fmul_rn(slot.frequency, (float)count));
    logit = saturated(__fsub_rn(frequent, count > 0 ? slot.presence : 0.0f));
}

// The last token of each bad word whose others the output ends with; a thread a word.
__device__ __forceinline__ void forbid_bad_words(__half *logits, const unsigned *offsets, const SlotState &slot,
                                                 const History &history, unsigned kv_len) {
    const unsigned *tokens = offsets + slot.bad_words + 1;
    for (unsigned word = threadIdx.x; word < slot.bad_words; word += 1024) {
        const unsigned first = offsets[word], before = offsets[word + 1] - first - 1;
        if (slot.prompt_len + before > kv_len)
            continue;
        unsigned same = 0;
        while (same < before && history.at(kv_len - before + same) == tokens[first + same])
            same++;
        if (same == before)
            forbid(logits[tokens[first + before]]);
    }
}

// Counts tokens in `tile` [TILE], and edits the logits of those that there are.
template <unsigned TILE>
__device__ __forceinline__ void penalize_all(__half *logits, unsigned vocab, const SlotState &slot, const History &history,
                                             unsigned kv_len, unsigned *tile) {
    constexpr unsigned HELD = 8, NONE = 0xffffffffu;
    unsigned held[HELD];
    const auto load = [&](unsigned begin) {
#pragma unroll
        for (unsigned i = 0; i < HELD; i++) {
            const unsigned position = begin + i * 1024 + threadIdx.x;
            held[i] = position < kv_len ? history.at(position) : NONE;
        }
    };
    const bool all_held = kv_len <= HELD * 1024;
    if (all_held)
        load(0);
    for (unsigned first = 0; first < vocab; first += TILE) {
        for (unsigned i = threadIdx.x; i < TILE; i += 1024)
            tile[i] = 0;
        __syncthreads();
        for (unsigned begin = 0; begin < kv_len; begin += HELD * 1024) {
            if (!all_held)
                load(begin);
#pragma unroll
            for (unsigned i = 0; i < HELD; i++) {
                if (held[i] - first >= TILE)
                    continue;
                if (begin + i * 1024 + threadIdx.x < slot.prompt_len)
                    atomicOr(&tile[held[i] - first], IN_PROMPT);
                else
                    atomicAdd(&tile[held[i] - first], 1);
            }
        }
        __syncthreads();
        for (unsigned begin = 0; begin < kv_len; begin += HELD * 1024) {
            if (!all_held)
                load(begin);
#pragma unroll
            for (unsigned i = 0; i < HELD; i++) {
                const unsigned count = held[i] - first < TILE ? atomicExch(&tile[held[i] - first], 0) : 0;
                if (count != 0)
                    penalize(logits[held[i]], count & ~IN_PROMPT, slot);
            }
        }
        __syncthreads();
    }
}

// All edits of a row; the whole block of 1,024 threads. `tile` [TILE] is shared memory.
template <unsigned TILE>
__device__ __forceinline__ void edit_row(__half *logits, unsigned vocab, const Row &row, const SlotState &slot,
                                         const unsigned *rules, const History &history, unsigned *tile) {
    const unsigned *own = rules + (size_t)row.slot * RULE_WORDS, *endings = own + 2 * slot.biases;
    if (row.kv_len < slot.endings_from)
        for (unsigned i = threadIdx.x; i < slot.endings; i += 1024)
            forbid(logits[endings[i]]);
    forbid_bad_words(logits, endings + slot.endings, slot, history, row.kv_len);
    __syncthreads();
    for (unsigned i = threadIdx.x; i < slot.biases; i += 1024)
        add_bias(logits[own[2 * i]], __uint_as_float(own[2 * i + 1]));
    __syncthreads();
    if (slot.repetition != 1.0f || slot.presence != 0.0f || slot.frequency != 0.0f)
        penalize_all<TILE>(logits, vocab, slot, history, row.kv_len, tile);
}
