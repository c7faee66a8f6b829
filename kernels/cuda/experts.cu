// experts_*: a layer's experts, of which each token gets some (minisgl_core::spec::Experts is the definition). For any GPU from
// Ampere on; Hopper has products of its own (hopper/experts_products.cu). Six kernels, one after the other, in the same grids
// whatever the tokens chose:
//
//   logits     logits[t, e] = norm(x[t]) . router[e], f32                    grid (E / 8, T) or (E / 32, T / 4)   block 256
//   choose     the P largest of a token, ascending, and their shares         grid T / 8                       block 256
//   dispatch   which pairs are each expert's: begins, pairs                  grid E                           block 256
//   gate_up    activated[place] = silu(gate) * up                            grid (rows / 128, tiles)         block 256
//   down       given[pair] = w x                                             grid (rows / 128, tiles)         block 256
//   combine    residual[t] += sum of share * given, ascending                grid (T, hidden / 512)           block 256
//
//   E experts, P of a token; a pair is a token and one of its experts, number t P + j, j ascending with the expert
//   chosen [T, P] u16, NOBODY for padding   shares [T, P] f32   begins [E + 1]   pairs [T P]: expert e's are begins[e] .. begins[e + 1]
//   activated [T P, intermediate] bf16, by place in `pairs`   given [T P, hidden] bf16, by pair
//   w [E][stored, hidden] of gate and up, 8 rows of each in turn, stored a multiple of 128; [E][hidden, intermediate] of down
//   moves   the weights of experts that somebody chose, once from memory: tiles of one expert are neighbours, the rest hit L2
//
// 1. A block of `dispatch` counts its expert's pairs and those of all experts before it, so it knows where its own begin without
//    asking another block. A thread takes neighbouring pairs: an expert's are in ascending order.
// 2. The products' blocks find their tile by counting tiles: expert by expert, as many as its pairs need. There are blocks for as
//    many as there can be; the rest end at once. So nothing is dropped, and a recorded step does for all choices.
// 3. A pair's sums have one order (mma_tile.cuh, one slice) and a token's experts are added in ascending order in f32: a token's bits
//    depend neither on its place nor on the tokens beside it. A share is multiplied in f32, behind the rounding of `given`.
// 4. The norm's scale by column is multiplied into gate and up at load, and here into x for the router, whose weights stay as they are:
//    a choice should not hang on a rounding that can be left out.
#include "batch.cuh"
#include "dependent.cuh"
#include "experts.cuh"
#include "experts_choose.cuh"
#include "mma_tile.cuh"

constexpr int LOGIT_TOKENS = 4;

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
        choose(routing, t, slot);
}

// `read`, if it is there: one more layer ran, and one more expert for each block that has pairs.
extern "C" __global__ void __launch_bounds__(THREADS)
experts_dispatch(Routing routing, unsigned long long *read) {
    __shared__ unsigned below_of[WARPS], own_of[WARPS];
    dependent_launch();
    dependent_wait();
    const unsigned expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned pairs = routing.tokens * routing.per_token, chunks = (pairs + 7) / 8; // chunks of 8 numbers, 16 bytes
    const unsigned each = (chunks + THREADS - 1) / THREADS;
    const unsigned begin = min(threadIdx.x * each, chunks), end = min(begin + each, chunks);
    auto number = [&](const uint4 &chunk, unsigned at, int i) {
        return 8 * at + i < pairs ? reinterpret_cast<const unsigned short *>(&chunk)[i] : NOBODY;
    };
    const uint4 *numbers = reinterpret_cast<const uint4 *>(routing.chosen);
    unsigned below = 0, own = 0;
    for (unsigned at = begin; at < end; at++) {
        const uint4 chunk = numbers[at];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const unsigned other = number(chunk, at, i);
            below += other < expert;
            own += other == expert;
        }
    }
    unsigned before = own; // this thread's place among the expert's pairs: own ones of the threads before it
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, before, step);
        before += lane >= step ? other : 0;
    }
    below = __reduce_add_sync(0xffffffffu, below);
    if (lane == 31) {
        below_of[warp] = below;
        own_of[warp] = before;
    }
    before -= own;
    __syncthreads();
    unsigned first = 0, count = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        before += w < warp ? own_of[w] : 0;
        first += below_of[w];
        count += own_of[w];
    }
    if (threadIdx.x == 0) {
        routing.begins[expert] = first;
        if (expert + 1 == routing.experts)
            routing.begins[expert + 1] = first + count;
        if (read != nullptr && expert == 0)
            atomicAdd(read, 1ull);
        if (read != nullptr && count > 0)
            atomicAdd(read + 1, 1ull);
    }
    for (unsigned at = begin; own > 0 && at < end; at++) {
        const uint4 chunk = numbers[at];
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (number(chunk, at, i) == expert)
                routing.pairs[first + before++] = 8 * at + i;
    }
}

