// fp8_residual_*: gemm_decode_residual.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE_FP8(fp8_residual_64x16, 1, 16, Residual)
DECODE_FP8(fp8_residual_64x32, 1, 32, Residual)
DECODE_FP8(fp8_residual_64x64, 1, 64, Residual)
DECODE_FP8(fp8_residual_64x128, 1, 128, Residual)
