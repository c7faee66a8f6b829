// experts_router_*: which experts each token gets, from the residual stream to the choice.
//
//   a cluster of 8 blocks    16 tokens; a block has an eighth of the columns
//     normed ── hi, lo ──> mma with the router's rows, a warp some of them ──> sums of an eighth
//     ── all of the cluster ── a block adds up two tokens' eighths, in order ── choose, a warp each
//
// 1. What is multiplied is norm(x) times the norm's scale by column, in f32: a choice should not hang on a rounding that can be left out. A
//    product of two bf16 numbers has 16 bits of mantissa, so it is the sum of two bf16 numbers, and each of them is multiplied by itself.
// 2. A token's sums have one order, whatever tokens are beside it.
// 3. Columns go to the places that make a lane's loads 16 bytes, in both operands alike: a sum of products does not mind.
#include "dependent.cuh"
#include "experts/experts_choose.cuh"
#include "experts/experts_f16.cuh"
#include "hopper/hopper.cuh"

constexpr unsigned BLOCKS = 8, WARPS = 8, TOKENS = 16;
constexpr unsigned PART = 256;       // columns of a block at once
constexpr unsigned LINE = PART + 32; // what a token's lie apart, so that a warp's reads meet no bank twice
constexpr unsigned SEGMENTS = 256;   // of a row norm, that are fetched while x is multiplied

__device__ __forceinline__ void multiply(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The high half of eight products of bf16 numbers, and what is left of them.
__device__ __forceinline__ void split_products(uint4 x, uint4 scale, uint4 &high, uint4 &low) {
    const __nv_bfloat162 *xs = reinterpret_cast<const __nv_bfloat162 *>(&x);
    const __nv_bfloat162 *scales = reinterpret_cast<const __nv_bfloat162 *>(&scale);
    __nv_bfloat162 *highs = reinterpret_cast<__nv_bfloat162 *>(&high), *lows = reinterpret_cast<__nv_bfloat162 *>(&low);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 a = __bfloat1622float2(xs[i]), b = __bfloat1622float2(scales[i]);
        const float2 product = {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)};
        highs[i] = __floats2bfloat162_rn(product.x, product.y);
        const float2 taken = __bfloat1622float2(highs[i]);
        lows[i] = __floats2bfloat162_rn(product.x - taken.x, product.y - taken.y);
    }
}

// Eight products as experts in fp8 take them.
__device__ __forceinline__ uint4 inputs(uint4 x, uint4 scale) {
    const __nv_bfloat162 *xs = reinterpret_cast<const __nv_bfloat162 *>(&x), *scales = reinterpret_cast<const __nv_bfloat162 *>(&scale);
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 a = __bfloat1622float2(xs[i]), b = __bfloat1622float2(scales[i]);
        words[i] = experts_inputs_f16(__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y));
    }
    return {words[0], words[1], words[2], words[3]};
}

