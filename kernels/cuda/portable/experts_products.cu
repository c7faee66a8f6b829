// experts_gate_up_*, experts_down_*: the products of a layer's experts on any GPU (experts.cu has what is around them).
//
//   gate_up    activated[place] = silu(gate) * up                            grid (rows / 128, tiles)             block 256
//   down       given[pair] = w x                                             grid (rows / 128, tiles)             block 256
//
// 1. Blocks find their tile by counting tiles: expert by expert, as many as its pairs need. There are blocks for as many as there can be.
// 2. A pair's sums have one order (mma_tile.cuh, one slice).
#include "dependent.cuh"
#include "experts/experts_choose.cuh"
#include "mma_tile.cuh"

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
