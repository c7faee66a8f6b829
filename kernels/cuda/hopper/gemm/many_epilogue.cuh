// epilogue.cuh's arithmetic where the sums lie in the tensor core's registers: a warp has 16 tokens by 128 outputs, lane l of
// token l / 4 + 8 h outputs 8 j + 2 (l % 4) + e as y[4 j + 2 h + e].
//
//   y ── scale, norm, rope, silu, old residual ── 16 bits ── WarpTile ── the copy engine, rows of 128 bytes ──> memory
//                                                                    └── 16 bytes a lane ──> keys' and values' pages
//
// 1. A token's 64 outputs lie in 4 lanes: what epilogue.cuh sums by shuffles over 32 lanes is summed here first within the
//    lane, then over the 4, in the same order, so that the bits are the same.
// 2. Dims d and d + head_dim / 2, gate and up, lie in one lane: nothing is exchanged for them.
// 3. What a token's number leads to (its scale, its place) was looked up by a warp of its own, a tile ahead.
// 4. The engine stores while the next tile is multiplied. It takes rows that are a multiple of 16 bytes, which all but the
//    head's and a plain product's are.
#pragma once

#include "epilogue.cuh"
#include "hopper/pairs.cuh"
#include "hopper/warp_tile.cuh"

// What is known of a token beforehand.
struct Known {
    float scale;
    unsigned position, location;
};

__device__ __forceinline__ Known look_up(const Qkv &epilogue, unsigned token) {
    const Qkv::Where where = epilogue.where(token);
    return {epilogue.scale(token), where.position, where.location};
}
__device__ __forceinline__ Known look_up(const GateUp &epilogue, unsigned token) { return {epilogue.scale(token), 0, 0}; }
template <class Epilogue> __device__ __forceinline__ Known look_up(const Epilogue &, unsigned) { return {}; }

// A warp's share of a tile of outputs.
struct Outputs {
    WarpTile tile;
    const TensorMap *map;  // the outputs in memory, but for keys and values
    unsigned token, count; // the first of 16, of which so many exist
    unsigned m0, rows;     // the first output, and how many a token has

    __device__ __forceinline__ unsigned lane() const { return tile.lane; }

    // Stores what was staged from column `col` of the outputs on.
    __device__ __forceinline__ void send(unsigned halves, unsigned col) const {
        tile.written();
        for (unsigned half = 0; half < halves; half++)
            tile.send(half, map, col + 64 * half, token);
    }
};

__device__ __forceinline__ unsigned word(__half2 pair) { return *reinterpret_cast<unsigned *>(&pair); }
__device__ __forceinline__ float2 floats(unsigned word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ __forceinline__ void scale(float (&y)[64], float first, float second) {
#pragma unroll
    for (int i = 0; i < 64; i++)
        y[i] = __fmul_rn(y[i], i % 4 < 2 ? first : second);
}

// The sum of squares of 64 outputs, y's from J on, of token l / 4 + 8 H.
template <int J, int H, int COUNT> __device__ __forceinline__ float squares(const float (&y)[COUNT]) {
    float sum[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float x = y[4 * (J + j) + 2 * H], next = y[4 * (J + j) + 2 * H + 1];
        sum[j] = fmaf(x, x, __fmul_rn(next, next));
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2)
#pragma unroll
        for (int j = 0; j < step; j++)
            sum[j] += sum[j + step];
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 2);
    return sum[0] + __shfl_xor_sync(0xffffffffu, sum[0], 1);
}

__device__ __forceinline__ void stage_bf16(const WarpTile &tile, const float (&y)[64]) {
    tile.free();
#pragma unroll
    for (int p = 0; p < 8; p++) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            words[i] = bf16_word(y[8 * p + 2 * i], y[8 * p + 2 * i + 1]);
        tile.put(p, words);
    }
}

// Adds the biases of outputs m0 on.
__device__ __forceinline__ void add_bias(const Qkv &e, float (&y)[64], unsigned m0, unsigned rows, unsigned lane) {
    if (e.bias == nullptr)
        return;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const unsigned m = m0 + 8 * j + lane % 4 * 2;
        const float2 added = m < rows ? e.bias_at(m) : float2{-0.0f, -0.0f};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            y[4 * j + 2 * h] = __fadd_rn(y[4 * j + 2 * h], added.x);
            y[4 * j + 2 * h + 1] = __fadd_rn(y[4 * j + 2 * h + 1], added.y);
        }
    }
}

