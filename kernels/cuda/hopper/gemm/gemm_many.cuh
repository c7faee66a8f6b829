// How products of many tokens are made (prefill_* of bf16, many_* of codes), where the tensor cores' time counts:
// y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   tile     64 GROUPS tokens by M rows of w, all columns
//   cluster  blocks side by side, so many along the rows, so many along the tokens: each fetches a part of its tokens for all
//            that have the same ones, and a part of its rows of w
//   grid     a block a multiprocessor; a cluster takes tiles c, c + clusters, …, in bands of rows of w, all of a band's for
//            some tokens before the next tokens: the tiles in flight share w in L2, and both leave memory seldom
//   split_*  the same, but a cluster takes a slice of a tile's columns at a time (split.cuh)
//   joint_*  the same, but two blocks of a cluster have half of a tile's columns each (joint.cuh), and a cluster one tile
//   block    128 GROUPS + 128 threads
//
//   warpgroups 0 … GROUPS - 1   multiply 64 tokens each, and take their sums through the epilogue
//   the last, one thread        fetches block of columns after block, tile after tile
//   the last, another warp      looks up what the tokens of the tile ahead need
//
//   fetch ── full/empty of each stage ──> multiply ── epilogue (registers, a warp's own shared memory)
//   look up ── known_full/known_empty ───────────────────^
//
// 1. Each slice is summed from zero, k16 by k16 (wgmma), slices are added in fp32 in pairs, these in pairs: gemm_few.cuh's order. Most
//    products have one.
//    Tokens are the M operand here and the N operand there, which does not matter to a sum, and neither do the tokens beside
//    it.
// 2. A warpgroup has whole heads and whole 64-wide segments of its tokens, so none waits for another in the epilogue. They
//    reach it nearly together all the same: the ring is too short to let one run ahead by an epilogue.
// 3. A stage is free when the warps of all blocks that a block fetches for have read it. One that is not filled again is not released
//    either: so whatever a block sends to another is waited for there before that one ends, and no block waits for the others' end, by
//    which it would wait for its own outputs, too (0.9 us). (Where it is released, they do: COUNTED.)
// 4. Registers are dealt anew at the start: for a multiplying thread up to 128 sums and the epilogue's values, which it asks for while
//    the last columns are multiplied; few for the last warpgroup. Four slices, which are added in pairs, take three sets of 64 sums:
//    two warpgroups have room for them; of three, each thread leaves the first pair's sums in memory (Partials::sums).
// 5. Tensor cores read both operands from shared memory, 128 bytes a cycle. 64 tokens by 128 rows a warpgroup ask for more, 149
//    to 160 with what the copy engine writes; 64 by 256 ask for 128, but their sums leave no registers for a second slice's. So
//    where all columns are one slice, tiles of 256 rows take a fifth less for each product, if there are enough of them.
// 6. What comes through L2 bounds products of 129 to 256 tokens with large matrices: four blocks fetch the least.
// 7. A ring has all the stages that a multiprocessor's shared memory holds: two are always being read, and a block gets its
//    bytes at what is on their way in the others over a latency of 1.4 us.
// 8. Tiles of 144 to 288 rows of gate and up, no multiple of 128, are there for the number of blocks that they make: a round of
//    one a multiprocessor, or two. They leave no room to stage outputs, which go from registers to memory.
#pragma once

#include "dependent.cuh"
#include "hopper/hopper.cuh"
#include "hopper/gemm/joint.cuh"
#include "place.cuh"
#include "hopper/gemm/many_epilogue.cuh"
#include "hopper/gemm/split.cuh"
#include "shape.cuh"

// Both operands are bf16, and that is all; gemm_rounded_many.cu has what is to be said of codes.
struct Words {
    static constexpr bool CODES = false;
    template <class P> static constexpr unsigned SCALE_BYTES = 0; // beside a stage
};

// Bytes in which a warp stages its tokens' outputs of 128 rows of w.
template <class Epilogue> constexpr unsigned STAGED_BYTES = WarpTile::BYTES;
template <> constexpr unsigned STAGED_BYTES<GateUp> = WarpTile::HALF;
template <> constexpr unsigned STAGED_BYTES<RankSums> = 0;

