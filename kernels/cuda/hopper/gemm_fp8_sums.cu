// fp8_sums_*: gemm_decode_sums.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE_FP8(fp8_sums_64x16, 1, 16, RankSums)
DECODE_FP8(fp8_sums_64x32, 1, 32, RankSums)
DECODE_FP8(fp8_sums_64x64, 1, 64, RankSums)
DECODE_FP8(fp8_sums_64x128, 1, 128, RankSums)