// An expert's pairs of one tile; none where `count` is 0.
struct PairTile {
    unsigned expert, first, count;
};

// The tile of this number, of BN pairs, counted expert by expert. Every warp finds it by itself.
template <int BN> __device__ __forceinline__ PairTile find_tile(const Routing &routing, unsigned number) {
    const unsigned lane = threadIdx.x % 32;
    unsigned tiles[EXPERTS_A_LANE], own = 0;
#pragma unroll
    for (int i = 0; i < EXPERTS_A_LANE; i++) {
        const unsigned expert = EXPERTS_A_LANE * lane + i;
        const unsigned pairs = expert < routing.experts ? routing.begins[expert + 1] - routing.begins[expert] : 0;
        tiles[i] = (pairs + BN - 1) / BN;
        own += tiles[i];
    }
    unsigned end = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned before = __shfl_up_sync(0xffffffffu, end, step);
        end += lane >= step ? before : 0;
    }
    const bool is_here = number < end && number >= end - own;
    const unsigned owner = __ffs(__ballot_sync(0xffffffffu, is_here));
    if (owner == 0)
        return {0, 0, 0};
    unsigned expert = 0, tile = number - (end - own);
    bool done = false;
#pragma unroll
    for (int i = 0; i < EXPERTS_A_LANE; i++) {
        if (!done && tile < tiles[i]) {
            expert = EXPERTS_A_LANE * lane + i;
            done = true;
        }
        tile -= done ? 0 : tiles[i];
    }
    expert = __shfl_sync(0xffffffffu, expert, owner - 1);
    tile = __shfl_sync(0xffffffffu, tile, owner - 1);
    const unsigned first = routing.begins[expert] + tile * BN;
    return {expert, first, min(routing.begins[expert + 1] - first, (unsigned)BN)};
}

// Fetches 64 columns from `col` on of ROWS rows; `row(r)` says where row r begins, null where there is none. What lies outside
// the matrix becomes zero.
template <int ROWS, class Row>
__device__ __forceinline__ void fetch_rows(unsigned to, const __nv_bfloat16 *matrix, unsigned cols, unsigned col, Row row) {
#pragma unroll
    for (int i = 0; i < ROWS * 8; i += THREADS) {
        const unsigned chunk = i + threadIdx.x, r = chunk / 8, c = chunk % 8;
        if (ROWS * 8 < THREADS && chunk >= ROWS * 8)
            break;
        const __nv_bfloat16 *begin = row(r);
        const bool inside = begin != nullptr && col + 8 * c < cols;
        const __nv_bfloat16 *from = inside ? begin + col + 8 * c : matrix;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + r * 128 + ((c ^ (r % 8)) * 16)),
                     "l"(from), "r"(inside ? 16 : 0) : "memory");
    }
}

// The sums of a tile, in shared memory as [pair][row].
template <int BN, int STAGES, class Fetch>
__device__ __forceinline__ const float *sums(const Shape &shape, Fetch fetch) {
    extern __shared__ __align__(128) unsigned char shared[];
    Tile<BN> tile;
    tile.clear();
    accumulate<BN, STAGES>(tile, shape, shared_address(shared), fetch);
    float *staged = reinterpret_cast<float *>(shared);
    tile.stage_totals(staged);
    __syncthreads();
    return staged;
}

template <int BN, int STAGES>
__device__ __forceinline__ void gate_up(const Routing &routing, const __nv_bfloat16 *w, const __nv_bfloat16 *x,
                                        __nv_bfloat16 *activated) {
    __shared__ float scales[BN];
    __shared__ unsigned tokens[BN];
    dependent_launch();
    dependent_wait();
    const PairTile pairs = find_tile<BN>(routing, blockIdx.y);
    if (pairs.count == 0)
        return;
    if (threadIdx.x < pairs.count) {
        tokens[threadIdx.x] = routing.pairs[pairs.first + threadIdx.x] / routing.per_token;
        scales[threadIdx.x] = routing.scales[tokens[threadIdx.x]];
    }
    __syncthreads();
    const unsigned m0 = blockIdx.x * BM, warp = threadIdx.x / 32, lane = threadIdx.x % 32, hidden = routing.hidden;
    const Shape shape = {routing.stored, hidden, pairs.count, 1};
    const __nv_bfloat16 *matrix = w + (size_t)pairs.expert * routing.stored * hidden;
    const float *staged = sums<BN, STAGES>(shape, [&](unsigned stage, unsigned block) {
        fetch<BM>(stage, matrix, shape.rows, hidden, m0, block * BK);
        fetch_rows<BN>(stage + BM * BK * 2, x, hidden, block * BK,
                       [&](unsigned r) { return r < pairs.count ? x + (size_t)tokens[r] * hidden : nullptr; });
    });
    const GateUp epilogue = {{}, activated, routing.intermediate, 0};
    for (unsigned n = warp; n < pairs.count; n += WARPS) {
        float2 v[1][2];
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float2 sum = *reinterpret_cast<const float2 *>(staged + n * STAGED + 64 * b + 2 * lane);
            v[0][b] = {__fmul_rn(sum.x, scales[n]), __fmul_rn(sum.y, scales[n])};
        }
        const GateUp::Ahead<2> ahead[1] = {};
        epilogue.store<1, 2>(ahead, v, Taken{pairs.first + n, 0, 1}, m0, shape.rows, lane);
    }
}

