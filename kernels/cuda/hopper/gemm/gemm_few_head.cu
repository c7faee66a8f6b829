// few_head_*: logits of few tokens; see gemm_few.cuh.
#include "hopper/gemm/gemm_few.cuh"

FEW(few_head_64x16, 1, 1, 16, Head)
FEW(few_head_64x32, 1, 1, 32, Head)
FEW(few_head_64x64, 1, 1, 64, Head)
