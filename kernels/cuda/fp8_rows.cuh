// fp8_rows: rows of keys and values in fp8, on their way into pages and out of them. core/src/model/kv.rs has the definition.
//
//   page             codes of all rows of head 0, of head 1, ..., then a scale for each of them; to a multiple of 128 bytes
//   element          e4m3 * scale, the scale the best of the eight by which the row's largest magnitude becomes 240 to 448
//   code             an f16 number, by one instruction for two: operands are codes. A key's scale is its score's, and a value's is its
//                    probability's
//   scale            a key's in bf16; a value's 2^8 times in f16, where it is a normal number
//
// A row's codes are permuted so that a word of four is what a lane needs of two registers of an operand. Of 16 dims, word c is
//
//   keys     dims 2c, 2c + 1, 2c + 8, 2c + 9     word c of chunk k (of four) lies at byte 16 c + 4 k of its 64 dims; of rows of
//                                                128 dims the halves of odd rows change places
//   values   dims 2c, 2c + 8, 2c + 1, 2c + 9     word c at byte 4 c of its 16 dims; these lie where a row of bf16 has its chunks
//                                                of 16 bytes, at chunk d ^ (t & 7), of rows of 64 dims at d ^ (t / 2 & 3)
//
// so that 16 bytes a lane, or ldmatrix of pairs of codes, transposed, find eight rows in different banks. Of 16 rows the scales lie
// in the order 0, 1, 8, 9, 2, 3, 10, 11, ...: so do tokens in an operand's lanes.
//
// 1. Errors are summed in whole numbers: the scale that is chosen depends neither on who sums nor on the order. (Of a row that is
//    cut, with more than 57,344, a sum may overflow; what it is then does not depend on them either.)
// 2. A row is rounded to bf16 before, as where pages are bf16: products of few tokens and of many store the same.
// 3. What is no number or infinite has larger bits than any number; its row gets a scale that is none.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "words.cuh"

// Rows of a tile.
constexpr unsigned FP8_TILE = 16;

// Bytes of a page of so many rows of HD dims, all heads'.
template <int HD> __device__ __forceinline__ unsigned fp8_page_bytes(unsigned rows) { return (rows * (HD + 2) + 127) & ~127u; }

// Where row t's word c of dims 16 chunk on lies, of rows from a multiple of 16 on.
template <int HD> __device__ __forceinline__ unsigned fp8_key_at(unsigned t, unsigned chunk, unsigned c) {
    const unsigned half = HD == 128 ? chunk / 4 ^ (t & 1) : chunk / 4;
    return t * HD + half * 64 + c * 16 + chunk % 4 * 4;
}
template <int HD> __device__ __forceinline__ unsigned fp8_value_at(unsigned t, unsigned chunk) {
    return t * HD + (chunk ^ (HD == 128 ? t & 7 : t / 2 & 3)) * 16;
}

// Values' scales are kept times 2^8, and so are sums of values until the end.
__device__ __forceinline__ constexpr float scale_lift() { return 0x1p8f; }

// A word's codes 0 and 1, and 2 and 3, as f16 numbers.
__device__ __forceinline__ void fp8_halves(unsigned &low, unsigned &high, unsigned word) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(low), "=r"(high)
        : "r"(word));
}

// Codes 0, 2, 1, 3: of a word of values those of the lower dims, then those of the higher ones; of what ldmatrix has transposed those
// of one dim's tokens, then those of the dim 8 further on.
__device__ __forceinline__ unsigned fp8_in_order(unsigned word) { return __byte_perm(word, 0, 0x3120); }

// Where a tile's row t has its scale among the tile's.
__device__ __forceinline__ unsigned fp8_scale_at(unsigned t) { return t % 8 / 2 * 4 + t / 8 * 2 + t % 2; }

// Where a lane's words lie in any tile: of keys, of their scales, and of values, whose chunks are `d` and, of lanes from 16 on, `d` or
// the next. Worked out once: the compiler would do it for each tile again, which takes as long as widening some words.
template <int HD> struct Fp8Lane {
    unsigned keys, scales, values, value_scales;

    __device__ __forceinline__ Fp8Lane(unsigned lane, unsigned d, unsigned chunks)
        : keys(fp8_key_at<HD>(lane / 4, 0, lane % 4)), scales(fp8_scale_at(lane / 4) * 2),
          values(fp8_value_at<HD>(lane & 15, d + lane / 16 % chunks)), value_scales(lane % 4 * 8) {
        asm volatile("" : "+r"(keys), "+r"(scales), "+r"(values), "+r"(value_scales));
    }
};

