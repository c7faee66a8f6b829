// few_residual_*: few tokens added to the residual stream; see gemm_few.cuh.
#include "hopper/gemm/gemm_few.cuh"

FEW(few_residual_64x16, 1, 1, 16, Residual)
FEW(few_residual_64x32, 1, 1, 32, Residual)
FEW(few_residual_64x64, 1, 1, 64, Residual)
FEW(few_residual_64x128, 1, 1, 128, Residual)
FEW_ALONE(few_residual_128x88, 2, 88, 1, Residual)
FEW_ALONE(few_residual_128x128, 2, 128, 1, Residual)
FEW_ALONE(few_residual_192x128, 3, 128, 1, Residual)
FEW_OF(few_residual_64x64_2, 1, 1, 64, 2, 2, TensorMap, Residual)
FEW_ALONE(few_residual_128x64_2, 2, 64, 2, Residual)
FEW_PAIRED(few_residual_128x64_2_paired, 2, 64, 2, Residual)
FEW_ALONE(few_residual_128x96_2, 2, 96, 2, Residual)
FEW_ALONE(few_residual_128x128_2, 2, 128, 2, Residual)
FEW_ALONE(few_residual_192x144, 3, 144, 1, Residual)
FEW_ALONE(few_residual_192x192, 3, 192, 1, Residual)
FEW_PAIRED(few_residual_192x96_paired, 3, 96, 1, Residual)
FEW_ROWS_PAIRED(few_residual_192x64_rows, 3, 64, 1, Residual)
