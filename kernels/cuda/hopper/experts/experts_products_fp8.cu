// experts_few_*_fp8, experts_many_*_fp8: the two products of a layer's experts with weights in fp8, whose elements are widened to f16 in the
// registers that are wgmma's left operand (experts_tile_fp8.cuh). Inputs are f16 too (experts_f16.cuh).
#include "experts/experts_f16.cuh"
#include "hopper/experts/experts_products.cuh"
#include "hopper/experts/experts_tile_fp8.cuh"

// w [E][rows, cols] as tiles that lie whole in memory.
struct TilesOfFp8 {
    static constexpr unsigned COLS = 64, W_BYTES = 2 * ExpertPart::TILE_BYTES; // of a block of columns
    static constexpr bool READ_BY_LANES = true;
    const char *tiles;

    __device__ __forceinline__ void prefetch() const {}
    // 128 rows of an expert's from `row` on; in place of those behind its last are some of its own.
    __device__ __forceinline__ void fetch(unsigned to, unsigned expert, unsigned row, unsigned rows, unsigned block, unsigned blocks,
                                          unsigned barrier, unsigned long long policy) const {
        const unsigned tiles_down = rows / 64;
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            const unsigned tile = expert * tiles_down + min(row / 64 + half, tiles_down - 1);
            const char *from = tiles + ((size_t)tile * blocks + block) * ExpertPart::TILE_BYTES;
            bulk_fetch_bytes(to + half * ExpertPart::TILE_BYTES, from, ExpertPart::TILE_BYTES, barrier, policy);
        }
    }

    __device__ __forceinline__ static unsigned inputs(float x, float y) { return experts_inputs_f16(x, y); }

    // The sums of a warpgroup's 64 rows of w for N pairs. Of a block of columns one half's registers are written while the other
    // half is multiplied, and the next block's codes are read behind the last of it.
    template <class T, int N>
    __device__ __forceinline__ static void multiply(const Shared<T> &shared, Place<T::STAGES> &place, unsigned blocks,
                                                    float (&sum)[N / 2]) {
        const unsigned group = threadIdx.x / 128 * ExpertPart::TILE_BYTES;
        unsigned first[2][4], second[2][4], before = 0;
        ExpertPart part;
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            sum[i] = 0.0f;
        hold(sum);
        // Onto zeros at first.
        const auto start = [&](const unsigned(&a)[2][4], unsigned x, unsigned columns) {
            wgmma_fence();
            wgmma_halves(sum, a[0], tile_descriptor_at(x, columns), true);
            wgmma_halves(sum, a[1], tile_descriptor_at(x, columns + 16), true);
            wgmma_commit();
        };
        const auto load = [&] {
            shared.wait(place);
            part.load(shared.stage(place.at) + group);
        };
        load();
#pragma unroll 1
        for (unsigned i = 0; i < blocks; i++) {
            const unsigned at = place.at;
            const unsigned x = shared.stage(at) + T::X_AT;
            part.widen<0>(first);
            start(first, x, 0);
            if (i > 0) {
                wgmma_wait<1>(); // the block before is multiplied
                shared.release(before);
            }
            part.widen<1>(second);
            start(second, x, 32);
            place.advance();
            if (i + 1 < blocks)
                load();
            wgmma_wait<1>();
            before = at;
        }
        wgmma_wait<0>();
        hold(sum);
        shared.release(before);
    }
};
using FewByTokenFp8 = Tiling<TilesOfFp8, 32, 1, 1, 7, 32, 2>;
using FewFp8 = Tiling<TilesOfFp8, 32, 8, 1, 7, 32, 2>;
using ManyFp8 = Tiling<TilesOfFp8, 192, 32, 2, 5, 64, 1>;

extern "C" __global__ void __launch_bounds__(320, FewByTokenFp8::BESIDE)
experts_few_gate_up_fp8(const char *w, const __nv_bfloat16 *x, Routing routing, GateUpOfExperts product) {
    products<FewByTokenFp8>(TilesOfFp8{w}, RowsOfTokens{x}, routing, product);
}

#define PRODUCT(NAME, TILING, PRODUCT_)                                                                                      \
    extern "C" __global__ void __launch_bounds__(320, TILING::BESIDE)                                                        \
    NAME(const char *w, const __grid_constant__ TensorMap x, Routing routing, PRODUCT_ product) {                            \
        products<TILING>(TilesOfFp8{w}, RowsOfX{&x}, routing, product);                                                      \
    }

PRODUCT(experts_few_down_fp8, FewFp8, DownOfExperts)
PRODUCT(experts_many_gate_up_fp8, ManyFp8, GateUpOfExperts)
PRODUCT(experts_many_down_fp8, ManyFp8, DownOfExperts)
