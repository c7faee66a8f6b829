// fp8_qkv_fp8_*: gemm_few_qkv_fp8.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_few.cuh.
#include "hopper/gemm/gemm_few.cuh"

FEW_FP8(fp8_qkv_fp8_128x16, 2, 16, 2, QkvFp8)
FEW_FP8(fp8_qkv_fp8_128x32, 2, 32, 2, QkvFp8)
FEW_FP8(fp8_qkv_fp8_128x64, 2, 64, 1, QkvFp8)
FEW_FP8(fp8_qkv_fp8_128x128, 2, 128, 1, QkvFp8)
FEW_FP8(fp8_qkv_fp8_128x192, 2, 192, 1, QkvFp8)
FEW_FP8(fp8_qkv_fp8_normed_128x16, 2, 16, 2, QkvNormedFp8)
FEW_FP8(fp8_qkv_fp8_normed_128x32, 2, 32, 2, QkvNormedFp8)
FEW_FP8(fp8_qkv_fp8_normed_128x64, 2, 64, 1, QkvNormedFp8)
FEW_FP8(fp8_qkv_fp8_normed_128x128, 2, 128, 1, QkvNormedFp8)
FEW_FP8(fp8_qkv_fp8_normed_128x192, 2, 192, 1, QkvNormedFp8)
