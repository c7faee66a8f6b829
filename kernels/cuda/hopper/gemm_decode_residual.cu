// decode_residual_*: few tokens added to the residual stream; see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE(decode_residual_64x16, 1, 1, 16, Residual)
DECODE(decode_residual_64x32, 1, 1, 32, Residual)
DECODE(decode_residual_64x64, 1, 1, 64, Residual)
DECODE(decode_residual_64x128, 1, 1, 128, Residual)
DECODE_ALONE(decode_residual_128x88, 2, 88, 1, Residual)
DECODE_ALONE(decode_residual_128x128, 2, 128, 1, Residual)
DECODE_ALONE(decode_residual_192x128, 3, 128, 1, Residual)
DECODE_OF(decode_residual_64x64_2, 1, 1, 64, 2, 2, TensorMap, Residual)
DECODE_ALONE(decode_residual_128x64_2, 2, 64, 2, Residual)
DECODE_PAIRED(decode_residual_128x64_2_paired, 2, 64, 2, Residual)
DECODE_ALONE(decode_residual_128x96_2, 2, 96, 2, Residual)
DECODE_ALONE(decode_residual_128x128_2, 2, 128, 2, Residual)
DECODE_ALONE(decode_residual_192x144, 3, 144, 1, Residual)
DECODE_ALONE(decode_residual_192x192, 3, 192, 1, Residual)
DECODE_PAIRED(decode_residual_192x96_paired, 3, 96, 1, Residual)
DECODE_ROWS_PAIRED(decode_residual_192x64_rows, 3, 64, 1, Residual)
