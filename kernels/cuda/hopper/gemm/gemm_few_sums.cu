// few_sums_*: a rank's sums of few tokens; see gemm_few.cuh. Of gemm_few_residual.cu's tiles those that are the quickest of some, and its own.
#include "hopper/gemm/gemm_few.cuh"

FEW(few_sums_64x16, 1, 1, 16, RankSums)
FEW(few_sums_64x32, 1, 1, 32, RankSums)
FEW(few_sums_64x64, 1, 1, 64, RankSums)
FEW(few_sums_64x128, 1, 1, 128, RankSums)
FEW(few_sums_128x88, 2, 1, 88, RankSums)
FEW_ALONE(few_sums_128x128, 2, 128, 1, RankSums)
FEW_ALONE(few_sums_192x128, 3, 128, 1, RankSums)
FEW_OF(few_sums_64x64_2, 1, 1, 64, 2, 2, TensorMap, RankSums)
FEW_ALONE(few_sums_128x96_2, 2, 96, 2, RankSums)
FEW_ALONE(few_sums_128x128_2, 2, 128, 2, RankSums)
FEW_PAIRED(few_sums_192x72_paired, 3, 72, 1, RankSums)
FEW_PAIRED(few_sums_192x96_paired, 3, 96, 1, RankSums)
FEW_PAIRED(few_sums_192x128_paired, 3, 128, 1, RankSums)
FEW_ROWS_PAIRED(few_sums_128x64_rows, 2, 64, 1, RankSums)
FEW_ROWS_PAIRED(few_sums_128x96_rows, 2, 96, 1, RankSums)
