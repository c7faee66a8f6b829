#pragma once

// Word j of lane i of four becomes word i of lane j.
__device__ __forceinline__ void transpose(unsigned (&words)[4], unsigned lane) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (!(j & bit)) {
                const unsigned other = __shfl_xor_sync(0xffffffffu, lane & bit ? words[j] : words[j | bit], bit);
                words[j] = lane & bit ? other : words[j];
                words[j | bit] = lane & bit ? words[j | bit] : other;
            }
}
