// The warps of a multiplying block that compute the scales of its rows' norms (layers_multiply.cuh).
#pragma once

#include "hopper/layers/layers_multiplier.cuh"

// The warps that compute the rows' scales, two rows a thread.
struct Scales {
    const Multiplying &of;

    // Behind o (0) or down (1).
    __device__ __forceinline__ void make(unsigned phase, unsigned product) const {
        const unsigned row = threadIdx.x % SCALE_THREADS * 2, half = phase % 2;
        while (of.flags.parts(of.flags.parts_of(phase, product ? DOWN : O), 0) < Flags::PARTS)
            ;
        if (row < of.padded) {
            float4 two[SEGMENTS];
#pragma unroll
            for (int i = 0; i < SEGMENTS; i++)
                two[i] = __ldcg(reinterpret_cast<const float4 *>(of.sums(half, product, i) + row));
            float a = 0.0f, b = 0.0f;
#pragma unroll
            for (int i = 0; i < SEGMENTS; i++) {
                a = a + __fadd_rn(two[i].x, two[i].y);
                b = b + __fadd_rn(two[i].z, two[i].w);
            }
            a = rsqrtf(a / (float)HIDDEN + of.args.norm_eps);
            b = rsqrtf(b / (float)HIDDEN + of.args.norm_eps);
            store_float2(of.shared.scale(row), a, b);
        }
        sync_threads(2, TENSOR_THREADS + SCALE_THREADS);
    }
    __device__ __forceinline__ void run() const {
#pragma unroll 1
        for (unsigned phase = 0; phase < of.flags.chains(); phase++) {
            make(phase, 0);
            if (phase + 2 < of.flags.phases())
                make(phase, 1);
        }
    }
};
