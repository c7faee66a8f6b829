// Sampling without sorting: each row's token by core's definition (temperature, top-k, top-p, min-p, Gumbel-max).
//
//   sample_cut   applies row r's mask (mask.cuh), then edits its logits in place (edit.cuh)      grid samples          block 1024
//                cut[r] = the least logit that row r's top-k, top-p and min-p keep
//   sample_draw  token[r] = argmax over kept i of l_i / temperature + gumbel(seed, position, i)
//                                                                                 grid (chunks, samples)  block 256
//   logprobs     log-probability of the token drawn and of the k most probable   grid samples          block 1024
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
#include <cuda_fp16.h>

#include "step/batch.cuh"
#include "dependent.cuh"
#include "step/edit.cuh"
#include "step/mask.cuh"
#include "step/slot.cuh"

#define LN2 0.6931471805599453f
#define LOG2E 1.4426950408889634f
#define NO_CUT __int_as_float(0xff800000)
#define INFINITE __int_as_float(0x7f800000)
#define NO_TOKEN 0xffffffffu

// f16 bits to a key of the same order, and back; -0 has the key of 0.
__device__ __forceinline__ unsigned key_of(__half logit) {
    const unsigned bits = __half_as_ushort(logit);
    return bits & 0x8000u ? 0x10000u - bits : bits | 0x8000u;
}

__device__ __forceinline__ float logit_of(unsigned key) {
    return __half2float(__ushort_as_half((unsigned short)(key & 0x8000u ? key & 0x7fffu : 0x10000u - key)));
}

