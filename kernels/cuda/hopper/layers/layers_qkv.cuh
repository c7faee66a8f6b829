// q, k and v of a multiplying block (layers_multiply.cuh).
#pragma once

#include "hopper/layers/layers_keep.cuh"
#include "hopper/layers/layers_neighbour.cuh"
#include "hopper/layers/layers_tensor.cuh"
#include "hopper/pairs.cuh"

// A pair of dims of a head, and the one that it turns with.
struct Halves {
    float2 lo, hi;
};

// What each of the thread's two tokens' heads is multiplied by. Sums of squares of a half are of both neighbours' pairs, and where warps share
// rows, of both's.
template <bool FP8, bool BESIDE>
__device__ __forceinline__ void Tensor<FP8, BESIDE>::norm_heads(const Spot &spot, const float2 (&y)[2][2 * GROUPS], float (&inverse)[2]) const {
    float mine[2][2];
    const unsigned barrier = at_neighbour(of.shared.squares_there(), of.rank);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float square[GROUPS];
#pragma unroll
            for (int j = 0; j < GROUPS; j++)
                square[j] = square_of(y[i][GROUPS * part + j]);
            mine[i][part] = of_thread(square);
        }
    if constexpr (BESIDE) {
        store_float4(left_by(spot, spot.group), mine[0][0], mine[0][1], mine[1][0], mine[1][1]);
        meet(spot);
        const float4 others = load_shared(left_by(spot, spot.group ^ 1));
        mine[0][0] = __fadd_rn(mine[0][0], others.x), mine[0][1] = __fadd_rn(mine[0][1], others.y);
        mine[1][0] = __fadd_rn(mine[1][0], others.z), mine[1][1] = __fadd_rn(mine[1][1], others.w);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int part = 0; part < 2; part++)
            mine[i][part] = butterfly(mine[i][part]);
        if (spot.quad == 0 && (!BESIDE || spot.group == 0))
            send(at_neighbour(of.shared.squares(spot.token + 8 * i), of.rank), mine[i][0], mine[i][1], barrier);
    }
    await(of.shared.squares_there(), squares_parity);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned at = of.shared.squares(spot.token + 8 * i);
        const float lo = __fadd_rn(mine[i][0], load_float(at)), hi = __fadd_rn(mine[i][1], load_float(at + 4));
        inverse[i] = rsqrtf(fmaf(__fadd_rn(lo, hi), 1.0f / 128.0f, of.args.norm_eps));
    }
}

