// many_*, split_*, joint_*: products of many tokens with matrices in bf16; see gemm_many.cuh.
#include "hopper/gemm/gemm_many.cuh"

#define MANY(NAME, GROUPS, M, ALONG_ROWS, ALONG_TOKENS, EPILOGUE)                                                            \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)                                                      \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, EPILOGUE epilogue) {                                                                                   \
        multiply_many<Plan<GROUPS, M, ALONG_ROWS, ALONG_TOKENS, 1, EPILOGUE>>(&w, &x, &out, shape, epilogue, {}, Words());            \
    }

// Of kernels that leave sums in memory; SLICES: Plan's SPLIT.
#define MANY_ASIDE(NAME, GROUPS, M, ALONG_ROWS, ALONG_TOKENS, SLICES, EPILOGUE)                                              \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)                                                      \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, EPILOGUE epilogue, Partials partials) {                                                                \
        multiply_many<Plan<GROUPS, M, ALONG_ROWS, ALONG_TOKENS, SLICES, EPILOGUE>>(&w, &x, &out, shape, epilogue, partials, Words()); \
    }
#define SPLIT(NAME, GROUPS, M, ALONG_ROWS, ALONG_TOKENS, EPILOGUE)                                                           \
    MANY_ASIDE(NAME, GROUPS, M, ALONG_ROWS, ALONG_TOKENS, EPILOGUE::SLICES, EPILOGUE)
// Of clusters whose halves have half of the columns each.
#define JOINT(NAME, GROUPS, EPILOGUE)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)                                                      \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, EPILOGUE epilogue) {                                                                                   \
        multiply_many<Plan<GROUPS, 128, 1, 1, 1, EPILOGUE, Words, 2>>(&w, &x, &out, shape, epilogue, {}, Words());           \
    }

MANY(many_qkv_narrow, 2, 128, 2, 1, Qkv)
MANY(many_qkv_middle, 3, 128, 2, 1, Qkv)
MANY(many_qkv_square, 2, 128, 2, 2, Qkv)
MANY(many_qkv_wide, 2, 256, 1, 2, Qkv)
MANY(many_residual_narrow, 2, 128, 2, 1, Residual)
MANY_ASIDE(many_residual_middle, 3, 128, 2, 1, 1, Residual)
MANY(many_residual_square, 2, 128, 2, 2, Residual)
SPLIT(split_residual_narrow, 2, 128, 2, 1, Residual)
SPLIT(split_residual_middle, 3, 128, 2, 1, Residual)
SPLIT(split_residual_wide, 2, 256, 1, 2, Residual)
JOINT(joint_residual_short, 1, Residual)
JOINT(joint_residual_narrow, 2, Residual)
JOINT(joint_residual_middle, 3, Residual)
MANY(many_sums_narrow, 2, 128, 2, 1, RankSums)
MANY(many_sums_middle, 3, 128, 2, 1, RankSums)
MANY(many_sums_square, 2, 128, 2, 2, RankSums)
SPLIT(split_sums_narrow, 2, 128, 2, 1, RankSums)
SPLIT(split_sums_middle, 3, 128, 2, 1, RankSums)
SPLIT(split_sums_wide, 2, 256, 1, 2, RankSums)
JOINT(joint_sums_short, 1, RankSums)
JOINT(joint_sums_narrow, 2, RankSums)
JOINT(joint_sums_middle, 3, RankSums)
MANY(many_gate_up_narrow, 2, 128, 2, 1, GateUp)
MANY(many_gate_up_middle, 3, 128, 2, 1, GateUp)
MANY(many_gate_up_square, 2, 128, 2, 2, GateUp)
MANY(many_gate_up_wide, 2, 256, 1, 2, GateUp)
MANY(many_gate_up_288x128, 2, 288, 2, 1, GateUp)
MANY(many_gate_up_208x128, 2, 208, 2, 1, GateUp)
MANY(many_gate_up_224x128, 2, 224, 2, 1, GateUp)
MANY(many_gate_up_192x128, 2, 192, 2, 1, GateUp)
MANY(many_gate_up_144x128, 2, 144, 2, 1, GateUp)
MANY(many_gate_up_144x192, 3, 144, 2, 1, GateUp)
MANY(many_gate_up_192x192, 3, 192, 2, 1, GateUp)
MANY(many_head_narrow, 2, 128, 2, 1, Head)
MANY(many_head_middle, 3, 128, 2, 1, Head)
MANY(many_head_square, 2, 128, 2, 2, Head)
MANY(many_head_wide, 2, 256, 1, 2, Head)
MANY(many_linear_narrow, 2, 128, 2, 1, Linear)
