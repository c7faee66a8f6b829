// Decode attention over keys and values in fp8, for Hopper: attention.cu's kernels, whose tiles are widened in registers.
//
// A stage holds as many tokens in half the bytes, so there are nearly twice as many: as much is on its way. With twice as many two
// blocks would not fit a multiprocessor.
#define DECODE_WARPS 4
#define DECODE_BLOCKS 4
#define DECODE_STAGES(DIMS) (5 * 128 / (DIMS))
#include "attention_kernels.cuh"

ATTENTION_DECODE(attention_decode_fp8_64, 64, 1, false, true)
ATTENTION_DECODE(attention_decode_fp8_64x2, 64, 2, false, true)
ATTENTION_DECODE(attention_decode_fp8_128, 128, 1, false, true)
ATTENTION_DECODE(attention_decode_fp8_window_64, 64, 1, true, true)
ATTENTION_DECODE(attention_decode_fp8_window_64x2, 64, 2, true, true)
ATTENTION_DECODE(attention_decode_fp8_window_128, 128, 1, true, true)