// What outputs of a warp's tokens need of memory beside what is known of these: of most epilogues, nothing.
template <class Epilogue> struct Ahead {
    __device__ __forceinline__ void fetch(const Epilogue &, const Known *, unsigned) {}
};

// (cos, sin) of dims 8 j + 2 (lane % 4) and the next of all heads, of the lane's two tokens.
template <> struct Ahead<Qkv> {
    float4 turns[2][8];

    __device__ __forceinline__ void fetch(const Qkv &e, const Known *known, unsigned lane) {
        if (e.rope == nullptr)
            return stay();
        const unsigned half = e.head_dim / 2;
        unsigned rest = half == 64 ? 32 : 0; // of heads of 64 dims the last four are the first again, and of no use
        asm("" : "+r"(rest)); // else there is a branch, and copies
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float2 *first = e.rope + (size_t)known[lane / 4 + 8 * h].position * half + lane % 4 * 2, *behind = first + rest;
#pragma unroll
            for (int j = 0; j < 8; j++)
                turns[h][j] = *reinterpret_cast<const float4 *>((j < 4 ? first : behind) + j % 4 * 8);
        }
    }

  private:
    // No dim turns. By values that the compiler does not know, so that they are written in this branch alone, not first and then over.
    __device__ __forceinline__ void stay() {
        float one, zero;
        asm volatile("mov.f32 %0, 0f3F800000;\n mov.f32 %1, 0f00000000;" : "=f"(one), "=f"(zero));
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 8; j++)
                turns[h][j] = {one, zero, one, zero};
    }
};

// Norms and turns a head of 64 PARTS dims, y's from J on. A weight is read and unpacked once for both of the lane's tokens.
template <int PARTS, int J>
__device__ __forceinline__ void turn_head(const Qkv &e, float (&y)[64], const __nv_bfloat16 *weight, const Ahead<Qkv> &ahead,
                                          unsigned lane) {
    constexpr int COUNT = 4 * PARTS; // words of dims 8 j + 2 (lane % 4) and the next; what these turn with is as many further on
    unsigned weights[2 * COUNT];
#pragma unroll
    for (int j = 0; j < 2 * COUNT; j++)
        weights[j] = weight ? reinterpret_cast<const unsigned *>(weight)[4 * j + lane % 4] : 0x3f803f80; // ones
    float sum[2] = {squares<J, 0>(y), squares<J, 1>(y)}, inverse[2];
    if (PARTS == 2) {
        sum[0] = __fadd_rn(sum[0], squares<PARTS == 2 ? 8 : J, 0>(y));
        sum[1] = __fadd_rn(sum[1], squares<PARTS == 2 ? 8 : J, 1>(y));
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
        inverse[h] = weight ? rsqrtf(fmaf(sum[h], 1.0f / (64.0f * PARTS), e.head_eps)) : 1.0f;
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        const float2 w_lo = floats(weights[j]), w_hi = floats(weights[j + COUNT]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float *lo = y + 4 * (J + j) + 2 * h, *hi = lo + 16 * PARTS;
            const float4 turn = ahead.turns[h][j];
            const float2 a = Qkv::weighted({lo[0], lo[1]}, inverse[h], w_lo), b = Qkv::weighted({hi[0], hi[1]}, inverse[h], w_hi);
            lo[0] = Qkv::turned(a.x, turn.x, -b.x, turn.y), lo[1] = Qkv::turned(a.y, turn.z, -b.y, turn.w);
            hi[0] = Qkv::turned(b.x, turn.x, a.x, turn.y), hi[1] = Qkv::turned(b.y, turn.z, a.y, turn.w);
        }
    }
}

// Stores a key or value head of 64 HALVES dims, staged from half `half` of the warp's tile on, to its pages.
template <unsigned HALVES>
__device__ __forceinline__ void store_kept(const Qkv &e, const Outputs &out, const Known *known, unsigned half, unsigned h) {
    const bool is_key = h < e.heads + e.kv_heads;
    const unsigned head = h - e.heads - (is_key ? 0 : e.kv_heads), chunk = out.lane() % 8, first = out.lane() / 8;
    __nv_bfloat16 *const base = is_key ? e.k : e.v;
    unsigned location[4];
    uint4 values[4][HALVES];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        location[i] = known[first + 4 * i].location;
#pragma unroll
        for (unsigned k = 0; k < HALVES; k++)
            values[i][k] = out.tile.read(first + 4 * i, 8 * (half + k) + chunk);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned row = location[i] & ((1u << e.page_shift) - 1);
        const unsigned line = (((location[i] >> e.page_shift) * e.kv_heads + head) << e.page_shift) + row;
        uint4 *to = reinterpret_cast<uint4 *>(base + (size_t)line * (64 * HALVES)) + (chunk ^ row % 8);
#pragma unroll
        for (unsigned k = 0; k < HALVES; k++)
            if (first + 4 * i < out.count)
                to[8 * k] = values[i][k];
    }
}

