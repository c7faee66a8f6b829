// Queries, keys and values: biased, normed by head, turned by position, and stored, the latter two in pages (epilogue.cuh).
#pragma once
#include "epilogue/row_norm.cuh"
#include "epilogue/taken.cuh"
#include "fp8_rows.cuh"
#include "step/batch.cuh"

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
