// Sampling without sorting: each row's token by core's definition (temperature, top-k, top-p, min-p, Gumbel-max).
//
//   sample_cut   applies row r's mask (mask.cuh), then edits its logits in place (edit.cuh)      grid samples          block 1024
//                cut[r] = the least logit that row r's top-k, top-p and min-p keep
//   sample_draw  token[r] = argmax over kept i of l_i / temperature + gumbel(seed, position, i)
//                                                                                 grid (chunks, samples)  block 256
//   logprobs     log-probability of the token drawn and of the k most probable   grid samples          block 1024
//
//   logits.cuh, selection.cuh and noise.cuh have what each of them does to a row.
//
//   logits [samples, stride] f16 of which `vocab` count; moves samples * vocab * 2 bytes a pass: sample_draw one pass,
//   sample_cut none for a row without filters, two for one whose top-k is up to 1,024 and whose candidates fit the list (not
//   those of a mask that allows fewer than its top-k: minus infinity is among them), else up to five
//
// 1. A logit is 16 bits, so an order-preserving 16-bit key names its value exactly. A histogram of the keys' upper 11
//    bits finds the bucket that holds the k-th largest (or the mass's) boundary, one of the bucket's 32 keys finds the
//    value: exact selection, no sort. The k-th largest of the threads' own maxima is not above the k-th largest of all, so
//    what lies below it is left out: the few that stay are listed in one pass, and selection is among them.
// 2. Masses are added as integers (2^-28 of the most probable token's), so their sum does not depend on the order of
//    the atomics: the same row is always cut at the same value. They are split in two 14-bit halves, because a sum of
//    2^18 of them must fit the 32 bits of a shared-memory atomic.
// 3. The argmax over a row's chunks is one 64-bit atomic maximum of (score, lowest id), which has no order either; the
//    row's last chunk writes the token and leaves the scratch as it found it.
// 4. -ln(u) near u = 1 is a series in 1 - u, which is exact there: the winners' variates come from that end, where the
//    hardware's logarithm has only absolute accuracy.
// 5. A score's bound is never below the score: the noise's bound is above the noise by more than its logarithms are off, and
//    what is added to both rounds the same way. So a logit whose bound is below what the warp has found has lost, and its
//    logarithms are not computed: after a few hundred logits, most have. Of a row that is cut, eight logits per thread that are
//    all below the cut cost a warp nothing more.
// 6. A row whose largest logit is not finite, or that has a NaN, gets NO_TOKEN. A maximum that keeps NaN goes along with the
//    draw, four instructions for eight logits; what it finds takes part as a score of infinity, which no number has. The
//    token pool gets 0: the next step, launched already, reads it.
// 7. sample_cut waits for the head's product even where it has nothing to cut: sample_draw waits for sample_cut alone, and
//    reads the logits. logprobs is launched behind a recorded step, hence no dependent launch.
#include "step/batch.cuh"
#include "dependent.cuh"
#include "step/edit.cuh"
#include "step/logits.cuh"
#include "step/mask.cuh"
#include "step/noise.cuh"
#include "step/selection.cuh"
#include "step/slot.cuh"

#define LOG2E 1.4426950408889634f
#define NO_CUT __int_as_float(0xff800000)
#define INFINITE __int_as_float(0x7f800000)
#define NO_TOKEN 0xffffffffu

