// decode_gate_up_*: silu(gate) * up of few tokens; see gemm_decode.cuh.
#include "gemm_decode.cuh"

DECODE(decode_gate_up_64x16, 1, 1, 16, GateUp)
DECODE(decode_gate_up_64x64, 1, 1, 64, GateUp)
DECODE(decode_gate_up_64x128, 1, 1, 128, GateUp)
DECODE(decode_gate_up_128x128, 2, 1, 128, GateUp)
