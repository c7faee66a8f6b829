// fp8_gate_up_*: gemm_decode_gate_up.cu's kernels for matrices in fp8 (fp8_ring.cuh); see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE_FP8(fp8_gate_up_128x16, 2, 16, 2, GateUp)
DECODE_FP8(fp8_gate_up_128x32, 2, 32, 2, GateUp)
DECODE_FP8(fp8_gate_up_128x64, 2, 64, 2, GateUp)
DECODE_FP8(fp8_gate_up_192x128, 3, 128, 1, GateUp)
