// A row's mask: the logits of all tokens that it does not allow become minus infinity, in place.
//
//   mask   [vocab / 32, rounded up] words; bit i % 32 of word i / 32: token i may be drawn
//   moves  the mask, and of the logits those groups of eight of which some, not all, are allowed, both ways, and those of which
//          none is, one way
#pragma once

#include <cuda_fp16.h>

#include "step/edit.cuh"

// The whole block, of THREADS threads; every thread sees the row as it is afterwards.
template <int THREADS>
__device__ __forceinline__ void apply_mask(__half *row, bool aligned, unsigned vocab, const unsigned *mask) {
    for (unsigned i = threadIdx.x * 8; i < vocab; i += THREADS * 8) {
        const unsigned allowed = mask[i / 32] >> (i % 32) & 0xffu;
        if (allowed == 0xffu)
            continue;
        if (aligned && i + 8 <= vocab) {
            uint4 *eight = reinterpret_cast<uint4 *>(row + i);
            unsigned short logit[8];
            if (allowed != 0)
                *reinterpret_cast<uint4 *>(logit) = *eight;
#pragma unroll
            for (int j = 0; j < 8; j++)
                logit[j] = allowed >> j & 1u ? logit[j] : (unsigned short)FORBIDDEN;
            *eight = *reinterpret_cast<uint4 *>(logit);
        } else {
            for (int j = 0; j < 8; j++)
                if (i + j < vocab && !(allowed >> j & 1u))
                    row[i + j] = __ushort_as_half(FORBIDDEN);
        }
    }
    __syncthreads();
}