// A tile of keys as A operands, tokens x dims, in shared memory: attention.cuh's load_keys, chunk after chunk.
template <int HD> struct Fp8Keys {
    unsigned at, scales; // of the lane's words; of its rows' scales
    uint4 low, high;     // words of 64 dims of rows lane / 4 and lane / 4 + 8

    __device__ __forceinline__ Fp8Keys(unsigned tile, unsigned scales, const Fp8Lane<HD> &lane)
        : at(tile + lane.keys), scales(scales + lane.scales) {}
    // That of row lane / 4, or lane / 4 + 8.
    __device__ __forceinline__ float scale(bool second) const {
        unsigned short bits;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(scales + second * 4) : "memory");
        return __uint_as_float((unsigned)bits << 16);
    }
    // Chunks in their order: k counts up, known when this is compiled.
    __device__ __forceinline__ void load(unsigned (&a)[4], unsigned k) {
        if (k % 4 == 0) {
            const unsigned half = at ^ k / 4 * 64; // as fp8_key_at has it: a tile begins at a multiple of 128 bytes
            low = load_words(half);
            high = load_words(half + 8 * HD);
        }
        fp8_halves(a[0], a[2], k % 4 == 0 ? low.x : k % 4 == 1 ? low.y : k % 4 == 2 ? low.z : low.w);
        fp8_halves(a[1], a[3], k % 4 == 0 ? high.x : k % 4 == 1 ? high.y : k % 4 == 2 ? high.z : high.w);
    }
};

// A tile of values on its way to A operands, dims x tokens: attention.cuh's load_values, of COUNT chunks, one or two. words[k][i] has
// tokens 2 (lane % 4) + 8 i and the next one in its halves.
template <int HD, int COUNT>
__device__ __forceinline__ void fp8_load_values(unsigned (&words)[COUNT][2], unsigned tile, const Fp8Lane<HD> &lane) {
    if constexpr (COUNT == 2)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words[0][0]), "=r"(words[0][1]), "=r"(words[1][0]), "=r"(words[1][1])
                     : "r"(tile + lane.values)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(words[0][0]), "=r"(words[0][1])
                     : "r"(tile + lane.values)
                     : "memory");
}
__device__ __forceinline__ void fp8_values_operand(unsigned (&a)[4], const unsigned (&words)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
        fp8_halves(a[2 * i], a[2 * i + 1], fp8_in_order(words[i]));
}
// Probabilities of a tile's tokens, as a B operand, times the tokens' scales.
template <int HD>
__device__ __forceinline__ void fp8_scale_probabilities(unsigned (&scaled)[2], const unsigned (&p)[2], unsigned scales_of_tile,
                                                        const Fp8Lane<HD> &lane) {
    unsigned scales[2];
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(scales[0]), "=r"(scales[1])
                 : "r"(scales_of_tile + lane.value_scales)
                 : "memory");
#pragma unroll
    for (int i = 0; i < 2; i++)
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(scaled[i]) : "r"(p[i]), "r"(scales[i]));
}

// e4m3's two nearest numbers as codes, x's below y's; beyond 448 is cut.
__device__ __forceinline__ unsigned fp8_codes(float x, float y) {
    unsigned short codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(y), "f"(x));
    return codes;
}
__device__ __forceinline__ float2 fp8_values(unsigned codes) {
    unsigned halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((unsigned short)codes));
    return __half22float2(*reinterpret_cast<__half2 *>(&halves));
}

