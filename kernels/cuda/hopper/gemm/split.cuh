// Tiles whose slices several clusters sum, where whole tiles are too few to give every multiprocessor one: each leaves its sums
// in memory, and who is the last adds them up.
//
//   partials   [tiles][slices][warps of a cluster][M / 8][lanes] float4: a warp's sums as the tensor core's registers have them
//   arrived    [tiles][warps of a cluster] words: how many slices of a warp's tokens and rows are there; zero between launches
//
//   multiply ── store ── count ──┬── not the last: the next turn
//                                └── all slices' sums, in pairs ── epilogue
//
// 1. A warp's sums are its own business: the warp of another cluster that has the same tokens and rows adds them, and no block
//    waits for another.
// 2. A warp's sums are stored before its lane 0 counts, which releases them and acquires those of the slices counted before.
//    Who counts last sets the count to 0 for the next launch.
// 3. All slices' sums are read back, the last one's own among them: none is kept in registers beside the total.
#pragma once

struct Partials {
    float4 *sums;
    unsigned *arrived;
};

// A warp's share of a tile: where its COUNT slices' sums lie. SUMS sums a lane, WARPS warps in a cluster, of which it is `warp`.
template <int COUNT, int SUMS, int WARPS> struct Slices {
    float4 *sums;
    unsigned *arrived;
    static constexpr unsigned OWN = SUMS / 4 * 32, STEP = WARPS * OWN; // float4s: a warp's sums, from slice to slice

    __device__ __forceinline__ Slices(const Partials &partials, unsigned tile, unsigned warp)
        : sums(partials.sums + ((size_t)tile * COUNT * WARPS + warp) * OWN + threadIdx.x % 32),
          arrived(partials.arrived + tile * WARPS + warp) {}

    __device__ __forceinline__ void store(unsigned slice, const float (&sum)[SUMS]) const {
        float4 *to = sums + slice * STEP;
#pragma unroll
        for (int i = 0; i < SUMS / 4; i++)
            __stcg(to + 32 * i, make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
    }
    // Are all slices' sums in memory, the warp's own too?
    __device__ __forceinline__ bool arrives_last() const {
        unsigned before = 0;
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
        before = __shfl_sync(0xffffffffu, before, 0);
        if (before + 1 != COUNT)
            return false;
        if (threadIdx.x % 32 == 0)
            *arrived = 0;
        return true;
    }
    // The slices' sums, added in pairs and these again (Shape), of so many of a lane's places from place `first` on; AT_ONCE float4s of
    // each on their way.
    template <int AT_ONCE, int PLACES> __device__ __forceinline__ void add(float (&total)[PLACES], unsigned first) const {
        const float4 *from = sums + first / 4 * 32;
#pragma unroll
        for (int i = 0; i < PLACES / 4; i += AT_ONCE) {
            float4 part[COUNT][AT_ONCE];
#pragma unroll
            for (int s = 0; s < COUNT; s++)
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    part[s][j] = __ldcg(from + s * STEP + 32 * (i + j));
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
#pragma unroll
                for (int apart = 1; apart < COUNT; apart *= 2)
#pragma unroll
                    for (int s = 0; s < COUNT; s += 2 * apart) {
                        float4 &to = part[s][j];
                        const float4 &from = part[s + apart][j];
                        to = {to.x + from.x, to.y + from.y, to.z + from.z, to.w + from.w};
                    }
                const float4 sum = part[0][j];
                float *to = total + 4 * (i + j);
                to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
            }
        }
    }
};