template <int BN, int STAGES>
__device__ __forceinline__ void down(const Routing &routing, const __nv_bfloat16 *w, const __nv_bfloat16 *activated,
                                     __nv_bfloat16 *given) {
    dependent_launch();
    dependent_wait();
    const PairTile pairs = find_tile<BN>(routing, blockIdx.y);
    if (pairs.count == 0)
        return;
    const unsigned m0 = blockIdx.x * BM, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Shape shape = {routing.hidden, routing.intermediate, pairs.count, 1};
    const __nv_bfloat16 *matrix = w + (size_t)pairs.expert * shape.rows * shape.cols;
    const __nv_bfloat16 *x = activated + (size_t)pairs.first * shape.cols;
    const float *staged = sums<BN, STAGES>(shape, [&](unsigned stage, unsigned block) {
        fetch<BM>(stage, matrix, shape.rows, shape.cols, m0, block * BK);
        fetch<BN>(stage + BM * BK * 2, x, pairs.count, shape.cols, 0, block * BK);
    });
    const Linear epilogue = {given};
    for (unsigned n = warp; n < pairs.count; n += WARPS) {
        float2 v[1][2];
#pragma unroll
        for (int b = 0; b < 2; b++)
            v[0][b] = *reinterpret_cast<const float2 *>(staged + n * STAGED + 64 * b + 2 * lane);
        const Linear::Ahead<2> ahead[1] = {};
        epilogue.store<1, 2>(ahead, v, Taken{routing.pairs[pairs.first + n], 0, 1}, m0, shape.rows, lane);
    }
}

#define PRODUCT(NAME, BODY, BN, STAGES)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                 \
    NAME(Routing routing, const __nv_bfloat16 *w, const __nv_bfloat16 *x, __nv_bfloat16 *out) {                              \
        BODY<BN, STAGES>(routing, w, x, out);                                                                                \
    }

PRODUCT(experts_gate_up_16, gate_up, 16, 4)
PRODUCT(experts_gate_up_32, gate_up, 32, 4)
PRODUCT(experts_gate_up_64, gate_up, 64, 3)
PRODUCT(experts_down_16, down, 16, 4)
PRODUCT(experts_down_32, down, 32, 4)
PRODUCT(experts_down_64, down, 64, 3)

// A warp takes 64 columns of a token.
extern "C" __global__ void __launch_bounds__(THREADS)
experts_combine(Routing routing, const __nv_bfloat16 *given, __nv_bfloat16 *residual, float *sumsq) {
    dependent_launch();
    dependent_wait();
    const unsigned t = blockIdx.x, segment = blockIdx.y * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned hidden = routing.hidden, per_token = routing.per_token, m = 64 * segment + 2 * lane;
    if (64 * segment >= hidden)
        return;
    const size_t first = (size_t)t * per_token;
    float2 sum = {0.0f, 0.0f};
    if (m < hidden && routing.chosen[first] != NOBODY) {
#pragma unroll 8
        for (unsigned j = 0; j < per_token; j++) {
            const float2 y = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(given + (first + j) * hidden + m));
            const float share = routing.shares[first + j];
            sum = {fmaf(share, y.x, sum.x), fmaf(share, y.y, sum.y)};
        }
    }
    float squares[1] = {0.0f};
    if (m < hidden) {
        __nv_bfloat162 *at = reinterpret_cast<__nv_bfloat162 *>(residual + (size_t)t * hidden + m);
        const float2 old = __bfloat1622float2(*at);
        const __nv_bfloat162 now = __floats2bfloat162_rn(old.x + sum.x, old.y + sum.y);
        *at = now;
        const float2 x = __bfloat1622float2(now);
        squares[0] = fmaf(x.x, x.x, __fmul_rn(x.y, x.y));
    }
    warp_sums(squares);
    if (lane == 0)
        sumsq[(size_t)t * ((hidden + 63) / 64) + segment] = squares[0];
}
