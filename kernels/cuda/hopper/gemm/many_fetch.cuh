// The warpgroup of gemm_many.cuh that does not multiply: it fetches both operands, and looks up what is known of the tokens.
#pragma once

#include "dependent.cuh"
#include "hopper/gemm/many_tiles.cuh"

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
