// Attention for Hopper: decode keeps two thirds of a multiprocessor's rings in flight, by bulk copies, and takes two heads of 64
// dims as one of 128, where their queries are eight at most; prefill multiplies by wgmma.
//
// attention_decode.cuh and attention_prefill.cuh say what is computed and how.
#define DECODE_WARPS 8
#define DECODE_BLOCKS 2
#define DECODE_STAGES(DIMS) (3 * 128 / (DIMS))
#include "attention/attention_kernels.cuh"
#include "hopper/attention/attention_prefill.cuh"

#define ATTENTION_PREFILL(HD)                                                                                           \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1)                                                    \
    attention_prefill_##HD(const __grid_constant__ PrefillParams params, const __grid_constant__ TensorMap q,           \
                           const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v) {                  \
        const PrefillArgs args = {params, &q, &k, &v, {}};                                                              \
        prefill<HD, false>(args, shared_memory);                                                                        \
    }

ATTENTION_DECODE(attention_decode_64, 64, 1, false, false)
ATTENTION_DECODE(attention_decode_64x2, 64, 2, false, false)
ATTENTION_DECODE(attention_decode_128, 128, 1, false, false)
ATTENTION_DECODE(attention_decode_window_64, 64, 1, true, false)
ATTENTION_DECODE(attention_decode_window_64x2, 64, 2, true, false)
ATTENTION_DECODE(attention_decode_window_128, 128, 1, true, false)
ATTENTION_PREFILL(64)
ATTENTION_PREFILL(128)
