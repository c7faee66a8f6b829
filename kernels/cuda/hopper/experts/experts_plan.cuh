// Which pairs and which rows of w a block of an expert product takes: counted from how many pairs each expert has.
//
//   pairs    a token and one of its experts; expert e's have the places begins[e] .. begins[e + 1]
//   tiles    of up to PAIRS pairs of one expert, all but the last as many; expert e's have the numbers tiles[e] .. tiles[e + 1]
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

// STEP: by which tiles are multiplied. An expert's are about equal, for a small one costs more than its share.
template <int PAIRS_, int STEP_> struct ExpertPlan {
    static constexpr unsigned PAIRS = PAIRS_, STEP = STEP_, EXPERTS_MAX = 256;
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
        const unsigned pairs = begins[expert + 1] - begins[expert], count = tiles[expert + 1] - tiles[expert];
        const unsigned each = (pairs + count * STEP - 1) / (count * STEP) * STEP; // PAIRS at most
        const unsigned first = begins[expert] + (tile - tiles[expert]) * each, left = begins[expert + 1] - first;
        return {expert, first, left < each ? left : each, number % across, count};
    }
};
