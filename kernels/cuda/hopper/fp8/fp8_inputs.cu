// fp8_inputs: rows of activations become e4m3 codes with scales, as core/src/model/fp8.rs defines it (rounded.cuh).
//
//   x [tokens, cols] bf16, times the row's norm and the norm's scales  ──>  codes [tokens, cols], scales [blocks, pitch] f32
//   block    a token's 2048 columns, a warp's 256 of these, or all of a token: where it has one scale, or where tokens are many
//   grid     (tokens, parts)   block 256
//
//   by groups   scale = the largest magnitude of 128 or 256 columns / 448, for each of their blocks
//   by tokens   the whole row's, for each of its blocks
//   fixed       one that the checkpoint gives: what lies beyond its 448 is cut
//
// 1. Codes are the nearest to x / scale, a division: by the reciprocal and what that leaves over, which is one, rounded to the nearest
//    (Markstein, 1990), where scales are no extreme numbers. A block of zeros has scale zero and codes of zero; one with what is no number, or
//    infinite, has a scale that is none.
// 2. The norm's sum has one order, whatever the grid is.
// 3. What a warp rounds is on its way while the norm is summed, and what it rounds next while it rounds; scales of the norm are weights.
#include <cuda_bf16.h>

#include "dependent.cuh"
#include "epilogue.cuh"

// What is rounded, and to where: a kernel's parameter.
struct Fp8Inputs {
    const __nv_bfloat16 *x;    // [tokens, cols]
    const __nv_bfloat16 *norm; // [cols], or null
    RowNorm row_norm;          // of no sums where rows are as they are
    unsigned char *codes;      // [tokens, cols]
    float *scales;             // [ceil(cols / 128), pitch]
    const float *fixed;        // the scale of all, or null
    unsigned cols, pitch;
    unsigned group, reserved; // columns that share a scale, 128 or WIDE_COLS; 0: all of a row
};

constexpr unsigned WIDE_COLS = 256; // that a warp has at once

__device__ __forceinline__ float2 pair_of(unsigned word) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&word)); }

// Divides by a scale.
struct Divider {
    float scale, inverse;
    bool is_plain; // quotients are 448 at most, but for a rounding, and none of it is an extreme number

    __device__ __forceinline__ Divider(float by, bool is_fixed)
        : scale(by == 0.0f ? 1.0f : by), inverse(__frcp_rn(scale)), is_plain(scale > 0x1p-90f && scale < 0x1p90f && !is_fixed) {}

    __device__ __forceinline__ float quotient(float x) const {
        const float near = __fmul_rn(x, inverse);
        return fmaf(fmaf(-near, scale, x), inverse, near);
    }
    __device__ __forceinline__ unsigned codes(float x, float y) const {
        return is_plain ? fp8_codes(quotient(x), quotient(y)) : fp8_codes(__fdiv_rn(x, scale), __fdiv_rn(y, scale));
    }
};

// Eight columns of a lane.
struct Eight {
    float x[8];

    // The bits of the largest magnitude: of what is no number, or infinite, they are larger than any number's.
    __device__ __forceinline__ unsigned largest() const {
        unsigned largest = 0;
#pragma unroll
        for (int i = 0; i < 8; i++)
            largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
        return largest;
    }
    __device__ __forceinline__ uint2 codes(const Divider &by) const {
        return {by.codes(x[0], x[1]) | by.codes(x[2], x[3]) << 16, by.codes(x[4], x[5]) | by.codes(x[6], x[7]) << 16};
    }
};

// Columns c to c + 7 of a row of bf16, as they lie; zeros behind the last.
__device__ __forceinline__ uint4 eight_of(const __nv_bfloat16 *row, unsigned c, unsigned cols) {
    return c < cols ? *reinterpret_cast<const uint4 *>(row + c) : uint4{0, 0, 0, 0};
}

// The same times the row's norm and its scales.
__device__ __forceinline__ Eight normed(uint4 x, float by, const __nv_bfloat16 *norm, uint4 scales) {
    const unsigned words[4] = {x.x, x.y, x.z, x.w}, of[4] = {scales.x, scales.y, scales.z, scales.w};
    Eight eight;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = pair_of(words[i]);
        eight.x[2 * i] = __fmul_rn(pair.x, by), eight.x[2 * i + 1] = __fmul_rn(pair.y, by);
    }
    if (norm != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = pair_of(of[i]);
            eight.x[2 * i] = __fmul_rn(eight.x[2 * i], pair.x), eight.x[2 * i + 1] = __fmul_rn(eight.x[2 * i + 1], pair.y);
        }
    }
    return eight;
}

// A token's norm, by a warp.
__device__ __forceinline__ float row_norm(const RowNorm &norm, unsigned token) {
    float sum[1] = {0.0f};
    for (unsigned i = threadIdx.x % 32; i < norm.segments; i += 32)
        sum[0] += norm.sumsq[(size_t)token * norm.segments + i];
    warp_sums(sum);
    return rsqrtf(sum[0] / (float)norm.hidden + norm.eps);
}

__device__ __forceinline__ float scale_of(unsigned largest) {
    return largest < 0x7f800000u ? __fdiv_rn(__uint_as_float(largest), 448.0f) : __uint_as_float(0x7fffffffu);
}

// The largest of 16 lanes'.
__device__ __forceinline__ unsigned group_largest(unsigned largest) {
#pragma unroll
    for (int lane = 8; lane > 0; lane /= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lane));
    return largest;
}

extern "C" __global__ void __launch_bounds__(256) fp8_inputs(const Fp8Inputs in) {
    __shared__ unsigned of_warps[8];
    dependent_launch();
    const unsigned token = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, step = gridDim.y * 8 * WIDE_COLS;
    const __nv_bfloat16 *const row = in.x + (size_t)token * in.cols;
    const auto norm_at = [&](unsigned c) { return in.norm != nullptr ? eight_of(in.norm, c, in.cols) : uint4{0, 0, 0, 0}; };
    unsigned c = (blockIdx.y * 8 + warp) * WIDE_COLS + 8 * lane;
    uint4 scales = norm_at(c);
    dependent_wait();
    uint4 x = eight_of(row, c, in.cols); // on its way while the norm is summed
    const float by = in.row_norm.sumsq != nullptr ? row_norm(in.row_norm, token) : 1.0f;
    float scale = in.fixed != nullptr ? *in.fixed : 0.0f;
    if (in.group == 0 && in.fixed == nullptr) {
        unsigned largest = 0;
        for (unsigned at = 8 * threadIdx.x; at < in.cols; at += 8 * 256)
            largest = max(largest, normed(eight_of(row, at, in.cols), by, in.norm, norm_at(at)).largest());
        largest = __reduce_max_sync(0xffffffffu, largest);
        if (lane == 0)
            of_warps[warp] = largest;
        __syncthreads();
        scale = scale_of(__reduce_max_sync(0xffffffffu, of_warps[lane % 8]));
    }
    for (unsigned next; c - 8 * lane < in.cols; c = next) {
        const Eight eight = normed(x, by, in.norm, scales);
        next = c + step;
        x = eight_of(row, next, in.cols), scales = norm_at(next);
        if (in.group != 0)
            scale = scale_of(in.group == WIDE_COLS ? __reduce_max_sync(0xffffffffu, eight.largest()) : group_largest(eight.largest()));
        if (c >= in.cols)
            continue;
        *reinterpret_cast<uint2 *>(in.codes + (size_t)token * in.cols + c) = eight.codes({scale, in.fixed != nullptr});
        if (lane % 16 == 0)
            in.scales[(size_t)(c / 128) * in.pitch + token] = scale;
    }
}