// T rows whose elements lie in LANES lanes beside each other, N pairs each: their scales, and the lane's codes. `largest` are the rows'
// largest magnitudes' bits; `sum` adds what a row's lanes have. Each lane works out some of the eight scales for all. Rows side by
// side hide each other's chains.
template <int LANES, int T, int N, class Sum>
__device__ __forceinline__ void fp8_round(unsigned (&codes)[T][N], float (&scales)[T], const float2 (&x)[T][N],
                                          const unsigned (&largest)[T], Sum sum) {
    constexpr float WHOLE = 0x1p23f; // what is added to it, and rounded down, is a whole number in its lowest bits
    constexpr int SHARE = LANES < 8 ? LANES : 8;
    static_assert(SHARE >= 4, "a lane has two of the scales at most");
    float scale_of[T][8 / SHARE], inverse_of[T][8 / SHARE], best[T], least[T];
#pragma unroll
    for (int i = 0; i < T; i++) {
        const float clamped = fminf(fmaxf(__uint_as_float(largest[i]), 0x1p-13f), 57344.0f);
        least[i] = __int_as_float(0x7f800000);
#pragma unroll
        for (int j = 0; j < 8 / SHARE; j++) {
            const unsigned index = threadIdx.x % SHARE + j * SHARE, top = index < 7 ? 448 - 32 * index : 240;
            scale_of[i][j] = __bfloat162float(__float2bfloat16_rn(__fdiv_rn(clamped, (float)top)));
            inverse_of[i][j] = __frcp_rn(scale_of[i][j]);
        }
        best[i] = __shfl_sync(0xffffffffu, scale_of[i][0], 0, SHARE);
    }
#pragma unroll 2
    for (unsigned index = 0; index < 8; index++) {
#pragma unroll
        for (int i = 0; i < T; i++) {
            const bool is_first = index < SHARE;
            const float own = is_first ? scale_of[i][0] : scale_of[i][8 / SHARE - 1];
            const float own_inverse = is_first ? inverse_of[i][0] : inverse_of[i][8 / SHARE - 1];
            const float scale = __shfl_sync(0xffffffffu, own, index % SHARE, SHARE);
            const float inverse = __shfl_sync(0xffffffffu, own_inverse, index % SHARE, SHARE);
            unsigned parts = 0; // 4,096ths
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float2 y = {__fmul_rn(x[i][j].x, inverse), __fmul_rn(x[i][j].y, inverse)};
                const float2 kept = fp8_values(fp8_codes(y.x, y.y));
                const float a = __fsub_rn(y.x, kept.x), b = __fsub_rn(y.y, kept.y);
                parts += __float_as_uint(__fmaf_rz(__fmul_rn(a, a), 4096.0f, WHOLE));
                parts += __float_as_uint(__fmaf_rz(__fmul_rn(b, b), 4096.0f, WHOLE));
            }
            parts -= 2 * N * __float_as_uint(WHOLE);
            const float error = __fmul_rn((float)sum(parts), __fmul_rn(scale, scale));
            best[i] = error < least[i] ? scale : best[i];
            least[i] = fminf(error, least[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < T; i++) {
        const float inverse = __frcp_rn(best[i]);
#pragma unroll
        for (int j = 0; j < N; j++)
            codes[i][j] = fp8_codes(__fmul_rn(x[i][j].x, inverse), __fmul_rn(x[i][j].y, inverse));
        scales[i] = largest[i] >= 0x7f800000u ? __uint_as_float(0x7fffffff) : best[i];
    }
}

// A scale as it is kept.
__device__ __forceinline__ unsigned short fp8_kept_scale(float scale, bool is_key) {
    return is_key ? __bfloat16_as_ushort(__float2bfloat16_rn(scale)) : __half_as_ushort(__float2half_rn(scale * scale_lift()));
}

__device__ __forceinline__ unsigned fp8_magnitude(float2 x) {
    return max(__float_as_uint(x.x) & 0x7fffffffu, __float_as_uint(x.y) & 0x7fffffffu);
}

// The word of two codes of a chunk's lower dims and two of its higher ones.
__device__ __forceinline__ unsigned fp8_key_word(unsigned low, unsigned high) { return __byte_perm(low, high, 0x5410); }
__device__ __forceinline__ unsigned fp8_value_word(unsigned low, unsigned high) { return __byte_perm(low, high, 0x5140); }

// Where a row lies.
struct Fp8Place {
    char *tile; // the 16 rows that it is one of
    unsigned t; // which one
    unsigned short *scale;

    // A page of `kv_heads` times `rows` rows, of whose head `head` it is row `row`.
    template <int HD>
    __device__ __forceinline__ static Fp8Place of(void *pages, unsigned page, unsigned kv_heads, unsigned rows, unsigned head,
                                                  unsigned row) {
        char *begin = static_cast<char *>(pages) + (size_t)page * fp8_page_bytes<HD>(kv_heads * rows);
        const unsigned line = head * rows + row, t = line % FP8_TILE, first = line - t;
        unsigned short *scales = reinterpret_cast<unsigned short *>(begin + kv_heads * rows * HD);
        return {begin + first * HD, t, scales + first + fp8_scale_at(t)};
    }
};

// A warp rounds T rows of 64 PARTS dims, keys or values, of which lane l has 2 l, 2 l + 1, and 64 more, and stores those that are
// there.
template <int PARTS, int T>
__device__ __forceinline__ void fp8_store(const Fp8Place (&places)[T], const float2 (&rows)[T][PARTS], unsigned count, bool is_key,
                                          unsigned lane) {
    constexpr int HD = 64 * PARTS;
    unsigned codes[T][PARTS], largest[T];
    float scales[T];
#pragma unroll
    for (int i = 0; i < T; i++) {
        largest[i] = fp8_magnitude(rows[i][0]);
#pragma unroll
        for (int j = 1; j < PARTS; j++)
            largest[i] = max(largest[i], fp8_magnitude(rows[i][j]));
        largest[i] = __reduce_max_sync(0xffffffffu, largest[i]);
    }
    fp8_round<32>(codes, scales, rows, largest, [](unsigned parts) { return __reduce_add_sync(0xffffffffu, parts); });
    // Lanes with lower dims make the words of the first 64 dims, those with higher ones of the others.
    const unsigned part = lane / 4 % 2, chunk = 4 * part + lane / 8, c = lane % 4;
#pragma unroll
    for (int i = 0; i < T; i++) {
        const unsigned mine = PARTS == 2 ? codes[i][0] | codes[i][PARTS - 1] << 16 : codes[i][0];
        const unsigned other = __shfl_xor_sync(0xffffffffu, mine, 4);
        const unsigned low = (part ? other : mine) >> 16 * part & 0xffffu, high = (part ? mine : other) >> 16 * part & 0xffffu;
        const Fp8Place &place = places[i];
        const unsigned at = is_key ? fp8_key_at<HD>(place.t, chunk, c) : fp8_value_at<HD>(place.t, chunk) + 4 * c;
        if (i < count && part < PARTS)
            *reinterpret_cast<unsigned *>(place.tile + at) = is_key ? fp8_key_word(low, high) : fp8_value_word(low, high);
        if (i < count && lane == 0)
            *place.scale = fp8_kept_scale(scales[i], is_key);
    }
}