// TILES times 8 experts a warp.
template <unsigned TILES>
__device__ __forceinline__ void router(const Routing &routing, const RowNorm &norm, const __nv_bfloat16 *weights,
                                       const __nv_bfloat16 *column_scale, const __nv_bfloat16 *x, const Token *tokens) {
    constexpr unsigned EXPERTS = WARPS * TILES * 8, CHUNKS = PART / 32, APART = EXPERTS + 8;
    __shared__ __align__(16) __nv_bfloat16 highs[TOKENS][LINE], lows[TOKENS][LINE];
    __shared__ __align__(16) float sums[TOKENS][APART]; // of this block's columns
    __shared__ float logits[2][EXPERTS];
    __shared__ __align__(16) float squares[2][SEGMENTS];
    dependent_launch();
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank(), hidden = routing.hidden;
    const unsigned t0 = blockIdx.x / BLOCKS * TOKENS;
    const unsigned share = (hidden + 32 * BLOCKS - 1) / (32 * BLOCKS) * 32; // columns of a block
    const unsigned begin = rank * share, end = min(begin + share, hidden);
    const auto load = [&](const __nv_bfloat16 *row, unsigned col) {
        return col < end ? *reinterpret_cast<const uint4 *>(row + col) : make_uint4(0, 0, 0, 0);
    };
    uint4 rows[TILES][CHUNKS], scale[2], own[2];
    const auto load_weights = [&](unsigned part) {
#pragma unroll
        for (unsigned n = 0; n < TILES; n++) {
            const unsigned expert = min((warp * TILES + n) * 8 + lane / 4, routing.experts - 1);
#pragma unroll
            for (unsigned c = 0; c < CHUNKS; c++)
                rows[n][c] = load(weights + (size_t)expert * hidden, part + 32 * c + lane % 4 * 8);
        }
#pragma unroll
        for (unsigned i = 0; i < 2; i++)
            scale[i] = load(column_scale, part + threadIdx.x % 16 * 16 + 8 * i);
    };
    // A thread takes 16 columns of a token.
    const unsigned staged = threadIdx.x / 16, t = t0 + staged;
    const auto load_own = [&](unsigned part) {
#pragma unroll
        for (unsigned i = 0; i < 2; i++)
            own[i] = t < routing.tokens ? load(x + (size_t)t * hidden, part + threadIdx.x % 16 * 16 + 8 * i) : make_uint4(0, 0, 0, 0);
    };
    const auto stage = [&](unsigned part) {
#pragma unroll
        for (unsigned i = 0; i < 2; i++) {
            const unsigned col = threadIdx.x % 16 * 16 + 8 * i;
            uint4 high, low;
            split_products(own[i], scale[i], high, low);
            *reinterpret_cast<uint4 *>(&highs[staged][col]) = high;
            *reinterpret_cast<uint4 *>(&lows[staged][col]) = low;
            if (routing.scaled != nullptr && t < routing.tokens && part + col < end)
                *reinterpret_cast<uint4 *>(routing.scaled + (size_t)t * hidden + part + col) = inputs(own[i], scale[i]);
        }
    };
    load_weights(begin);
    // The two tokens that this block adds up.
    const unsigned token = t0 + 2 * rank + warp;
    const bool chooses = warp < 2 && token < routing.tokens;
    const unsigned slot = chooses ? tokens[token].slot : 0;
    dependent_wait();
    load_own(begin);
    const bool is_staged = norm.segments <= SEGMENTS;
    if (chooses && is_staged)
        for (unsigned i = lane; i < norm.segments; i += 32)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(&squares[warp][i])),
                         "l"(norm.sumsq + (size_t)token * norm.segments + i) : "memory");
    float sum[TILES][4] = {};
    for (unsigned part = begin; part < begin + share; part += PART) {
        if (part > begin) {
            __syncthreads(); // the part before is multiplied
            load_weights(part);
            load_own(part);
        }
        stage(part);
        __syncthreads();
#pragma unroll
        for (unsigned c = 0; c < CHUNKS; c++) {
            const unsigned col = 32 * c + lane % 4 * 8;
            const uint4 parts[2][2] = {{*reinterpret_cast<const uint4 *>(&highs[lane / 4][col]),
                                        *reinterpret_cast<const uint4 *>(&highs[lane / 4 + 8][col])},
                                       {*reinterpret_cast<const uint4 *>(&lows[lane / 4][col]),
                                        *reinterpret_cast<const uint4 *>(&lows[lane / 4 + 8][col])}};
#pragma unroll
            for (unsigned n = 0; n < TILES; n++)
#pragma unroll
                for (unsigned p = 0; p < 2; p++) {
                    const uint4 &low = parts[p][0], &high = parts[p][1], &w = rows[n][c];
                    multiply(sum[n], low.x, high.x, low.y, high.y, w.x, w.y);
                    multiply(sum[n], low.z, high.z, low.w, high.w, w.z, w.w);
                }
        }
    }
#pragma unroll
    for (unsigned n = 0; n < TILES; n++) {
        const unsigned expert = (warp * TILES + n) * 8 + lane % 4 * 2;
        *reinterpret_cast<float2 *>(&sums[lane / 4][expert]) = {sum[n][0], sum[n][1]};
        *reinterpret_cast<float2 *>(&sums[lane / 4 + 8][expert]) = {sum[n][2], sum[n][3]};
    }
    float row_scale = 0.0f; // all lanes alike
    if (chooses) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();
        const RowNorm staged = {squares[warp], norm.segments, norm.hidden, norm.eps};
        row_scale = is_staged ? staged.scale(0) : norm.scale(token);
        if (lane == 0)
            routing.scales[token] = row_scale;
    }
    cluster_sync();
    if (warp < 2) {
#pragma unroll
        for (unsigned i = 0; i < EXPERTS / 64; i++) {
            const unsigned expert = 64 * i + 2 * lane;
            float2 total = {0.0f, 0.0f}, eighth[BLOCKS];
#pragma unroll
            for (unsigned r = 0; r < BLOCKS; r++)
                eighth[r] = load_remote(shared_address(&sums[2 * rank + warp][expert]), r);
#pragma unroll
            for (unsigned r = 0; r < BLOCKS; r++)
                total = {total.x + eighth[r].x, total.y + eighth[r].y};
            logits[warp][expert] = __fmul_rn(total.x, row_scale);
            logits[warp][expert + 1] = __fmul_rn(total.y, row_scale);
        }
        __syncwarp();
        if (chooses)
            choose(routing, token, slot, logits[warp]);
    }
    cluster_sync_relaxed(); // what others read of this block is read
}

#define ROUTER(NAME, TILES)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
    NAME(Routing routing, RowNorm norm, const __nv_bfloat16 *weights, const __nv_bfloat16 *column_scale,                     \
         const __nv_bfloat16 *x, const unsigned *batch, unsigned tokens_offset) {                                            \
        const Token *tokens = reinterpret_cast<const Token *>(batch + tokens_offset);                                        \
        router<TILES>(routing, norm, weights, column_scale, x, tokens);                                                      \
    }

ROUTER(experts_router_64, 1)
ROUTER(experts_router_128, 2)
ROUTER(experts_router_256, 4)