// A block's tile, 64 GROUPS tokens by M rows of w, and a cluster's: so many blocks along the rows, so many along the tokens, and all that
// again for each half of the columns, or once for all of them.
// SPLIT: a cluster takes one of so many slices of a tile at a time; with 1, a whole tile, however many slices it has.
template <int GROUPS_, int M_, int ALONG_ROWS_, int ALONG_TOKENS_, int SPLIT_, class Epilogue, class Operands_ = Words, int HALVES_ = 1>
struct Plan {
    using Operands = Operands_;
    static constexpr unsigned GROUPS = GROUPS_;
    static constexpr unsigned SPLIT = SPLIT_;
    static constexpr unsigned M = M_, TOKENS = 64 * GROUPS, X_BYTES = TOKENS * 128, STAGE_BYTES = X_BYTES + M * 128;
    static constexpr unsigned ALONG_ROWS = ALONG_ROWS_, ALONG_TOKENS = ALONG_TOKENS_, HALVES = HALVES_;
    static constexpr unsigned SIDE = ALONG_ROWS * ALONG_TOKENS, BLOCKS = SIDE * HALVES; // with the same columns, and in all
    // Blocks that need the same tokens or rows as a block does, itself among them.
    static constexpr unsigned SHARERS = ALONG_ROWS + ALONG_TOKENS - 1;
    static constexpr unsigned MULTIPLIERS = 128 * GROUPS, WARPS = 4 * GROUPS;
    // Rows of w that are fetched at once: the copy engine takes 256 at most.
    static constexpr unsigned FETCHED = M / ALONG_TOKENS <= 256 ? M / ALONG_TOKENS : M / ALONG_TOKENS / 2;
    // Outputs of 128 rows of w are staged at a time, in turn, or of 64.
    static constexpr unsigned WIDTH = M == 64 ? 64 : 128;
    static constexpr bool STAGED = M % WIDTH == 0;
    static constexpr unsigned WARP_TILE_BYTES = STAGED ? STAGED_BYTES<Epilogue> * WIDTH / 128 : 0;
    // Tiles whose tokens something is known of: the next one's are looked up while one is finished, but of the widest, whose ring has one
    // stage more for it.
    static constexpr unsigned KNOWN_TILES = M == 256 ? 1 : 2, KNOWN = Epilogue::SCALED ? KNOWN_TILES * TOKENS : 0;
    static constexpr unsigned SCALE_BYTES = Operands::template SCALE_BYTES<Plan>;
    // At a stage's `empty`: a warp's of each sharer.
    static constexpr unsigned ARRIVALS = SHARERS * WARPS;
    // Are stages that are not filled again left alone? Of split tiles, whose slices differ in length, they are released, too.
    static constexpr bool COUNTED = SPLIT == 1;
    // Shared memory of a multiprocessor, and what lies beside the ring: what aligns it to 1024 bytes, outputs and a barrier a warp,
    // known tokens and their four barriers, what halves meet by, the ends of 8 slices.
    static constexpr unsigned SHARED = 227 << 10;
    static constexpr unsigned MEETING = HALVES > 1 ? Meeting<WARPS>::BYTES : 0;
    static constexpr unsigned BESIDE = 1024 + WARPS * (WARP_TILE_BYTES + 8) + KNOWN * sizeof(Known) + 4 * 8 + MEETING + 8 * 4;
    static constexpr unsigned STAGES = (SHARED - BESIDE) / (STAGE_BYTES + SCALE_BYTES + 2 * 8);
    // Stages of w that are asked for before the wait. With more, the first tokens stand in line behind them, 0.7 us where all
    // multiprocessors fetch. (Of codes, all: what fewer give there is not measured.)
    static constexpr unsigned EARLY = Operands::CODES ? STAGES : 3;
    static_assert(EARLY <= STAGES, "no stage is filled twice before it is read");
    // Float4s of each slice on their way when a thread adds them.
    static constexpr unsigned ADDED = GROUPS == 2 && M == 128 ? 8 : 4;
    // Registers of a thread: 65536 in all.
    static constexpr unsigned MULTIPLIER = GROUPS < 3 ? 232 : 152, OTHER = GROUPS < 3 ? 40 : 56;
};