// f32 to a key of the same order, and back; likewise.
__device__ __forceinline__ unsigned ordered(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? 0u - bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : 0u - key);
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Philox4x32, 7 rounds.
__device__ __forceinline__ uint4 philox(uint4 c, unsigned k0, unsigned k1) {
#pragma unroll
    for (int round = 0; round < 7; round++) {
        const unsigned high0 = __umulhi(c.x, 0xD2511F53u), low0 = c.x * 0xD2511F53u;
        const unsigned high1 = __umulhi(c.z, 0xCD9E8D57u), low1 = c.z * 0xCD9E8D57u;
        c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// 1 - u of the fraction u that a random word stands for, (word / 512 + 1/2) / 2^23: exact.
__device__ __forceinline__ float complement(unsigned word) {
    return 2.0f - __uint_as_float(0x3f800000u | word >> 9) - 0x1p-24f;
}

// -ln(-ln(u)), of w = 1 - u.
__device__ __forceinline__ float gumbel(float w) {
    const float u = 1.0f - w;
    const float series = w * fmaf(w, fmaf(w, fmaf(w, fmaf(w, 0.2f, 0.25f), 1.0f / 3.0f), 0.5f), 1.0f);
    const float e = w < 0.0625f ? series : -LN2 * log2_fast(u);
    return -LN2 * log2_fast(e);
}

// At least that, also with what the logarithms are off: -ln(w) is, and its bits say that but for 0.06.
__device__ __forceinline__ float gumbel_bound(float w) {
    const float bits = __uint_as_float(0x4b000000u | __float_as_uint(w) >> 8); // 2^23 and the bits / 256
    return fmaf(bits, -LN2 / 32768.0f, LN2 * (256.0f + 127.0f) + 0.002f);
}

// Calls f(id, logit) for the ids of [begin, end) that fall to this thread, eight neighbours at a time in one load
// where rows are aligned to 16 bytes. `begin` is a multiple of 8.
template <int THREADS, typename F>
__device__ __forceinline__ void for_each_logit(const __half *row, bool aligned, unsigned begin, unsigned end, F f) {
    for (unsigned i = begin + threadIdx.x * 8; i < end; i += THREADS * 8) {
        if (aligned && i + 8 <= end) {
            __half logit[8];
            *reinterpret_cast<uint4 *>(logit) = *reinterpret_cast<const uint4 *>(row + i);
#pragma unroll
            for (int j = 0; j < 8; j++)
                f(i + j, logit[j]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (i + j < end)
                    f(i + j, row[i + j]);
        }
    }
}

__device__ __forceinline__ unsigned mass_of(float logit, float top, float scale) {
    return __float2uint_rn(exp2f((logit - top) * scale) * 268435456.0f);
}

#define LISTED 4096

struct Selection {
    unsigned count[2048], low[2048], high[2048];  // by the key's upper 11 bits: keys, and their mass in two halves;
                                                  // before, all three are the tile of the edits
    unsigned within[32];                          // by the lower 5 bits, in one bucket
    unsigned short list[LISTED];                  // keys that may be kept
    unsigned top, bucket, listed;
    unsigned long long before, total;
};

constexpr unsigned EDIT_TILE = 3 * 2048;

// Finds, walking down from the largest key, the bucket in which `weight(bucket)` summed passes `target`; one warp.
template <typename W>
__device__ __forceinline__ void find_bucket(Selection &s, unsigned long long target, W weight) {
    unsigned long long before = 0;
    for (int first = s.top / 32; first >= 0; first -= 32) {
        const int bucket = first - (int)(threadIdx.x % 32);
        const unsigned long long own = bucket < 0 ? 0 : weight(bucket);
        unsigned long long upto = own;
        for (int step = 1; step < 32; step *= 2) {
            const unsigned long long left = __shfl_up_sync(0xffffffffu, upto, step);
            if (threadIdx.x % 32 >= step)
                upto += left;
        }
        const unsigned passed = __ballot_sync(0xffffffffu, before + upto >= target);
        if (passed) {
            if (threadIdx.x % 32 == __ffs(passed) - 1) {
                s.bucket = bucket;
                s.before = before + upto - own;
            }
            return;
        }
        before += __shfl_sync(0xffffffffu, upto, 31);
    }
    if (threadIdx.x % 32 == 0) {  // the target is all there is, but for rounding
        s.bucket = 0;
        s.before = before;
    }
}

// The keys among which is selected: those listed, or all of the row's.
struct Keys {
    const __half *row;
    bool aligned, listed;
    unsigned vocab;

    // Calls f(key) for those that fall to this thread.
    template <typename F>
    __device__ __forceinline__ void each(const Selection &s, F f) const {
        if (listed)
            for (unsigned i = threadIdx.x; i < s.listed; i += 1024)
                f(s.list[i]);
        else
            for_each_logit<1024>(row, aligned, 0, vocab, [&](unsigned, __half logit) { f(key_of(logit)); });
    }
};

// Counts the bucket's 32 keys among those not below `floor_key`; the whole block.
__device__ __forceinline__ void count_within(Selection &s, unsigned floor_key, const Keys &keys) {
    if (threadIdx.x < 32)
        s.within[threadIdx.x] = 0;
    __syncthreads();
    const unsigned bucket = s.bucket;
    keys.each(s, [&](unsigned key) {
        if (key / 32 == bucket && key >= floor_key)
            atomicAdd(&s.within[key % 32], 1);
    });
    __syncthreads();
}

// The key within the bucket at which `target` is passed, from the largest down; thread 0's answer counts.
template <typename W>
__device__ __forceinline__ unsigned key_within(const Selection &s, unsigned long long target, W weight) {
    unsigned long long sum = s.before;
    unsigned least = s.bucket * 32;
    for (int i = 31; i >= 0; i--) {
        const unsigned key = s.bucket * 32 + i;
        if (s.within[i] == 0)
            continue;
        least = key;
        sum += weight(key) * s.within[i];
        if (sum >= target)
            break;
    }
    return least;
}

// Lists the keys that may be among the `top_k` largest, given the threads' own maxima in `count`, which is zero afterwards.
// False if they are too many. The whole block.
__device__ __forceinline__ bool list_keys(Selection &s, const __half *row, bool aligned, unsigned vocab, unsigned top_k) {
    if (threadIdx.x < 32)
        find_bucket(s, top_k, [&](int bucket) { return (unsigned long long)s.count[bucket]; });
    if (threadIdx.x == 0)
        s.listed = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < 2048; i += 1024)
        s.count[i] = 0;
    const unsigned floor_key = s.bucket * 32;
    for_each_logit<1024>(row, aligned, 0, vocab, [&](unsigned, __half logit) {
        const unsigned key = key_of(logit);
        if (key >= floor_key) {
            const unsigned at = atomicAdd(&s.listed, 1);
            if (at < LISTED)
                s.list[at] = key;
        }
    });
    __syncthreads();
    return s.listed <= LISTED;
}

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
    const bool by_count = slot.top_k > 0 && slot.top_k < vocab, by_mass = slot.top_p < 1.0f;
    if (slot.temperature == 0.0f || !(by_count || by_mass || slot.min_p > 0.0f)) {
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
    bool is_listed = by_count && slot.top_k <= 1024;
    if (is_listed && top > 0)
        atomicAdd(&s.count[top / 32], 1);
    __syncthreads();
    if (is_listed)
        is_listed = list_keys(s, l, aligned, vocab, slot.top_k);
    const Keys keys = {l, aligned, is_listed, vocab};
    const float largest = logit_of(s.top), scale = LOG2E / slot.temperature;
    float least = slot.min_p > 0.0f ? largest + slot.temperature * logf(slot.min_p) : NO_CUT;
    unsigned floor_key = 0;
    const auto mass_in = [&](int bucket) { return ((unsigned long long)s.high[bucket] << 14) + s.low[bucket]; };
    const auto mass_at = [&](unsigned key) { return mass_of(logit_of(key), largest, scale); };

    keys.each(s, [&](unsigned key) {
        if (by_count)
            atomicAdd(&s.count[key / 32], 1);
        const unsigned mass = by_mass ? mass_at(key) : 0;
        if (mass > 0) {
            atomicAdd(&s.low[key / 32], mass & 0x3fff);
            atomicAdd(&s.high[key / 32], mass >> 14);
        }
    });
    __syncthreads();

    if (by_count) {
        if (threadIdx.x < 32)
            find_bucket(s, slot.top_k, [&](int bucket) { return (unsigned long long)s.count[bucket]; });
        __syncthreads();
        count_within(s, 0, keys);
        floor_key = key_within(s, slot.top_k, [](unsigned) { return 1ull; });
        __syncthreads();
        if (by_mass && threadIdx.x == 0) {  // what lies below the k-th largest has no mass from here on
            unsigned long long mass = 0;
            for (unsigned key = floor_key; key < s.bucket * 32 + 32; key++)
                mass += (unsigned long long)mass_at(key) * s.within[key % 32];
            s.low[s.bucket] = (unsigned)(mass & 0x3fff);
            s.high[s.bucket] = (unsigned)(mass >> 14);
        }
        if (by_mass)
            for (unsigned i = threadIdx.x; i < s.bucket; i += 1024)
                s.low[i] = s.high[i] = 0;
        __syncthreads();
    }
    if (by_mass) {
        if (threadIdx.x == 0)
            s.total = 0;
        __syncthreads();
        unsigned long long mass = 0;
        for (unsigned i = threadIdx.x; i < 2048; i += 1024)
            mass += mass_in(i);
        atomicAdd(&s.total, mass);
        __syncthreads();
        const unsigned long long target = max(1ull, (unsigned long long)ceil((double)slot.top_p * (double)s.total));
        if (threadIdx.x < 32)
            find_bucket(s, target, mass_in);
        __syncthreads();
        count_within(s, floor_key, keys);
        floor_key =
            max(floor_key, key_within(s, target, [&](unsigned key) { return (unsigned long long)mass_at(key); }));
    }
    if (threadIdx.x == 0) {
        const float selected = by_count || by_mass ? logit_of(floor_key) : NO_CUT;
        cut[blockIdx.x] = fmaxf(selected, least);
    }
}

// The eight logits from i on, minus infinity from `end` on.
__device__ __forceinline__ void load_eight(__half (&logit)[8], const __half *row, bool aligned, unsigned i, unsigned end) {
    if (aligned && i + 8 <= end)
        *reinterpret_cast<uint4 *>(logit) = *reinterpret_cast<const uint4 *>(row + i);
    else
#pragma unroll
        for (int j = 0; j < 8; j++)
            logit[j] = i + j < end ? row[i + j] : __ushort_as_half(FORBIDDEN);
}

// What a block draws from: the logits [begin, end) of a row.
struct Chunk {
    const __half *row;
    bool aligned;
    unsigned begin, end;

    // Calls f(logits, i) for each eight logits, from i on, that fall to this thread. Gives the largest of them, NaN if one is.
    template <typename F>
    __device__ __forceinline__ __half each_eight(F f) const {
        __half2 largest = __half2half2(__ushort_as_half(FORBIDDEN));
        for (unsigned first = begin; first < end; first += 256 * 8) {
            const unsigned i = first + threadIdx.x * 8;
            __half logit[8];
            load_eight(logit, row, aligned, i, end);
#pragma unroll
            for (int j = 0; j < 8; j += 2)
                largest = __hmax2_nan(largest, __halves2half2(logit[j], logit[j + 1]));
            f(logit, i);
        }
        return __hmax_nan(__low2half(largest), __high2half(largest));
    }
};

// Is one of the eight not below `least`?
__device__ __forceinline__ bool reaches(const __half (&logit)[8], float least) {
    bool any = false;
#pragma unroll
    for (int j = 0; j < 8; j++)
        any |= __half2float(logit[j]) >= least;
    return any;
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
    unsigned long long winner = (unsigned long long)ordered(best.score) << 32 | (0xffffffffu - best.id);
    for (int lane = 16; lane > 0; lane /= 2) {
        const unsigned long long other = __shfl_xor_sync(0xffffffffu, winner, lane);
        winner = other > winner ? other : winner;
    }
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

// The block's maximum of a 64-bit value, for every thread.
__device__ __forceinline__ unsigned long long block_max(unsigned long long value, unsigned long long *shared /* [32] */) {
    for (int lane = 16; lane > 0; lane /= 2) {
        const unsigned long long other = __shfl_xor_sync(0xffffffffu, value, lane);
        value = other > value ? other : value;
    }
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
