// The blocks of layers_divide.cuh that multiply: o, gate_up, down and the next layer's qkv of a half's rows, then of the other half's, layer after
// layer, to the last layer's first half. Tokens are the rows of every product and rows of w its columns: D[64 tokens, N] by each of two warpgroups.
// Of up to 64 tokens both have all: of o and down a slice each, of gate_up and qkv half of the rows of w.
//
//   block     o, down   32 rows of w by half of the columns; its neighbour has the other half, they add up by st.async, warp by warp
//             gate_up   96 rows of w
//             qkv       64 rows of w: half of a head, whose norm's sums its neighbour and it exchange; of fp8, halves of rows too
//   shared    x ring [X_STAGES][padded rows or more][64]    w ring [W_STAGES][chunks][N][64]    sums of the neighbour    scales
//   weights   warp 8: runs ahead across products, halves and layers; what the second half has read, nobody reads again in this step
//   x         warp 9: fetches what the product reads, in the order in which it multiplies, as soon as it is there; gate_up's and qkv's half
//             for both neighbours
//   scales    warps 10 and 11: those of the rows' norms, from sums of squares of 64 elements
//
// 1. Bits are gemm_few.cuh's and epilogue.cuh's: a slice of the columns from zero, k16 by k16, slices added in pairs, then pairs of
//    pairs: of o and down each block has the two slices of a pair, of all others all columns, which are one.
// 2. A sum of squares of 64 elements is a butterfly over pairs of them, 16 apart first and neighbours last. A thread has pairs in steps
//    of two, its quad those between: what two blocks must add is the last level, because each has every second pair (`parity`).
// 3. An element of the residual stream is read and written by one thread throughout.
// 4. What neighbours send each other is waited for before a block counts itself done with a product, and sent after the neighbour has
//    counted itself done with the last that sent to the same place, for between the two lies a product whose activations all blocks made.
// 5. A part of a product's activations is overwritten behind a product of which the block, or the neighbour whose sums it adds, has seen all
//    parts: so all blocks have ended what read it.
// 6. What bounds a product of many tokens is shared memory: what is fetched is written there, and read once by each warpgroup that it is for.
#pragma once

#include "hopper/layers/layers_fetch.cuh"
#include "hopper/layers/layers_keep.cuh"

