// A tile's sums, by a warpgroup of gemm_many.cuh: block of columns after block, and slices added in pairs, these in pairs.
#pragma once

#include "hopper/gemm/many_tiles.cuh"

// Sums, each set to a number, and added to others.
template <int COUNT> __device__ __forceinline__ void fill(float (&sums)[COUNT], float with) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        sums[i] = with;
}
template <int COUNT> __device__ __forceinline__ void add_sums(float (&total)[COUNT], const float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        total[i] += sums[i];
}

// What a warp does while a block's products are on their way.
struct Nothing {
    __device__ __forceinline__ void operator()(unsigned) const {}
};

// Starts the products of the block of columns at hand, adding them to `sum`, or to zero where it is a sum's first.
template <class P>
__device__ __forceinline__ void start_block(const Shared<P> &shared, const Turn<P> &position, float (&sum)[P::M / 2], bool is_first) {
    const unsigned stage = shared.stage(position.at);
    barrier_wait(shared.full + 8 * position.at, position.parity);
    const unsigned long long a = tile_descriptor(stage + threadIdx.x / 128 * 64 * 128);
    const unsigned long long b = tile_descriptor(stage + P::X_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++)
        if constexpr (P::Operands::CODES)
            wgmma_codes(sum, a + 2 * k, b + 2 * k, !is_first || k > 0);
        else
            wgmma(sum, a + 2 * k, b + 2 * k, !is_first || k > 0);
    wgmma_commit();
}

// Adds the next block of columns to `sum`, or begins it, and lets go of the block before, once that is multiplied: of stage `before`,
// which becomes this one's. `meanwhile` is called with the products on their way.
template <class P, class Meanwhile>
__device__ __forceinline__ void multiply_block(const Shared<P> &shared, Turn<P> &position, bool is_first, unsigned &before,
                                               float (&sum)[P::M / 2], const Meanwhile &meanwhile) {
    const unsigned lane = threadIdx.x % 32, sharer = cluster_rank() ^ lane; // of clusters with two a side
    start_block(shared, position, sum, is_first);
    meanwhile();
    if (!is_first) {
        wgmma_wait<1>();
        position.release(shared.empty + 8 * before, lane, sharer);
    }
    before = position.at;
    position.advance();
}

// All products are made: the last stage is free, too.
template <class P>
__device__ __forceinline__ void end_products(const Shared<P> &shared, Turn<P> &position, unsigned before, float (&sum)[P::M / 2]) {
    const unsigned lane = threadIdx.x % 32;
    wgmma_wait<0>();
    hold(sum);
    position.release(shared.empty + 8 * before, lane, cluster_rank() ^ lane);
}

// Makes `sum` that of the columns' blocks begin .. end. `meanwhile` is called with the number of each.
template <class P, class Meanwhile = Nothing>
__device__ __forceinline__ void multiply_slice(const Shared<P> &shared, Turn<P> &position, unsigned begin,
                                               unsigned end, float (&sum)[P::M / 2], const Meanwhile &meanwhile = {}) {
    unsigned before = 0;
#pragma unroll 1
    for (unsigned i = begin; i < end; i++)
        multiply_block(shared, position, i == begin, before, sum, [&] { meanwhile(i - begin); });
    end_products(shared, position, before, sum);
}

// A tile's sums of all columns. `at_last` is called with the last products on their way.
template <class P, class AtLast>
__device__ __forceinline__ void multiply_whole(const Shared<P> &shared, Turn<P> &position, const Shape &shape,
                                               float (&sum)[P::M / 2], const AtLast &at_last) {
    fill(sum, 0.0f);
    const unsigned last = shape.blocks() - 1;
    unsigned before = 0;
#pragma unroll 1
    for (unsigned i = 0; i < last; i++)
        multiply_block(shared, position, i == 0, before, sum, [] {});
    multiply_block(shared, position, last == 0, before, sum, at_last);
    end_products(shared, position, before, sum);
}

// A tile's sums of several slices, added in their order. `between` is called once, with the first on its way or done.
template <class P, class Between>
__device__ __forceinline__ void multiply_tile(const Shared<P> &shared, Turn<P> &position, const Shape &shape,
                                              float (&total)[P::M / 2], const Between &between) {
    float sum[P::M / 2];
    fill(total, -0.0f); // -0 + x is x, whatever x is
    fill(sum, 0.0f);
    for (unsigned slice = 0, begin = 0; slice < shape.slices; slice++) {
        const unsigned end = shared.slice_ends[slice];
        multiply_slice(shared, position, begin, end, sum);
        begin = end;
        add_sums(total, sum);
        if (slice == 0)
            between();
    }
}

// The same of up to four slices: each pair's sums are added, then the pairs', for which three sets of sums are at hand.
template <class P, class Between>
__device__ __forceinline__ void multiply_pairs(const Shared<P> &shared, Turn<P> &position, const Shape &shape,
                                               float (&total)[P::M / 2], const Between &between) {
    float left[P::M / 2], right[P::M / 2];
    fill(total, -0.0f);
    fill(left, 0.0f);
    fill(right, 0.0f);
    for (unsigned slice = 0, begin = 0; slice < shape.slices; slice += 2) {
        unsigned end = shared.slice_ends[slice];
        multiply_slice(shared, position, begin, end, left);
        begin = end;
        if (slice == 0)
            between();
        if (shape.slices > 1) {
            end = shared.slice_ends[slice + 1];
            multiply_slice(shared, position, begin, end, right);
            begin = end;
            add_sums(left, right);
        }
        add_sums(total, left);
    }
}

// The same where registers hold two sets: the first pair's sums go out to `aside`, a lane's place in memory, while the third slice
// is multiplied, a quarter of them with each of its first four blocks of columns, and are added when the second pair's are there.
template <class P, class Between>
__device__ __forceinline__ void multiply_aside(const Shared<P> &shared, Turn<P> &position, const Shape &shape,
                                               float (&total)[P::M / 2], float4 *aside, const Between &between) {
    constexpr unsigned FOURS = P::M / 8, QUARTER = FOURS / 4;
    float sum[P::M / 2];
    fill(total, -0.0f);
    fill(sum, 0.0f);
#pragma unroll 1
    for (unsigned slice = 0, begin = 0; slice < shape.slices; slice++) {
        const unsigned end = shared.slice_ends[slice];
        multiply_slice(shared, position, begin, end, sum, [&](unsigned block) {
            if (slice != 2)
                return;
#pragma unroll
            for (int q = 0; q < 4; q++)
                if (block == q)
#pragma unroll
                    for (int i = q * QUARTER; i < (q + 1) * QUARTER; i++)
                        __stcg(aside + 32 * i, make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]));
        });
        begin = end;
        if (slice == 0)
            between();
#pragma unroll
        for (int i = 0; i < P::M / 2; i++)
            total[i] = (slice == 2 ? -0.0f : total[i]) + sum[i];
    }
    if (shape.slices > 2)
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const float4 pair = __ldcg(aside + 32 * i);
            total[4 * i] += pair.x, total[4 * i + 1] += pair.y, total[4 * i + 2] += pair.z, total[4 * i + 3] += pair.w;
        }
}