// Queries, and the newest keys and values, of the next layer: dims 16 j + 4 quad + 2 rank of half of a head, 64 further on those
// that they turn with.
template <bool FP8, bool BESIDE> __device__ __forceinline__ void Tensor<FP8, BESIDE>::qkv(const Step &step) {
    const Spot spot(here(threadIdx.x));
    const Layer &layer = of.args.layers[step.layer + 1];
    const unsigned head = here(of.block) / 2, dim = 4 * spot.quad + 2 * of.rank, rows = of.rows(step.half);
    const bool is_query = head < HEADS, is_value = head >= HEADS + KV_HEADS;
    const __nv_bfloat16 *const weight = is_query ? layer.q_norm : layer.k_norm;
    const bool normed = !is_value && weight != nullptr;
    if (normed && threadIdx.x == 0)
        barrier_expect(of.shared.squares_there(), of.padded * 8);
    const bool swaps = FP8 && !is_query;
    if (swaps && threadIdx.x == 0)
        barrier_expect(of.shared.swapped_there(), of.padded * (BESIDE ? 128 : 64));
    unsigned position[2], location[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned row = of.first_row(step.half) + min(spot.token + 8 * i, rows - 1);
        const Token *token = reinterpret_cast<const Token *>(of.args.batch + of.args.tokens_offset) + row;
        position[i] = token->position;
        location[i] = token->location;
    }
    // Of keys and values in fp8 the row that the lane keeps.
    const unsigned kept = spot.warp * 16 + of.rank * 8 + spot.group * 4 + spot.lane / 8;
    unsigned kept_location = 0;
    if (BESIDE && swaps)
        kept_location = (reinterpret_cast<const Token *>(of.args.batch + of.args.tokens_offset) + of.first_row(step.half) +
                         min(kept, rows - 1))->location;
    // What turns and norms the thread's pairs, read while it waits for activations.
    float4 turn[2][GROUPS];
    float2 weights[2][GROUPS];
    const float2 *const rope = is_value ? nullptr : layer.rope;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        const unsigned d = 16 * spot.columns(j) + dim;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            turn[i][j] = {1.0f, 0.0f, 1.0f, 0.0f};
            if (rope)
                turn[i][j] = *reinterpret_cast<const float4 *>(rope + (size_t)position[i] * (HEAD_DIM / 2) + d);
            weights[i][j] = {1.0f, 1.0f};
            if (normed)
                weights[i][j] = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(weight + d + 64 * i));
        }
    }
    float sum[SLICES<QKV>][WIDTH<QKV> / 2] = {};
    multiply<QKV>(spot, sum);
    const bool lives = spot.lives(of.padded);
    sync_threads(2, TENSOR_THREADS + SCALE_THREADS);
    float2 y[2][2 * GROUPS]; // by token; the first half of the head's first half
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float scale = load_float(of.shared.scale(spot.token + 8 * i));
#pragma unroll
        for (int j = 0; j < 2 * GROUPS; j++)
            y[i][j] = {__fmul_rn(sum[0][4 * j + 2 * i], scale), __fmul_rn(sum[0][4 * j + 2 * i + 1], scale)};
    }
    if (lives) {
        float inverse[2] = {1.0f, 1.0f};
        if (normed)
            norm_heads(spot, y, inverse);
        const auto finished = [&](int i, int j) {
            Halves of_head = {y[i][j], y[i][GROUPS + j]};
            if (!is_value) {
                const float2 a = QkvNormed::weighted(of_head.lo, inverse[i], weights[0][j]);
                const float2 b = QkvNormed::weighted(of_head.hi, inverse[i], weights[1][j]);
                const float4 t = turn[i][j];
                of_head.lo = {QkvNormed::turned(a.x, t.x, -b.x, t.y), QkvNormed::turned(a.y, t.z, -b.y, t.w)};
                of_head.hi = {QkvNormed::turned(b.x, t.x, a.x, t.y), QkvNormed::turned(b.y, t.z, a.y, t.w)};
            }
            return of_head;
        };
        const unsigned kv_head = head - HEADS - (is_value ? KV_HEADS : 0);
        if (swaps) {
            unsigned pairs[2][2 * GROUPS];
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < GROUPS; j++) {
                    const Halves of_head = finished(i, j);
                    pairs[i][j] = bf16_word(of_head.lo.x, of_head.lo.y);
                    pairs[i][GROUPS + j] = bf16_word(of_head.hi.x, of_head.hi.y);
                }
            const unsigned received = of.shared.swapped(BESIDE ? 2 * spot.warp : threadIdx.x / 32);
            const unsigned at = BESIDE ? kept_location : of.rank ? location[1] : location[0];
            const Fp8Place place =
                Fp8Place::of<HEAD_DIM>(is_value ? layer.v : layer.k, at / PAGE, KV_HEADS, PAGE, kv_head, at % PAGE);
            if constexpr (BESIDE) {
                const HalfRows mine = {of.rank, received, of.shared.swapped_there()};
                float2 row[1][8];
                mine.share(row, pairs, spot.group, spot.lane, swapped_parity);
                mine.keep<8, 2>(row, place, !is_value, kept < rows, spot.quad, spot.lane / 4 % 2);
            } else {
                const HalfRows mine = {of.rank, received + spot.lane * 16, of.shared.swapped_there()};
                float2 row[1][16];
                mine.swap(pairs, swapped_parity);
                mine.row_of(row, pairs);
                mine.keep<16, 1>(row, place, !is_value, spot.token + 8 * of.rank < rows, spot.quad, 0);
            }
        } else
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const unsigned row = of.first_row(step.half) + spot.token + 8 * i;
                if (spot.token + 8 * i >= rows)
                    continue;
                __nv_bfloat16 *out;
                unsigned swizzle = 0;
                if (is_query) {
                    out = of.args.q + (size_t)row * Q_WIDTH + head * HEAD_DIM;
                } else {
                    const unsigned at = location[i] % PAGE;
                    out = (is_value ? layer.v : layer.k) +
                          (((size_t)(location[i] / PAGE) * KV_HEADS + kv_head) * PAGE + at) * HEAD_DIM;
                    swizzle = at % 8 * 8;
                }
#pragma unroll
                for (int j = 0; j < GROUPS; j++) {
                    const unsigned d = 16 * spot.columns(j) + dim;
                    const Halves of_head = finished(i, j);
                    store_pair(out + (d ^ swizzle), of_head.lo.x, of_head.lo.y);
                    store_pair(out + (d ^ swizzle) + 64, of_head.hi.x, of_head.hi.y);
                }
            }
    }
    swapped_parity ^= swaps;
    squares_parity ^= normed;
    end(step, QKV);
}