// Keeps the compiler from computing addresses of all products ahead of the layers' loop, which spills.
__device__ __forceinline__ unsigned here(unsigned x) {
    unsigned y;
    asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

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

// The warps that compute the rows' scales, two rows a thread.
struct Scales {
    const Multiplying &of;

    // Behind o (0) or down (1).
    __device__ __forceinline__ void make(unsigned phase, unsigned product) const {
        const unsigned row = threadIdx.x % SCALE_THREADS * 2, half = phase % 2;
        while (of.flags.parts(of.flags.parts_of(phase, product ? DOWN : O), 0) < Flags::PARTS)
            ;
        if (row < of.padded) {
            float4 two[SEGMENTS];
#pragma unroll
            for (int i = 0; i < SEGMENTS; i++)
                two[i] = __ldcg(reinterpret_cast<const float4 *>(of.sums(half, product, i) + row));
            float a = 0.0f, b = 0.0f;
#pragma unroll
            for (int i = 0; i < SEGMENTS; i++) {
                a = a + __fadd_rn(two[i].x, two[i].y);
                b = b + __fadd_rn(two[i].z, two[i].w);
            }
            a = rsqrtf(a / (float)HIDDEN + of.args.norm_eps);
            b = rsqrtf(b / (float)HIDDEN + of.args.norm_eps);
            store_float2(of.shared.scale(row), a, b);
        }
        sync_threads(2, TENSOR_THREADS + SCALE_THREADS);
    }
    __device__ __forceinline__ void run() const {
#pragma unroll 1
        for (unsigned phase = 0; phase < of.flags.chains(); phase++) {
            make(phase, 0);
            if (phase + 2 < of.flags.phases())
                make(phase, 1);
        }
    }
};

// A thread that multiplies. FP8: keys and values are kept so. BESIDE: both warpgroups have the same tokens.
template <bool FP8, bool BESIDE> struct Tensor {
    const Multiplying &of;
    Place<X_STAGES> x;
    Place<W_STAGES> w;
    unsigned sums_parity = 0, squares_parity = 0, swapped_parity = 0;

    // Does a warpgroup sum one of a product's slices, whose chunks take turns?
    template <int PRODUCT> static constexpr bool IN_TURNS = BESIDE && Tile<PRODUCT>::ADDS;
    // Columns of its sums, and how many there are of each.
    template <int PRODUCT> static constexpr unsigned WIDTH = Tile<PRODUCT>::N / (BESIDE && !IN_TURNS<PRODUCT> ? 2 : 1);
    template <int PRODUCT> static constexpr int SLICES = IN_TURNS<PRODUCT> ? 1 : Tile<PRODUCT>::SLICES;
    // Groups of 8 columns that a thread ends: of o's, of down's, and of each half of a head's.
    static constexpr int GROUPS = BESIDE ? 2 : 4;

    // A thread's place in a product: it has tokens `token` and `token + 8`, and of each group of 8 columns 2 quad and the next.
    struct Spot {
        unsigned lane, group, warp, quad, token;

        __device__ __forceinline__ explicit Spot(unsigned thread)
            : lane(thread % 32), group(thread / 128), warp(thread / 32 % 4), quad(thread % 4),
              token((BESIDE ? 0 : group * 64) + warp * 16 + lane / 4) {}
        // Has the warp rows?
        __device__ __forceinline__ bool lives(unsigned padded) const { return token / 16 * 16 < padded; }
        // Which group of columns its j-th is.
        __device__ __forceinline__ unsigned columns(int j) const { return BESIDE ? group + 2 * j : j; }
    };
    // Of two warps that share rows: where one leaves what the other adds.
    __device__ __forceinline__ unsigned left_by(const Spot &spot, unsigned group) const {
        return of.shared.received() + (group * 2 + spot.warp / 2) * 2048 + 1024 + spot.warp % 2 * 512 + spot.lane * 16;
    }
    __device__ __forceinline__ static void meet(const Spot &spot) { sync_threads(3 + spot.warp, 64); }

    // The warpgroup's sums over each of its slices.
    template <int PRODUCT>
    __device__ __forceinline__ void multiply(const Spot &spot, float (&sum)[SLICES<PRODUCT>][WIDTH<PRODUCT> / 2]) {
        using T = Tile<PRODUCT>;
        const unsigned x_chunks = of.x_chunks();
        const bool works = BESIDE || spot.group * 64 < of.padded;
        // Of qkv's columns the warpgroups have every second group; of gates and ups, which take turns, what lies together.
        constexpr unsigned FIRST = !BESIDE || T::ADDS ? 0 : PRODUCT == GATE_UP ? WIDTH<PRODUCT> * 128 : 1024;
        constexpr unsigned long long APART = BESIDE && PRODUCT == QKV ? 64ull << 32 : 0;
        unsigned x_before = X_STAGES, w_before = W_STAGES, in_x = 0; // stages that are read as soon as the chunk before is multiplied
        const auto release = [&] {
            if (x_before < X_STAGES && spot.lane < 2)
                barrier_arrive_at(of.shared.x_empty(x_before), spot.lane);
            if (w_before < W_STAGES && spot.lane == 0)
                barrier_arrive(of.shared.w_empty(w_before));
            x_before = X_STAGES, w_before = W_STAGES;
        };
#pragma unroll
        for (int slice = 0; slice < SLICES<PRODUCT>; slice++) {
            hold(sum[slice]);
#pragma unroll 1
            for (unsigned chunk = 0; chunk < T::CHUNKS / SLICES<PRODUCT>; chunk += T::AT_ONCE) {
                await(of.shared.w_full(w.at), w.parity);
#pragma unroll
                for (unsigned i = 0; i < T::AT_ONCE; i++) {
                    if (in_x == 0)
                        await(of.shared.x_full(x.at), x.parity);
                    const bool own = !IN_TURNS<PRODUCT> || i % 2 == spot.group;
                    if (works && own) {
                        const unsigned long long a =
                            tile_descriptor(of.shared.x(x.at) + in_x * of.padded * 128 + (BESIDE ? 0 : spot.group * 64 * 128));
                        const unsigned long long b = tile_descriptor(of.shared.w(w.at) + i * T::N * 128 + spot.group * FIRST) + APART;
                        wgmma_fence();
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            wgmma(sum[slice], a + 2 * k, b + 2 * k, i > IN_TURNS<PRODUCT> || k > 0 || chunk > 0);
                        wgmma_commit();
                        wgmma_wait<1>();
                    }
                    if (own)
                        release();
                    if (++in_x == x_chunks) {
                        in_x = 0;
                        x_before = x.at;
                        x.advance();
                    }
                    if (i == T::AT_ONCE - 1) {
                        w_before = w.at;
                        w.advance();
                    }
                }
            }
            wgmma_wait<0>();
            hold(sum[slice]);
            release();
        }
    }
    // Counts the block: what it wrote for others is in memory.
    __device__ __forceinline__ void end(const Step &step, unsigned product) const {
        sync_threads(1, TENSOR_THREADS);
        if (threadIdx.x == 0)
            count(product == QKV ? of.flags.ended(step.phase, of.block >= 2 * HEADS)
                                 : of.flags.parts_of(step.phase, product) + of.block / Flags::PART_BLOCKS,
                  1);
    }
    // The quad's sum of squares of every second pair of 32, in the order of a butterfly: a thread's four, or the two that it has of them,
    // to which the others' are added,
    __device__ __forceinline__ static float of_thread(const float (&square)[GROUPS]) {
        if constexpr (BESIDE)
            return __fadd_rn(square[0], square[1]);
        else
            return __fadd_rn(__fadd_rn(square[0], square[2]), __fadd_rn(square[1], square[3]));
    }
    // and then the quad's.
    __device__ __forceinline__ static float butterfly(float sum) {
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
        return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
    }
    __device__ __forceinline__ static float square_of(float2 x) { return fmaf(x.x, x.x, __fmul_rn(x.y, x.y)); }

    // The thread has both slices: the first's sums become those of both.
    template <int COUNT> __device__ __forceinline__ static void add_slices(float (&sum)[2][COUNT]) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            sum[0][i] = __fadd_rn(sum[0][i], sum[1][i]);
    }
    // Each warpgroup has one: it gets the sum of both of its own groups of columns.
    __device__ __forceinline__ void add_slices(const Spot &spot, float (&sum)[16]) const {
        const auto at = [&](unsigned group) { return of.shared.swapped(group * 4 + spot.warp) + spot.lane * 16; };
        const bool is_second = spot.group;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float *const given = sum + 8 * j;
            store_float4(at(spot.group ^ 1) + j * 512, is_second ? given[0] : given[4], is_second ? given[1] : given[5],
                         is_second ? given[2] : given[6], is_second ? given[3] : given[7]);
        }
        meet(spot);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float4 others = load_shared(at(spot.group) + j * 512);
            const float all[4] = {others.x, others.y, others.z, others.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum[4 * j + i] = __fadd_rn(is_second ? sum[8 * j + 4 + i] : sum[8 * j + i], all[i]);
        }
    }
    // o, down: adds to the residual stream. Warps of its own parity are a block's to end, the others its neighbour's.
    template <int PRODUCT> __device__ __forceinline__ void add(const Step &step) {
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
    // silu(gate) * up: groups of 8 columns are gates and their ups in turn.
    __device__ __forceinline__ void gate_up(const Step &step) {
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
                words[at(i, j)] = pair_of({GateUp::silu(g.x) * u.x, GateUp::silu(g.y) * u.y});
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
    // A pair of dims of a head, and the one that it turns with.
    struct Halves {
        float2 lo, hi;
    };
    // Queries, and the newest keys and values, of the next layer: dims 16 j + 4 quad + 2 rank of half of a head, 64 further on those
    // that they turn with.
    __device__ __forceinline__ void qkv(const Step &step) {
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
            if (normed) {
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
                        pairs[i][j] = pair_of(of_head.lo);
                        pairs[i][GROUPS + j] = pair_of(of_head.hi);
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
    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (unsigned phase = 0; phase < of.flags.chains(); phase++) {
            const Step step(phase);
            add<O>(step);
            gate_up(step);
            add<DOWN>(step);
            if (phase + 2 < of.flags.phases())
                qkv(step);
        }
    }
};

// A multiplying block.
template <bool FP8> __device__ __forceinline__ void multiply(const Layers &args, const LayerMaps &maps, unsigned base, unsigned block) {
    const Multiplying of(args, maps, base, block);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < X_STAGES; i++) {
            barrier_init(of.shared.x_full(i), 1);
            barrier_init(of.shared.x_empty(i), 2 * TENSOR_THREADS / 32);
        }
        for (unsigned i = 0; i < W_STAGES; i++) {
            barrier_init(of.shared.w_full(i), 1);
            barrier_init(of.shared.w_empty(i), TENSOR_THREADS / 32);
        }
        barrier_init(of.shared.sums_there(), 1);
        barrier_init(of.shared.squares_there(), 1);
        barrier_init(of.shared.swapped_there(), 1);
        barrier_init_fence();
    }
    __syncthreads();
    cluster_sync();
    // Of registers who multiplies takes what warps that are there for attending do not need.
    if (warp < TENSOR_THREADS / 32) {
        if constexpr (FP8)
            asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
        dependent_wait();
        if (of.padded > 64)
            Tensor<FP8, false>{of}.run();
        else
            Tensor<FP8, true>{of}.run();
    } else {
        if constexpr (FP8)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        if (warp == TENSOR_THREADS / 32) {
            if (lane == 0)
                WeightFetcher{of}.run();
        } else {
            dependent_wait();
            if (warp == TENSOR_THREADS / 32 + 1)
                ActivationFetcher{of, lane}.run();
            else if (warp < TENSOR_THREADS / 32 + 4)
                Scales{of}.run();
        }
    }
    __syncwarp();
    cluster_sync();
}
