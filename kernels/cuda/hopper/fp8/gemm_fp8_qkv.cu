// fp8_qkv_*: gemm_few_qkv.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_few.cuh.
#include "hopper/gemm/gemm_few.cuh"

FEW_FP8(fp8_qkv_128x16, 2, 16, 2, Qkv)
FEW_FP8(fp8_qkv_128x32, 2, 32, 2, Qkv)
FEW_FP8(fp8_qkv_128x64, 2, 64, 1, Qkv)
FEW_FP8(fp8_qkv_128x128, 2, 128, 1, Qkv)
FEW_FP8(fp8_qkv_128x192, 2, 192, 1, Qkv)
FEW_FP8(fp8_qkv_normed_128x16, 2, 16, 2, QkvNormed)
FEW_FP8(fp8_qkv_normed_128x32, 2, 32, 2, QkvNormed)
FEW_FP8(fp8_qkv_normed_128x64, 2, 64, 1, QkvNormed)
FEW_FP8(fp8_qkv_normed_128x128, 2, 128, 1, QkvNormed)
FEW_FP8(fp8_qkv_normed_128x192, 2, 192, 1, QkvNormed)
