// Attention for Hopper: decode keeps 192 KiB of keys and values in flight a multiprocessor, by bulk copies.
//
// attention_decode.cuh and attention_prefill.cuh say what is computed and how.
#define DECODE_BLOCKS 2
#define DECODE_STAGES(HD) (3 * 128 / (HD))
#define PREFILL_BUFFERS 2
#include "attention_kernels.cuh"

ATTENTION_KERNELS(64)
ATTENTION_KERNELS(128)
