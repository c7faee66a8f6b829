// Sums that go to the ranks which add them up (epilogue.cuh).
#pragma once
#include "epilogue/taken.cuh"
#include "exchange/inbox.cuh"
#include "segment.cuh"

// What a rank has of o's or down's sums, for who adds them up (exchange.cuh): a product's own stores carry them to the other ranks while
// it multiplies the next tile.
//
//   shared    segments of outputs in tiles of 16, [tokens, segments_of(rows)] in a row; tile i is for rank i % ranks, which has those
//             that are for it one behind the other
//   else      all of them are for every rank
struct RankSums {
    float *to[8]; // by rank: where its ones go, in its inbox; at this rank's own place, in its memory
    unsigned ranks, ranks_log2, shared, reserved;
    static constexpr bool SCALED = false;
    static constexpr int SLICES = 2; // at most: a rank of two has half of Residual's
    static constexpr bool EARLY = false; // does `ahead` read nothing that a kernel of this step's layers wrote?

    __device__ __forceinline__ float scale(unsigned) const { return 1.0f; }
    using Where = Nowhere;
    __device__ __forceinline__ Where where(unsigned) const { return {}; }

    template <int BLOCKS> struct Ahead {};

    template <int BLOCKS>
    __device__ __forceinline__ Ahead<BLOCKS> ahead(Where, unsigned, unsigned, unsigned, unsigned) const { return {}; }

    // Where a segment goes to.
    struct Segment {
        size_t at; // in floats
        unsigned owner;
    };

    __device__ __forceinline__ Segment segment(unsigned token, unsigned m, unsigned rows) const {
        const unsigned index = token * segments_of(rows) + m / SEGMENT;
        if (!shared)
            return {(size_t)index * SEGMENT, 0};
        const unsigned tile = index / 16;
        return {(size_t)((tile >> ranks_log2) * 16 + index % 16) * SEGMENT, tile & (ranks - 1)};
    }

    // Stores outputs `within` and the next of a segment.
    __device__ __forceinline__ void put(const Segment &segment, unsigned within, float2 y) const {
        const float2 sent = {sendable(y.x), sendable(y.y)};
#pragma unroll
        for (unsigned rank = 0; rank < 8; rank++)
            if (rank < ranks && (!shared || segment.owner == rank))
                push(reinterpret_cast<float2 *>(to[rank] + segment.at + within), sent);
    }

    template <int T, int BLOCKS>
    __device__ __forceinline__ void store(const Ahead<BLOCKS> (&)[T], float2 (&v)[T][BLOCKS], const Taken &taken, unsigned m0,
                                          unsigned rows, unsigned lane) const {
#pragma unroll
        for (int i = 0; i < T; i++) {
            if (i >= taken.count)
                break;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
                if (m0 + 64 * b + 2 * lane < rows)
                    put(segment(taken.token(i), m0 + 64 * b, rows), 2 * lane, v[i][b]);
        }
    }
};