// `known`: of the warp's 16 tokens.
__device__ __forceinline__ void finish(const Qkv &e, float (&y)[64], const Outputs &out, const Known *known,
                                       const Ahead<Qkv> &ahead) {
    const unsigned lane = out.lane(), head = out.m0 >> (e.head_dim == 128 ? 7 : 6), normed = e.heads + e.kv_heads;
    const Known first = known[lane / 4], second = known[lane / 4 + 8];
    scale(y, first.scale, second.scale);
    add_bias(e, y, out.m0, out.rows, lane);
    if (e.head_dim == 128 && head < normed)
        turn_head<2, 0>(e, y, head < e.heads ? e.q_norm : e.k_norm, ahead, lane);
    if (e.head_dim == 64 && head < normed)
        turn_head<1, 0>(e, y, head < e.heads ? e.q_norm : e.k_norm, ahead, lane);
    if (e.head_dim == 64 && head + 1 < normed)
        turn_head<1, 8>(e, y, head + 1 < e.heads ? e.q_norm : e.k_norm, ahead, lane);
    stage_bf16(out.tile, y);
    if (e.head_dim == 128) {
        if (head < e.heads)
            return out.send(2, out.m0);
        out.tile.written();
        if (out.m0 < out.rows)
            store_kept<2>(e, out, known, 0, head);
        return;
    }
    out.tile.written();
#pragma unroll 1
    for (unsigned half = 0; half < 2; half++) {
        const unsigned h = head + half, m = out.m0 + 64 * half;
        if (h < e.heads)
            out.tile.send(half, out.map, m, out.token);
        else if (m < out.rows)
            store_kept<1>(e, out, known, half, h);
    }
}

// The same where nothing was fetched before.
__device__ __forceinline__ void finish(const Qkv &e, float (&y)[64], const Outputs &out, const Known *known) {
    Ahead<Qkv> ahead;
    ahead.fetch(e, known, out.lane());
    finish(e, y, out, known, ahead);
}
template <class Epilogue, int COUNT>
__device__ __forceinline__ void finish(const Epilogue &e, float (&y)[COUNT], const Outputs &out, const Known *known,
                                       const Ahead<Epilogue> &) {
    finish(e, y, out, known);
}

// Are outputs added to what is there?
template <class Epilogue> __device__ __forceinline__ constexpr bool is_added(const Epilogue &) { return false; }
__device__ __forceinline__ constexpr bool is_added(const Residual &) { return true; }

// Starts fetching what `finish` reads of so many outputs, behind a barrier of the warp's.
template <unsigned WIDTH, class Epilogue> __device__ __forceinline__ void prepare(const Epilogue &, const Outputs &, unsigned) {}

template <unsigned WIDTH> __device__ __forceinline__ void prepare(const Residual &, const Outputs &out, unsigned barrier) {
    out.tile.fetch<WIDTH / 64>(out.map, out.m0, out.token, barrier);
}

// The residual stream as it was is in the warp's tile. Of 128 outputs or 64.
template <int COUNT>
__device__ __forceinline__ void finish(const Residual &e, float (&y)[COUNT], const Outputs &out, const Known *) {
#pragma unroll
    for (int p = 0; p < COUNT / 8; p++) {
        unsigned words[4];
        out.tile.get(p, words);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float *pair = y + 8 * p + 2 * i;
            const float2 old = floats(words[i]);
            words[i] = bf16_word(old.x + pair[0], old.y + pair[1]);
            const float2 sum = floats(words[i]);
            pair[0] = sum.x, pair[1] = sum.y;
        }
        out.tile.put(p, words);
    }
    constexpr int NEXT = COUNT == 64 ? 8 : 0; // where another segment's begin, or the same again
    const float sums[4] = {squares<0, 0>(y), squares<0, 1>(y), squares<NEXT, 0>(y), squares<NEXT, 1>(y)};
    // Lane 4 g + q stores sum q of its tokens.
    const unsigned q = out.lane() % 4, row = out.lane() / 4 + q % 2 * 8, segment = out.m0 / SEGMENT + q / 2;
    const float sum = q < 2 ? (q == 0 ? sums[0] : sums[1]) : (q == 2 ? sums[2] : sums[3]);
    if (q < COUNT / 16 && row < out.count && segment * SEGMENT < out.rows)
        e.sumsq[(size_t)(out.token + row) * segments_of(out.rows) + segment] = sum;
    out.send(COUNT / 32, out.m0);
}

