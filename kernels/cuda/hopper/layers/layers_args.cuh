// What layers_divide.cuh is told: the step, the layers, and how the copy engine fetches weights and activations. backend-cuda/src/ops/layers/args.rs
// declares the same fields.
#pragma once

#include <cuda_bf16.h>

#include "hopper/hopper.cuh"
#include "segment.cuh"

// The model's sizes: Qwen3-0.6B's.
constexpr unsigned HIDDEN = 1024, HEADS = 16, KV_HEADS = 8, HEAD_DIM = 128, MLP = 3072;
constexpr unsigned GROUP = HEADS / KV_HEADS, Q_WIDTH = HEADS * HEAD_DIM, SEGMENTS = HIDDEN / SEGMENT;
constexpr unsigned PAGE = 16; // tokens

constexpr unsigned LAYERS_MAX = 32;
// Where keys and values are kept in fp8 a block attends with more warps.
constexpr unsigned LAYERS_THREADS = 384, LAYERS_FP8_THREADS = 512, LAYERS_SHARED = 231424;
// Rows of a half at most.
constexpr unsigned HALF_ROWS = 128;
// Blocks that multiply, pairs of neighbours; the rest of the grid attends.
constexpr unsigned MULTIPLIERS = 64;

// Weights are fetched as [rows / 4][2][2][cols]: pairs of rows, two by two, so that a box may have every second pair.
struct Layer {
    TensorMap qkv, o, gate_up, down;      // boxes, innermost first: 64, 2, 1, 32; 64, 2, 1, 16; 64, 2, 2, 24; 64, 2, 1, 16
    __nv_bfloat16 *k, *v;                 // pages (attention.cuh)
    const __nv_bfloat16 *q_norm, *k_norm; // [HEAD_DIM], or null
    const float2 *rope;                   // [positions, HEAD_DIM / 2] (cos, sin), or null
    unsigned long long reserved[3];
};
static_assert(sizeof(Layer) == 576, "the host's layout");

// Activations of each half from its first row on, in boxes of 64 columns and half of the rows.
struct LayerMaps {
    TensorMap attended[2], residual[2], activated[2];
};

struct Layers {
    Layer layers[32]; // LAYERS_MAX
    const unsigned *batch; // the packed batch's words
    const unsigned *page_table;
    __nv_bfloat16 *q, *attended;  // [rows, Q_WIDTH]
    __nv_bfloat16 *activated;     // [rows, MLP]
    __nv_bfloat16 *residual;      // [rows, HIDDEN]
    float2 *sums;                 // by half, by product (o, down): [SEGMENTS][HALF_ROWS] sums of squares
    float4 *partials[2];          // by half; see attention_merge.cuh
    unsigned *arrived[2];         // [rows of the half, KV_HEADS]; zero between launches
    unsigned *flags;              // zero between launches; see layers_flags.cuh
    unsigned count;               // of layers
    unsigned rows[2];             // of the halves, padding included
    unsigned padded;              // those of the first one, up to a multiple of 16
    unsigned plan_offset[2], tokens_offset; // words of the batch
    unsigned table_width;
    float norm_eps;
    unsigned reserved[15];
};
static_assert(sizeof(Layers) == LAYERS_MAX * sizeof(Layer) + 192, "nothing in between");
