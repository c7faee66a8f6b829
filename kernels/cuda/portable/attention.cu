// Attention for any GPU from Ampere on: shared memory of at most 99 KiB a block, tiles copied by cp.async.
//
// attention_decode.cuh and attention_prefill.cuh say what is computed and how.
#define DECODE_WARPS 8
#define DECODE_BLOCKS 1
#define DECODE_STAGES(DIMS) 2
#include "attention/attention_kernels.cuh"
#include "portable/attention_prefill.cuh"

#define ATTENTION_PREFILL(HD)                                                                                           \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1)                                                    \
    attention_prefill_##HD(const PrefillParams params) {                                                                \
        prefill<HD>(params, shared_memory);                                                                             \
    }

ATTENTION_DECODE(attention_decode_64, 64, 1, false, false)
ATTENTION_DECODE(attention_decode_128, 128, 1, false, false)
ATTENTION_DECODE(attention_decode_window_64, 64, 1, true, false)
ATTENTION_DECODE(attention_decode_window_128, 128, 1, true, false)
ATTENTION_PREFILL(64)
ATTENTION_PREFILL(128)
