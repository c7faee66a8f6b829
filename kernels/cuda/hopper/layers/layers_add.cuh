// o and down of a multiplying block (layers_multiply.cuh).
#pragma once

#include "hopper/layers/layers_neighbour.cuh"
#include "hopper/layers/layers_tensor.cuh"

// o, down: adds to the residual stream. Warps of its own parity are a block's to end, the others its neighbour's.
template <bool FP8, bool BESIDE>
template <int PRODUCT>
__device__ __forceinline__ void Tensor<FP8, BESIDE>::add(const Step &step) {
    const Spot spot(here(threadIdx.x));
    const bool lives = spot.lives(of.padded), own = lives && spot.warp % 2 == of.rank;
    const unsigned rows = of.rows(step.half);
    // Pairs (element 0 of the segment's pairs this thread has): 16 j + 4 quad + 2 parity.
    __nv_bfloat16 *const residual = of.args.residual + (size_t)(of.first_row(step.half) + spot.token) * HIDDEN + of.segment() * SEGMENT +
                                    4 * spot.quad + 2 * of.parity();
    if (threadIdx.x == 0) { // warps of 16 rows that are this block's
        const unsigned warps = (of.padded / 16 + 1 - of.rank) / 2;
        barrier_expect(of.shared.sums_there(), warps * 32 * 64);
    }
    unsigned old[2][GROUPS];
    if (own)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < GROUPS; j++)
                old[i][j] = spot.token + 8 * i < rows
                                ? *reinterpret_cast<const unsigned *>(residual + (size_t)8 * i * HIDDEN + 16 * spot.columns(j))
                                : 0;
    float sum[SLICES<PRODUCT>][WIDTH<PRODUCT> / 2] = {};
    multiply<PRODUCT>(spot, sum);
    if constexpr (!BESIDE)
        add_slices(sum);
    else if (lives)
        add_slices(spot, sum[0]);
    const unsigned received = of.shared.received() + (((spot.group * 2 + spot.warp / 2) * 4) * 32 + spot.lane) * 16;
    if (lives && !own) {
        const unsigned to = at_neighbour(received, of.rank), barrier = at_neighbour(of.shared.sums_there(), of.rank);
#pragma unroll
        for (int j = 0; j < GROUPS; j++)
            send(to + j * 512, sum[0][4 * j], sum[0][4 * j + 1], sum[0][4 * j + 2], sum[0][4 * j + 3], barrier);
    }
    if (own) {
        await(of.shared.sums_there(), sums_parity);
        float square[2][GROUPS];
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            const uint4 words = load_words(received + j * 512);
            const float theirs[4] = {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
                                     __uint_as_float(words.w)};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float2 was = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&old[i][j]));
                const float2 y = {__fadd_rn(sum[0][4 * j + 2 * i], theirs[2 * i]),
                                  __fadd_rn(sum[0][4 * j + 2 * i + 1], theirs[2 * i + 1])};
                const __nv_bfloat162 is = __floats2bfloat162_rn(__fadd_rn(was.x, y.x), __fadd_rn(was.y, y.y));
                square[i][j] = square_of(__bfloat1622float2(is));
                if (spot.token + 8 * i < rows)
                    *reinterpret_cast<__nv_bfloat162 *>(residual + (size_t)8 * i * HIDDEN + 16 * spot.columns(j)) = is;
            }
        }
        float *const sums = reinterpret_cast<float *>(of.sums(step.half, PRODUCT == DOWN, of.segment())) + of.parity();
        float squares[2] = {of_thread(square[0]), of_thread(square[1])};
        if constexpr (BESIDE) {
            if (spot.group == 1)
                store_float2(left_by(spot, 1), squares[0], squares[1]);
            meet(spot);
        }
        if (!BESIDE || spot.group == 0) {
            if constexpr (BESIDE) {
#pragma unroll
                for (int i = 0; i < 2; i++)
                    squares[i] = __fadd_rn(squares[i], load_float(left_by(spot, 1) + 4 * i));
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float all = butterfly(squares[i]);
                if (spot.quad == 0)
                    __stcg(sums + (spot.token + 8 * i) * 2, all);
            }
        }
    }
    sums_parity ^= 1;
    end(step, PRODUCT);
}
