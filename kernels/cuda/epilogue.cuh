// What happens to a GEMM's sums on their way out, the same code for every GEMM kernel: a warp takes T tokens' outputs of
// a tile side by side, BLOCKS times 64 of each, lane l holding outputs 64 b + 2 l and 64 b + 2 l + 1 of token i as
// v[i][b]. What it needs from memory (`ahead`) can be fetched long before the sums are ready (`store`).
//
//   Qkv        row scale; bias; head norm; rope; q -> [tokens, q_width] bf16, k and v -> KV pages  128 outputs a tile
//   Residual   residual += y (bf16), sumsq[t, segment of m] = sum of the new values' squares, f32      64 or 128
//   RankSums   y, f32, to the ranks that add them up and take them through Residual              64 or 128
//   GateUp     row scale; silu(gate) * up -> [tokens, intermediate] bf16                         64 or 128
//   Head       y -> [samples, vocab] f16, clamped to what f16 holds                              64 or 128
//   Linear     y -> [tokens, rows] bf16                                                          64 or 128
//
//   row scale  rsqrt(sum_sq / hidden + eps), sum_sq the token's sum over sumsq [tokens, segments] f32
//   KV pages   [pages + 1, kv_heads, page_size, head_dim] bf16; 16-byte chunk c of row t lies at chunk c ^ (t % 8)
//
// 1. Everything between the sums and the stored value is f32, and every sum has one order: a token's bits depend
//    neither on the kernel nor on the tokens beside it.
// 2. Gate and up rows take turns in blocks of 8 (the loader's doing), so that a lane finds its partner by a shuffle.
// 3. A token's chain of shuffles and loads is long and each step of it waits for the one before: T chains side by side
//    hide each other. Tokens beyond `count` go along and are not stored.
// 4. The structs are kernel parameters: backend-cuda/src/ops/gemm/epilogue.rs declares the same fields, which its tests compare.
// 5. A model without bias, head norms or rope has null pointers there, and numbers that change no bit in their places: a bias
//    of -0, an inverse and weights of 1, a cosine of 1 and a sine of 0. Asking costs registers: where all heads are normed and
//    turned and none has a bias, the products of few rows are compiled for that alone (QkvNormed).
// 6. Hopper's products of few rows take Qkv with keys and values in bf16, and Residual, through hopper/gemm/wide.cuh, to the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "step/batch.cuh"
#include "fp8_rows.cuh"
#include "exchange/inbox.cuh"
#include "segment.cuh"

// The T tokens that a warp has in hand: token first + i * step is stored if i < count.
struct Taken {
    unsigned first, step, count;

    __device__ __forceinline__ unsigned token(unsigned i) const { return first + i * step; }
};

template <int T> __device__ __forceinline__ void warp_sums(float (&value)[T]) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2)
#pragma unroll
        for (int i = 0; i < T; i++)
            value[i] += __shfl_xor_sync(0xffffffffu, value[i], lane);
}

__device__ __forceinline__ void store_pair(__nv_bfloat16 *at, float x, float y) {
    *reinterpret_cast<__nv_bfloat162 *>(at) = __floats2bfloat162_rn(x, y);
}

// The scale of a normed row, from its partial sums of squares.
struct RowNorm {
    const float *sumsq; // [tokens, segments]
    unsigned segments, hidden;
    float eps;

    // A thread's call: loads are independent, the sum of each token is in order.
    template <int COUNT> __device__ __forceinline__ void scales(const unsigned (&token)[COUNT], float (&scale)[COUNT]) const {
        float sum[COUNT] = {};
        if (segments % 4 == 0) {
#pragma unroll 4
            for (unsigned i = 0; i < segments; i += 4)
#pragma unroll
                for (int t = 0; t < COUNT; t++) {
                    const float4 four = *reinterpret_cast<const float4 *>(sumsq + (size_t)token[t] * segments + i);
                    sum[t] = sum[t] + four.x + four.y + four.z + four.w;
                }
        } else {
            for (unsigned i = 0; i < segments; i++)
#pragma unroll
                for (int t = 0; t < COUNT; t++)
                    sum[t] += sumsq[(size_t)token[t] * segments + i];
        }
#pragma unroll
        for (int t = 0; t < COUNT; t++)
            scale[t] = rsqrtf(sum[t] / (float)hidden + eps);
    }
    __device__ __forceinline__ float scale(unsigned token) const {
        const unsigned one[1] = {token};
        float found[1];
        scales(one, found);
        return found[0];
    }
};

