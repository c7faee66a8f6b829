// fp8_sums_*: gemm_few_sums.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_few.cuh.
#include "hopper/gemm/gemm_few.cuh"

FEW_FP8(fp8_sums_128x16, 2, 16, 2, RankSums)
FEW_FP8(fp8_sums_128x32, 2, 32, 2, RankSums)
FEW_FP8(fp8_sums_128x64, 2, 64, 2, RankSums)
FEW_FP8(fp8_sums_64x128, 1, 128, 2, RankSums)
FEW_FP8(fp8_sums_128x192, 2, 192, 1, RankSums)
