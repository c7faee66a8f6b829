// What the kernels of a layer's experts share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// backend-cuda/src/ops/experts/routing.rs declares the same fields, which its tests compare.
struct Routing {
    float *logits;            // [T, E]: of kernels for any GPU
    float *scales;            // [T]: the row norm's
    unsigned short *chosen;   // [T, P], and up to 7 more to read
    float *shares;            // [T, P]
    unsigned *begins;         // [E + 1]
    unsigned *pairs;          // [T P]: expert e's are begins[e] .. begins[e + 1]
    unsigned *bits;           // [E, ceil(T / 32)]: a bit for each token that chose an expert, 0 between layers; null where there are lists
    unsigned long long *read; // null, or to count in: layers that ran, experts that have pairs
    unsigned tokens, experts, per_token, hidden, intermediate, stored;
    unsigned normalized, nobody; // nobody: the slot of padding
    __half *scaled;              // [T, hidden]: x times the norm's scale by column, for experts in fp8 (experts_f16.cuh); or null
};

// What the next layer's first product takes, where it is of fp8: the new residual stream times its norm's scale by column. routing.rs too.
struct Ahead {
    const __nv_bfloat16 *norm; // [hidden], or null: it takes the stream itself
    __nv_bfloat16 *scaled;     // [T, hidden]
};
