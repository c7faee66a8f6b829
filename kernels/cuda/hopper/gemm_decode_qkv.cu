// decode_qkv_*, pair_qkv_*: queries, keys and values of few tokens; see gemm_decode.cuh and gemm_pair.cuh.
//
// A head's 128 rows meet in one cluster: two tiles of 64.
#include "gemm_decode.cuh"
#include "gemm_pair.cuh"

DECODE(decode_qkv_64x16, 1, 2, 16, Qkv)
DECODE(decode_qkv_64x32, 1, 2, 32, Qkv)
DECODE(decode_qkv_64x64, 1, 2, 64, Qkv)
DECODE(decode_qkv_64x128, 1, 2, 128, Qkv)
PAIR(pair_qkv_128x32, 2, 32, Qkv)
PAIR(pair_qkv_128x64, 2, 64, Qkv)
