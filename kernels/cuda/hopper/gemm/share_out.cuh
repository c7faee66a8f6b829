// What the multiplying warps of a product of few tokens do at the end: they share out the tokens of a tile and take each one's sums
// through the epilogue.
//
//   sums      in shared memory as [token][row], STAGED floats from one token to the next, over the ring
//   turns     the tile's tokens go round among all the warps that have a part in it, T of them at once
#pragma once

#include "hopper/hopper.cuh"
#include "hopper/gemm/wide.cuh"
#include "shape.cuh"

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
    static constexpr int PLACES = T; // whose sums are read at once
    typename Epilogue::template Ahead<BLOCKS> ahead[T];
    unsigned n, step, count, m0, n0, lane;

    // The warp is the `turn`th of `step`. All outputs are stored.
    __device__ __forceinline__ ShareOut(const Shape &shape, unsigned turn, unsigned step, unsigned m0, unsigned n0, unsigned = 0)
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

// The same for an epilogue of eight outputs a lane (wide.cuh), where a warp gets ALL tokens: it takes PIECES eights of a lane's outputs
// of T tokens, up to AT_ONCE in all; or, where registers are few (TIGHT) or pieces many, those of one piece after the other.
template <int N, int BLOCKS, int ALL, bool TIGHT, class Epilogue> struct WideShareOut {
    using W = Wide<Epilogue>;
    static constexpr int BESIDE = 32 / W::LANES, PIECES = 8 * BLOCKS / W::LANES;
    static constexpr int TURNS = (ALL + BESIDE - 1) / BESIDE, MOST = PIECES < AT_ONCE<Epilogue> ? AT_ONCE<Epilogue> / PIECES : 1;
    static constexpr int ROUNDS = (TURNS + MOST - 1) / MOST;
    static constexpr int T = (TURNS + ROUNDS - 1) / ROUNDS, COUNT = T * PIECES;
    static constexpr int PARTS = TIGHT || PIECES > 2 ? PIECES : 1, PART = COUNT / PARTS;
    // Of a whole head's lanes (Wide<QkvOf>) all pieces of a store begin at one row of w.
    static_assert(W::LANES == 8 || PARTS == PIECES, "pieces of other rows of w would be stored over each other");
    static constexpr int PLACES = 2 * PART; // whose four sums are read at once
    typename W::Ahead ahead[COUNT];
    unsigned n, step, count, m0, n0, from, lane;

    // Outputs before `from` are not stored.
    __device__ __forceinline__ WideShareOut(const Shape &shape, unsigned turn, unsigned step, unsigned m0, unsigned n0,
                                            unsigned from = 0)
        : ahead{}, n(turn), step(step), count(n0 >= shape.tokens ? 0 : shape.tokens - n0 < N ? shape.tokens - n0 : N), m0(m0),
          n0(n0), from(from), lane(threadIdx.x % 32) {}

    // Of piece i: the token in the tile, and the first row.
    __device__ __forceinline__ unsigned token(int i) const { return n + (lane / W::LANES + i / PIECES * BESIDE) * step; }
    __device__ __forceinline__ unsigned row(const Epilogue &epilogue, int i) const {
        return i % PIECES * W::LANES * 8 + W::first(epilogue, lane);
    }

    __device__ __forceinline__ void fetch(const Epilogue &epilogue, unsigned rows) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (token(i) < count)
                ahead[i] = W::ahead(epilogue, n0 + token(i), m0 + row(epilogue, i), rows);
    }

    // `read(sum, token, row)` reads the places' sums of four rows.
    template <class Read>
    __device__ __forceinline__ void take(const Epilogue &epilogue, const Shape &shape, const float *scales, const Read &read) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            unsigned tokens[PLACES], rows[PLACES];
            typename W::Ahead found[PART];
            Piece at[PART];
#pragma unroll
            for (int j = 0; j < PART; j++) {
                const int i = PARTS == 1 ? j : j * PIECES + part;
                const unsigned mine = token(i), first = row(epilogue, i);
                tokens[2 * j] = tokens[2 * j + 1] = mine < count ? mine : n;
                rows[2 * j] = first, rows[2 * j + 1] = first + W::apart(epilogue);
                at[j] = {n0 + tokens[2 * j], m0 + first, mine < count && m0 + first >= from};
                found[j] = ahead[i];
            }
            float4 sum[PLACES];
            read(sum, tokens, rows);
            float v[PART][8];
#pragma unroll
            for (int j = 0; j < PART; j++) {
                const float scale = Epilogue::SCALED ? scales[tokens[2 * j]] : 1.0f;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float4 four = sum[2 * j + half];
                    float *to = v[j] + 4 * half;
                    to[0] = __fmul_rn(four.x, scale), to[1] = __fmul_rn(four.y, scale);
                    to[2] = __fmul_rn(four.z, scale), to[3] = __fmul_rn(four.w, scale);
                }
            }
            W::store(epilogue, found, v, at, shape.rows, lane);
        }
        n += T * BESIDE * step;
        fetch(epilogue, shape.rows);
    }
};

template <bool WIDE, int N, int BLOCKS, int ALL, int T, bool TIGHT, class Epilogue> struct Width {
    using Type = ShareOut<N, BLOCKS, T, Epilogue>;
};
template <int N, int BLOCKS, int ALL, int T, bool TIGHT, class Epilogue> struct Width<true, N, BLOCKS, ALL, T, TIGHT, Epilogue> {
    using Type = WideShareOut<N, BLOCKS, ALL, TIGHT, Epilogue>;
};
// A warp of ALL tokens takes T of them at once where lanes have two outputs.
template <int N, int BLOCKS, int ALL, int T, bool TIGHT, class Epilogue>
using EitherWidth = typename Width<IS_WIDE<Epilogue>, N, BLOCKS, ALL, T, TIGHT, Epilogue>::Type;

// The scaling warp's work: the tile's rows' scales, while the others multiply.
template <int N, class Epilogue>
__device__ __forceinline__ void scale_rows(const Epilogue &epilogue, const Shape &shape, unsigned n0, float *scales) {
    if constexpr (Epilogue::SCALED) {
        constexpr int COUNT = (N + 31) / 32;
        unsigned token[COUNT];
        float scale[COUNT];
        dependent_wait();
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const unsigned n = n0 + 32 * i + threadIdx.x % 32;
            token[i] = n < shape.tokens ? n : 0;
        }
        epilogue.scales(token, scale);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const unsigned n = 32 * i + threadIdx.x % 32;
            if (n < N && n0 + n < shape.tokens)
                scales[n] = scale[i];
        }
    }
}
