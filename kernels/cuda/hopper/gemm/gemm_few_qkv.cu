// few_qkv_*, pair_qkv_*, trio_qkv_*: queries, keys and values of few tokens; see gemm_few.cuh and gemm_pair.cuh.
//
// A head's 128 rows meet in one cluster: two tiles of 64.
#include "hopper/gemm/gemm_few.cuh"
#include "hopper/gemm/gemm_pair.cuh"

// KIND is Qkv, for any model, or QkvNormed.
#define KERNELS(SUFFIX, KIND)                                                                                                \
    FEW(few_qkv##SUFFIX##_64x16, 1, 2, 16, KIND)                                                                             \
    FEW(few_qkv##SUFFIX##_64x32, 1, 2, 32, KIND)                                                                             \
    FEW(few_qkv##SUFFIX##_64x48, 1, 2, 48, KIND)                                                                             \
    FEW(few_qkv##SUFFIX##_64x64, 1, 2, 64, KIND)                                                                             \
    FEW(few_qkv##SUFFIX##_64x128, 1, 2, 128, KIND)                                                                           \
    FEW_PAIRED(few_qkv##SUFFIX##_128x64_paired, 2, 64, 1, KIND)                                                              \
    FEW_PAIRED(few_qkv##SUFFIX##_128x96_paired, 2, 96, 1, KIND)                                                              \
    FEW_ROWS_PAIRED(few_qkv##SUFFIX##_128x64_rows, 2, 64, 1, KIND)                                                           \
    FEW_ROWS_PAIRED(few_qkv##SUFFIX##_128x128_rows, 2, 128, 1, KIND)                                                         \
    FEW_ROWS_PAIRED(few_qkv##SUFFIX##_128x192_rows, 2, 192, 1, KIND)                                                         \
    PAIR(pair_qkv##SUFFIX##_128x32, 2, 32, KIND)                                                                             \
    PAIR(pair_qkv##SUFFIX##_128x64, 2, 64, KIND)                                                                             \
    PAIR(pair_qkv##SUFFIX##_128x72, 2, 72, KIND)                                                                             \
    PAIR(pair_qkv##SUFFIX##_128x96, 2, 96, KIND)                                                                             \
    PAIR(pair_qkv##SUFFIX##_128x128, 2, 128, KIND)                                                                           \
    TRIO(trio_qkv##SUFFIX##_128x64, 2, 64, KIND)                                                                             \
    TRIO(trio_qkv##SUFFIX##_128x88, 2, 88, KIND)

KERNELS(, Qkv)
KERNELS(_normed, QkvNormed)