extern "C" __global__ void __launch_bounds__(1024, 2)
sample_cut(const unsigned *batch, unsigned rows_offset, const SlotState *slots, __half *logits, unsigned vocab,
           unsigned stride, float *cut, const unsigned *rules, const unsigned *page_table, unsigned table_width,
           unsigned page_bits, const unsigned *history, const unsigned *masks) {
    __shared__ Selection s;
    dependent_launch();
    const Row row = reinterpret_cast<const Row *>(batch + rows_offset)[blockIdx.x];
    const SlotState slot = slots[row.slot];
    dependent_wait();
    __half *l = logits + (size_t)blockIdx.x * stride;
    const bool aligned = stride % 8 == 0;
    if (row.mask > 0)
        apply_mask<1024>(l, aligned, vocab, masks + (size_t)(row.mask - 1) * ((vocab + 31) / 32));
    if (slot.edits != 0) {
        const History own = {page_table + (size_t)row.slot * table_width, history, page_bits};
        edit_row<EDIT_TILE>(l, vocab, row, slot, rules, own, reinterpret_cast<unsigned *>(&s));
    }
    const Filters filters = {slot.top_k > 0 && slot.top_k < vocab, slot.top_p < 1.0f};
    if (slot.temperature == 0.0f || !(filters.by_count || filters.by_mass || slot.min_p > 0.0f)) {
        if (threadIdx.x == 0)
            cut[blockIdx.x] = NO_CUT;
        return;
    }
    for (unsigned i = threadIdx.x; i < 2048; i += 1024)
        s.count[i] = s.low[i] = s.high[i] = 0;
    if (threadIdx.x == 0)
        s.top = 0;
    __syncthreads();

    unsigned top = 0;
    for_each_logit<1024>(l, aligned, 0, vocab, [&](unsigned, __half logit) { top = max(top, key_of(logit)); });
    atomicMax(&s.top, __reduce_max_sync(0xffffffffu, top));
    bool is_listed = filters.by_count && slot.top_k <= 1024;
    if (is_listed && top > 0)
        atomicAdd(&s.count[top / 32], 1);
    __syncthreads();
    if (is_listed)
        is_listed = list_keys(s, l, aligned, vocab, slot.top_k);
    const Keys keys = {l, aligned, is_listed, vocab};
    const float largest = logit_of(s.top), scale = LOG2E / slot.temperature;
    const float least = slot.min_p > 0.0f ? largest + slot.temperature * logf(slot.min_p) : NO_CUT;
    unsigned floor_key = 0;
    const Mass mass = {largest, scale};
    count_keys(s, keys, filters, mass);
    if (filters.by_count)
        floor_key = cut_by_count(s, keys, slot.top_k, filters, mass);
    if (filters.by_mass)
        floor_key = cut_by_mass(s, keys, slot.top_p, floor_key, mass);
    if (threadIdx.x == 0) {
        const float selected = filters.by_count || filters.by_mass ? logit_of(floor_key) : NO_CUT;
        cut[blockIdx.x] = fmaxf(selected, least);
    }
}

// The warp's maximum, for every lane.
__device__ __forceinline__ unsigned long long warp_max(unsigned long long value) {
    for (int lane = 16; lane > 0; lane /= 2) {
        const unsigned long long other = __shfl_xor_sync(0xffffffffu, value, lane);
        value = other > value ? other : value;
    }
    return value;
}

// The best score that a thread has found. Ids are given in ascending order: the lowest among equals stays.
struct Best {
    float score;
    unsigned id;

    __device__ __forceinline__ void take(float other, unsigned other_id) {
        id = other > score ? other_id : id;
        score = fmaxf(other, score);
    }
};

// Takes the scores of the row's four logits from `id` on, a multiple of 4, unless none of them can be `found` or better.
__device__ __forceinline__ void take_four(Best &best, const __half *logit, unsigned id, unsigned position,
                                          const SlotState &slot, float inverse, float least, float found) {
    const uint4 words = philox(make_uint4(id / 4, position, 0, 0), slot.seed_low, slot.seed_high);
    const float w[4] = {complement(words.x), complement(words.y), complement(words.z), complement(words.w)};
    float bound = NO_CUT;
#pragma unroll
    for (int j = 0; j < 4; j++)
        bound = fmaxf(bound, fmaf(__half2float(logit[j]), inverse, gumbel_bound(w[j])));
    if (bound < found)
        return;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float value = __half2float(logit[j]);
        best.take(value < least ? NO_CUT : fmaf(value, inverse, gumbel(w[j])), id + j);
    }
}

