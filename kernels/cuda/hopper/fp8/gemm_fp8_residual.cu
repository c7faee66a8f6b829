// fp8_residual_*: gemm_few_residual.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_few.cuh.
#include "hopper/gemm/gemm_few.cuh"

FEW_FP8(fp8_residual_128x16, 2, 16, 2, Residual)
FEW_FP8(fp8_residual_128x32, 2, 32, 2, Residual)
FEW_FP8(fp8_residual_128x64, 2, 64, 2, Residual)
FEW_FP8(fp8_residual_64x128, 1, 128, 2, Residual)
FEW_FP8(fp8_residual_128x192, 2, 192, 1, Residual)
