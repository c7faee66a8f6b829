// prefill_*, split_*, joint_*: products of many tokens with matrices in bf16; see gemm_prefill.cuh.
#include "gemm_prefill.cuh"

#define PREFILL(NAME, GROUPS, M, ALONG_ROWS, ALONG_TOKENS, EPILOGUE)                                                         \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)                                                      \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, EPILOGUE epilogue) {                                                                                   \
        prefill<Plan<GROUPS, M, ALONG_ROWS, ALONG_TOKENS, 1, EPILOGUE>>(&w, &x, &out, shape, epilogue, {}, Words());                  \
    }

// Of kernels that leave sums in memory; SLICES: Plan's SPLIT.
#define PREFILL_ASIDE(NAME, GROUPS, M, ALONG_ROWS, ALONG_TOKENS, SLICES, EPILOGUE)                                           \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)                                                      \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, EPILOGUE epilogue, Partials partials) {                                                                \
        prefill<Plan<GROUPS, M, ALONG_ROWS, ALONG_TOKENS, SLICES, EPILOGUE>>(&w, &x, &out, shape, epilogue, partials, Words());       \
    }
#define SPLIT(NAME, GROUPS, M, ALONG_ROWS, ALONG_TOKENS, EPILOGUE)                                                           \
    PREFILL_ASIDE(NAME, GROUPS, M, ALONG_ROWS, ALONG_TOKENS, EPILOGUE::SLICES, EPILOGUE)
// Of clusters whose halves have half of the columns each.
#define JOINT(NAME, GROUPS, EPILOGUE)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)                                                      \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, EPILOGUE epilogue) {                                                                                   \
        prefill<Plan<GROUPS, 128, 1, 1, 1, EPILOGUE, Words, 2>>(&w, &x, &out, shape, epilogue, {}, Words());                 \
    }

PREFILL(prefill_qkv_narrow, 2, 128, 2, 1, Qkv)
PREFILL(prefill_qkv_middle, 3, 128, 2, 1, Qkv)
PREFILL(prefill_qkv_square, 2, 128, 2, 2, Qkv)
PREFILL(prefill_residual_narrow, 2, 128, 2, 1, Residual)
PREFILL_ASIDE(prefill_residual_middle, 3, 128, 2, 1, 1, Residual)
PREFILL(prefill_residual_square, 2, 128, 2, 2, Residual)
SPLIT(split_residual_narrow, 2, 128, 2, 1, Residual)
SPLIT(split_residual_middle, 3, 128, 2, 1, Residual)
SPLIT(split_residual_wide, 2, 256, 1, 2, Residual)
JOINT(joint_residual_short, 1, Residual)
JOINT(joint_residual_narrow, 2, Residual)
JOINT(joint_residual_middle, 3, Residual)
PREFILL(prefill_sums_narrow, 2, 128, 2, 1, RankSums)
PREFILL(prefill_sums_middle, 3, 128, 2, 1, RankSums)
PREFILL(prefill_sums_square, 2, 128, 2, 2, RankSums)
SPLIT(split_sums_narrow, 2, 128, 2, 1, RankSums)
SPLIT(split_sums_middle, 3, 128, 2, 1, RankSums)
SPLIT(split_sums_wide, 2, 256, 1, 2, RankSums)
JOINT(joint_sums_short, 1, RankSums)
JOINT(joint_sums_narrow, 2, RankSums)
JOINT(joint_sums_middle, 3, RankSums)
PREFILL(prefill_gate_up_narrow, 2, 128, 2, 1, GateUp)
PREFILL(prefill_gate_up_middle, 3, 128, 2, 1, GateUp)
PREFILL(prefill_gate_up_square, 2, 128, 2, 2, GateUp)
PREFILL(prefill_gate_up_wide, 2, 256, 1, 2, GateUp)
PREFILL(prefill_gate_up_288x128, 2, 288, 2, 1, GateUp)
PREFILL(prefill_gate_up_224x128, 2, 224, 2, 1, GateUp)
PREFILL(prefill_gate_up_192x128, 2, 192, 2, 1, GateUp)
PREFILL(prefill_gate_up_144x128, 2, 144, 2, 1, GateUp)
PREFILL(prefill_gate_up_144x192, 3, 144, 2, 1, GateUp)
PREFILL(prefill_gate_up_192x192, 3, 192, 2, 1, GateUp)
PREFILL(prefill_head_narrow, 2, 128, 2, 1, Head)
PREFILL(prefill_head_middle, 3, 128, 2, 1, Head)
PREFILL(prefill_head_square, 2, 128, 2, 2, Head)
PREFILL(prefill_head_wide, 2, 256, 1, 2, Head)
PREFILL(prefill_linear_narrow, 2, 128, 2, 1, Linear)
