// fp8_qkv_fp8_*: gemm_decode_qkv_fp8.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE_FP8(fp8_qkv_fp8_64x16, 2, 16, QkvFp8)
DECODE_FP8(fp8_qkv_fp8_64x32, 2, 32, QkvFp8)
DECODE_FP8(fp8_qkv_fp8_64x64, 2, 64, QkvFp8)
DECODE_FP8(fp8_qkv_fp8_64x128, 2, 128, QkvFp8)
DECODE_FP8(fp8_qkv_fp8_normed_64x16, 2, 16, QkvNormedFp8)
DECODE_FP8(fp8_qkv_fp8_normed_64x32, 2, 32, QkvNormedFp8)
DECODE_FP8(fp8_qkv_fp8_normed_64x64, 2, 64, QkvNormedFp8)
DECODE_FP8(fp8_qkv_fp8_normed_64x128, 2, 128, QkvNormedFp8)