// Addresses in shared memory: the ring, a piece for each multiplying warp, two tiles' known tokens, barriers.
template <class P> struct Shared {
    unsigned ring, full, empty, known_full, known_empty, old;
    Meeting<P::WARPS> meeting;
    Known *known;
    unsigned *slice_ends;

    __device__ __forceinline__ explicit Shared(unsigned char *start) {
        ring = (shared_address(start) + 1023) & ~1023u;
        start += ring - shared_address(start);
        known = reinterpret_cast<Known *>(start + P::STAGES * (P::STAGE_BYTES + P::SCALE_BYTES) + P::WARPS * P::WARP_TILE_BYTES);
        full = shared_address(known + P::KNOWN);
        empty = full + 8 * P::STAGES;
        known_full = empty + 8 * P::STAGES;
        known_empty = known_full + 16;
        old = known_empty + 16;
        meeting = {old + 8 * P::WARPS};
        slice_ends = reinterpret_cast<unsigned *>(known + P::KNOWN) + (2 * P::STAGES + 4 + P::WARPS) * 2 + P::MEETING / 4;
    }
    __device__ __forceinline__ unsigned stage(unsigned i) const { return ring + i * P::STAGE_BYTES; }
    __device__ __forceinline__ unsigned scales(unsigned i) const { return warp_tile(P::WARPS) + i * P::SCALE_BYTES; }
    __device__ __forceinline__ unsigned warp_tile(unsigned warp) const { return stage(P::STAGES) + warp * P::WARP_TILE_BYTES; }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < P::STAGES; i++) {
            barrier_init(full + 8 * i, P::SCALE_BYTES > 0 ? 33 : 1); // a warp's lanes fetch scales
            barrier_init(empty + 8 * i, P::ARRIVALS);
        }
        for (unsigned i = 0; i < 2; i++) {
            barrier_init(known_full + 8 * i, 32);
            barrier_init(known_empty + 8 * i, 32 * P::WARPS);
        }
        for (unsigned i = 0; i < P::WARPS; i++)
            barrier_init(old + 8 * i, 1);
        if (P::HALVES > 1)
            meeting.init_barriers();
        barrier_init_fence();
    }
};

// Of the blocks that have the same columns, which one this is.
template <class P> __device__ __forceinline__ unsigned side_rank() {
    return P::HALVES > 1 ? cluster_rank() % P::SIDE : cluster_rank();
}

// The tiles of this block in their order. Of split ones each slice is a tile to itself, beside the other slices of its rows.
template <class P> struct Tiles {
    static constexpr unsigned ROWS = P::ALONG_ROWS * P::M, TOKENS = P::ALONG_TOKENS * P::TOKENS;
    unsigned tile, m, n; // which, of which rows of w (and slice), of which tokens
    unsigned across, down, band;

    // A band is all of w where L2 holds that beside x (24 MiB of 50; the host's choice of kernels draws the same line), else
    // about as many rows as tokens are in flight beside them.
    __device__ __forceinline__ explicit Tiles(const Shape &shape)
        : tile(blockIdx.x / P::BLOCKS), across((shape.rows + ROWS - 1) / ROWS * P::SPLIT),
          down((shape.tokens + TOKENS - 1) / TOKENS),
          band((size_t)shape.rows * shape.cols * 2 <= 24u << 20 ? across : 8) {
        find();
    }
    __device__ __forceinline__ void find() {
        const unsigned begin = tile / (band * down) * band, within = tile - begin * down, width = min(band, across - begin);
        m = begin + within % width, n = within / width;
    }
    __device__ __forceinline__ bool remain() const { return tile < across * down; }
    __device__ __forceinline__ void advance() {
        tile += gridDim.x / P::BLOCKS;
        if (remain())
            find();
    }
    // Has it found by here.
    __device__ __forceinline__ void hold() { asm volatile("" : "+r"(tile), "+r"(m), "+r"(n)); }
    // How many there are yet, this one among them.
    __device__ __forceinline__ unsigned left() const {
        const unsigned step = gridDim.x / P::BLOCKS;
        return (across * down - tile + step - 1) / step;
    }
    __device__ __forceinline__ unsigned row() const { return m / P::SPLIT * ROWS + cluster_rank() % P::ALONG_ROWS * P::M; }
    __device__ __forceinline__ unsigned token() const { return n * TOKENS + side_rank<P>() / P::ALONG_ROWS * P::TOKENS; }
    __device__ __forceinline__ unsigned slice() const { return m % P::SPLIT; }
    // Which of all tiles of rows and tokens.
    __device__ __forceinline__ unsigned whole() const { return n * (across / P::SPLIT) + m / P::SPLIT; }
    // The block's slices of the columns, and the blocks of these.
    __device__ __forceinline__ unsigned first_slice(const Shape &shape) const {
        return P::HALVES > 1 ? cluster_rank() / P::SIDE * (shape.slices / P::HALVES) : P::SPLIT > 1 ? slice() : 0;
    }
    __device__ __forceinline__ unsigned last_slice(const Shape &shape) const {
        return P::HALVES > 1 ? first_slice(shape) + shape.slices / P::HALVES : P::SPLIT > 1 ? slice() + 1 : shape.slices;
    }
    __device__ __forceinline__ unsigned begin(const Shape &shape) const {
        return P::SPLIT * P::HALVES > 1 ? shape.slice_begin(first_slice(shape)) : 0;
    }
    __device__ __forceinline__ unsigned end(const Shape &shape) const {
        return P::SPLIT * P::HALVES > 1 ? shape.slice_begin(last_slice(shape)) : shape.blocks();
    }
};

