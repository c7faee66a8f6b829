// A row's scale, as epilogues of normed rows take it (epilogue.cuh).
#pragma once

// The scale of a normed row, from its partial sums of squares.
struct RowNorm {
    const float *sumsq; // [tokens, segments]
    unsigned segments, hidden;
    float eps;

    // A thread's call: loads are independent, the sum of each token is in order.
    template <int COUNT> __device__ __forceinline__ void scales(const unsigned (&token)[COUNT], float (&scale)[COUNT]) const {
        float sum[COUNT] = {};
        if (segments % 4 == 0) {
#pragma unroll 4
            for (unsigned i = 0; i < segments; i += 4)
#pragma unroll
                for (int t = 0; t < COUNT; t++) {
                    const float4 four = *reinterpret_cast<const float4 *>(sumsq + (size_t)token[t] * segments + i);
                    sum[t] = sum[t] + four.x + four.y + four.z + four.w;
                }
        } else {
            for (unsigned i = 0; i < segments; i++)
#pragma unroll
                for (int t = 0; t < COUNT; t++)
                    sum[t] += sumsq[(size_t)token[t] * segments + i];
        }
#pragma unroll
        for (int t = 0; t < COUNT; t++)
            scale[t] = rsqrtf(sum[t] / (float)hidden + eps);
    }
    __device__ __forceinline__ float scale(unsigned token) const {
        const unsigned one[1] = {token};
        float found[1];
        scales(one, found);
        return found[0];
    }
};