// What an epilogue that needs nothing beside the token's number knows of it.
struct Nowhere {
    __device__ __forceinline__ Nowhere from_lane(unsigned) const { return {}; }
};

// NORMED: there are head norms and rope, and no bias. FP8: keys and values are kept so (fp8_rows.cuh).
template <bool NORMED, bool FP8> struct QkvOf {
    RowNorm norm;
    float head_eps;
    const unsigned *batch; // the packed batch's words
    const __nv_bfloat16 *bias;            // [rows of w], or null
    const __nv_bfloat16 *q_norm, *k_norm; // [head_dim], or null
    const float2 *rope;                   // [positions, head_dim / 2] (cos, sin), or null
    __nv_bfloat16 *q, *k, *v;
    unsigned tokens_offset, heads, kv_heads, head_dim, page_shift, fp8; // fp8: as the kernel is, for the host
    static constexpr bool SCALED = true;
    static constexpr int SLICES = 2; // at most
    static constexpr bool EARLY = true; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned token) const { return norm.scale(token); }
    template <int COUNT> __device__ __forceinline__ void scales(const unsigned (&token)[COUNT], float (&scale)[COUNT]) const {
        norm.scales(token, scale);
    }

    // A token's place in its sequence and in the pages.
    struct Where {
        unsigned position, location;

        __device__ __forceinline__ Where from_lane(unsigned lane) const {
            return {__shfl_sync(0xffffffffu, position, lane), __shfl_sync(0xffffffffu, location, lane)};
        }
    };

    __device__ __forceinline__ Where where(unsigned token) const {
        const Token entry = reinterpret_cast<const Token *>(batch + tokens_offset)[token];
        return {entry.position, entry.location};
    }

    // Where a token's key and value go, and (cos, sin) of this lane's two angles.
    template <int BLOCKS> struct Ahead {
        unsigned location;
        float4 turn;
    };

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(const Where &where, unsigned, unsigned, unsigned, unsigned lane) const {
        return {where.location, turn_at(where.position, (2 * lane) & (head_dim / 2 - 1))};
    }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&ahead)[T], float2 (&y)[T][BLOCKS], const Taken &taken,
                                          unsigned m0, unsigned rows, unsigned lane) const {
        static_assert(BLOCKS == 2, "a tile holds whole heads");
        float2 lo[T], hi[T];
        if constexpr (!NORMED) {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const unsigned m = m0 + 64 * b + 2 * lane;
                const float2 added = m < rows ? bias_at(m) : float2{-0.0f, -0.0f};
#pragma unroll
                for (int i = 0; i < T; i++)
                    y[i][b] = {__fadd_rn(y[i][b].x, added.x), __fadd_rn(y[i][b].y, added.y)};
            }
        }
        if (head_dim == 128) {
#pragma unroll
            for (int i = 0; i < T; i++)
                lo[i] = y[i][0], hi[i] = y[i][1];
            head<2>(lo, hi, ahead, taken, m0 / 128, lane);
        } else {
            // Dims 2 l and 2 l + 1 turn with dims 32 further on, which lane l + 16 holds.
#pragma unroll
            for (int b = 0; b < 2; b++) {
                if (m0 + 64 * b >= rows)
                    break;
#pragma unroll
                for (int i = 0; i < T; i++)
                    lo[i] = hi[i] = y[i][b];
                head<1>(lo, hi, ahead, taken, m0 / 64 + b, lane);
            }
        }
    }

    // The biases of outputs m and m + 1.
    __device__ __forceinline__ float2 bias_at(unsigned m) const {
        return bias ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(bias + m)) : float2{-0.0f, -0.0f};
    }

    // (cos, sin) of a position's angles i and i + 1.
    __device__ __forceinline__ float4 turn_at(unsigned position, unsigned i) const {
        if (!NORMED && rope == nullptr)
            return {1.0f, 0.0f, 1.0f, 0.0f};
        return *reinterpret_cast<const float4 *>(rope + (size_t)position * (head_dim / 2) + i);
    }

    // The weights of dims d and d + 1 of a head norm.
    __device__ __forceinline__ static float2 weights_at(const __nv_bfloat16 *weight, unsigned d) {
        if (!NORMED && weight == nullptr)
            return {1.0f, 1.0f};
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(weight + d));
    }

    // x cos + y sin, rounded in one way whatever the compiler would make of it.
    __device__ __forceinline__ static float turned(float x, float cos, float y, float sin) {
        return fmaf(x, cos, __fmul_rn(y, sin));
    }

    __device__ __forceinline__ static float2 weighted(float2 x, float inverse, float2 w) {
        return {__fmul_rn(__fmul_rn(x.x, inverse), w.x), __fmul_rn(__fmul_rn(x.y, inverse), w.y)};
    }

  private:
    __device__ __forceinline__ static float2 rounded(float2 x) { return __bfloat1622float2(__floats2bfloat162_rn(x.x, x.y)); }

    // One head of 64 PARTS dims. lo: dims 2 l, 2 l + 1. hi: dims 64 + 2 l, … (of no use where PARTS is 1).
    template <int PARTS, int T, int BLOCKS>
    __device__ __forceinline__ void head(float2 (&lo)[T], float2 (&hi)[T], const Ahead<BLOCKS> (&ahead)[T],
                                         const Taken &taken, unsigned h, unsigned lane) const {
        const unsigned d = 2 * lane;
        if (h < heads + kv_heads) {
            const __nv_bfloat16 *weight = h < heads ? q_norm : k_norm;
            const float2 w_lo = weights_at(weight, d), w_hi = PARTS == 2 ? weights_at(weight, d + 64) : w_lo;
            float sum[T], sum_hi[T];
#pragma unroll
            for (int i = 0; i < T; i++) {
                sum[i] = fmaf(lo[i].x, lo[i].x, __fmul_rn(lo[i].y, lo[i].y));
                sum_hi[i] = fmaf(hi[i].x, hi[i].x, __fmul_rn(hi[i].y, hi[i].y));
            }
            warp_sums(sum);
            if (PARTS == 2)
                warp_sums(sum_hi);
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float squares = PARTS == 2 ? __fadd_rn(sum[i], sum_hi[i]) : sum[i];
                const bool normed = NORMED || weight != nullptr;
                const float inverse = normed ? rsqrtf(fmaf(squares, 1.0f / (64.0f * PARTS), head_eps)) : 1.0f;
                const float4 turn = ahead[i].turn;
                lo[i] = weighted(lo[i], inverse, w_lo);
                if (PARTS == 2) {
                    const float2 a = lo[i], b = weighted(hi[i], inverse, w_hi);
                    lo[i] = {turned(a.x, turn.x, -b.x, turn.y), turned(a.y, turn.z, -b.y, turn.w)};
                    hi[i] = {turned(b.x, turn.x, a.x, turn.y), turned(b.y, turn.z, a.y, turn.w)};
                } else {
                    const float sign = lane < 16 ? -1.0f : 1.0f;
                    const float x = __shfl_xor_sync(0xffffffffu, lo[i].x, 16);
                    const float y = __shfl_xor_sync(0xffffffffu, lo[i].y, 16);
                    lo[i] = {turned(lo[i].x, turn.x, sign * x, turn.y), turned(lo[i].y, turn.z, sign * y, turn.w)};
                }
            }
        }
        if constexpr (FP8) {
            if (h >= heads)
                return keep<PARTS>(lo, hi, ahead, taken, h, lane);
        }
