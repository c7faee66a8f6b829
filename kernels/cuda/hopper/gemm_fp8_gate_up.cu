// fp8_gate_up_*: gemm_decode_gate_up.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE_FP8(fp8_gate_up_64x16, 1, 16, GateUp)
DECODE_FP8(fp8_gate_up_64x32, 1, 32, GateUp)
DECODE_FP8(fp8_gate_up_64x64, 1, 64, GateUp)
DECODE_FP8(fp8_gate_up_64x128, 1, 128, GateUp)