// Where a multiplying warp is in the ring, and how many stages will yet be filled again.
template <class P> struct Turn : Place<P::STAGES> {
    unsigned refills = 0;

    __device__ __forceinline__ explicit Turn(const Shape &shape) {
        const Tiles<P> tiles(shape);
        const unsigned blocks = tiles.left() * (tiles.end(shape) - tiles.begin(shape));
        if (P::COUNTED && blocks > P::STAGES)
            refills = blocks - P::STAGES;
    }
    // A warp's call, of which each lane has one of the sharers: the stage may be filled again, if that is to happen.
    __device__ __forceinline__ void release(unsigned empty, unsigned lane, unsigned sharer) {
        if (lane < P::SHARERS && (!P::COUNTED || refills > 0))
            barrier_arrive_at(empty, sharer);
        refills -= refills > 0;
    }
};

// Fetches a box for the SHARERS blocks of these ranks.
template <unsigned SHARERS>
__device__ __forceinline__ void fetch_part(unsigned to, const TensorMap *map, unsigned col, unsigned row, unsigned barrier,
                                           unsigned long long policy, unsigned short ranks) {
    if (SHARERS == 1)
        bulk_fetch(to, map, col, row, barrier, policy);
    else
        bulk_fetch_shared(to, map, col, row, barrier, policy, ranks);
}

// What the kernel before wrote is x alone: the first stages of w are on their way before the wait for that kernel.
template <class P>
__device__ __forceinline__ void fetch(const Shared<P> &shared, const TensorMap *w, const TensorMap *x, const Shape &shape) {
    const unsigned r = cluster_rank() % P::ALONG_ROWS, t = side_rank<P>() / P::ALONG_ROWS;
    const unsigned side = P::HALVES > 1 ? cluster_rank() / P::SIDE * P::SIDE : 0; // the first that has the same columns
    const unsigned x_part = r * (P::TOKENS / P::ALONG_ROWS), w_part = t * (P::M / P::ALONG_TOKENS);
    const unsigned short same_tokens = ((1 << P::ALONG_ROWS) - 1) << (side + t * P::ALONG_ROWS);
    const unsigned short same_rows = (P::ALONG_TOKENS == 2 ? 1 | 1 << P::ALONG_ROWS : 1) << (side + r);
    Tiles<P> tiles(shape);
    // Rows of w that one cluster reads, nobody reads again: what is written stays in L2 instead.
    const unsigned long long policy = tiles.down == 1 ? EVICT_FIRST : EVICT_NORMAL;
    const auto fetch_w = [&](unsigned at, unsigned i) {
        barrier_expect(shared.full + 8 * at, P::STAGE_BYTES);
#pragma unroll
        for (unsigned row = w_part; row < w_part + P::M / P::ALONG_TOKENS; row += P::FETCHED)
            fetch_part<P::ALONG_TOKENS>(shared.stage(at) + P::X_BYTES + row * 128, w, i * 64, tiles.row() + row,
                                        shared.full + 8 * at, policy, same_rows);
    };
    const auto fetch_x = [&](unsigned at, unsigned i) {
        fetch_part<P::ALONG_ROWS>(shared.stage(at) + x_part * 128, x, i * 64, tiles.token() + x_part, shared.full + 8 * at,
                                  EVICT_NORMAL, same_tokens);
    };
    const unsigned first = tiles.begin(shape);
    unsigned ahead = min(P::EARLY, tiles.end(shape) - first);
    for (unsigned i = 0; i < ahead; i++)
        fetch_w(i, first + i);
    dependent_wait();
    Place<P::STAGES> position;
    for (unsigned i = 0; i < ahead; i++) {
        fetch_x(i, first + i);
        position.advance();
    }
    for (; tiles.remain(); tiles.advance(), ahead = 0)
        for (unsigned i = tiles.begin(shape) + ahead; i < tiles.end(shape); i++) {
            barrier_wait(shared.empty + 8 * position.at, position.parity ^ 1); // passes in the first round
            fetch_w(position.at, i);
            fetch_x(position.at, i);
            position.advance();
        }
}

