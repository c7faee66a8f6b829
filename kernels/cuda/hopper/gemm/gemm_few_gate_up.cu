// few_gate_up_*, pair_gate_up_*: silu(gate) * up of few tokens; see gemm_few.cuh and gemm_pair.cuh.
#include "hopper/gemm/gemm_few.cuh"
#include "hopper/gemm/gemm_pair.cuh"

FEW(few_gate_up_64x16, 1, 1, 16, GateUp)
FEW(few_gate_up_64x32, 1, 1, 32, GateUp)
FEW(few_gate_up_64x48, 1, 1, 48, GateUp)
FEW(few_gate_up_64x64, 1, 1, 64, GateUp)
FEW(few_gate_up_128x64, 2, 1, 64, GateUp)
FEW(few_gate_up_128x128, 2, 1, 128, GateUp)
FEW_ALONE(few_gate_up_192x48, 3, 48, 1, GateUp)
PAIR(pair_gate_up_192x32, 3, 32, GateUp)
PAIR(pair_gate_up_192x64, 3, 64, GateUp)
