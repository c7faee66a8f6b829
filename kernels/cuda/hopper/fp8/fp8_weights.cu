// fp8_weights_widen, fp8_weights_scale: what products of many rows need of a matrix in fp8, and all of them of their inputs.
//
//   widen    w [rows, cols] bf16 = what the tiles mean (fp8_ring.cuh)      grid (tiles across, tiles down)     block 256
//   scale    out[t, c] = bf16(x[t, c] * norm[c])                           grid tokens                         block 128
//
// 1. A norm's scale can't be folded into codes as it is into bf16 columns: tokens are multiplied with it instead.
#include <cuda_bf16.h>

#include "dependent.cuh"
#include "hopper/fp8/fp8_ring.cuh"
#include "hopper/transpose.cuh"

extern "C" __global__ void __launch_bounds__(256)
fp8_weights_widen(const __grid_constant__ Fp8Matrix w, unsigned rows, unsigned cols, __nv_bfloat16 *out) {
    dependent_launch();
    const unsigned row = threadIdx.x / 4, c = threadIdx.x % 4, lane = threadIdx.x % 32, block = blockIdx.x;
    const char *tile = w.tiles + ((size_t)blockIdx.y * w.across + block) * Fp8Matrix::TILE_BYTES;
    const uint4 four = *reinterpret_cast<const uint4 *>(tile + row * 64 + c * 16);
    const unsigned lifted = reinterpret_cast<const unsigned short *>(tile + 4096)[row] * 0x10001u;
    unsigned words[4] = {four.x, four.y, four.z, four.w}, low[4], high[4];
    transpose(words, lane);
#pragma unroll
    for (int i = 0; i < 4; i++)
        fp8_widen(low[i], high[i], words[i], lifted);
    dependent_wait(); // the kernel before may read what was here
    const unsigned m = blockIdx.y * 64 + row, col = block * 64 + c * 16;
    uint4 *to = reinterpret_cast<uint4 *>(out + (size_t)m * cols + col);
    if (m < rows && col < cols)
        to[0] = make_uint4(low[0], low[1], low[2], low[3]);
    if (m < rows && col + 8 < cols)
        to[1] = make_uint4(high[0], high[1], high[2], high[3]);
}

extern "C" __global__ void __launch_bounds__(128)
fp8_weights_scale(const __nv_bfloat162 *x, const __nv_bfloat162 *norm, unsigned cols, __nv_bfloat162 *out) {
    dependent_launch();
    dependent_wait();
    const size_t row = (size_t)blockIdx.x * (cols / 2);
    for (unsigned c = threadIdx.x; c < cols / 2; c += 128) {
        const float2 a = __bfloat1622float2(x[row + c]), b = __bfloat1622float2(norm[c]);
        out[row + c] = __floats2bfloat162_rn(__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y));
    }
}