// Looks up what is known of each tile's tokens.
template <class P, class Epilogue>
__device__ __forceinline__ void look_up(const Shared<P> &shared, const Shape &shape, const Epilogue &epilogue) {
    dependent_wait();
    Place<P::KNOWN_TILES> position;
    for (Tiles<P> tiles(shape); tiles.remain(); tiles.advance()) {
        barrier_wait(shared.known_empty + 8 * position.at, position.parity ^ 1);
        Known *known = shared.known + position.at * P::TOKENS;
#pragma unroll 1
        for (unsigned n = threadIdx.x % 32; n < P::TOKENS; n += 32) // the last one's where there are no more
            known[n] = look_up(epilogue, min(tiles.token() + n, shape.tokens - 1));
        barrier_arrive(shared.known_full + 8 * position.at);
        position.advance();
    }
}

// What a warp does while a block's products are on their way.
struct Nothing {
    __device__ __forceinline__ void operator()(unsigned) const {}
};

// Adds the next block of columns to `sum`, or begins it, and lets go of the block before, once that is multiplied: of stage `before`,
// which becomes this one's. `meanwhile` is called with the products on their way.
template <class P, class Meanwhile>
__device__ __forceinline__ void multiply_block(const Shared<P> &shared, Turn<P> &position, bool is_first, unsigned &before,
                                               float (&sum)[P::M / 2], const Meanwhile &meanwhile) {
    const unsigned lane = threadIdx.x % 32, sharer = cluster_rank() ^ lane; // of clusters with two a side
    const unsigned stage = shared.stage(position.at);
    barrier_wait(shared.full + 8 * position.at, position.parity);
    const unsigned long long a = tile_descriptor(stage + threadIdx.x / 128 * 64 * 128);
    const unsigned long long b = tile_descriptor(stage + P::X_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++)
        wgmma(sum, a + 2 * k, b + 2 * k, !is_first || k > 0);
    wgmma_commit();
    meanwhile();
    if (!is_first) {
        wgmma_wait<1>();
        position.release(shared.empty + 8 * before, lane, sharer);
    }
    before = position.at;
    position.advance();
}

// All products are made: the last stage is free, too.
template <class P>
__device__ __forceinline__ void end_products(const Shared<P> &shared, Turn<P> &position, unsigned before, float (&sum)[P::M / 2]) {
    const unsigned lane = threadIdx.x % 32;
    wgmma_wait<0>();
    hold(sum);
    position.release(shared.empty + 8 * before, lane, cluster_rank() ^ lane);
}

// Makes `sum` that of the columns' blocks begin .. end. `meanwhile` is called with the number of each.
template <class P, class Meanwhile = Nothing>
__device__ __forceinline__ void multiply_slice(const Shared<P> &shared, Turn<P> &position, unsigned begin,
                                               unsigned end, float (&sum)[P::M / 2], const Meanwhile &meanwhile = {}) {
    unsigned before = 0;
#pragma unroll 1
    for (unsigned i = begin; i < end; i++)
        multiply_block(shared, position, i == begin, before, sum, [&] { meanwhile(i - begin); });
    end_products(shared, position, before, sum);
}

// A tile's sums of all columns. `at_last` is called with the last products on their way.
template <class P, class AtLast>
__device__ __forceinline__ void multiply_whole(const Shared<P> &shared, Turn<P> &position, const Shape &shape,
                                               float (&sum)[P::M / 2], const AtLast &at_last) {
#pragma unroll
    for (int i = 0; i < P::M / 2; i++)
        sum[i] = 0.0f;
    const unsigned last = shape.blocks() - 1;
    unsigned before = 0;
#pragma unroll 1
    for (unsigned i = 0; i < last; i++)
        multiply_block(shared, position, i == 0, before, sum, [] {});
    multiply_block(shared, position, last == 0, before, sum, at_last);
    end_products(shared, position, before, sum);
}

