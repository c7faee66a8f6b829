// prefill_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y, where tokens are many and the tensor
// cores' time counts.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   tile     128 rows of w by 160 tokens, all columns; a block takes tiles blockIdx.x, blockIdx.x + gridDim.x, …
//   grid     one block a multiprocessor     block 512 threads, 4 warpgroups
//   shared   4 stages of (128 + 160) * 128 bytes, 160 * 130 floats of sums, barriers, 160 scales: 226 KiB
//   moves    288 * cols * 2 bytes a tile through L2; 640 flop for each 9 bytes
//
//   warpgroup 3, one thread   fetches: w and x, block of columns after block, tile after tile
//   warpgroups 0 and 1        multiply 64 rows each; the tile's sums go to shared memory
//   warpgroup 2               takes the sums through the epilogue, while 0 and 1 multiply the next tile
//
//   fetch ── full/empty of each stage ──> multiply ── summed/taken ──> epilogue
//
// 1. Each slice is summed from zero, k16 by k16 (wgmma), slices are added in fp32 in their order: gemm_decode.cu's order.
//    The tokens beside a token do not matter to its sum.
// 2. Tiles are taken in bands of 8 tiles of tokens, rows of w after rows of w: the tiles in flight share both operands
//    in L2.
// 3. Registers are dealt anew at the start: 192 for a multiplying thread (80 sums of the slice, 80 of the slices before),
//    104 for the epilogue, 24 for the fetch.
#include "dependent.cuh"
#include "epilogue.cuh"
#include "hopper.cuh"

constexpr int M = 128, N = 160, STAGES = 4, BAND = 8;
constexpr int W_BYTES = M * 128, STAGE_BYTES = (M + N) * 128;
constexpr int STAGED = M + 2; // floats between two tokens' sums
constexpr int MULTIPLIERS = 256, STORERS = 128, THREADS = 512;
constexpr int AHEAD = 4; // tokens that a warp of the epilogue has in hand

// Addresses in shared memory.
struct Shared {
    unsigned ring, full, empty, summed, taken;
    float *staged, *scales;

    __device__ __forceinline__ explicit Shared(unsigned char *start) {
        ring = (shared_address(start) + 1023) & ~1023u;
        start += ring - shared_address(start);
        staged = reinterpret_cast<float *>(start + STAGES * STAGE_BYTES);
        scales = staged + N * STAGED;
        full = shared_address(scales + N);
        empty = full + 8 * STAGES;
        summed = empty + 8 * STAGES;
        taken = summed + 8;
    }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, MULTIPLIERS / 32);
        }
        barrier_init(summed, MULTIPLIERS / 32);
        barrier_init(taken, STORERS / 32);
        barrier_init_fence();
    }
};

// Walks the ring, over tiles' ends.
struct Position {
    unsigned at = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++at == STAGES) {
            at = 0;
            parity ^= 1;
        }
    }
};

// The tiles of a product in their order.
struct Tiles {
    unsigned across_m, across_n;

    __device__ __forceinline__ explicit Tiles(const Shape &shape)
        : across_m((shape.rows + M - 1) / M), across_n((shape.tokens + N - 1) / N) {}
    __device__ __forceinline__ unsigned count() const { return across_m * across_n; }
    __device__ __forceinline__ void place(unsigned tile, unsigned &m0, unsigned &n0) const {
        const unsigned first = tile / (across_m * BAND) * BAND, within = tile % (across_m * BAND);
        const unsigned width = across_n - first < BAND ? across_n - first : BAND;
        m0 = within / width * M;
        n0 = (first + within % width) * N;
    }
};

__device__ __forceinline__ void fetch(const Shared &shared, const TensorMap *w, const TensorMap *x, const Shape &shape) {
    const Tiles tiles(shape);
    Position position;
    for (unsigned tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
        unsigned m0, n0;
        tiles.place(tile, m0, n0);
        for (unsigned i = 0; i < shape.blocks(); i++) {
            const unsigned full = shared.full + 8 * position.at, to = shared.ring + position.at * STAGE_BYTES;
            barrier_wait(shared.empty + 8 * position.at, position.parity ^ 1); // passes in the first round
            barrier_expect(full, STAGE_BYTES);
            bulk_fetch(to, w, i * 64, m0, full, EVICT_NORMAL);
            bulk_fetch(to + W_BYTES, x, i * 64, n0, full, EVICT_NORMAL);
            position.advance();
        }
    }
}

// Adds the columns' blocks begin .. end to `sum`, from zero.
__device__ __forceinline__ void multiply_slice(const Shared &shared, Position &position, unsigned begin, unsigned end,
                                               float (&sum)[N / 2]) {
    const bool speaks = threadIdx.x % 32 == 0;
    unsigned before = 0;
    for (unsigned i = begin; i < end; i++) {
        const unsigned stage = shared.ring + position.at * STAGE_BYTES;
        barrier_wait(shared.full + 8 * position.at, position.parity);
        const unsigned long long a = tile_descriptor(stage + threadIdx.x / 128 * 64 * 128);
        const unsigned long long b = tile_descriptor(stage + W_BYTES);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma(sum, a + 2 * k, b + 2 * k, i > begin || k > 0);
        wgmma_commit();
        if (i > begin) {
            wgmma_wait<1>(); // the block before is multiplied: its stage is free
            if (speaks)
                barrier_arrive(shared.empty + 8 * before);
        }
        before = position.at;
        position.advance();
    }
    wgmma_wait<0>();
    hold(sum);
    if (speaks)
        barrier_arrive(shared.empty + 8 * before);
}

