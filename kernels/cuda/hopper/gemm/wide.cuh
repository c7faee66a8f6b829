// Epilogues of queries, keys and values and of the residual stream by eight outputs of one token a lane, where epilogue.cuh's lanes
// have two of each token: as many tokens side by side as lanes allow share a shuffle, an address and a store.
//
//   a lane     four outputs from `first` on and four that lie `apart` from those, of 8 LANES outputs that LANES lanes share; the next
//              LANES lanes have those of the next token
//   Residual   8 lanes, 64 outputs: a segment of the squares' sums
//   Qkv        16 lanes, 128 outputs: a head, or two of 64 dims; what is `apart` turns with what is first
//
// 1. Bits are epilogue.cuh's: what its lanes add up by shuffles 16, 8, 4, 2 and 1 apart, pairs of outputs each, is added in that order
//    here, within a lane where both are there.
// 2. Rows are a multiple of four: o's and down's are the columns of the matrices behind them.
#pragma once

#include "epilogue.cuh"

template <class E> constexpr bool IS_WIDE = false;
template <class E> struct Wide;
// Eights of a lane that go side by side, at most.
template <class E> constexpr int AT_ONCE = 4;

// Where a lane's outputs belong: row m of w is the first one's.
struct Piece {
    unsigned token, m;
    bool stored;
};

__device__ __forceinline__ float2 pair_of(unsigned bits) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&bits)); }
__device__ __forceinline__ unsigned bits_of(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const unsigned *>(&pair);
}
// The sum of a pair's two squares.
__device__ __forceinline__ float squares_of(float x, float y) { return fmaf(x, x, __fmul_rn(y, y)); }

