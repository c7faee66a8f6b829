// fp8_rows: rows of keys and values in fp8, on their way into pages and out of them. core/src/kv.rs has the definition.
//
//   page of a head   tiles of 16 rows: codes of row 0, codes of row 1, ..., then a scale for each row, bf16
//   element          bf16(e4m3 * scale), the scale the best of the eight by which the row's largest magnitude becomes 240 to 448
//
// A row's codes are permuted so that a word of four is what a lane needs of two registers of an operand. Of 16 dims, word c is
//
//   keys     dims 2c + 8, 2c, 2c + 9, 2c + 1     word c of chunk k (of four) lies at byte 16 c + 4 k of its 64 dims; of rows of
//                                                128 dims the halves of odd rows change places
//   values   dims 2c, 2c + 8, 2c + 1, 2c + 9     word c at byte 4 c of its 16 dims; these lie where a row of bf16 has its chunks
//                                                of 16 bytes, at chunk d ^ (t & 7), of rows of 64 dims at d ^ (t / 2 & 3)
//
// so that 16 bytes a lane, or ldmatrix of pairs of codes, transposed, find eight rows in different banks.
//
// 1. Errors are summed in whole numbers: the scale that is chosen depends neither on who sums nor on the order. (Of a row that is
//    cut, with more than 57,344, a sum may overflow; what it is then does not depend on them either.)
// 2. A row is rounded to bf16 before, as where pages are bf16: products of few tokens and of many store the same.
// 3. What is no number or infinite has larger bits than any number; its row gets a scale that is none.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr unsigned FP8_TILE_ROWS = 16;

// Bytes of a tile of rows of HD dims.
template <int HD> constexpr unsigned fp8_tile_bytes = FP8_TILE_ROWS * (HD + 2);

// Where row t's word c of dims 16 chunk on lies.
template <int HD> __device__ __forceinline__ unsigned fp8_key_at(unsigned t, unsigned chunk, unsigned c) {
    const unsigned half = HD == 128 ? chunk / 4 ^ (t & 1) : chunk / 4;
    return t * HD + half * 64 + c * 16 + chunk % 4 * 4;
}
template <int HD> __device__ __forceinline__ unsigned fp8_value_at(unsigned t, unsigned chunk) {
    return t * HD + (chunk ^ (HD == 128 ? t & 7 : t / 2 & 3)) * 16;
}

// 2^120 times two scales: e4m3's exponent, in bf16's place, is less by 120.
__device__ __forceinline__ unsigned fp8_lifted(unsigned scales) {
    unsigned lifted;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(lifted) : "r"(scales), "r"(0x7b807b80u));
    return lifted;
}

// A word's codes 1 and 3, and 0 and 2, times lifted scales, rounded to bf16.
__device__ __forceinline__ void fp8_widen(unsigned &odd, unsigned &even, unsigned word, unsigned scales) {
    const unsigned up = word << 8;
    const unsigned a = (word >> 4 & 0x07f007f0u) | (word & 0x80008000u), b = (word << 4 & 0x07f007f0u) | (up & 0x80008000u);
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(odd) : "r"(a), "r"(scales));
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(even) : "r"(b), "r"(scales));
}

__device__ __forceinline__ uint4 fp8_load_words(unsigned address) {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address)
                 : "memory");
    return words;
}

// A tile of keys as A operands, tokens x dims, in shared memory: attention.cuh's load_keys, chunk after chunk.
template <int HD> struct Fp8Keys {
    unsigned tile, lane, first, second; // lifted scales of rows lane / 4 and lane / 4 + 8
    uint4 low, high;                    // their words of 64 dims

    __device__ __forceinline__ Fp8Keys(unsigned tile, unsigned lane) : tile(tile), lane(lane) {
        first = scale(lane / 4);
        second = scale(lane / 4 + 8);
    }
    __device__ __forceinline__ unsigned scale(unsigned row) const {
        unsigned short bits;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(tile + FP8_TILE_ROWS * HD + row * 2) : "memory");
        return fp8_lifted(bits * 0x10001u);
    }
    // Chunks in their order: k counts up, known when this is compiled.
    __device__ __forceinline__ void load(unsigned (&a)[4], unsigned k) {
        if (k % 4 == 0) {
            low = fp8_load_words(tile + fp8_key_at<HD>(lane / 4, k, lane % 4));
            high = fp8_load_words(tile + fp8_key_at<HD>(lane / 4 + 8, k, lane % 4));
        }
        fp8_widen(a[0], a[2], k % 4 == 0 ? low.x : k % 4 == 1 ? low.y : k % 4 == 2 ? low.z : low.w, first);
        fp8_widen(a[1], a[3], k % 4 == 0 ? high.x : k % 4 == 1 ? high.y : k % 4 == 2 ? high.z : high.w, second);
    }
};

