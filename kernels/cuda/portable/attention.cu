// Attention for any GPU from Ampere on: shared memory of at most 99 KiB a block, tiles copied by cp.async.
//
// attention_decode.cuh and attention_prefill.cuh say what is computed and how.
#define DECODE_BLOCKS 1
#define DECODE_STAGES(HD) 2
#define PREFILL_BUFFERS 1
#include "attention_kernels.cuh"

ATTENTION_KERNELS(64)
ATTENTION_KERNELS(128)