// Each value's sum over 2 HALF neighbouring lanes, those furthest apart first.
template <int HALF, int COUNT> __device__ __forceinline__ void add_lanes(float (&value)[COUNT]) {
#pragma unroll
    for (int lane = HALF; lane > 0; lane /= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            value[i] += __shfl_xor_sync(0xffffffffu, value[i], lane);
}

template <> inline constexpr bool IS_WIDE<Residual> = true;
template <> struct Wide<Residual> {
    static constexpr int LANES = 8;

    __device__ __forceinline__ static unsigned first(const Residual &, unsigned lane) { return lane % 8 * 4; }
    __device__ __forceinline__ static unsigned apart(const Residual &) { return 32; }

    // The residual stream as it was.
    struct Ahead {
        uint2 old[2];
    };

    __device__ __forceinline__ static Ahead ahead(const Residual &epilogue, unsigned token, unsigned m, unsigned rows) {
        const __nv_bfloat16 *at = epilogue.residual + (size_t)token * rows + m;
        Ahead found = {};
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (m + 32 * half < rows)
                found.old[half] = *reinterpret_cast<const uint2 *>(at + 32 * half);
        return found;
    }

    template <int COUNT>
    __device__ __forceinline__ static void store(const Residual &epilogue, const Ahead (&ahead)[COUNT], float (&v)[COUNT][8],
                                                 const Piece (&at)[COUNT], unsigned rows, unsigned lane) {
        float squares[2 * COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float of[2][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint2 old = ahead[i].old[half];
                const float2 x = pair_of(old.x), y = pair_of(old.y);
                const float *const added = v[i] + 4 * half;
                const uint2 sum = {bits_of(x.x + added[0], x.y + added[1]), bits_of(y.x + added[2], y.y + added[3])};
                const float2 a = pair_of(sum.x), b = pair_of(sum.y);
                of[half][0] = squares_of(a.x, a.y);
                of[half][1] = squares_of(b.x, b.y);
                if (at[i].stored && at[i].m + 32 * half < rows)
                    *reinterpret_cast<uint2 *>(epilogue.residual + (size_t)at[i].token * rows + at[i].m + 32 * half) = sum;
            }
            squares[2 * i] = of[0][0] + of[1][0];
            squares[2 * i + 1] = of[0][1] + of[1][1];
        }
        add_lanes<4>(squares);
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (at[i].stored && lane % 8 == 0 && at[i].m < rows)
                epilogue.sumsq[(size_t)at[i].token * segments_of(rows) + at[i].m / SEGMENT] = squares[2 * i] + squares[2 * i + 1];
    }
};

template <bool NORMED> inline constexpr bool IS_WIDE<QkvOf<NORMED, false>> = true;
template <bool NORMED> struct Wide<QkvOf<NORMED, false>> {
    using Qkv = QkvOf<NORMED, false>;
    static constexpr int LANES = 16;

    __device__ __forceinline__ static unsigned first(const Qkv &epilogue, unsigned lane) {
        return epilogue.head_dim == 128 ? lane % 16 * 4 : lane % 16 / 8 * 64 + lane % 8 * 4;
    }
    __device__ __forceinline__ static unsigned apart(const Qkv &epilogue) { return epilogue.head_dim / 2; }

    // Where a token's key and value go, and (cos, sin) of four angles.
    struct Ahead {
        unsigned location;
        float4 turn[2];
    };

    __device__ __forceinline__ static Ahead ahead(const Qkv &epilogue, unsigned token, unsigned m, unsigned) {
        const typename Qkv::Where where = epilogue.where(token);
        const unsigned angle = m & (epilogue.head_dim / 2 - 1);
        return {where.location, {epilogue.turn_at(where.position, angle), epilogue.turn_at(where.position, angle + 2)}};
    }

    template <int COUNT>
    __device__ __forceinline__ static void store(const Qkv &epilogue, const Ahead (&ahead)[COUNT], float (&v)[COUNT][8],
                                                 const Piece (&at)[COUNT], unsigned rows, unsigned) {
        const unsigned m = at[0].m, dim = epilogue.head_dim, apart = dim / 2; // one of w's rows for all tokens
        const unsigned h = m / 64 >> (dim == 128), d = m & (dim - 1);
        const bool is_query = h < epilogue.heads, is_key = !is_query && h < epilogue.heads + epilogue.kv_heads, there = m < rows;
        if constexpr (!NORMED) {
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const float2 added = there ? epilogue.bias_at(m + pair / 2 * apart + pair % 2 * 2) : float2{-0.0f, -0.0f};
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
                    v[i][2 * pair] = __fadd_rn(v[i][2 * pair], added.x);
                    v[i][2 * pair + 1] = __fadd_rn(v[i][2 * pair + 1], added.y);
                }
            }
        }
        if (NORMED || epilogue.q_norm != nullptr || epilogue.k_norm != nullptr)
            norm(epilogue, v, is_query ? epilogue.q_norm : epilogue.k_norm, d, is_query || is_key);
        if (is_query || is_key)
#pragma unroll
            for (int i = 0; i < COUNT; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4 turn = ahead[i].turn[j / 2];
                    const float cos = j % 2 == 0 ? turn.x : turn.z, sin = j % 2 == 0 ? turn.y : turn.w, a = v[i][j], b = v[i][4 + j];
                    v[i][j] = Qkv::turned(a, cos, -b, sin);
                    v[i][4 + j] = Qkv::turned(b, cos, a, sin);
                }
        const unsigned kv_head = h - epilogue.heads - (is_key ? 0 : epilogue.kv_heads);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            __nv_bfloat16 *out;
            unsigned second;
            if (is_query) {
                out = epilogue.q + (size_t)at[i].token * epilogue.heads * dim + m;
                second = apart;
            } else {
                const unsigned location = ahead[i].location, page = location >> epilogue.page_shift;
                const unsigned row = location & ((1u << epilogue.page_shift) - 1);
                const size_t line = (((size_t)page * epilogue.kv_heads + kv_head) << epilogue.page_shift) + row;
                const unsigned to = d ^ row % 8 * 8; // a 16-byte chunk is eight dims
                out = (is_key ? epilogue.k : epilogue.v) + line * dim + to;
                second = ((d + apart) ^ row % 8 * 8) - to;
            }
            if (at[i].stored && there) {
                *reinterpret_cast<uint2 *>(out) = {bits_of(v[i][0], v[i][1]), bits_of(v[i][2], v[i][3])};
                *reinterpret_cast<uint2 *>(out + (int)second) = {bits_of(v[i][4], v[i][5]), bits_of(v[i][6], v[i][7])};
            }
        }
    }

  private:
    // The norm of a head, whose weights may be null: then of none.
    template <int COUNT>
    __device__ __forceinline__ static void norm(const Qkv &epilogue, float (&v)[COUNT][8], const __nv_bfloat16 *weight, unsigned d,
                                                bool is_there) {
        float sum[2 * COUNT], squares[COUNT];
        const bool is_wide = epilogue.head_dim == 128;
        if (is_wide) {
            // Of both halves of a head one sum each.
            float high[2 * COUNT];
#pragma unroll
            for (int i = 0; i < 2 * COUNT; i++) {
                const float *const x = v[i / 2] + i % 2 * 2;
                sum[i] = squares_of(x[0], x[1]);
                high[i] = squares_of(x[4], x[5]);
            }
            add_lanes<8>(sum);
            add_lanes<8>(high);
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                squares[i] = __fadd_rn(sum[2 * i] + sum[2 * i + 1], high[2 * i] + high[2 * i + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < 2 * COUNT; i++) {
                const float *const x = v[i / 2] + i % 2 * 2;
                sum[i] = squares_of(x[0], x[1]) + squares_of(x[4], x[5]);
            }
            add_lanes<4>(sum);
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                squares[i] = sum[2 * i] + sum[2 * i + 1];
        }
        if (!is_there || (!NORMED && weight == nullptr))
            return;
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            const float2 w = Qkv::weights_at(weight, d + pair / 2 * (epilogue.head_dim / 2) + pair % 2 * 2);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const float inverse = rsqrtf(fmaf(squares[i], is_wide ? 1.0f / 128.0f : 1.0f / 64.0f, epilogue.head_eps));
                const float2 x = Qkv::weighted({v[i][2 * pair], v[i][2 * pair + 1]}, inverse, w);
                v[i][2 * pair] = x.x;
                v[i][2 * pair + 1] = x.y;
            }
        }
    }
};
