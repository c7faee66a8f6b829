// Which tiles a block of gemm_many.cuh takes, in which order, and a multiplying warp's way through the stages of theirs.
#pragma once

#include "hopper/gemm/many_plan.cuh"
#include "place.cuh"
#include "shape.cuh"

// Of the blocks that have the same columns, which one this is.
template <class P> __device__ __forceinline__ unsigned side_rank() {
    return P::HALVES > 1 ? cluster_rank() % P::SIDE : cluster_rank();
}

// The tiles of this block in their order. Of split ones each slice is a tile to itself, beside the other slices of its rows.
template <class P> struct Tiles {
    static constexpr unsigned ROWS = P::ALONG_ROWS * P::M, TOKENS = P::ALONG_TOKENS * P::TOKENS;
    unsigned tile, m, n; // which, of which rows of w (and slice), of which tokens
    unsigned across, down, band;

    // A band is all of w where L2 holds that beside x (24 MiB of 50; the host's choice of kernels draws the same line), else
    // about as many rows as tokens are in flight beside them.
    __device__ __forceinline__ explicit Tiles(const Shape &shape)
        : tile(blockIdx.x / P::BLOCKS), across((shape.rows + ROWS - 1) / ROWS * P::SPLIT),
          down((shape.tokens + TOKENS - 1) / TOKENS),
          band((size_t)shape.rows * shape.cols * 2 <= 24u << 20 ? across : 8) {
        find();
    }
    __device__ __forceinline__ void find() {
        const unsigned begin = tile / (band * down) * band, within = tile - begin * down, width = min(band, across - begin);
        m = begin + within % width, n = within / width;
    }
    __device__ __forceinline__ bool remain() const { return tile < across * down; }
    __device__ __forceinline__ void advance() {
        tile += gridDim.x / P::BLOCKS;
        if (remain())
            find();
    }
    // Has it found by here.
    __device__ __forceinline__ void hold() { asm volatile("" : "+r"(tile), "+r"(m), "+r"(n)); }
    // How many there are yet, this one among them.
    __device__ __forceinline__ unsigned left() const {
        const unsigned step = gridDim.x / P::BLOCKS;
        return (across * down - tile + step - 1) / step;
    }
    __device__ __forceinline__ unsigned row() const { return m / P::SPLIT * ROWS + cluster_rank() % P::ALONG_ROWS * P::M; }
    __device__ __forceinline__ unsigned token() const { return n * TOKENS + side_rank<P>() / P::ALONG_ROWS * P::TOKENS; }
    __device__ __forceinline__ unsigned slice() const { return m % P::SPLIT; }
    // Which of all tiles of rows and tokens.
    __device__ __forceinline__ unsigned whole() const { return n * (across / P::SPLIT) + m / P::SPLIT; }
    // The block's slices of the columns, and the blocks of these.
    __device__ __forceinline__ unsigned first_slice(const Shape &shape) const {
        return P::HALVES > 1 ? cluster_rank() / P::SIDE * (shape.slices / P::HALVES) : P::SPLIT > 1 ? slice() : 0;
    }
    __device__ __forceinline__ unsigned last_slice(const Shape &shape) const {
        return P::HALVES > 1 ? first_slice(shape) + shape.slices / P::HALVES : P::SPLIT > 1 ? slice() + 1 : shape.slices;
    }
    __device__ __forceinline__ unsigned begin(const Shape &shape) const {
        return P::SPLIT * P::HALVES > 1 ? shape.slice_begin(first_slice(shape)) : 0;
    }
    __device__ __forceinline__ unsigned end(const Shape &shape) const {
        return P::SPLIT * P::HALVES > 1 ? shape.slice_begin(last_slice(shape)) : shape.blocks();
    }
};

// Where a multiplying warp is in the ring, and how many stages will yet be filled again.
template <class P> struct Turn : Place<P::STAGES> {
    unsigned refills = 0;

    __device__ __forceinline__ explicit Turn(const Shape &shape) {
        const Tiles<P> tiles(shape);
        const unsigned blocks = tiles.left() * (tiles.end(shape) - tiles.begin(shape));
        if (P::COUNTED && blocks > P::STAGES)
            refills = blocks - P::STAGES;
    }
    // A warp's call, of which each lane has one of the sharers: the stage may be filled again, if that is to happen.
    __device__ __forceinline__ void release(unsigned empty, unsigned lane, unsigned sharer) {
        if (lane < P::SHARERS && (!P::COUNTED || refills > 0))
            barrier_arrive_at(empty, sharer);
        refills -= refills > 0;
    }
};
