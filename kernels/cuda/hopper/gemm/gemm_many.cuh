// How products of many tokens are made (many_*, split_*, joint_* of bf16, rounded_many_* of codes), where the tensor cores' time counts:
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
//   many_plan.cuh    what a kernel is at compile time      many_fetch.cuh      fetch, look up
//   many_tiles.cuh   which tiles a block takes             many_sums.cuh       multiply
//                                                          many_epilogue.cuh   the epilogue
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

#pragma once

#include "dependent.cuh"
#include "hopper/gemm/many_fetch.cuh"
#include "hopper/gemm/many_sums.cuh"
#include "hopper/gemm/split.cuh"

// A multiplying warp's tiles, all columns of each.
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

// The same of slices of tiles, whose epilogue takes no row scale.
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
        fill(sum, 0.0f);
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
        fill(total, -0.0f);
        fill(sum, 0.0f);
        const unsigned last = tiles.last_slice(shape);
#pragma unroll 1
        for (unsigned slice = tiles.first_slice(shape), begin = tiles.begin(shape); slice < last; slice++) {
            const unsigned end = shared.slice_ends[slice];
            multiply_slice(shared, position, begin, end, sum, [&](unsigned block) {
                if (slice + 1 == last && begin + block + 1 == end)
                    open();
            });
            begin = end;
            add_sums(total, sum);
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