extern "C" __global__ void __launch_bounds__(256)
sample_draw(const unsigned *batch, unsigned rows_offset, const SlotState *slots, const __half *logits, unsigned vocab,
            unsigned stride, unsigned chunk, const float *cut, unsigned long long *row_best, unsigned *arrived, unsigned *tokens,
            unsigned *token_pool) {
    __shared__ unsigned long long warps[8];
    dependent_launch();
    const Row row = reinterpret_cast<const Row *>(batch + rows_offset)[blockIdx.y];
    const SlotState slot = slots[row.slot];
    dependent_wait();
    const unsigned begin = blockIdx.x * chunk;
    const Chunk own = {logits + (size_t)blockIdx.y * stride, stride % 8 == 0, begin, min(vocab, begin + chunk)};
    const float least = cut[blockIdx.y];
    Best best = {NO_CUT, begin};
    __half largest;
    if (slot.temperature == 0.0f) {
        largest = own.each_eight([&](const __half (&logit)[8], unsigned i) {
#pragma unroll
            for (int j = 0; j < 8; j++)
                best.take(__half2float(logit[j]), i + j);
        });
    } else {
        const float inverse = 1.0f / slot.temperature;
        const auto draw = [&](const __half (&logit)[8], unsigned i) {
            const float found = value_of(__reduce_max_sync(0xffffffffu, ordered(best.score)));
            take_four(best, logit, i, row.kv_len, slot, inverse, least, found);
            take_four(best, logit + 4, i + 4, row.kv_len, slot, inverse, least, found);
        };
        if (least == NO_CUT)
            largest = own.each_eight(draw);
        else
            largest = own.each_eight([&](const __half (&logit)[8], unsigned i) {
                if (__any_sync(0xffffffffu, reaches(logit, least)))
                    draw(logit, i);
            });
    }
    if (!(__half2float(largest) < INFINITE))
        best.score = INFINITE;
    unsigned long long winner = warp_max((unsigned long long)ordered(best.score) << 32 | (0xffffffffu - best.id));
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = winner;
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    for (int i = 1; i < 8; i++)
        winner = warps[i] > winner ? warps[i] : winner;
    atomicMax(&row_best[blockIdx.y], winner);
    __threadfence();
    if (atomicAdd(&arrived[blockIdx.y], 1) + 1 != gridDim.x)
        return;
    __threadfence();
    winner = atomicExch(&row_best[blockIdx.y], 0ull);
    arrived[blockIdx.y] = 0;
    const unsigned id = 0xffffffffu - (unsigned)winner;
    const bool drawn = fabsf(value_of((unsigned)(winner >> 32))) < INFINITE;
    tokens[reinterpret_cast<const Header *>(batch)->output + blockIdx.y] = drawn ? id : NO_TOKEN;
    token_pool[row.slot] = drawn ? id : 0;
}

struct RowLogprobs {
    float token;
    unsigned len, ids[20];
    float logprobs[20];
};

// The block's maximum, for every thread.
__device__ __forceinline__ unsigned long long block_max(unsigned long long value, unsigned long long *shared /* [32] */) {
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = value;
    __syncthreads();
    for (int i = 0; i < 32; i++)
        value = shared[i] > value ? shared[i] : value;
    return value;
}

extern "C" __global__ void __launch_bounds__(1024)
logprobs(const unsigned *batch, unsigned rows_offset, const __half *logits, unsigned vocab, unsigned stride,
         const unsigned *tokens, RowLogprobs *out) {
    __shared__ unsigned long long shared[32];
    __shared__ float sums[32];
    const Row row = reinterpret_cast<const Row *>(batch + rows_offset)[blockIdx.x];
    if (row.logprobs == 0)
        return;
    const unsigned output = reinterpret_cast<const Header *>(batch)->output + blockIdx.x;
    if (tokens[output] == NO_TOKEN)
        return;
    const __half *l = logits + (size_t)blockIdx.x * stride;
    const bool aligned = stride % 8 == 0;
    const unsigned wanted = min(row.logprobs - 1, vocab);
    // (key, lowest id) of the most probable token, then of the most probable one below it, and so on.
    unsigned long long bound = ~0ull;
    float log_total = 0.0f;
    unsigned len = 0;
    for (unsigned rank = 0; rank == 0 || rank < wanted; rank++) {
        unsigned long long own = 0;
        for_each_logit<1024>(l, aligned, 0, vocab, [&](unsigned id, __half logit) {
            const unsigned long long entry = (unsigned long long)key_of(logit) << 32 | (0xffffffffu - id);
            own = entry < bound && entry > own ? entry : own;
        });
        bound = block_max(own, shared);
        const float value = logit_of((unsigned)(bound >> 32));
        if (rank == 0) {
            float sum = 0.0f;
            for_each_logit<1024>(l, aligned, 0, vocab,
                                 [&](unsigned, __half logit) { sum += expf(__half2float(logit) - value); });
            for (int lane = 16; lane > 0; lane /= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, lane);
            if (threadIdx.x % 32 == 0)
                sums[threadIdx.x / 32] = sum;
            __syncthreads();
            float total = 0.0f;
            for (int i = 0; i < 32; i++)
                total += sums[i];
            log_total = value + logf(total);
        }
        if (!(value > NO_CUT))  // the others can't be drawn
            break;
        len = min(rank + 1, wanted);
        if (threadIdx.x == 0 && rank < wanted) {
            out[output].ids[rank] = 0xffffffffu - (unsigned)bound;
            out[output].logprobs[rank] = value - log_total;
        }
    }
    if (threadIdx.x == 0) {
        out[output].token = __half2float(l[tokens[output]]) - log_total;
        out[output].len = len;
    }
}
