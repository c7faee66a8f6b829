// decode_sums_*: a rank's sums of few tokens; see gemm_decode.cuh. The tiles are those of gemm_decode_residual.cu.
#include "gemm_decode.cuh"

DECODE(decode_sums_64x16, 1, 1, 16, RankSums)
DECODE(decode_sums_64x32, 1, 1, 32, RankSums)
DECODE(decode_sums_64x64, 1, 1, 64, RankSums)
DECODE(decode_sums_64x128, 1, 1, 128, RankSums)
DECODE(decode_sums_128x88, 2, 1, 88, RankSums)
DECODE_ALONE(decode_sums_128x128, 2, 128, 1, RankSums)
DECODE_ALONE(decode_sums_192x128, 3, 128, 1, RankSums)
DECODE_OF(decode_sums_64x64_2, 1, 1, 64, 2, 2, TensorMap, RankSums)
DECODE_ALONE(decode_sums_128x96_2, 2, 96, 2, RankSums)
DECODE_ALONE(decode_sums_128x128_2, 2, 128, 2, RankSums)
DECODE_PAIRED(decode_sums_192x72_paired, 3, 72, 1, RankSums)
DECODE_PAIRED(decode_sums_192x96_paired, 3, 96, 1, RankSums)
DECODE_PAIRED(decode_sums_192x128_paired, 3, 128, 1, RankSums)