// A tile's sums of several slices, added in their order. `between` is called once, with the first on its way or done.
template <class P, class Between>
__device__ __forceinline__ void multiply_tile(const Shared<P> &shared, Turn<P> &position, const Shape &shape,
                                              float (&total)[P::M / 2], const Between &between) {
    float sum[P::M / 2];
#pragma unroll
    for (int i = 0; i < P::M / 2; i++)
        total[i] = -0.0f, sum[i] = 0.0f; // -0 + x is x, whatever x is
    for (unsigned slice = 0, begin = 0; slice < shape.slices; slice++) {
        const unsigned end = shared.slice_ends[slice];
        multiply_slice(shared, position, begin, end, sum);
        begin = end;
#pragma unroll
        for (int i = 0; i < P::M / 2; i++)
            total[i] += sum[i];
        if (slice == 0)
            between();
    }
}

// The same of up to four slices: each pair's sums are added, then the pairs', for which three sets of sums are at hand.
template <class P, class Between>
__device__ __forceinline__ void multiply_pairs(const Shared<P> &shared, Turn<P> &position, const Shape &shape,
                                               float (&total)[P::M / 2], const Between &between) {
    float left[P::M / 2], right[P::M / 2];
#pragma unroll
    for (int i = 0; i < P::M / 2; i++)
        total[i] = -0.0f, left[i] = 0.0f, right[i] = 0.0f;
    for (unsigned slice = 0, begin = 0; slice < shape.slices; slice += 2) {
        unsigned end = shared.slice_ends[slice];
        multiply_slice(shared, position, begin, end, left);
        begin = end;
        if (slice == 0)
            between();
        if (shape.slices > 1) {
            end = shared.slice_ends[slice + 1];
            multiply_slice(shared, position, begin, end, right);
            begin = end;
#pragma unroll
            for (int i = 0; i < P::M / 2; i++)
                left[i] += right[i];
        }
#pragma unroll
        for (int i = 0; i < P::M / 2; i++)
            total[i] += left[i];
    }
}

// The same where registers hold two sets: the first pair's sums go out to `aside`, a lane's place in memory, while the third slice
// is multiplied, a quarter of them with each of its first four blocks of columns, and are added when the second pair's are there.
template <class P, class Between>
__device__ __forceinline__ void multiply_aside(const Shared<P> &shared, Turn<P> &position, const Shape &shape,
                                               float (&total)[P::M / 2], float4 *aside, const Between &between) {
    constexpr unsigned FOURS = P::M / 8, QUARTER = FOURS / 4;
    float sum[P::M / 2];
#pragma unroll
    for (int i = 0; i < P::M / 2; i++)
        total[i] = -0.0f, sum[i] = 0.0f;
#pragma unroll 1
    for (unsigned slice = 0, begin = 0; slice < shape.slices; slice++) {
        const unsigned end = shared.slice_ends[slice];
        multiply_slice(shared, position, begin, end, sum, [&](unsigned block) {
            if (slice != 2)
                return;
#pragma unroll
            for (int q = 0; q < 4; q++)
                if (block == q)
#pragma unroll
                    for (int i = q * QUARTER; i < (q + 1) * QUARTER; i++)
                        __stcg(aside + 32 * i, make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]));
        });
        begin = end;
        if (slice == 0)
            between();
#pragma unroll
        for (int i = 0; i < P::M / 2; i++)
            total[i] = (slice == 2 ? -0.0f : total[i]) + sum[i];
    }
    if (shape.slices > 2)
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const float4 pair = __ldcg(aside + 32 * i);
            total[4 * i] += pair.x, total[4 * i + 1] += pair.y, total[4 * i + 2] += pair.z, total[4 * i + 3] += pair.w;
        }
}