#pragma unroll
        for (int i = 0; i < T; i++)
            if (i < taken.count)
                put<PARTS>(lo[i], hi[i], ahead[i].location, taken.token(i), h, d);
    }

    // Stores a head's keys or values in fp8.
    template <int PARTS, int T, int BLOCKS>
    __device__ __forceinline__ void keep(const float2 (&lo)[T], const float2 (&hi)[T], const Ahead<BLOCKS> (&ahead)[T],
                                         const Taken &taken, unsigned h, unsigned lane) const {
        constexpr int BOTH = T < 2 ? T : 2; // more take registers
        const bool is_key = h < heads + kv_heads;
#pragma unroll
        for (int first = 0; first < T; first += BOTH) {
            Fp8Place places[BOTH];
            float2 rows[BOTH][PARTS];
#pragma unroll
            for (int i = 0; i < BOTH; i++) {
                const int at = first + i < T ? first + i : first;
                const unsigned location = ahead[at].location, row = location & ((1u << page_shift) - 1);
                places[i] = Fp8Place::of<64 * PARTS>(is_key ? k : v, location >> page_shift, kv_heads, 1u << page_shift,
                                                     h - heads - (is_key ? 0 : kv_heads), row);
                rows[i][0] = rounded(lo[at]);
                if constexpr (PARTS == 2)
                    rows[i][1] = rounded(hi[at]);
            }
            fp8_store<PARTS>(places, rows, taken.count > first ? taken.count - first : 0, is_key, lane);
        }
    }

    template <int PARTS>
    __device__ __forceinline__ void put(float2 lo, float2 hi, unsigned location, unsigned token, unsigned h,
                                        unsigned d) const {
        if (h < heads) {
            __nv_bfloat16 *out = q + ((size_t)token * heads + h) * (64 * PARTS) + d;
            store_pair(out, lo.x, lo.y);
            if (PARTS == 2)
                store_pair(out + 64, hi.x, hi.y);
            return;
        }
        const bool is_key = h < heads + kv_heads;
        const unsigned kv_head = h - heads - (is_key ? 0 : kv_heads);
        const unsigned page = location >> page_shift, row = location & ((1u << page_shift) - 1);
        const size_t line = (((size_t)page * kv_heads + kv_head) << page_shift) + row;
        __nv_bfloat16 *out = (is_key ? k : v) + line * (64 * PARTS) + ((d / 8) ^ (row % 8)) * 8 + d % 8;
        store_pair(out, lo.x, lo.y);
        if (PARTS == 2)
            store_pair(out + 64, hi.x, hi.y); // chunk 8 + c goes to 8 + (c ^ row % 8)
    }
};

