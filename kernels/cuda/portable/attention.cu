// Attention for any GPU from Ampere on: shared memory of at most 99 KiB a block, tiles copied by cp.async.
//
// attention_decode.cuh and attention_prefill.cuh say what is computed and how.
#define DECODE_WARPS 8
#define DECODE_STAGES(HD) (3 * 128 / (HD))
#define PREFILL_BUFFERS 1
#include "attention_kernels.cuh"

ATTENTION_KERNELS(64)
ATTENTION_KERNELS(128)
