// prefill_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y, where tokens are many and the tensor
// cores' time counts.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   tile     64 GROUPS tokens by 128 rows of w, all columns
//   cluster  two blocks, the same tokens by 256 rows: each fetches its rows of w, and half of the tokens for both
//   grid     a block a multiprocessor; a cluster takes tiles c, c + clusters, …, in bands of rows of w, all of a band's for
//            some tokens before the next tokens: the tiles in flight share w in L2, and both leave memory seldom
//   block    128 GROUPS + 128 threads
//
//   warpgroups 0 … GROUPS - 1   multiply 64 tokens each, and take their sums through the epilogue
//   the last, one thread        fetches block of columns after block, tile after tile
//   the last, another warp      looks up what the tokens of the tile ahead need
//
//   fetch ── full/empty of each stage ──> multiply ── epilogue (registers, a warp's own shared memory)
//   look up ── known_full/known_empty ───────────────────^
//
// 1. Each slice is summed from zero, k16 by k16 (wgmma), slices are added in fp32 in their order: gemm_decode.cuh's order.
//    Tokens are the M operand here and the N operand there, which does not matter to a sum, and neither do the tokens beside
//    it.
// 2. A warpgroup has whole heads and whole 64-wide segments of its tokens, so none waits for another in the epilogue. They
//    reach it nearly together all the same: the ring is too short to let one run ahead by an epilogue.
// 3. A stage is free when both blocks' warps have read it, because each block's fetch writes to both.
// 4. Registers are dealt anew at the start: two sets of 64 sums (the slice's and those of the slices before) and the
//    epilogue's values for a multiplying thread, few for the last warpgroup.
#include "dependent.cuh"
#include "hopper.cuh"
#include "place.cuh"
#include "prefill_epilogue.cuh"

constexpr unsigned M = 128, W_BYTES = M * 128, BLOCKS = 2;

template <int GROUPS> struct Plan {
    static constexpr unsigned TOKENS = 64 * GROUPS, X_BYTES = TOKENS * 128, STAGE_BYTES = X_BYTES + W_BYTES;
    static constexpr unsigned STAGES = GROUPS == 2 ? 5 : GROUPS == 3 ? 4 : 3;
    static constexpr unsigned WARPS = 4 * GROUPS, THREADS = 128 * GROUPS + 128;
    // Registers of a thread: 65536 in all.
    static constexpr unsigned MULTIPLIER = GROUPS == 2 ? 232 : GROUPS == 3 ? 152 : 104, OTHER = GROUPS == 2 ? 40 : 56;
};

// Addresses in shared memory: the ring, a piece for each multiplying warp, two tiles' known tokens, barriers.
template <int GROUPS> struct Shared {
    using P = Plan<GROUPS>;
    unsigned ring, full, empty, known_full, known_empty, old;
    Known *known;
    unsigned *slice_ends;

    __device__ __forceinline__ explicit Shared(unsigned char *start) {
        ring = (shared_address(start) + 1023) & ~1023u;
        start += ring - shared_address(start);
        known = reinterpret_cast<Known *>(start + P::STAGES * P::STAGE_BYTES + P::WARPS * WarpTile::BYTES);
        full = shared_address(known + 2 * P::TOKENS);
        empty = full + 8 * P::STAGES;
        known_full = empty + 8 * P::STAGES;
        known_empty = known_full + 16;
        old = known_empty + 16;
        slice_ends = reinterpret_cast<unsigned *>(known + 2 * P::TOKENS) + (2 * P::STAGES + 4 + P::WARPS) * 2;
    }
    __device__ __forceinline__ unsigned stage(unsigned i) const { return ring + i * P::STAGE_BYTES; }
    __device__ __forceinline__ unsigned warp_tile(unsigned warp) const { return stage(P::STAGES) + warp * WarpTile::BYTES; }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < P::STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, BLOCKS * P::WARPS);
        }
        for (unsigned i = 0; i < 2; i++) {
            barrier_init(known_full + 8 * i, 32);
            barrier_init(known_empty + 8 * i, 32 * P::WARPS);
        }
        for (unsigned i = 0; i < P::WARPS; i++)
            barrier_init(old + 8 * i, 1);
        barrier_init_fence();
    }
};

