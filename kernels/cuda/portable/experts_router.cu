// experts_logits_*, experts_choose: which experts each token gets, on any GPU.
//
//   logits     logits[t, e] = norm(x[t]) . router[e], f32                    grid (E / 8, T) or (E / 32, T / 4)   block 256
//   choose     the P largest of a token, ascending, and their shares         grid T / 8                           block 256
#include "dependent.cuh"
#include "experts/experts_choose.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, LOGIT_TOKENS = 4;

// Eight bf16.
template <int N> __device__ __forceinline__ void unpack(const uint4 &chunk, float (&out)[N]) {
    const __nv_bfloat162 *pairs = reinterpret_cast<const __nv_bfloat162 *>(&chunk);
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float2 pair = __bfloat1622float2(pairs[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

// A warp takes N experts and TOKENS tokens, a lane 8 of each 256 columns, AHEAD times 256 at once: those of the router, which
// nobody writes, before the wait.
template <int N, int TOKENS, int AHEAD>
__device__ __forceinline__ void logits(const Routing &routing, const RowNorm &norm, const __nv_bfloat16 *router,
                                       const __nv_bfloat16 *column_scale, const __nv_bfloat16 *x) {
    __shared__ float scales[TOKENS];
    dependent_launch();
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, hidden = routing.hidden;
    const unsigned first = (blockIdx.x * WARPS + warp) * N, t0 = blockIdx.y * TOKENS;
    uint4 columns[AHEAD], weights[AHEAD][N], rows[AHEAD][TOKENS];
    const auto load_weights = [&](unsigned k) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++, k += 256) {
            if (k >= hidden)
                break;
            columns[a] = *reinterpret_cast<const uint4 *>(column_scale + k);
#pragma unroll
            for (int e = 0; e < N; e++)
                weights[a][e] =
                    *reinterpret_cast<const uint4 *>(router + (size_t)min(first + e, routing.experts - 1) * hidden + k);
        }
    };
    const auto load_rows = [&](unsigned k) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++, k += 256)
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (k < hidden)
                    rows[a][t] = *reinterpret_cast<const uint4 *>(x + (size_t)min(t0 + t, routing.tokens - 1) * hidden + k);
    };
    load_weights(8 * lane);
    dependent_wait();
    load_rows(8 * lane);
    if (threadIdx.x < TOKENS && t0 + threadIdx.x < routing.tokens) {
        scales[threadIdx.x] = norm.scale(t0 + threadIdx.x);
        if (blockIdx.x == 0)
            routing.scales[t0 + threadIdx.x] = scales[threadIdx.x];
    }
    float sums[N][TOKENS] = {};
    for (unsigned k = 8 * lane; k < hidden; k += 256 * AHEAD) {
        if (k >= 256) {
            load_weights(k);
            load_rows(k);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (k + 256 * a >= hidden)
                break;
            float scale[8], normed[TOKENS][8];
            unpack(columns[a], scale);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                unpack(rows[a][t], normed[t]);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    normed[t][i] = __fmul_rn(normed[t][i], scale[i]);
            }
#pragma unroll
            for (int e = 0; e < N; e++) {
                float weight[8];
                unpack(weights[a][e], weight);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        sums[e][t] = fmaf(weight[i], normed[t][i], sums[e][t]);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < N; e++) {
        warp_sums(sums[e]);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (lane == 0 && first + e < routing.experts && t0 + t < routing.tokens)
                routing.logits[(size_t)(t0 + t) * routing.experts + first + e] = sums[e][t] * scales[t];
    }
}

#define LOGITS(NAME, N, TOKENS, AHEAD)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                    \
    NAME(Routing routing, RowNorm norm, const __nv_bfloat16 *router, const __nv_bfloat16 *column_scale,                      \
         const __nv_bfloat16 *x) {                                                                                           \
        logits<N, TOKENS, AHEAD>(routing, norm, router, column_scale, x);                                                    \
    }

LOGITS(experts_logits_1, 1, 1, 8)
LOGITS(experts_logits_4, 4, LOGIT_TOKENS, 2)

extern "C" __global__ void __launch_bounds__(THREADS)
experts_choose(Routing routing, const unsigned *batch, unsigned tokens_offset) {
    dependent_launch();
    const unsigned t = blockIdx.x * WARPS + threadIdx.x / 32;
    const bool is_there = t < routing.tokens;
    const unsigned slot = is_there ? reinterpret_cast<const Token *>(batch + tokens_offset)[t].slot : 0;
    dependent_wait();
    if (is_there)
        choose(routing, t, slot, routing.logits + (size_t)t * routing.experts);
}