template <class P, class Epilogue, class Operands>
__device__ __forceinline__ void multiply(const Shared<P> &shared, const TensorMap *out, const Shape &shape,
                                         const Epilogue &epilogue, const Partials &partials, const Operands &operands) {
    static_assert(P::WIDTH == 128, "outputs leave 128 rows of w at a time; tiles of 64 are split");
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, old = shared.old + 8 * warp;
    const WarpTile warp_tile = {shared.warp_tile(warp), lane};
    Turn<P> position(shape);
    dependent_wait();
    constexpr bool IN_SLICES = Operands::CODES || (Epilogue::SLICES > 1 && P::M == 128);
    Place<P::KNOWN_TILES> looked;
    Place<1> fetched;
    for (Tiles<P> tiles(shape); tiles.remain();) {
        const unsigned token = tiles.token() + 16 * warp, count = shape.tokens > token ? shape.tokens - token : 0;
        Outputs outputs = {warp_tile, out, token, count, tiles.row(), shape.rows};
        float total[P::M / 2];
        const auto between = [&] { prepare<P::WIDTH>(epilogue, outputs, old); };
        // Asked for while the last columns are multiplied: what the tile's tokens need, and which tile is next, which takes divisions.
        const Known *known = shared.known + looked.at * P::TOKENS + 16 * warp;
        Ahead<Epilogue> ahead;
        const auto know = [&] {
            if (Epilogue::SCALED)
                barrier_wait(shared.known_full + 8 * looked.at, looked.parity);
        };
        if constexpr (Operands::CODES)
            multiply_codes_tile(shared, operands, position, shape, total, between);
        else if constexpr (Epilogue::SLICES > 2 && P::GROUPS > 2)
            multiply_aside(shared, position, shape, total,
                           partials.sums + (blockIdx.x * P::WARPS + warp) * (P::M / 8 * 32) + lane, between);
        else if constexpr (Epilogue::SLICES > 2)
            multiply_pairs(shared, position, shape, total, between);
        else if constexpr (IN_SLICES)
            multiply_tile(shared, position, shape, total, between);
        else
            multiply_whole(shared, position, shape, total, [&] {
                know();
                ahead.fetch(epilogue, known, lane);
                tiles.advance();
                tiles.hold();
            });
        if constexpr (IN_SLICES) {
            know();
            ahead.fetch(epilogue, known, lane);
            tiles.advance();
        }
        if (is_added(epilogue))
            barrier_wait(old, fetched.parity);
        if constexpr (P::STAGED) {
#pragma unroll
            for (unsigned i = 0; i < P::M / 128; i++) {
                float y[64];
#pragma unroll
                for (int j = 0; j < 64; j++)
                    y[j] = total[64 * i + j];
                finish(epilogue, y, outputs, known, ahead);
                outputs.m0 += 128;
            }
        } else {
            finish_unstaged(epilogue, total, outputs, known);
        }
        if (Epilogue::SCALED)
            barrier_arrive(shared.known_empty + 8 * looked.at);
        looked.advance();
        fetched.advance();
    }
    warp_tile.free();
}

// The same for slices of tiles, whose epilogue takes no row scale.
template <class P, class Epilogue, class Operands>
__device__ __forceinline__ void multiply_slices(const Shared<P> &shared, const TensorMap *out, const Shape &shape,
                                                const Epilogue &epilogue, const Partials &partials, const Operands &operands) {
    static_assert(!Epilogue::SCALED, "of the products with a split sum");
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, old = shared.old + 8 * warp;
    const WarpTile warp_tile = {shared.warp_tile(warp), lane};
    dependent_wait();
    Turn<P> position(shape);
    Place<1> fetched;
    for (Tiles<P> tiles(shape); tiles.remain(); tiles.advance()) {
        const unsigned token = tiles.token() + 16 * warp, count = shape.tokens > token ? shape.tokens - token : 0;
        const Slices<P::SPLIT, P::M / 2, P::BLOCKS * P::WARPS> slices(partials, tiles.whole(), cluster_rank() * P::WARPS + warp);
        Outputs outputs = {warp_tile, out, token, count, tiles.row(), shape.rows};
        float sum[P::M / 2];
#pragma unroll
        for (int i = 0; i < P::M / 2; i++)
            sum[i] = 0.0f;
        if constexpr (Operands::CODES)
            multiply_codes(shared, operands, position, tiles.begin(shape), tiles.end(shape), sum, [] {});
        else
            multiply_slice(shared, position, tiles.begin(shape), tiles.end(shape), sum);
        if (count == 0 || outputs.m0 >= shape.rows)
            continue;
        slices.store(tiles.slice(), sum);
        if (!slices.arrives_last())
            continue;
#pragma unroll 1
        for (unsigned i = 0; i < P::M / P::WIDTH; i++, outputs.m0 += P::WIDTH) {
            float y[P::WIDTH / 2];
            prepare<P::WIDTH>(epilogue, outputs, old);
            slices.template add<P::ADDED>(y, P::WIDTH / 2 * i);
            if (is_added(epilogue))
                barrier_wait(old, fetched.parity);
            fetched.advance();
            finish(epilogue, y, outputs, shared.known);
        }
    }
    warp_tile.free();
}

