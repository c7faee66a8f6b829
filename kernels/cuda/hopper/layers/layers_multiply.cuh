// The blocks of layers_divide.cuh that multiply: o, gate_up, down and the next layer's qkv of a half's rows, then of the other half's, layer after
// layer, to the last layer's first half. Tokens are the rows of every product and rows of w its columns: D[64 tokens, N] by each of two warpgroups.
// Of up to 64 tokens both have all: of o and down a slice each, of gate_up and qkv half of the rows of w.
//
//   block     o, down   32 rows of w by half of the columns; its neighbour has the other half, they add up by st.async, warp by warp
//             gate_up   96 rows of w
//             qkv       64 rows of w: half of a head, whose norm's sums its neighbour and it exchange; of fp8, halves of rows too
//   shared    x ring [X_STAGES][padded rows or more][64]    w ring [W_STAGES][chunks][N][64]    sums of the neighbour    scales
//   weights   warp 8: runs ahead across products, halves and layers; what the second half has read, nobody reads again in this step
//   x         warp 9: fetches what the product reads, in the order in which it multiplies, as soon as it is there; gate_up's and qkv's half
//             for both neighbours
//   scales    warps 10 and 11: those of the rows' norms, from sums of squares of 64 elements
//
//   layers_multiplier.cuh   what the roles share            layers_tensor.cuh    a thread of the tensor cores' warps
//   layers_fetch.cuh        weights, x                      layers_add.cuh       o, down
//   layers_scales.cuh       scales                          layers_gate_up.cuh   gate, up
//   layers_keep.cuh         keys and values in fp8          layers_qkv.cuh       q, k, v
//
// 1. Bits are gemm_few.cuh's and epilogue.cuh's: a slice of the columns from zero, k16 by k16, slices added in pairs, then pairs of
//    pairs: of o and down each block has the two slices of a pair, of all others all columns, which are one.
// 2. A sum of squares of 64 elements is a butterfly over pairs of them, 16 apart first and neighbours last. A thread has pairs in steps
//    of two, its quad those between: what two blocks must add is the last level, because each has every second pair (`parity`).
// 3. An element of the residual stream is read and written by one thread throughout.
// 4. What neighbours send each other is waited for before a block counts itself done with a product, and sent after the neighbour has
//    counted itself done with the last that sent to the same place, for between the two lies a product whose activations all blocks made.
// 5. A part of a product's activations is overwritten behind a product of which the block, or the neighbour whose sums it adds, has seen all
//    parts: so all blocks have ended what read it.
// 6. What bounds a product of many tokens is shared memory: what is fetched is written there, and read once by each warpgroup that it is for.
#pragma once

#include "hopper/layers/layers_add.cuh"
#include "hopper/layers/layers_fetch.cuh"
#include "hopper/layers/layers_gate_up.cuh"
#include "hopper/layers/layers_qkv.cuh"
#include "hopper/layers/layers_scales.cuh"

// A multiplying block.
template <bool FP8> __device__ __forceinline__ void multiply(const Layers &args, const LayerMaps &maps, unsigned base, unsigned block) {
    const Multiplying of(args, maps, base, block);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < X_STAGES; i++) {
            barrier_init(of.shared.x_full(i), 1);
            barrier_init(of.shared.x_empty(i), 2 * TENSOR_THREADS / 32);
        }
        for (unsigned i = 0; i < W_STAGES; i++) {
            barrier_init(of.shared.w_full(i), 1);
            barrier_init(of.shared.w_empty(i), TENSOR_THREADS / 32);
        }
        barrier_init(of.shared.sums_there(), 1);
        barrier_init(of.shared.squares_there(), 1);
        barrier_init(of.shared.swapped_there(), 1);
        barrier_init_fence();
    }
    __syncthreads();
    cluster_sync();
    // Of registers who multiplies takes what warps that are there for attending do not need.
    if (warp < TENSOR_THREADS / 32) {
        if constexpr (FP8)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
        dependent_wait();
        if (of.padded > 64)
            Tensor<FP8, false>{of}.run();
        else
            Tensor<FP8, true>{of}.run();
    } else {
        if constexpr (FP8)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        if (warp == TENSOR_THREADS / 32) {
            if (lane == 0)
                WeightFetcher{of}.run();
        } else {
            dependent_wait();
            if (warp == TENSOR_THREADS / 32 + 1)
                ActivationFetcher{of, lane}.run();
            else if (warp < TENSOR_THREADS / 32 + 4)
                Scales{of}.run();
        }
    }
    __syncwarp();
    cluster_sync();
}
