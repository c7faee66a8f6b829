// uniform, fold_norm: what happens to weights once, while they are loaded.
//
//   uniform     out[dest(r), c] = core's uniform_element(seed, r * pitch + c)    grid rows    block 256
//   fold_norm   matrix[r, c] = bf16(matrix[r, c] * norm[c])                      grid rows    block 256
//
//   out, matrix [rows, cols] bf16   norm [cols] bf16
//
// 1. Row r of `uniform` goes to row r / group * stride + r % group of `out`: gate and up rows alternate in blocks of 8
//    (group 8, stride 16); a matrix that stays as it is has group = stride. The pitch is the columns of the tensor, of which a
//    rank's part may have fewer.
// 2. A product, then a sum, each rounded: never contracted, so that the values are the CPU's bit for bit.
#include <cuda_bf16.h>

__device__ __forceinline__ unsigned long long splitmix64(unsigned long long x) {
    unsigned long long z = x + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

extern "C" __global__ void __launch_bounds__(256)
uniform(__nv_bfloat16 *out, unsigned cols, unsigned group, unsigned stride, unsigned pitch, unsigned long long seed, float low,
        float width) {
    const unsigned r = blockIdx.x;
    const unsigned long long first = (unsigned long long)r * pitch;
    __nv_bfloat16 *row = out + (size_t)(r / group * stride + r % group) * cols;
    for (unsigned c = threadIdx.x; c < cols; c += 256) {
        const float fraction = (float)(unsigned)(splitmix64(seed + first + c) >> 40) * (1.0f / 16777216.0f);
        row[c] = __float2bfloat16_rn(__fadd_rn(low, __fmul_rn(width, fraction)));
    }
}

extern "C" __global__ void __launch_bounds__(256)
fold_norm(__nv_bfloat16 *matrix, unsigned cols, const __nv_bfloat16 *norm) {
    __nv_bfloat16 *row = matrix + (size_t)blockIdx.x * cols;
    for (unsigned c = threadIdx.x; c < cols; c += 256)
        row[c] = __float2bfloat16_rn(__bfloat162float(row[c]) * __bfloat162float(norm[c]));
}