// The tiles of this block in their order.
template <int GROUPS> struct Tiles {
    unsigned tile, m, n; // which, of which 256 rows of w, of which tokens
    unsigned across, down, band;

    // A band is all of w where L2 holds that beside x (24 MiB of 50; the host's choice of kernels draws the same line), else
    // about as many rows as tokens are in flight beside them.
    __device__ __forceinline__ explicit Tiles(const Shape &shape)
        : tile(blockIdx.x / BLOCKS), across((shape.rows + BLOCKS * M - 1) / (BLOCKS * M)),
          down((shape.tokens + Plan<GROUPS>::TOKENS - 1) / Plan<GROUPS>::TOKENS),
          band((size_t)shape.rows * shape.cols * 2 <= 24u << 20 ? across : 8) {
        find();
    }
    __device__ __forceinline__ void find() {
        const unsigned begin = tile / (band * down) * band, within = tile - begin * down, width = min(band, across - begin);
        m = begin + within % width, n = within / width;
    }
    __device__ __forceinline__ bool remain() const { return tile < across * down; }
    __device__ __forceinline__ void advance() {
        tile += gridDim.x / BLOCKS;
        if (remain())
            find();
    }
    __device__ __forceinline__ unsigned row() const { return (m * BLOCKS + cluster_rank()) * M; }
    __device__ __forceinline__ unsigned token() const { return n * Plan<GROUPS>::TOKENS; }
};

template <int GROUPS>
__device__ __forceinline__ void fetch(const Shared<GROUPS> &shared, const TensorMap *w, const TensorMap *x, const Shape &shape) {
    using P = Plan<GROUPS>;
    const unsigned rank = cluster_rank(), half = rank * (P::TOKENS / BLOCKS);
    Place<P::STAGES> position;
    for (Tiles<GROUPS> tiles(shape); tiles.remain(); tiles.advance())
        for (unsigned i = 0; i < shape.blocks(); i++) {
            const unsigned full = shared.full + 8 * position.at, to = shared.stage(position.at);
            barrier_wait(shared.empty + 8 * position.at, position.parity ^ 1); // passes in the first round
            barrier_expect(full, P::STAGE_BYTES);
            bulk_fetch_shared(to + half * 128, x, i * 64, tiles.token() + half, full, EVICT_NORMAL, (1 << BLOCKS) - 1);
            bulk_fetch(to + P::X_BYTES, w, i * 64, tiles.row(), full, EVICT_NORMAL);
            position.advance();
        }
}

// Looks up what is known of each tile's tokens.
template <int GROUPS, class Epilogue>
__device__ __forceinline__ void look_up(const Shared<GROUPS> &shared, const Shape &shape, const Epilogue &epilogue) {
    using P = Plan<GROUPS>;
    Place<2> position;
    for (Tiles<GROUPS> tiles(shape); tiles.remain(); tiles.advance()) {
        barrier_wait(shared.known_empty + 8 * position.at, position.parity ^ 1);
        Known *known = shared.known + position.at * P::TOKENS;
#pragma unroll 1
        for (unsigned n = threadIdx.x % 32; n < P::TOKENS; n += 32) // the last one's where there are no more
            known[n] = look_up(epilogue, min(tiles.token() + n, shape.tokens - 1));
        barrier_arrive(shared.known_full + 8 * position.at);
        position.advance();
    }
}

// Adds the columns' blocks begin .. end to `sum`, from zero.
template <int GROUPS>
__device__ __forceinline__ void multiply_slice(const Shared<GROUPS> &shared, Place<Plan<GROUPS>::STAGES> &position,
                                               unsigned begin, unsigned end, float (&sum)[64]) {
    const unsigned lane = threadIdx.x % 32;
    unsigned before = 0;
#pragma unroll 1
    for (unsigned i = begin; i < end; i++) {
        const unsigned stage = shared.stage(position.at);
        barrier_wait(shared.full + 8 * position.at, position.parity);
        const unsigned long long a = tile_descriptor(stage + threadIdx.x / 128 * 64 * 128);
        const unsigned long long b = tile_descriptor(stage + Plan<GROUPS>::X_BYTES);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma(sum, a + 2 * k, b + 2 * k, i > begin || k > 0);
        wgmma_commit();
        if (i > begin) {
            wgmma_wait<1>(); // the block before is multiplied: its stage is free
            if (lane < BLOCKS)
                barrier_arrive_at(shared.empty + 8 * before, lane);
        }
        before = position.at;
        position.advance();
    }
    wgmma_wait<0>();
    hold(sum);
    if (lane < BLOCKS)
        barrier_arrive_at(shared.empty + 8 * before, lane);
}

