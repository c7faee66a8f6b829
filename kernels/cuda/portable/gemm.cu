// gemm_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y. For any GPU from Ampere on.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   tile    128 rows of w by BN tokens (16, or 64 where there are more), steps of 64 columns; see mma_tile.cuh
//   grid    (ceil(rows / 128), ceil(tokens / BN))   block 256   shared 3 stages of (128 + BN) * 128 bytes
//   moves   rows * cols * 2 bytes of w for each BN tokens
#include "mma_tile.cuh"

constexpr int STAGES = 3;

template <int BN, class Epilogue>
__device__ __forceinline__ void gemm(const __nv_bfloat16 *w, const __nv_bfloat16 *x, const Shape &shape,
                                     const Epilogue &epilogue) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float scales[BN];
    const unsigned m0 = blockIdx.x * BM, n0 = blockIdx.y * BN, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (Epilogue::SCALED && threadIdx.x < BN && n0 + threadIdx.x < shape.tokens)
        scales[threadIdx.x] = epilogue.scale(n0 + threadIdx.x);
    Tile<BN, Epilogue::SLICES <= 2 ? 2 : Epilogue::SLICES> tile;
    tile.clear();
    accumulate<BN, STAGES>(tile, shape, shared_address(shared), [&](unsigned stage, unsigned block) {
        fetch<BM>(stage, w, shape.rows, shape.cols, m0, block * BK);
        fetch<BN>(stage + BM * BK * 2, x, shape.tokens, shape.cols, n0, block * BK);
    });
    float *staged = reinterpret_cast<float *>(shared);
    tile.stage_totals(staged);
    __syncthreads();
    for (unsigned n = warp; n < BN && n0 + n < shape.tokens; n += WARPS) {
        const float scale = Epilogue::SCALED ? scales[n] : 1.0f;
        const typename Epilogue::template Ahead<2> ahead[1] = {
            epilogue.template ahead<2>(epilogue.where(n0 + n), n0 + n, m0, shape.rows, lane)};
        float2 v[1][2];
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float2 sum = *reinterpret_cast<const float2 *>(staged + n * STAGED + 64 * b + 2 * lane);
            v[0][b] = {__fmul_rn(sum.x, scale), __fmul_rn(sum.y, scale)};
        }
        epilogue.template store<1, 2>(ahead, v, Taken{n0 + n, 0, 1}, m0, shape.rows, lane);
    }
}

#define GEMM(NAME, BN, EPILOGUE)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                 \
    NAME(const __nv_bfloat16 *w, const __nv_bfloat16 *x, Shape shape, EPILOGUE epilogue) {                                   \
        gemm<BN>(w, x, shape, epilogue);                                                                                     \
    }

GEMM(gemm_qkv_16, 16, Qkv)
GEMM(gemm_qkv_64, 64, Qkv)
GEMM(gemm_residual_16, 16, Residual)
GEMM(gemm_residual_64, 64, Residual)
GEMM(gemm_sums_16, 16, RankSums)
GEMM(gemm_sums_64, 64, RankSums)
GEMM(gemm_gate_up_16, 16, GateUp)
GEMM(gemm_gate_up_64, 64, GateUp)
GEMM(gemm_head_16, 16, Head)
GEMM(gemm_head_64, 64, Head)
GEMM(gemm_linear_16, 16, Linear)
GEMM(gemm_linear_64, 64, Linear)
