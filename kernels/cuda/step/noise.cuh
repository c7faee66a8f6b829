// Gumbel noise of a row's tokens, and a bound of it (sampling.cu).
#pragma once

#define LN2 0.6931471805599453f

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Philox4x32, 7 rounds.
__device__ __forceinline__ uint4 philox(uint4 c, unsigned k0, unsigned k1) {
#pragma unroll
    for (int round = 0; round < 7; round++) {
        const unsigned high0 = __umulhi(c.x, 0xD2511F53u), low0 = c.x * 0xD2511F53u;
        const unsigned high1 = __umulhi(c.z, 0xCD9E8D57u), low1 = c.z * 0xCD9E8D57u;
        c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// 1 - u of the fraction u that a random word stands for, (word / 512 + 1/2) / 2^23: exact.
__device__ __forceinline__ float complement(unsigned word) {
    return 2.0f - __uint_as_float(0x3f800000u | word >> 9) - 0x1p-24f;
}

// -ln(-ln(u)), of w = 1 - u.
__device__ __forceinline__ float gumbel(float w) {
    const float u = 1.0f - w;
    const float series = w * fmaf(w, fmaf(w, fmaf(w, fmaf(w, 0.2f, 0.25f), 1.0f / 3.0f), 0.5f), 1.0f);
    const float e = w < 0.0625f ? series : -LN2 * log2_fast(u);
    return -LN2 * log2_fast(e);
}

// At least that, also with what the logarithms are off: -ln(w) is, and its bits say that but for 0.06.
__device__ __forceinline__ float gumbel_bound(float w) {
    const float bits = __uint_as_float(0x4b000000u | __float_as_uint(w) >> 8); // 2^23 and the bits / 256
    return fmaf(bits, -LN2 / 32768.0f, LN2 * (256.0f + 127.0f) + 0.002f);
}
