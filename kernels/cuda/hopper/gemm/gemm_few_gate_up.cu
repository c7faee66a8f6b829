// few_gate_up_*, batch_gate_up_*: silu(gate) * up of few tokens; see gemm_few.cuh and gemm_batch.cuh.
#include "hopper/gemm/gemm_batch.cuh"
#include "hopper/gemm/gemm_few.cuh"

FEW(few_gate_up_64x16, 1, 1, 16, GateUp)
FEW(few_gate_up_64x32, 1, 1, 32, GateUp)
FEW(few_gate_up_64x48, 1, 1, 48, GateUp)
FEW(few_gate_up_64x64, 1, 1, 64, GateUp)
FEW(few_gate_up_128x64, 2, 1, 64, GateUp)
FEW(few_gate_up_128x128, 2, 1, 128, GateUp)
FEW_ALONE(few_gate_up_192x48, 3, 48, 1, GateUp)
BATCH(batch_gate_up_64x48, 1, 48, GateUp)
BATCH(batch_gate_up_64x64, 1, 64, GateUp)
BATCH(batch_gate_up_64x96, 1, 96, GateUp)
BATCH(batch_gate_up_64x128, 1, 128, GateUp)
BATCH(batch_gate_up_192x144, 3, 144, GateUp)
BATCH(batch_gate_up_192x160, 3, 160, GateUp)
BATCH(batch_gate_up_192x176, 3, 176, GateUp)
BATCH(batch_gate_up_192x192, 3, 192, GateUp)
BATCH(batch_gate_up_192x208, 3, 208, GateUp)
BATCH(batch_gate_up_192x224, 3, 224, GateUp)
BATCH(batch_gate_up_192x240, 3, 240, GateUp)
BATCH(batch_gate_up_192x256, 3, 256, GateUp)
