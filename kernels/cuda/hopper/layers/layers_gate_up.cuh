// gate and up of a multiplying block (layers_multiply.cuh).
#pragma once

#include "hopper/layers/layers_tensor.cuh"
#include "hopper/pairs.cuh"

// Word i of the quad's lane j becomes word j of its lane i.
__device__ __forceinline__ void turn_words(unsigned (&w)[4], unsigned quad) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool is_high = quad & bit;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (!(i & bit)) {
                const unsigned other = __shfl_xor_sync(0xffffffffu, is_high ? w[i] : w[i + bit], bit);
                (is_high ? w[i] : w[i + bit]) = other;
            }
    }
}

// silu(gate) * up: groups of 8 columns are gates and their ups in turn.
template <bool FP8, bool BESIDE> __device__ __forceinline__ void Tensor<FP8, BESIDE>::gate_up(const Step &step) {
    constexpr unsigned OUTPUTS = WIDTH<GATE_UP> / 2;
    const Spot spot(here(threadIdx.x));
    float sum[SLICES<GATE_UP>][OUTPUTS] = {};
    multiply<GATE_UP>(spot, sum);
    sync_threads(2, TENSOR_THREADS + SCALE_THREADS);
    __nv_bfloat16 *const out = of.args.activated + (size_t)(of.first_row(step.half) + spot.token) * MLP +
                               here(of.block) * (Tile<GATE_UP>::N / 2) + (BESIDE ? spot.group * OUTPUTS : 0);
    const unsigned rows = of.rows(step.half);
    constexpr int CHUNKS = OUTPUTS / 8, FOURS = BESIDE ? 2 : 3; // of a row; of a lane's words
    unsigned words[4 * FOURS] = {};
    const auto at = [](int i, int j) { return BESIDE ? 4 * i + j : j < 4 ? 4 * i + j : 8 + 2 * i + j - 4; };
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float scale = load_float(of.shared.scale(spot.token + 8 * i));
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            const float *gate = sum[0] + 8 * j + 2 * i, *up = gate + 4;
            const float2 g = {__fmul_rn(gate[0], scale), __fmul_rn(gate[1], scale)};
            const float2 u = {__fmul_rn(up[0], scale), __fmul_rn(up[1], scale)};
            words[at(i, j)] = bf16_word(GateUp::silu(g.x) * u.x, GateUp::silu(g.y) * u.y);
        }
    }
    // A lane's four words become a chunk of 16 bytes.
#pragma unroll
    for (int four = 0; four < FOURS; four++) {
        unsigned(&w)[4] = reinterpret_cast<unsigned(&)[4]>(words[4 * four]);
        turn_words(w, spot.quad);
        const int i = four < 2 ? four : spot.quad / 2;
        const unsigned chunk = four < 2 ? spot.quad : 4 + spot.quad % 2;
        if (spot.token + 8 * i < rows && chunk < CHUNKS)
            *reinterpret_cast<uint4 *>(out + (size_t)8 * i * MLP + 8 * chunk) = {w[0], w[1], w[2], w[3]};
    }
    end(step, GATE_UP);
}
