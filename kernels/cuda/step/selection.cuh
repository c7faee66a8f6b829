// Exact selection among a row's logits, by the keys' histogram (sampling.cu).
#pragma once
#include "step/logits.cuh"

// Masses of keys: 2^28 is that of the most probable token, whose logit is `top`.
struct Mass {
    float top, scale;

    __device__ __forceinline__ unsigned of(unsigned key) const { return __float2uint_rn(exp2f((logit_of(key) - top) * scale) * 268435456.0f); }
};

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

// By what a row is cut, beside min-p.
struct Filters {
    bool by_count, by_mass;
};

// Counts the keys by bucket, and adds up their masses; the whole block.
__device__ __forceinline__ void count_keys(Selection &s, const Keys &keys, const Filters &filters, const Mass &mass) {
    keys.each(s, [&](unsigned key) {
        if (filters.by_count)
            atomicAdd(&s.count[key / 32], 1);
        const unsigned own = filters.by_mass ? mass.of(key) : 0;
        if (own > 0) {
            atomicAdd(&s.low[key / 32], own & 0x3fff);
            atomicAdd(&s.high[key / 32], own >> 14);
        }
    });
    __syncthreads();
}

// The key of the `top_k`th largest; thread 0's answer counts. What lies below it has no mass from here on. The whole block.
__device__ __forceinline__ unsigned cut_by_count(Selection &s, const Keys &keys, unsigned top_k, const Filters &filters, const Mass &mass) {
    if (threadIdx.x < 32)
        find_bucket(s, top_k, [&](int bucket) { return (unsigned long long)s.count[bucket]; });
    __syncthreads();
    count_within(s, 0, keys);
    const unsigned floor_key = key_within(s, top_k, [](unsigned) { return 1ull; });
    __syncthreads();
    if (filters.by_mass && threadIdx.x == 0) {
        unsigned long long kept = 0;
        for (unsigned key = floor_key; key < s.bucket * 32 + 32; key++)
            kept += (unsigned long long)mass.of(key) * s.within[key % 32];
        s.low[s.bucket] = (unsigned)(kept & 0x3fff);
        s.high[s.bucket] = (unsigned)(kept >> 14);
    }
    if (filters.by_mass)
        for (unsigned i = threadIdx.x; i < s.bucket; i += 1024)
            s.low[i] = s.high[i] = 0;
    __syncthreads();
    return floor_key;
}

// The key at which the largest ones' masses pass `top_p` of all, not below `floor_key`; thread 0's answer counts. The whole block.
__device__ __forceinline__ unsigned cut_by_mass(Selection &s, const Keys &keys, float top_p, unsigned floor_key, const Mass &mass) {
    const auto mass_in = [&](int bucket) { return ((unsigned long long)s.high[bucket] << 14) + s.low[bucket]; };
    if (threadIdx.x == 0)
        s.total = 0;
    __syncthreads();
    unsigned long long own = 0;
    for (unsigned i = threadIdx.x; i < 2048; i += 1024)
        own += mass_in(i);
    atomicAdd(&s.total, own);
    __syncthreads();
    const unsigned long long target = max(1ull, (unsigned long long)ceil((double)top_p * (double)s.total));
    if (threadIdx.x < 32)
        find_bucket(s, target, mass_in);
    __syncthreads();
    count_within(s, floor_key, keys);
    return max(floor_key, key_within(s, target, [&](unsigned key) { return (unsigned long long)mass.of(key); }));
}