// A tile of values as the A operand, dims x tokens: attention.cuh's load_values.
template <int HD>
__device__ __forceinline__ void fp8_load_values(unsigned (&a)[4], unsigned tile, unsigned d, unsigned lane) {
    unsigned words[2], scales[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(tile + fp8_value_at<HD>(lane & 15, d))
                 : "memory");
#pragma unroll
    for (int i = 0; i < 2; i++) {
        asm volatile("ld.shared.u32 %0, [%1];"
                     : "=r"(scales[i])
                     : "r"(tile + FP8_TILE_ROWS * HD + i * 16 + lane % 4 * 4)
                     : "memory");
        fp8_widen(a[2 * i + 1], a[2 * i], words[i], fp8_lifted(scales[i]));
    }
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

// T rows whose elements lie in several lanes, N pairs each: their scales, and the lane's codes. `largest` are the rows' largest
// magnitudes' bits; `sum` adds what a row's lanes have. Rows side by side hide each other's chains.
template <int T, int N, class Sum>
__device__ __forceinline__ void fp8_round(unsigned (&codes)[T][N], __nv_bfloat16 (&scales)[T], const float2 (&x)[T][N],
                                          const unsigned (&largest)[T], Sum sum) {
    constexpr float WHOLE = 0x1p23f; // what is added to it, and rounded down, is a whole number in its lowest bits
    float clamped[T], least[T];
#pragma unroll
    for (int i = 0; i < T; i++) {
        clamped[i] = fminf(fmaxf(__uint_as_float(largest[i]), 0x1p-91f), 57344.0f);
        least[i] = __int_as_float(0x7f800000);
        scales[i] = __float2bfloat16_rn(__fdiv_rn(clamped[i], 448.0f));
    }
#pragma unroll 1
    for (unsigned top = 448; top > 224; top -= top == 256 ? 16 : 32) {
#pragma unroll
        for (int i = 0; i < T; i++) {
            const __nv_bfloat16 tried = __float2bfloat16_rn(__fdiv_rn(clamped[i], (float)top));
            const float scale = __bfloat162float(tried), inverse = __frcp_rn(scale);
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
            scales[i] = error < least[i] ? tried : scales[i];
            least[i] = fminf(error, least[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < T; i++) {
        const float inverse = __frcp_rn(__bfloat162float(scales[i]));
#pragma unroll
        for (int j = 0; j < N; j++)
            codes[i][j] = fp8_codes(__fmul_rn(x[i][j].x, inverse), __fmul_rn(x[i][j].y, inverse));
        scales[i] = largest[i] >= 0x7f800000u ? __ushort_as_bfloat16(0x7fff) : scales[i];
    }
}

__device__ __forceinline__ unsigned fp8_magnitude(float2 x) {
    return max(__float_as_uint(x.x) & 0x7fffffffu, __float_as_uint(x.y) & 0x7fffffffu);
}

// The word of two codes of a chunk's lower dims and two of its higher ones.
__device__ __forceinline__ unsigned fp8_key_word(unsigned low, unsigned high) { return __byte_perm(low, high, 0x1504); }
__device__ __forceinline__ unsigned fp8_value_word(unsigned low, unsigned high) { return __byte_perm(low, high, 0x5140); }
__device__ __forceinline__ unsigned fp8_value_of_key_word(unsigned word) { return __byte_perm(word, 0, 0x2301); }

// Where a row's tile begins, and which of its rows it is.
struct Fp8Place {
    char *tile;
    unsigned t;

    // `line`: a row of a head among all rows of all pages' heads.
    template <int HD> __device__ __forceinline__ static Fp8Place of(void *pages, size_t line) {
        return {static_cast<char *>(pages) + line / FP8_TILE_ROWS * fp8_tile_bytes<HD>, (unsigned)(line % FP8_TILE_ROWS)};
    }
    template <int HD> __device__ __forceinline__ __nv_bfloat16 &scale() const {
        return reinterpret_cast<__nv_bfloat16 *>(tile + FP8_TILE_ROWS * HD)[t];
    }
};

// A warp rounds T rows of 64 PARTS dims, keys or values, of which lane l has 2 l, 2 l + 1, and 64 more, and stores those that are
// there.
template <int PARTS, int T>
__device__ __forceinline__ void fp8_store(const Fp8Place (&places)[T], const float2 (&rows)[T][PARTS], unsigned count, bool is_key,
                                          unsigned lane) {
    constexpr int HD = 64 * PARTS;
    unsigned codes[T][PARTS], largest[T];
    __nv_bfloat16 scales[T];
#pragma unroll
    for (int i = 0; i < T; i++) {
        largest[i] = fp8_magnitude(rows[i][0]);
#pragma unroll
        for (int j = 1; j < PARTS; j++)
            largest[i] = max(largest[i], fp8_magnitude(rows[i][j]));
        largest[i] = __reduce_max_sync(0xffffffffu, largest[i]);
    }
    fp8_round(codes, scales, rows, largest, [](unsigned parts) { return __reduce_add_sync(0xffffffffu, parts); });
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
            place.scale<HD>() = scales[i];
    }
}
