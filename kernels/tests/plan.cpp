// Compiled by plan.rs beside it: experts_plan.cuh on the host, over random and extreme counts.
#define __device__
#define __forceinline__ inline
#include "hopper/experts/experts_plan.cuh"

#include <cstdio>
#include <random>
#include <vector>

static std::mt19937 random_bits(1);

static unsigned below(unsigned bound) { return random_bits() % bound; }

// Is every pair multiplied with every row tile of its expert's, once, by the block whose number comes round?
template <int PAIRS, int STEP> static bool holds(const std::vector<unsigned> &counts, unsigned across, unsigned blocks) {
    static ExpertPlan<PAIRS, STEP> plan;
    plan.experts = counts.size(), plan.across = across;
    plan.begins[0] = plan.tiles[0] = 0;
    for (unsigned e = 0; e < counts.size(); e++) {
        plan.begins[e + 1] = plan.begins[e] + counts[e];
        plan.tiles[e + 1] = plan.tiles[e] + plan.tiles_of(counts[e]);
    }
    const unsigned pairs = plan.begins[counts.size()];
    std::vector<unsigned> seen(pairs * across);
    for (unsigned block = 0; block < blocks; block++)
        for (unsigned number = block; number < plan.units(); number += blocks) {
            const Unit unit = plan.unit(number);
            if (unit.expert >= counts.size() || unit.count == 0 || unit.count > PAIRS || unit.rows >= across)
                return false;
            if (unit.first < plan.begins[unit.expert] || unit.first + unit.count > plan.begins[unit.expert + 1])
                return false;
            if (unit.tiles != plan.tiles_of(counts[unit.expert]))
                return false;
            for (unsigned p = unit.first; p < unit.first + unit.count; p++)
                seen[p * across + unit.rows]++;
        }
    for (const unsigned times : seen)
        if (times != 1)
            return false;
    // No more units than the host makes blocks for: each expert has one tile at most that is not full.
    unsigned begun = 0;
    for (const unsigned count : counts)
        begun += count > 0;
    return plan.units() <= (begun + (pairs - begun) / PAIRS) * across;
}

int main() {
    for (unsigned round = 0; round < 2000; round++) {
        std::vector<unsigned> counts(1 + below(256));
        const unsigned kind = below(5), most = 1 + below(700);
        for (unsigned &count : counts)
            switch (kind) {
            case 0: count = below(most); break;                  // unevenly
            case 1: count = most % 130; break;                   // evenly
            case 2: count = below(8) == 0 ? below(most) : 0; break; // most experts by nobody
            case 3: count = 0; break;                            // padding alone
            default: count = (below(3) * 64 + below(3)) % 193;   // both sides of a tile's end
            }
        if (kind == 2)
            counts.back() = most; // all of the last one's
        const unsigned across = 1 + below(24), blocks = 1 + below(140);
        if (!holds<32, 16>(counts, across, blocks) || !holds<64, 16>(counts, across, blocks) ||
            !holds<192, 64>(counts, across, blocks) || !holds<256, 32>(counts, across, blocks)) {
            std::printf("round %u: kind %u, %zu experts\n", round, kind, counts.size());
            return 1;
        }
    }
}
