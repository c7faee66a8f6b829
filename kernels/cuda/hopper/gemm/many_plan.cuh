// A kernel of gemm_many.cuh at compile time: its tile, its cluster, its registers, and where things lie in shared memory.
#pragma once

#include "hopper/gemm/joint.cuh"
#include "hopper/gemm/many_epilogue.cuh"
#include "hopper/hopper.cuh"

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
