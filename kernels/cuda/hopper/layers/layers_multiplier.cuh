// What the roles of a block that multiplies share (layers_multiply.cuh): the tiles of its products, its shared memory, and its part of a half's rows.
#pragma once

#include "step/batch.cuh"
#include "epilogue.cuh"
#include "hopper/layers/layers_flags.cuh"

constexpr unsigned X_STAGES = 6, X_STAGE = 16384, W_STAGES = 7, W_STAGE = 16384;
constexpr unsigned TENSOR_THREADS = 256; // that multiply
constexpr unsigned SCALE_THREADS = 64;

template <int PRODUCT> struct Tile {
    static constexpr bool ADDS = PRODUCT == O || PRODUCT == DOWN;
    static constexpr unsigned N = ADDS ? 32 : PRODUCT == GATE_UP ? 96 : 64; // rows of w
    static constexpr unsigned COLS = PRODUCT == O ? Q_WIDTH : PRODUCT == DOWN ? MLP : HIDDEN;
    static constexpr unsigned CHUNKS = COLS / 64 / (ADDS ? 2 : 1);       // of 64 columns, a block's
    static constexpr unsigned AT_ONCE = ADDS ? 4 : PRODUCT == QKV ? 2 : 1; // chunks of a stage of w
    static constexpr unsigned SLICES = ADDS ? 2 : 1;                     // a block's
    static_assert(AT_ONCE * N * 128 <= W_STAGE && CHUNKS % (SLICES * 4) == 0, "whole stages of both rings in a slice");
};
static_assert(HIDDEN / 32 * 2 == MULTIPLIERS && 2 * MLP / 96 == MULTIPLIERS && 4 * HEADS == MULTIPLIERS && HEADS == 2 * KV_HEADS,
              "a tile of each product for every block");

// A multiplying block's shared memory.
struct Multiplier {
    unsigned base;
    static constexpr unsigned RECEIVED = 8192, SWAPPED = TENSOR_THREADS * 32;
    static constexpr unsigned ALL =
        X_STAGES * X_STAGE + W_STAGES * W_STAGE + RECEIVED + 3 * HALF_ROWS * 4 + 16 * (X_STAGES + W_STAGES + 2) + SWAPPED;

    __device__ __forceinline__ unsigned x(unsigned stage) const { return base + stage * X_STAGE; }
    __device__ __forceinline__ unsigned w(unsigned stage) const { return base + X_STAGES * X_STAGE + stage * W_STAGE; }
    // The neighbour's sums of o and down.
    __device__ __forceinline__ unsigned received() const { return w(W_STAGES); }
    // Its sums of squares of heads: float2 a token.
    __device__ __forceinline__ unsigned squares(unsigned token) const { return received() + RECEIVED + token * 8; }
    __device__ __forceinline__ unsigned scale(unsigned token) const { return squares(HALF_ROWS) + token * 4; }
    __device__ __forceinline__ unsigned x_full(unsigned stage) const { return scale(HALF_ROWS) + stage * 16; }
    __device__ __forceinline__ unsigned x_empty(unsigned stage) const { return x_full(stage) + 8; }
    __device__ __forceinline__ unsigned w_full(unsigned stage) const { return x_full(X_STAGES) + stage * 16; }
    __device__ __forceinline__ unsigned w_empty(unsigned stage) const { return w_full(stage) + 8; }
    __device__ __forceinline__ unsigned sums_there() const { return w_full(W_STAGES); }
    __device__ __forceinline__ unsigned squares_there() const { return sums_there() + 8; }
    // Of keys and values in fp8, what the neighbour has of a warp's rows (layers_keep.cuh).
    __device__ __forceinline__ unsigned swapped_there() const { return sums_there() + 16; }
    __device__ __forceinline__ unsigned swapped(unsigned warp) const { return sums_there() + 32 + warp * 1024; }
};
static_assert(Multiplier::ALL <= LAYERS_SHARED, "a multiprocessor's shared memory");

__device__ __forceinline__ float load_float(unsigned at) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
    return value;
}
__device__ __forceinline__ void store_float4(unsigned at, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ __forceinline__ void store_float2(unsigned at, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b) : "memory");
}
// Which rows and columns a product is of.
struct Step {
    unsigned phase, layer, half;

    __device__ __forceinline__ explicit Step(unsigned phase) : phase(phase), layer(phase / 2), half(phase % 2) {}
};

// A block's part of all products: what its roles share.
struct Multiplying {
    const Layers &args;
    const LayerMaps &maps;
    const Flags flags;
    const Multiplier shared;
    const unsigned block, rank, padded;

    __device__ __forceinline__ Multiplying(const Layers &args, const LayerMaps &maps, unsigned base, unsigned block)
        : args(args), maps(maps), flags(args), shared{base}, block(block), rank(block % 2), padded(args.padded) {}

    // The first row of a half, and how many there are.
    __device__ __forceinline__ unsigned first_row(unsigned half) const { return half ? args.rows[0] : 0; }
    __device__ __forceinline__ unsigned rows(unsigned half) const { return half ? args.rows[1] : args.rows[0]; }
    // Have both warpgroups the same rows?
    __device__ __forceinline__ bool beside() const { return padded <= 64; }
    // Which of a product's chunks is fetched as the i-th: those of the two slices take turns where each warpgroup sums one.
    template <int PRODUCT> __device__ __forceinline__ unsigned chunk(unsigned i) const {
        using T = Tile<PRODUCT>;
        return !T::ADDS ? i : rank * T::CHUNKS + (beside() ? i % 2 * (T::CHUNKS / 2) + i / 2 : i);
    }
    // Chunks of 64 columns that a stage of x holds.
    __device__ __forceinline__ unsigned x_chunks() const { return padded > 64 ? 1 : padded > 32 ? 2 : 4; }
    // Segments and parities take turns among pairs of blocks.
    __device__ __forceinline__ unsigned segment() const { return block / 4; }
    __device__ __forceinline__ unsigned parity() const { return block / 2 % 2; }
    // Sums of squares of what o (0) or down (1) added to, of a segment.
    __device__ __forceinline__ float2 *sums(unsigned half, unsigned product, unsigned segment) const {
        return args.sums + ((half * 2 + product) * SEGMENTS + segment) * HALF_ROWS;
    }
};
