// What the multiplying warps of a decode kernel do at the end: they share out the tokens of a tile and take each one's sums
// through the epilogue.
//
//   sums      in shared memory as [token][row], STAGED floats from one token to the next, over the ring
//   turns     the tile's tokens go round among all the warps that have a part in it, T of them at once
#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"

// The sums of a block's 64 GROUPS rows for N tokens.
template <int GROUPS, int N> struct Sums {
    static constexpr int STAGED = 64 * GROUPS + 4; // no bank conflicts when they are written
    static constexpr int FLOATS = N * STAGED;

    // Bytes from the first sum to the token's for this lane, in block b of 64 rows.
    __device__ __forceinline__ static unsigned offset(unsigned token, unsigned b) {
        return (token * STAGED + b * 64 + 2 * (threadIdx.x % 32)) * 4;
    }

    __device__ __forceinline__ static float2 read(const float *staged, unsigned token, unsigned b) {
        return *reinterpret_cast<const float2 *>(reinterpret_cast<const char *>(staged) + offset(token, b));
    }

    // Writes a warpgroup's sums.
    __device__ __forceinline__ static void write(float *staged, const float (&sum)[N / 2]) {
        const unsigned lane = threadIdx.x % 32, m = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                staged[(8 * j + lane % 4 * 2 + e % 2) * STAGED + m + e / 2 * 8] = sum[4 * j + e];
    }
};

// A warp's turns at a tile of up to N tokens and 64 BLOCKS rows.
template <int N, int BLOCKS, int T, class Epilogue> struct ShareOut {
    typename Epilogue::template Ahead<BLOCKS> ahead[T];
    unsigned n, step, count, m0, n0, lane;

    // The warp is the `turn`th of `step`.
    __device__ __forceinline__ ShareOut(const Shape &shape, unsigned turn, unsigned step, unsigned m0, unsigned n0)
        : ahead{}, n(turn), step(step), count(n0 >= shape.tokens ? 0 : shape.tokens - n0 < N ? shape.tokens - n0 : N), m0(m0),
          n0(n0), lane(threadIdx.x % 32) {}

    // Fetches what the tokens at hand need.
    __device__ __forceinline__ void fetch(const Epilogue &epilogue, unsigned rows) {
#pragma unroll
        for (int i = 0; i < T; i++)
            if (n + i * step < count) {
                const unsigned token = n0 + n + i * step;
                ahead[i] = epilogue.template ahead<BLOCKS>(epilogue.where(token), token, m0, rows, lane);
            }
    }

    // Takes the tokens at hand through the epilogue and goes on to the next. `read(sum, token, b)` reads T tokens' sums.
    template <class Read>
    __device__ __forceinline__ void take(const Epilogue &epilogue, const Shape &shape, const float *scales, const Read &read) {
        unsigned token[T];
        float2 v[T][BLOCKS];
#pragma unroll
        for (int i = 0; i < T; i++)
            token[i] = n + i * step < count ? n + i * step : n;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            float2 sum[T];
            read(sum, token, b);
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float scale = Epilogue::SCALED ? scales[token[i]] : 1.0f;
                v[i][b] = {__fmul_rn(sum[i].x, scale), __fmul_rn(sum[i].y, scale)};
            }
        }
        const Taken taken = {n0 + n, step, (count - n + step - 1) / step};
        epilogue.template store<T, BLOCKS>(ahead, v, taken, m0, shape.rows, lane);
        n += T * step;
        fetch(epilogue, shape.rows);
    }
};

// The scaling warp's work: the tile's rows' scales, while the others multiply.
template <int N, class Epilogue>
__device__ __forceinline__ void scale_rows(const Epilogue &epilogue, const Shape &shape, unsigned n0, float *scales) {
    if (!Epilogue::SCALED)
        return;
    dependent_wait();
#pragma unroll
    for (int i = 0; i < (N + 31) / 32; i++) {
        const unsigned n = 32 * i + threadIdx.x % 32;
        if (n < N && n0 + n < shape.tokens)
            scales[n] = epilogue.scale(n0 + n);
    }
}
