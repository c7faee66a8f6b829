// What happens to a GEMM's sums on their way out, the same code for every GEMM kernel: a warp takes T tokens' outputs of
// a tile side by side, BLOCKS times 64 of each, lane l holding outputs 64 b + 2 l and 64 b + 2 l + 1 of token i as
// v[i][b]. What it needs from memory (`ahead`) can be fetched long before the sums are ready (`store`).
//
//   each in a file of epilogue/
//
//   Qkv        row scale; bias; head norm; rope; q -> [tokens, q_width] bf16, k and v -> KV pages  128 outputs a tile
//   Residual   residual += y (bf16), sumsq[t, segment of m] = sum of the new values' squares, f32      64 or 128
//   RankSums   y, f32, to the ranks that add them up and take them through Residual              64 or 128
//   GateUp     row scale; silu(gate) * up -> [tokens, intermediate] bf16                         64 or 128
//   Head       y -> [samples, vocab] f16, clamped to what f16 holds                              64 or 128
//   Linear     y -> [tokens, rows] bf16                                                          64 or 128
//
//   row scale  rsqrt(sum_sq / hidden + eps), sum_sq the token's sum over sumsq [tokens, segments] f32
//   KV pages   [pages + 1, kv_heads, page_size, head_dim] bf16; 16-byte chunk c of row t lies at chunk c ^ (t % 8)
//
// 1. Everything between the sums and the stored value is f32, and every sum has one order: a token's bits depend
//    neither on the kernel nor on the tokens beside it.
// 2. Gate and up rows take turns in blocks of 8 (the loader's doing), so that a lane finds its partner by a shuffle.
// 3. A token's chain of shuffles and loads is long and each step of it waits for the one before: T chains side by side
//    hide each other. Tokens beyond `count` go along and are not stored.
// 4. The structs are kernel parameters: backend-cuda/src/ops/gemm/epilogue.rs declares the same fields, which its tests compare.
// 5. A model without bias, head norms or rope has null pointers there, and numbers that change no bit in their places: a bias
//    of -0, an inverse and weights of 1, a cosine of 1 and a sine of 0. Asking costs registers: where all heads are normed and
//    turned and none has a bias, the products of few rows are compiled for that alone (QkvNormed).
// 6. Hopper's products of few rows take Qkv with keys and values in bf16, and Residual, through hopper/gemm/wide.cuh, to the same bits.
#pragma once

#include "epilogue/qkv.cuh"
#include "epilogue/residual.cuh"
#include "epilogue/rank_sums.cuh"
#include "epilogue/gate_up.cuh"
#include "epilogue/stored.cuh"
