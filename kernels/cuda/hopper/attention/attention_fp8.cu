// Attention over keys and values in fp8, for Hopper: attention.cu's kernels, whose operands are codes as f16 numbers. Decode makes
// them of a tile's codes in registers, prefill finds them in wide pages.
//
// A leaf has half the bytes, so a multiprocessor must compute it in half the time. Its chain (scores, maxima, probabilities, output)
// waits at every step: so blocks are half as large and twice as many, and leaves of four are at work at once. As much is on its way.
#define DECODE_WARPS 4
#define DECODE_BLOCKS 4
#define DECODE_STAGES(DIMS) (5 * 128 / (DIMS))
#include "attention/attention_kernels.cuh"
#include "hopper/attention/attention_prefill.cuh"

#define ATTENTION_PREFILL_FP8(HD)                                                                                       \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 1)                                                    \
    attention_prefill_fp8_##HD(const __grid_constant__ PrefillParams params, const __grid_constant__ TensorMap q,       \
                               const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,                \
                               const KeptPages kept) {                                                                  \
        const PrefillArgs args = {params, &q, &k, &v, kept};                                                            \
        prefill<HD, true>(args, shared_memory);                                                                         \
    }

ATTENTION_DECODE(attention_decode_fp8_64, 64, 1, false, true)
ATTENTION_DECODE(attention_decode_fp8_64x2, 64, 2, false, true)
ATTENTION_DECODE(attention_decode_fp8_128, 128, 1, false, true)
ATTENTION_DECODE(attention_decode_fp8_window_64, 64, 1, true, true)
ATTENTION_DECODE(attention_decode_fp8_window_64x2, 64, 2, true, true)
ATTENTION_DECODE(attention_decode_fp8_window_128, 128, 1, true, true)
ATTENTION_PREFILL_FP8(64)
ATTENTION_PREFILL_FP8(128)