// One tile, of whose columns the block has half; of a warp's sums, when both halves have met, it has those of 64 of 128 rows.
template <class P, class Epilogue, class Operands>
__device__ __forceinline__ void multiply_half(const Shared<P> &shared, const TensorMap *out, const Shape &shape, const Epilogue &epilogue,
                                              const Operands &operands) {
    static_assert(!Epilogue::SCALED && P::M == 128, "of the products with a split sum");
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, old = shared.old + 8 * warp;
    const unsigned half = cluster_rank() / P::SIDE, other = cluster_rank() ^ P::SIDE;
    const WarpTile warp_tile = {shared.warp_tile(warp), lane};
    const Tiles<P> tiles(shape);
    const unsigned token = tiles.token() + 16 * warp, count = shape.tokens > token ? shape.tokens - token : 0;
    const Outputs outputs = {warp_tile, out, token, count, tiles.row() + 64 * half, shape.rows};
    dependent_wait();
    prepare<64>(epilogue, outputs, old);
    Turn<P> position(shape);
    float total[P::M / 2], sum[P::M / 2];
    const auto open = [&] { shared.meeting.open(other); }; // all but the last two blocks are multiplied
    if constexpr (Operands::CODES) {
        multiply_codes(shared, operands, position, tiles.begin(shape), tiles.end(shape), total, open);
    } else {
#pragma unroll
        for (int i = 0; i < P::M / 2; i++)
            total[i] = -0.0f, sum[i] = 0.0f;
        const unsigned last = tiles.last_slice(shape);
#pragma unroll 1
        for (unsigned slice = tiles.first_slice(shape), begin = tiles.begin(shape); slice < last; slice++) {
            const unsigned end = shared.slice_ends[slice];
            multiply_slice(shared, position, begin, end, sum, [&](unsigned block) {
                if (slice + 1 == last && begin + block + 1 == end)
                    open();
            });
            begin = end;
#pragma unroll
            for (int i = 0; i < P::M / 2; i++)
                total[i] += sum[i];
        }
    }
    // The sums lie over the stage of the last block but two, which is idle by then, and over one before it.
    const auto place = [&](unsigned half) {
        const unsigned slices = shape.slices / 2, blocks = shape.slice_begin((half + 1) * slices) - shape.slice_begin(half * slices);
        constexpr unsigned WARPS = P::STAGE_BYTES / Meeting<P::WARPS>::SUMS;
        static_assert(P::STAGES >= 3 + (P::WARPS - 1) / WARPS, "no stage that sums lie over is filled again");
        return shared.stage((blocks + P::STAGES - 3 - warp / WARPS) % P::STAGES) + warp % WARPS * Meeting<P::WARPS>::SUMS;
    };
    float y[P::M / 4];
    shared.meeting.swap(total, y, half, place(half), place(1 - half), other);
    if (is_added(epilogue))
        barrier_wait(old, 0);
    finish(epilogue, y, outputs, shared.known);
    warp_tile.free();
}

template <class P, class Epilogue, class Operands>
__device__ __forceinline__ void multiply_many(const TensorMap *w, const TensorMap *x, const TensorMap *out, const Shape &shape,
                                        const Epilogue &epilogue, const Partials &partials, const Operands &operands) {
    extern __shared__ __align__(1024) unsigned char start[];
    dependent_launch();
    const Shared<P> shared(start);
    if (threadIdx.x == 0)
        shared.init_barriers();
    if (threadIdx.x < shape.slices)
        shared.slice_ends[threadIdx.x] = shape.slice_begin(threadIdx.x + 1);
    cluster_sync();
    if (threadIdx.x < P::MULTIPLIERS) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(P::MULTIPLIER));
        if constexpr (P::HALVES > 1)
            multiply_half(shared, out, shape, epilogue, operands);
        else if constexpr (P::SPLIT > 1)
            multiply_slices(shared, out, shape, epilogue, partials, operands);
        else
            multiply(shared, out, shape, epilogue, partials, operands);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(P::OTHER));
        if (threadIdx.x == P::MULTIPLIERS)
            fetch(shared, w, x, shape);
        else if (Epilogue::SCALED && threadIdx.x / 32 == P::WARPS + 1)
            look_up(shared, shape, epilogue);
        if constexpr (Operands::CODES)
            if (threadIdx.x / 32 == P::WARPS + 2)
                operands.fetch(shared, shape);
        __syncwarp();
    }
    if (!P::COUNTED)
        cluster_sync(); // what blocks have sent to each other's shared memory is there
}

