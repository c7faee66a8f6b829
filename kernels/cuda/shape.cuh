// The sizes of a product.
#pragma once

// The sizes of a product, and how its sum over the columns is cut: slice i is blocks [i nb / slices, (i + 1) nb / slices)
// of 64 columns, nb of them in all; slices are a power of two. Their sums are added in pairs, then pairs of pairs: a rank that has
// half of the columns, or a quarter, has a whole subtree of that, and ranks' sums added in the same way have the bits of one GPU's.
struct Shape {
    unsigned rows, cols, tokens, slices;

    __device__ __forceinline__ unsigned blocks() const { return (cols + 63) / 64; }
    __device__ __forceinline__ unsigned slice_begin(unsigned slice) const { return slice * blocks() / slices; }
};
