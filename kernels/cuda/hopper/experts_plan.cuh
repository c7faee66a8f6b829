// Which pairs and which rows of w a block of an expert product takes: counted from how many pairs each expert has.
//
//   pairs    a token and one of its experts; expert e's have the places begins[e] .. begins[e + 1]
//   tiles    of PAIRS pairs of one expert; expert e's have the numbers tiles[e] .. tiles[e + 1]
//   unit u   tile u / across, rows u % across of its expert's matrix: who has the same pairs runs side by side, and behind them
//            who has the same rows
//
// 1. An expert without pairs has no tile, so its matrix is not read. All pairs are in a tile, so none is dropped.
// 2. Plain C++ but for the qualifiers: kernels/tests/plan.rs has it compiled for the host and counts.
#pragma once

// A unit of work; `tiles` of its expert.
struct Unit {
    unsigned expert, first, count, rows, tiles;
};

template <int PAIRS_> struct ExpertPlan {
    static constexpr unsigned PAIRS = PAIRS_, EXPERTS_MAX = 256;
    unsigned begins[EXPERTS_MAX + 1], tiles[EXPERTS_MAX + 1];
    unsigned experts, across;

    __device__ __forceinline__ static unsigned tiles_of(unsigned pairs) { return (pairs + PAIRS - 1) / PAIRS; }

    __device__ __forceinline__ unsigned units() const { return tiles[experts] * across; }

    // Below `units()`.
    __device__ __forceinline__ Unit unit(unsigned number) const {
        const unsigned tile = number / across;
        unsigned expert = 0, end = experts; // the last one whose tiles begin at `tile` or before it: it has that tile
        while (end - expert > 1) {
            const unsigned middle = (expert + end) / 2;
            if (tiles[middle] <= tile)
                expert = middle;
            else
                end = middle;
        }
        const unsigned first = begins[expert] + (tile - tiles[expert]) * PAIRS, left = begins[expert + 1] - first;
        return {expert, first, left < PAIRS ? left : PAIRS, number % across, tiles[expert + 1] - tiles[expert]};
    }
};
