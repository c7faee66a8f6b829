// fp8_qkv_*: gemm_decode_qkv.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE_FP8(fp8_qkv_64x16, 2, 16, Qkv)
DECODE_FP8(fp8_qkv_64x32, 2, 32, Qkv)
DECODE_FP8(fp8_qkv_64x64, 2, 64, Qkv)
DECODE_FP8(fp8_qkv_64x128, 2, 128, Qkv)
DECODE_FP8(fp8_qkv_normed_64x16, 2, 16, QkvNormed)
DECODE_FP8(fp8_qkv_normed_64x32, 2, 32, QkvNormed)
DECODE_FP8(fp8_qkv_normed_64x64, 2, 64, QkvNormed)
DECODE_FP8(fp8_qkv_normed_64x128, 2, 128, QkvNormed)