// From registers: the four lanes of a token fill 32 bytes. Of 128 outputs or 64.
template <int COUNT>
__device__ __forceinline__ void finish(const RankSums &e, float (&y)[COUNT], const Outputs &out, const Known *) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const unsigned row = out.lane() / 4 + 8 * h;
#pragma unroll
        for (int s = 0; s < COUNT / 32; s++) {
            const RankSums::Segment segment = e.segment(out.token + row, out.m0 + 64 * s, out.rows);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const unsigned within = 8 * j + out.lane() % 4 * 2;
                if (row < out.count && out.m0 + 64 * s + within < out.rows)
                    e.put(segment, within, {y[4 * (8 * s + j) + 2 * h], y[4 * (8 * s + j) + 2 * h + 1]});
            }
        }
    }
}

__device__ __forceinline__ void finish(const GateUp &e, float (&y)[64], const Outputs &out, const Known *known) {
    const Known first = known[out.lane() / 4], second = known[out.lane() / 4 + 8];
    scale(y, first.scale, second.scale);
    out.tile.free();
#pragma unroll
    for (int p = 0; p < 4; p++) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *gate = y + 16 * p + i / 2 * 8 + i % 2 * 2, *up = gate + 4;
            words[i] = bf16_word(GateUp::silu(gate[0]) * up[0], GateUp::silu(gate[1]) * up[1]);
        }
        out.tile.put(p, words);
    }
    out.send(1, out.m0 / 2);
}

// The same for any number of outputs, COUNT / 4 of each of the lane's two tokens, stored from registers.
template <int COUNT>
__device__ __forceinline__ void finish_unstaged(const GateUp &e, const float (&y)[COUNT], const Outputs &out,
                                                const Known *known) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const unsigned row = out.lane() / 4 + 8 * h;
        const float scale = known[row].scale;
        __nv_bfloat16 *to = e.out + (size_t)(out.token + row) * e.intermediate;
#pragma unroll
        for (int p = 0; p < COUNT / 8; p++) {
            const float *gate = y + 8 * p + 2 * h, *up = gate + 4;
            const unsigned m = out.m0 / 2 + 8 * p + out.lane() % 4 * 2;
            if (row < out.count && m < e.intermediate)
                store_pair(to + m, GateUp::silu(__fmul_rn(gate[0], scale)) * __fmul_rn(up[0], scale),
                           GateUp::silu(__fmul_rn(gate[1], scale)) * __fmul_rn(up[1], scale));
        }
    }
}

// Stores rows of any width.
__device__ __forceinline__ void store_rows(unsigned short *to, const Outputs &out) {
    if (out.rows % 8 == 0)
        return out.send(2, out.m0);
    __syncwarp();
    for (unsigned row = 0; row < 16 && row < out.count; row++)
        for (unsigned m = out.lane(); m < 128 && out.m0 + m < out.rows; m += 32)
            to[(size_t)(out.token + row) * out.rows + out.m0 + m] = out.tile.element(row, m);
    __syncwarp();
}

__device__ __forceinline__ void finish(const Head &e, float (&y)[64], const Outputs &out, const Known *) {
    out.tile.free();
#pragma unroll
    for (int p = 0; p < 8; p++) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            words[i] = word(__floats2half2_rn(Head::clamped(y[8 * p + 2 * i]), Head::clamped(y[8 * p + 2 * i + 1])));
        out.tile.put(p, words);
    }
    store_rows(reinterpret_cast<unsigned short *>(e.out), out);
}

__device__ __forceinline__ void finish(const Linear &e, float (&y)[64], const Outputs &out, const Known *) {
    stage_bf16(out.tile, y);
    store_rows(reinterpret_cast<unsigned short *>(e.out), out);
}
