// experts_route: where tokens are few, what experts_choose and experts_dispatch do (experts.cu), in one kernel.
//
//   a cluster of 8 blocks of 32 warps: a token a warp ── all of the cluster ── an expert a warp
//
// An expert's warp counts its pairs and those of all experts before it; a lane takes neighbouring pairs, so that an expert's are in
// ascending order.
#include "dependent.cuh"
#include "experts_choose.cuh"
#include "hopper.cuh"

// The numbers of up to 8 neighbouring pairs, NOBODY behind the last.
struct Numbers {
    uint4 words;
    unsigned first, pairs;

    __device__ __forceinline__ Numbers(const Routing &routing, unsigned chunk, unsigned pairs)
        : words(__ldcg(reinterpret_cast<const uint4 *>(routing.chosen) + chunk)), first(8 * chunk), pairs(pairs) {}
    __device__ __forceinline__ unsigned operator[](unsigned i) const {
        return first + i < pairs ? reinterpret_cast<const unsigned short *>(&words)[i] : NOBODY;
    }
};

__device__ __forceinline__ void dispatch(const Routing &routing, unsigned expert, unsigned long long *read) {
    const unsigned lane = threadIdx.x % 32, pairs = routing.tokens * routing.per_token, chunks = (pairs + 7) / 8;
    const unsigned each = (chunks + 31) / 32, begin = min(lane * each, chunks), end = min(begin + each, chunks);
    unsigned below = 0, own = 0;
    for (unsigned at = begin; at < end; at++) {
        const Numbers numbers(routing, at, pairs);
#pragma unroll
        for (unsigned i = 0; i < 8; i++) {
            below += numbers[i] < expert;
            own += numbers[i] == expert;
        }
    }
    unsigned before = own; // own pairs of the lanes before this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, before, step);
        before += lane >= step ? other : 0;
    }
    const unsigned first = __reduce_add_sync(0xffffffffu, below), count = __shfl_sync(0xffffffffu, before, 31);
    before -= own;
    if (lane == 0) {
        routing.begins[expert] = first;
        if (expert + 1 == routing.experts)
            routing.begins[expert + 1] = first + count;
        if (read != nullptr && expert == 0)
            atomicAdd(read, 1ull);
        if (read != nullptr && count > 0)
            atomicAdd(read + 1, 1ull);
    }
    for (unsigned at = begin; own > 0 && at < end; at++) {
        const Numbers numbers(routing, at, pairs);
#pragma unroll
        for (unsigned i = 0; i < 8; i++)
            if (numbers[i] == expert)
                routing.pairs[first + before++] = numbers.first + i;
    }
}

extern "C" __global__ void __launch_bounds__(1024)
experts_route(Routing routing, const unsigned *batch, unsigned tokens_offset, unsigned long long *read) {
    dependent_launch();
    const unsigned warp = threadIdx.x / 32 * gridDim.x + blockIdx.x, warps = gridDim.x * 32; // of all blocks in turn
    dependent_wait();
    for (unsigned t = warp; t < routing.tokens; t += warps)
        choose(routing, t, reinterpret_cast<const Token *>(batch + tokens_offset)[t].slot);
    cluster_sync();
    for (unsigned expert = warp; expert < routing.experts; expert += warps)
        dispatch(routing, expert, read);
}