using Qkv = QkvOf<false, false>;
using QkvNormed = QkvOf<true, false>;
using QkvFp8 = QkvOf<false, true>;
using QkvNormedFp8 = QkvOf<true, true>;
static_assert(sizeof(Qkv) == sizeof(QkvNormed), "one set of parameters for both");

struct Residual {
    __nv_bfloat16 *residual; // [tokens, rows]
    float *sumsq;            // [tokens, segments_of(rows)]
    static constexpr bool SCALED = false;
    static constexpr int SLICES = 4; // at most
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    // The residual stream as it was.
    template <int BLOCKS> struct Ahead {
        __nv_bfloat162 old[BLOCKS];
    };

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned token, unsigned m0, unsigned rows, unsigned lane) const {
        const __nv_bfloat162 *at =
            reinterpret_cast<const __nv_bfloat162 *>(residual + (size_t)token * rows + m0 + 2 * lane);
        Ahead<BLOCKS> ahead;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
            ahead.old[b] = m0 + 64 * b + 2 * lane < rows ? at[32 * b] : __nv_bfloat162();
        return ahead;
    }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&ahead)[T], float2 (&v)[T][BLOCKS], const Taken &taken,
                                          unsigned m0, unsigned rows, unsigned lane) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const unsigned m = m0 + 64 * b + 2 * lane;
            if (m0 + 64 * b >= rows)
                break;
            float squares[T];
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float2 old = __bfloat1622float2(ahead[i].old[b]);
                const __nv_bfloat162 sum = __floats2bfloat162_rn(old.x + v[i][b].x, old.y + v[i][b].y);
                const float2 x = __bfloat1622float2(sum);
                squares[i] = m < rows ? fmaf(x.x, x.x, __fmul_rn(x.y, x.y)) : 0.0f;
                if (i < taken.count && m < rows)
                    *reinterpret_cast<__nv_bfloat162 *>(residual + (size_t)taken.token(i) * rows + m) = sum;
            }
            warp_sums(squares);
#pragma unroll
            for (int i = 0; i < T; i++)
                if (i < taken.count && lane == 0)
                    sumsq[(size_t)taken.token(i) * segments_of(rows) + m0 / SEGMENT + b] = squares[i];
        }
    }
};

// What a rank has of o's or down's sums, for who adds them up (exchange.cuh): a product's own stores carry them to the other ranks while
// it multiplies the next tile.
//
//   shared    segments of outputs in tiles of 16, [tokens, segments_of(rows)] in a row; tile i is for rank i % ranks, which has those
//             that are for it one behind the other
//   else      all of them are for every rank
struct RankSums {
    float *to[8]; // by rank: where its ones go, in its inbox; at this rank's own place, in its memory
    unsigned ranks, ranks_log2, shared, reserved;
    static constexpr bool SCALED = false;
    static constexpr int SLICES = 2; // at most: a rank of two has half of Residual's
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    template <int BLOCKS> struct Ahead {};

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned, unsigned, unsigned, unsigned) const { return {}; }

    // Where a segment goes to.
    struct Segment {
        size_t at; // in floats
        unsigned owner;
    };

    __device__ __forceinline__ Segment segment(unsigned token, unsigned m, unsigned rows) const {
        const unsigned index = token * segments_of(rows) + m / SEGMENT;
        if (!shared)
            return {(size_t)index * SEGMENT, 0};
        const unsigned tile = index / 16;
        return {(size_t)((tile >> ranks_log2) * 16 + index % 16) * SEGMENT, tile & (ranks - 1)};
    }

    // Stores outputs `within` and the next of a segment.
    __device__ __forceinline__ void put(const Segment &segment, unsigned within, float2 y) const {
        const float2 sent = {sendable(y.x), sendable(y.y)};
#pragma unroll
        for (unsigned rank = 0; rank < 8; rank++)
            if (rank < ranks && (!shared || segment.owner == rank))
                push(reinterpret_cast<float2 *>(to[rank] + segment.at + within), sent);
    }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned rows, unsigned lane) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            if (i >= taken.count)
                break;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
                if (m0 + 64 * b + 2 * lane < rows)
                    put(segment(taken.token(i), m0 + 64 * b, rows), 2 * lane, v[i][b]);
        }
    }
};