__device__ __forceinline__ void multiply(const Shared &shared, const Shape &shape) {
    const Tiles tiles(shape);
    const unsigned lane = threadIdx.x % 32, m = threadIdx.x / 32 * 16 + lane / 4;
    Position position;
    unsigned parity = 1; // passes for the first tile
    float sum[N / 2] = {}, total[N / 2] = {};
    for (unsigned tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
        for (unsigned slice = 0; slice < shape.slices; slice++) {
            multiply_slice(shared, position, shape.slice_begin(slice), shape.slice_begin(slice + 1), sum);
#pragma unroll
            for (int i = 0; i < N / 2; i++)
                total[i] = slice == 0 ? sum[i] : total[i] + sum[i];
        }
        barrier_wait(shared.taken, parity);
        parity ^= 1;
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                shared.staged[(8 * j + lane % 4 * 2 + e % 2) * STAGED + m + e / 2 * 8] = total[4 * j + e];
        __syncwarp();
        if (lane == 0)
            barrier_arrive(shared.summed);
    }
}

// A tile's sums through the epilogue: warp w takes tokens w, w + 4, …, AHEAD of them side by side; what the next ones need
// is on its way meanwhile.
template <class Epilogue>
__device__ __forceinline__ void store_tile(const Shared &shared, const Shape &shape, const Epilogue &epilogue, unsigned m0,
                                           unsigned n0, unsigned parity) {
    const unsigned lane = threadIdx.x % 32;
    const unsigned count = shape.tokens - n0 < N ? shape.tokens - n0 : N;
    unsigned n = threadIdx.x / 32 % 4;
    // Lane l knows the warp's tokens l and l + 32, so that what depends on a token's place is one load away.
    static_assert(N / 4 <= 64, "two tokens a lane");
    typename Epilogue::Where places[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (n + 4 * (lane + 32 * i) < count)
            places[i] = epilogue.where(n0 + n + 4 * (lane + 32 * i));
    const unsigned warp = n;
    typename Epilogue::template Ahead<2> next[AHEAD] = {};
    const auto fetch = [&](unsigned first) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const unsigned token = first + 4 * i, index = (token - warp) / 4;
            if (token < count) {
                const auto place = (index < 32 ? places[0] : places[1]).from_lane(index % 32);
                next[i] = epilogue.template ahead<2>(place, n0 + token, m0, shape.rows, lane);
            }
        }
    };
    fetch(n);
    barrier_wait(shared.summed, parity);
    for (; n < count; n += 4 * AHEAD) {
        typename Epilogue::template Ahead<2> now[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            now[i] = next[i];
        fetch(n + 4 * AHEAD);
        float2 v[AHEAD][2];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const unsigned own = n + 4 * i < count ? n + 4 * i : n;
            const float scale = Epilogue::SCALED ? shared.scales[own] : 1.0f;
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const float2 sum = *reinterpret_cast<const float2 *>(shared.staged + own * STAGED + 2 * lane + 64 * b);
                v[i][b] = {__fmul_rn(sum.x, scale), __fmul_rn(sum.y, scale)};
            }
        }
        const Taken taken = {n0 + n, 4, (count - n + 3) / 4};
        epilogue.template store<AHEAD, 2>(now, v, taken, m0, shape.rows, lane);
    }
}

template <class Epilogue>
__device__ __forceinline__ void store(const Shared &shared, const Shape &shape, const Epilogue &epilogue) {
    const Tiles tiles(shape);
    const unsigned thread = threadIdx.x % STORERS;
    unsigned parity = 0;
    for (unsigned tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
        unsigned m0, n0;
        tiles.place(tile, m0, n0);
        if (Epilogue::SCALED) {
            sync_threads(1, STORERS); // the scales of the tile before were used
            for (unsigned n = thread; n < N && n0 + n < shape.tokens; n += STORERS)
                shared.scales[n] = epilogue.scale(n0 + n);
            sync_threads(1, STORERS);
        }
        store_tile(shared, shape, epilogue, m0, n0, parity);
        parity ^= 1;
        __syncwarp();
        if (thread % 32 == 0)
            barrier_arrive(shared.taken);
    }
}

template <class Epilogue>
__device__ __forceinline__ void prefill(const TensorMap *w, const TensorMap *x, const Shape &shape, const Epilogue &epilogue) {
    extern __shared__ __align__(1024) unsigned char start[];
    dependent_launch();
    const Shared shared(start);
    if (threadIdx.x == 0)
        shared.init_barriers();
    __syncthreads();
    dependent_wait();
    if (threadIdx.x < MULTIPLIERS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
        multiply(shared, shape);
    } else if (threadIdx.x < MULTIPLIERS + STORERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        store(shared, shape, epilogue);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == MULTIPLIERS + STORERS)
            fetch(shared, w, x, shape);
    }
}

#define PREFILL(NAME, EPILOGUE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                 \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Shape shape, EPILOGUE epilogue) {         \
        prefill(&w, &x, shape, epilogue);                                                                                    \
    }

PREFILL(prefill_qkv, Qkv)
PREFILL(prefill_residual, Residual)
PREFILL(prefill_gate_up, GateUp)
PREFILL(prefill_linear, Linear)
PREFILL(prefill_head, Head)
