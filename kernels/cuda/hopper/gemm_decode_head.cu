// decode_head_*: logits of few tokens; see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE(decode_head_64x16, 1, 1, 16, Head)
DECODE(decode_head_64x32, 1, 1, 32, Head)
DECODE(decode_head_64x64, 1, 1, 64, Head)
