// fp8_gate_up_*: gemm_few_gate_up.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_few.cuh.
#include "hopper/gemm/gemm_few.cuh"

FEW_FP8(fp8_gate_up_128x16, 2, 16, 2, GateUp)
FEW_FP8(fp8_gate_up_128x32, 2, 32, 2, GateUp)
FEW_FP8(fp8_gate_up_128x64, 2, 64, 2, GateUp)
FEW_FP8(fp8_gate_up_192x128, 3, 128, 1, GateUp)
