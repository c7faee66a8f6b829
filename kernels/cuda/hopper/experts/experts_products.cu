// experts_few_*, experts_many_*: the two products of a layer's experts with weights in bf16 (experts_products.cuh), and
// experts_gather, which puts each expert's tokens side by side where they are many.
#include "hopper/experts/experts_products.cuh"

// w [E][rows, cols] as the copy engine finds it.
struct RowsOfBf16 {
    static constexpr unsigned COLS = 64, W_BYTES = 128 * 128; // of a block of columns
    static constexpr bool READ_BY_LANES = false;
    const TensorMap *map;

    __device__ __forceinline__ void prefetch() const { prefetch_map(map); }
    // 128 rows of an expert's from `row` on; those behind its last are the next expert's, or zeros.
    __device__ __forceinline__ void fetch(unsigned to, unsigned expert, unsigned row, unsigned rows, unsigned block, unsigned,
                                          unsigned barrier, unsigned long long policy) const {
        bulk_fetch(to, map, block * COLS, expert * rows + row, barrier, policy);
    }

    __device__ __forceinline__ static unsigned inputs(float x, float y) { return bf16_word(x, y); }

    // The sums of a warpgroup's 64 rows of w for N pairs.
    template <class T, int N>
    __device__ __forceinline__ static void multiply(const Shared<T> &shared, Place<T::STAGES> &place, unsigned blocks,
                                                    float (&sum)[N / 2]) {
        unsigned before = 0;
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            sum[i] = 0.0f;
        hold(sum);
#pragma unroll 1
        for (unsigned i = 0; i < blocks; i++) {
            shared.wait(place);
            const unsigned long long a = tile_descriptor(shared.stage(place.at) + threadIdx.x / 128 * 64 * 128);
            const unsigned long long b = tile_descriptor(shared.stage(place.at) + T::X_AT);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma(sum, a + 2 * k, b + 2 * k, i > 0 || k > 0);
            wgmma_commit();
            if (i > 0) {
                wgmma_wait<1>(); // the block before is multiplied
                shared.release(before);
            }
            before = place.at;
            place.advance();
        }
        wgmma_wait<0>();
        hold(sum);
        shared.release(before);
    }
};
using FewByToken = Tiling<RowsOfBf16, 64, 1, 1, 6, 32, 1>;
using Few = Tiling<RowsOfBf16, 64, 8, 1, 6, 32, 1>;
using Many = Tiling<RowsOfBf16, 256, 32, 2, 4, 64, 1>;

extern "C" __global__ void __launch_bounds__(320, FewByToken::BESIDE)
experts_few_gate_up(const __grid_constant__ TensorMap w, const __nv_bfloat16 *x, Routing routing, GateUpOfExperts product) {
    products<FewByToken>(RowsOfBf16{&w}, RowsOfTokens{x}, routing, product);
}

#define PRODUCT(NAME, TILING, PRODUCT_)                                                                                      \
    extern "C" __global__ void __launch_bounds__(320, TILING::BESIDE)                                                        \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Routing routing, PRODUCT_ product) {      \
        products<TILING>(RowsOfBf16{&w}, RowsOfX{&x}, routing, product);                                                     \
    }

PRODUCT(experts_few_down, Few, DownOfExperts)
PRODUCT(experts_many_gate_up, Many, GateUpOfExperts)
PRODUCT(experts_many_down, Many, DownOfExperts)

// A warp takes a place.
extern "C" __global__ void __launch_bounds__(256)
experts_gather(Routing routing, const __nv_bfloat16 *x, __nv_bfloat16 *gathered) {
    dependent_wait();
    dependent_launch(); // behind the wait: the products read the plan before theirs
    const unsigned place = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, chunks = routing.hidden / 8;
    if (place >= routing.begins[routing.experts])
        return;
    const unsigned token = routing.pairs[place] / routing.per_token;
    const uint4 *from = reinterpret_cast<const uint4 *>(x + (size_t)token * routing.hidden);
    uint4 *to = reinterpret_cast<uint4 *>(gathered + (size_t)place * routing.hidden);
#pragma unroll 8
    for (unsigned c = lane; c < chunks; c += 32)
        to[c] = from[c];
}
