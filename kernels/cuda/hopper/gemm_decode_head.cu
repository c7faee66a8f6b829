// decode_head_*: logits; see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE(decode_head_64x16, 1, 1, 16, Head)
DECODE(decode_head_64x64, 1, 1, 64, Head)
DECODE(decode_head_64x128, 1, 1, 128, Head)
DECODE(decode_head_128x128, 2, 1, 128, Head)