struct GateUp {
    RowNorm norm;
    __nv_bfloat16 *out; // [tokens, intermediate]
    unsigned intermediate, reserved;
    static constexpr bool SCALED = true;
    static constexpr int SLICES = 1; // at most
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned token) const { return norm.scale(token); }
    template <int COUNT> __device__ __forceinline__ void scales(const unsigned (&token)[COUNT], float (&scale)[COUNT]) const {
        norm.scales(token, scale);
    }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    template <int BLOCKS> struct Ahead {};

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned, unsigned, unsigned, unsigned) const { return {}; }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned, unsigned lane) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            // Of 8 lanes, the first 4 hold 8 gates, the last 4 their ups.
            const unsigned m = (m0 + 64 * b) / 2 + lane / 8 * 8 + lane % 4 * 2;
            const bool stores = lane % 8 < 4 && m < intermediate;
#pragma unroll
            for (int i = 0; i < T; i++) {
                const float2 g = v[i][b];
                const float2 u = {__shfl_xor_sync(0xffffffffu, g.x, 4), __shfl_xor_sync(0xffffffffu, g.y, 4)};
                if (stores && i < taken.count)
                    store_pair(out + (size_t)taken.token(i) * intermediate + m, silu(g.x) * u.x, silu(g.y) * u.y);
            }
        }
    }

    __device__ __forceinline__ static float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
};

// Plain stores of one type.
struct Head {
    __half *out; // [samples, rows]
    static constexpr bool SCALED = false;
    static constexpr int SLICES = 1; // at most
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    template <int BLOCKS> struct Ahead {};

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned, unsigned, unsigned, unsigned) const { return {}; }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned rows, unsigned lane) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            if (i >= taken.count)
                break;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const unsigned m = m0 + 64 * b + 2 * lane;
                __half *at = out + (size_t)taken.token(i) * rows + m;
                const __half2 pair = __floats2half2_rn(clamped(v[i][b].x), clamped(v[i][b].y));
                if (rows % 2 == 0 && m < rows) {
                    *reinterpret_cast<__half2 *>(at) = pair;
                } else {
                    // An odd vocabulary: pairs are not aligned.
                    if (m < rows)
                        at[0] = pair.x;
                    if (m + 1 < rows)
                        at[1] = pair.y;
                }
            }
        }
    }

    __device__ __forceinline__ static float clamped(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }
};

struct Linear {
    __nv_bfloat16 *out; // [tokens, rows]
    static constexpr bool SCALED = false;
    static constexpr int SLICES = 1; // at most
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    template <int BLOCKS> struct Ahead {};

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned, unsigned, unsigned, unsigned) const { return {}; }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned rows, unsigned lane) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            if (i >= taken.count)
                break;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const unsigned m = m0 + 64 * b + 2 * lane;
                __nv_bfloat16 *at = out + (size_t)taken.token(i) * rows + m;
                if (rows % 2 == 0 && m < rows) {
                    store_pair(at, v[i][b].x, v[i][b].y);
                } else {
                    if (m < rows)
                        at[0] = __float2bfloat16_rn(v[i][b].x);
                    if (m + 1 < rows)
                        at[1] = __float2bfloat16_rn(v[i][b].y);
                }
            }
        }
    }
};

// The sizes of a product, and how its sum over the columns is cut: slice i is blocks [i nb / slices, (i + 1) nb / slices)
// of 64 columns, nb of them in all; slices are a power of two. Their sums are added in pairs, then pairs of pairs: a rank that has
// half of the columns, or a quarter, has a whole subtree of that, and ranks' sums added in the same way have the bits of one GPU's.
struct Shape {
    unsigned rows, cols, tokens, slices;

    __device__ __forceinline__ unsigned blocks() const { return (cols + 63) / 64; }
    __device__ __forceinline__ unsigned slice_begin(unsigned slice) const { return slice * blocks() / slices; }
};