// A tile's sums: its slices' in their order. `between` is called once, with the first on its way or done.
template <bool ONE_SLICE, int GROUPS, class Between>
__device__ __forceinline__ void multiply_tile(const Shared<GROUPS> &shared, Place<Plan<GROUPS>::STAGES> &position,
                                              const Shape &shape, float (&total)[64], const Between &between) {
    float sum[64];
#pragma unroll
    for (int i = 0; i < 64; i++)
        total[i] = -0.0f, sum[i] = 0.0f; // -0 + x is x, whatever x is
    for (unsigned slice = 0, begin = 0; slice < (ONE_SLICE ? 1 : shape.slices); slice++) {
        const unsigned end = shared.slice_ends[slice];
        multiply_slice(shared, position, begin, end, sum);
        begin = end;
#pragma unroll
        for (int i = 0; i < 64; i++)
            total[i] = ONE_SLICE ? sum[i] : total[i] + sum[i];
        if (slice == 0)
            between();
    }
}

template <int GROUPS, class Epilogue>
__device__ __forceinline__ void multiply(const Shared<GROUPS> &shared, const TensorMap *out, const Shape &shape,
                                         const Epilogue &epilogue) {
    using P = Plan<GROUPS>;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, old = shared.old + 8 * warp;
    const WarpTile warp_tile = {shared.warp_tile(warp), lane};
    Place<P::STAGES> position;
    Place<2> looked;
    Place<1> fetched;
    for (Tiles<GROUPS> tiles(shape); tiles.remain(); tiles.advance()) {
        const unsigned token = tiles.token() + 16 * warp, count = shape.tokens > token ? shape.tokens - token : 0;
        const Outputs outputs = {warp_tile, out, token, count, tiles.row(), shape.rows};
        float total[64];
        multiply_tile<Epilogue::SLICES == 1>(shared, position, shape, total, [&] { prepare(epilogue, outputs, old); });
        if (Epilogue::SCALED)
            barrier_wait(shared.known_full + 8 * looked.at, looked.parity);
        if (is_added(epilogue))
            barrier_wait(old, fetched.parity);
        finish(epilogue, total, outputs, shared.known + looked.at * P::TOKENS + 16 * warp);
        if (Epilogue::SCALED)
            barrier_arrive(shared.known_empty + 8 * looked.at);
        looked.advance();
        fetched.advance();
    }
    warp_tile.free();
}

template <int GROUPS, class Epilogue>
__device__ __forceinline__ void prefill(const TensorMap *w, const TensorMap *x, const TensorMap *out, const Shape &shape,
                                        const Epilogue &epilogue) {
    using P = Plan<GROUPS>;
    extern __shared__ __align__(1024) unsigned char start[];
    dependent_launch();
    const Shared<GROUPS> shared(start);
    if (threadIdx.x == 0)
        shared.init_barriers();
    if (threadIdx.x < shape.slices)
        shared.slice_ends[threadIdx.x] = shape.slice_begin(threadIdx.x + 1);
    cluster_sync();
    dependent_wait();
    if (threadIdx.x < 128 * GROUPS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(P::MULTIPLIER));
        multiply(shared, out, shape, epilogue);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(P::OTHER));
        if (threadIdx.x == 128 * GROUPS)
            fetch(shared, w, x, shape);
        else if (Epilogue::SCALED && threadIdx.x / 32 == 4 * GROUPS + 1)
            look_up(shared, shape, epilogue);
        __syncwarp();
    }
    cluster_sync(); // what either block has sent to the other's shared memory is there
}

#define PREFILL(NAME, GROUPS, EPILOGUE)                                                                                      \
    extern "C" __global__ void __launch_bounds__(Plan<GROUPS>::THREADS, 1)                                                   \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, EPILOGUE epilogue) {                                                                                   \
        prefill<GROUPS>(&w, &x, &out, shape, epilogue);                                                                      \
    }

PREFILL(prefill_qkv_128, 2, Qkv)
PREFILL(prefill_qkv_192, 3, Qkv)
PREFILL(prefill_residual_128, 2, Residual)
PREFILL(prefill_residual_192, 3, Residual)
PREFILL(prefill_gate_up_128, 2, GateUp)
PREFILL(prefill_gate_up_192, 3, GateUp)
PREFILL(prefill_head_128, 2, Head)
PREFILL(prefill_head_192, 3, Head)
PREFILL(prefill_head_256, 4, Head)
PREFILL(prefill_linear_128, 2, Linear)
