// decode_qkv_*: queries, keys and values of few tokens; see gemm_decode.cuh.
//
// A head's 128 rows meet in one cluster: two tiles of 64, or one of 128.
#include "gemm_decode.cuh"

DECODE(decode_qkv_64x16, 1, 2, 16, Qkv)
DECODE(decode_qkv_64x64, 1, 2, 64, Qkv)
DECODE(decode_qkv_64x128, 1, 2, 128, Qkv)
DECODE(decode_qkv_128x128, 2, 1, 128, Qkv)
