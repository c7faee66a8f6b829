// The blocks of layers_divide.cuh that multiply: o, gate_up, down and the next layer's qkv of a half's rows, then of the other half's, layer after
// layer, to the last layer's first half. Tokens are the rows of every product and rows of w its columns: D[64 tokens, N] by each of two warpgroups.
//
//   block     o, down   32 rows of w by half of the columns; its neighbour has the other half, they add up by st.async, warp by warp
//             gate_up   96 rows of w
//             qkv       64 rows of w: half of a head, whose norm's sums its neighbour and it exchange; of fp8, halves of rows too
//   shared    x ring [X_STAGES][padded rows or more][64]    w ring [W_STAGES][chunks][N][64]    sums of the neighbour    scales
//   weights   warp 8: runs ahead across products, halves and layers; what the second half has read, nobody reads again in this step
//   x         warp 9: waits for what the product reads, then fetches; gate_up's and qkv's half for both neighbours
//   scales    warps 10 and 11: those of the rows' norms, from sums of squares of 64 elements
//
// 1. Bits are gemm_few.cuh's and epilogue.cuh's: a slice of the columns from zero, k16 by k16, slices added in pairs, then pairs of
//    pairs: each block has the two slices of a pair.
// 2. A sum of squares of 64 elements is a butterfly over pairs of them, 16 apart first and neighbours last. A thread has pairs in steps
//    of two, its quad those between: what two blocks must add is the last level, because each has every second pair (`parity`).
// 3. An element of the residual stream is read and written by one thread throughout.
// 4. What neighbours send each other is waited for before a block counts itself done with a product, and sent after all have
//    counted themselves done with the last that sent to the same place, for its activations are fetched behind that.
#pragma once

#include "step/batch.cuh"
#include "epilogue.cuh"
#include "hopper/layers/layers_flags.cuh"
#include "hopper/layers/layers_keep.cuh"

constexpr unsigned X_STAGES = 6, X_STAGE = 16384, W_STAGES = 7, W_STAGE = 16384;
constexpr unsigned TENSOR_THREADS = 256; // that multiply
constexpr unsigned SCALE_THREADS = 64;

template <int PRODUCT> struct Tile {
    static constexpr bool ADDS = PRODUCT == O || PRODUCT == DOWN;
    static constexpr unsigned N = ADDS ? 32 : PRODUCT == GATE_UP ? 96 : 64; // rows of w
    static constexpr unsigned COLS = PRODUCT == O ? Q_WIDTH : PRODUCT == DOWN ? MLP : HIDDEN;
    static constexpr unsigned CHUNKS = COLS / 64 / (ADDS ? 2 : 1);       // of 64 columns, a block's
    static constexpr unsigned AT_ONCE = ADDS ? 4 : PRODUCT == QKV ? 2 : 1; // chunks of a stage of w
    static constexpr unsigned SLICES = 2;                                // a block's
    static_assert(AT_ONCE * N * 128 <= W_STAGE && CHUNKS % (SLICES * 4) == 0, "whole stages of both rings in a slice");
};
static_assert(HIDDEN / 32 * 2 == MULTIPLIERS && 2 * MLP / 96 == MULTIPLIERS && (HEADS + 2 * KV_HEADS) * 2 == MULTIPLIERS,
              "a tile of each product for every block");

// A multiplying block's shared memory.
struct Multiplier {
    unsigned base;
    static constexpr unsigned RECEIVED = 8192, SWAPPED = TENSOR_THREADS * 32;
    static constexpr unsigned ALL =
        X_STAGES * X_STAGE + W_STAGES * W_STAGE + RECEIVED + 3 * HALF_ROWS * 4 + 16 * (X_STAGES + W_STAGES + 2) + SWAPPED;

    __device__ __forceinline__ unsigned x(unsigned stage) const { return base + stage * X_STAGE; }
    __device__ __forceinline__ unsigned w(unsigned stage) const { return base + X_STAGES * X_STAGE + stage * W_STAGE; }
    // The neighbour's sums of o and down.
    __device__ __forceinline__ unsigned received() const { return w(W_STAGES); }
    // Its sums of squares of heads: float2 a token.
    __device__ __forceinline__ unsigned squares(unsigned token) const { return received() + RECEIVED + token * 8; }
    __device__ __forceinline__ unsigned scale(unsigned token) const { return squares(HALF_ROWS) + token * 4; }
    __device__ __forceinline__ unsigned x_full(unsigned stage) const { return scale(HALF_ROWS) + stage * 16; }
    __device__ __forceinline__ unsigned x_empty(unsigned stage) const { return x_full(stage) + 8; }
    __device__ __forceinline__ unsigned w_full(unsigned stage) const { return x_full(X_STAGES) + stage * 16; }
    __device__ __forceinline__ unsigned w_empty(unsigned stage) const { return w_full(stage) + 8; }
    __device__ __forceinline__ unsigned sums_there() const { return w_full(W_STAGES); }
    __device__ __forceinline__ unsigned squares_there() const { return sums_there() + 8; }
    // Of keys and values in fp8, what the neighbour has of a warp's rows (layers_keep.cuh).
    __device__ __forceinline__ unsigned swapped_there() const { return sums_there() + 16; }
    __device__ __forceinline__ unsigned swapped(unsigned warp) const { return sums_there() + 32 + warp * 1024; }
};
static_assert(Multiplier::ALL <= LAYERS_SHARED, "a multiprocessor's shared memory");

__device__ __forceinline__ float load_float(unsigned at) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
    return value;
}
// A box of weights, whose map has four dimensions.
__device__ __forceinline__ void fetch_weights(unsigned to, const TensorMap *map, unsigned col, unsigned parity, unsigned fours,
                                              unsigned barrier, unsigned long long policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to), "l"(map), "r"(col), "r"(0), "r"(parity), "r"(fours), "r"(barrier),
                 "l"(policy)
                 : "memory");
}
// Keeps the compiler from computing addresses of all products ahead of the layers' loop, which spills.
__device__ __forceinline__ unsigned here(unsigned x) {
    unsigned y;
    asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Which rows and columns a product is of.
struct Step {
    unsigned phase, layer, half;

    __device__ __forceinline__ explicit Step(unsigned phase) : phase(phase), layer(phase / 2), half(phase % 2) {}
};

// A block's part of all products: what its roles share.
struct Multiplying {
    const Layers &args;
    const LayerMaps &maps;
    const Flags flags;
    const Multiplier shared;
    const unsigned block, rank, padded;

    __device__ __forceinline__ Multiplying(const Layers &args, const LayerMaps &maps, unsigned base, unsigned block)
        : args(args), maps(maps), flags(args), shared{base}, block(block), rank(block % 2), padded(args.padded) {}

    // The first row of a half, and how many there are.
    __device__ __forceinline__ unsigned first_row(unsigned half) const { return half ? args.rows[0] : 0; }
    __device__ __forceinline__ unsigned rows(unsigned half) const { return half ? args.rows[1] : args.rows[0]; }
    // Chunks of 64 columns that a stage of x holds.
    __device__ __forceinline__ unsigned x_chunks() const { return padded > 64 ? 1 : padded > 32 ? 2 : 4; }
    // Segments and parities take turns among pairs of blocks.
    __device__ __forceinline__ unsigned segment() const { return block / 4; }
    __device__ __forceinline__ unsigned parity() const { return block / 2 % 2; }
    // Sums of squares of what o (0) or down (1) added to, of a segment.
    __device__ __forceinline__ float2 *sums(unsigned half, unsigned product, unsigned segment) const {
        return args.sums + ((half * 2 + product) * SEGMENTS + segment) * HALF_ROWS;
    }
};

// The thread that fetches weights.
struct WeightFetcher {
    const Multiplying &of;
    Place<W_STAGES> place;
    unsigned long long policy = EVICT_NORMAL;

    template <int PRODUCT> __device__ __forceinline__ void fetch(const TensorMap *map) {
        using T = Tile<PRODUCT>;
        const unsigned first = T::ADDS ? of.rank * T::CHUNKS : 0;
#pragma unroll 1
        for (unsigned chunk = 0; chunk < T::CHUNKS; chunk += T::AT_ONCE) {
            const unsigned full = of.shared.w_full(place.at), to = of.shared.w(place.at);
            await(of.shared.w_empty(place.at), place.parity ^ 1);
            barrier_expect(full, T::AT_ONCE * T::N * 128);
#pragma unroll
            for (unsigned i = 0; i < T::AT_ONCE; i++) {
                const unsigned col = (first + chunk + i) * 64, at = to + i * T::N * 128;
                if (T::ADDS)
                    fetch_weights(at, map, col, of.parity(), 16 * of.segment(), full, policy);
                else if (PRODUCT == QKV)
                    fetch_weights(at, map, col, of.rank, 32 * (of.block / 2), full, policy);
                else
                    fetch_weights(at, map, col, 0, 24 * of.block, full, policy);
            }
            place.advance();
        }
    }
    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (unsigned phase = 0; phase < of.flags.chains(); phase++) {
            const Layer *layer = of.args.layers + phase / 2;
            policy = phase % 2 ? EVICT_FIRST : EVICT_NORMAL;
            fetch<O>(&layer->o);
            fetch<GATE_UP>(&layer->gate_up);
            fetch<DOWN>(&layer->down);
            if (phase + 2 < of.flags.phases())
                fetch<QKV>(&layer[1].qkv);
        }
    }
};

// The thread that fetches activations.
struct ActivationFetcher {
    const Multiplying &of;
    Place<X_STAGES> place;

    template <int PRODUCT> __device__ __forceinline__ void fetch(const TensorMap *map) {
        using T = Tile<PRODUCT>;
        const unsigned first = T::ADDS ? of.rank * T::CHUNKS : 0, at_once = of.x_chunks(), rows = of.padded / 2;
#pragma unroll 1
        for (unsigned chunk = 0; chunk < T::CHUNKS; chunk += at_once) {
            const unsigned full = of.shared.x_full(place.at);
            await(of.shared.x_empty(place.at), place.parity ^ 1);
            barrier_expect(full, at_once * of.padded * 128);
#pragma unroll 1
            for (unsigned i = 0; i < at_once; i++) {
                const unsigned to = of.shared.x(place.at) + i * of.padded * 128, col = (first + chunk + i) * 64;
                if (T::ADDS) {
                    bulk_fetch(to, map, col, 0, full, EVICT_NORMAL);
                    bulk_fetch(to + rows * 128, map, col, rows, full, EVICT_NORMAL);
                } else {
                    bulk_fetch_shared(to + of.rank * rows * 128, map, col, of.rank * rows, full, EVICT_NORMAL, 3);
                }
            }
            place.advance();
        }
    }
    __device__ __forceinline__ void run() {
        const Flags &flags = of.flags;
        const unsigned turns[2] = {of.args.batch[of.args.plan_offset[0]] * KV_HEADS, of.args.batch[of.args.plan_offset[1]] * KV_HEADS};
#pragma unroll 1
        for (unsigned phase = 0; phase < flags.chains(); phase++) {
            const unsigned half = phase % 2;
            const auto after = [&](const unsigned *flag, unsigned value) {
                flags.wait(flag, value);
                fence_before_fetch();
            };
            after(flags.done(phase), half ? turns[1] : turns[0]);
            fetch<O>(of.maps.attended + half);
            after(flags.ended(phase, O), MULTIPLIERS);
            fetch<GATE_UP>(of.maps.residual + half);
            after(flags.ended(phase, GATE_UP), MULTIPLIERS);
            fetch<DOWN>(of.maps.activated + half);
            if (phase + 2 < flags.phases()) {
                after(flags.ended(phase, DOWN), MULTIPLIERS);
                fetch<QKV>(of.maps.residual + half);
            }
        }
    }
};

// The warps that compute the rows' scales, two rows a thread.
struct Scales {
    const Multiplying &of;

    // Behind o (0) or down (1).
    __device__ __forceinline__ void make(unsigned phase, unsigned product) const {
        const unsigned lane = threadIdx.x % 32, row = threadIdx.x % SCALE_THREADS * 2, half = phase % 2;
        if (lane == 0)
            of.flags.wait(of.flags.ended(phase, product ? DOWN : O), MULTIPLIERS);
        __syncwarp();
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
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(of.shared.scale(row)), "f"(a), "f"(b) : "memory");
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

// A thread that multiplies. FP8: keys and values are kept so.
template <bool FP8> struct Tensor {
    const Multiplying &of;
    Place<X_STAGES> x;
    Place<W_STAGES> w;
    unsigned sums_parity = 0, squares_parity = 0, swapped_parity = 0;

    // A thread's place in a product: it has tokens `token` and `token + 8`, and of each group j of 8 columns 8 j + 2 quad and the next.
    struct Spot {
        unsigned lane, group, warp, quad, token;

        __device__ __forceinline__ explicit Spot(unsigned thread)
            : lane(thread % 32), group(thread / 128), warp(thread / 32 % 4), quad(thread % 4),
              token(group * 64 + warp * 16 + lane / 4) {}
        // Has the warp rows?
        __device__ __forceinline__ bool lives(unsigned padded) const { return group * 64 + warp * 16 < padded; }
    };

    // The block's sums over its two slices, the one's and the other's.
    template <int PRODUCT> __device__ __forceinline__ void multiply(const Spot &spot, float (&sum)[2][Tile<PRODUCT>::N / 2]) {
        using T = Tile<PRODUCT>;
        const unsigned x_chunks = of.x_chunks();
        const bool works = spot.group * 64 < of.padded;
        unsigned x_before = X_STAGES, w_before = W_STAGES, in_x = 0; // stages that are read as soon as the chunk before is multiplied
        const auto release = [&] {
            if (x_before < X_STAGES && spot.lane < 2)
                barrier_arrive_at(of.shared.x_empty(x_before), spot.lane);
            if (w_before < W_STAGES && spot.lane == 0)
                barrier_arrive(of.shared.w_empty(w_before));
            x_before = X_STAGES, w_before = W_STAGES;
        };
#pragma unroll
        for (int slice = 0; slice < 2; slice++) {
            hold(sum[slice]);
#pragma unroll 1
            for (unsigned chunk = 0; chunk < T::CHUNKS / 2; chunk += T::AT_ONCE) {
                await(of.shared.w_full(w.at), w.parity);
#pragma unroll
                for (unsigned i = 0; i < T::AT_ONCE; i++) {
                    if (in_x == 0)
                        await(of.shared.x_full(x.at), x.parity);
                    if (works) {
                        const unsigned long long a =
                            tile_descriptor(of.shared.x(x.at) + in_x * of.padded * 128 + spot.group * 64 * 128);
                        const unsigned long long b = tile_descriptor(of.shared.w(w.at) + i * T::N * 128);
                        wgmma_fence();
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            wgmma(sum[slice], a + 2 * k, b + 2 * k, i > 0 || k > 0 || chunk > 0);
                        wgmma_commit();
                        wgmma_wait<1>();
                    }
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
            count(of.flags.ended(step.phase, product), 1);
    }
    // The quad's sum of four pairs' squares, in the order of a butterfly over every second pair of 32.
    __device__ __forceinline__ static float butterfly(const float (&square)[4]) {
        float sum = __fadd_rn(__fadd_rn(square[0], square[2]), __fadd_rn(square[1], square[3]));
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 2));
        return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 1));
    }
    __device__ __forceinline__ static float square_of(float2 x) { return fmaf(x.x, x.x, __fmul_rn(x.y, x.y)); }

    // o, down: adds to the residual stream. Warps of its own parity are a block's to end, the others its neighbour's.
    template <int PRODUCT> __device__ __forceinline__ void add(const Step &step) {
        using T = Tile<PRODUCT>;
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
        unsigned old[2][4];
        if (own)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    old[i][j] = spot.token + 8 * i < rows
                                    ? *reinterpret_cast<const unsigned *>(residual + (size_t)8 * i * HIDDEN + 16 * j)
                                    : 0;
        float sum[2][T::N / 2] = {};
        multiply<PRODUCT>(spot, sum);
#pragma unroll
        for (int i = 0; i < T::N / 2; i++)
            sum[0][i] = __fadd_rn(sum[0][i], sum[1][i]);
        const unsigned received = of.shared.received() + (((spot.group * 2 + spot.warp / 2) * 4) * 32 + spot.lane) * 16;
        if (lives && !own) {
            const unsigned to = at_neighbour(received, of.rank), barrier = at_neighbour(of.shared.sums_there(), of.rank);
#pragma unroll
            for (int j = 0; j < 4; j++)
                send(to + j * 512, sum[0][4 * j], sum[0][4 * j + 1], sum[0][4 * j + 2], sum[0][4 * j + 3], barrier);
        }
        if (own) {
            await(of.shared.sums_there(), sums_parity);
            float square[2][4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
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
                        *reinterpret_cast<__nv_bfloat162 *>(residual + (size_t)8 * i * HIDDEN + 16 * j) = is;
                }
            }
            float *const sums = reinterpret_cast<float *>(of.sums(step.half, PRODUCT == DOWN, of.segment())) + of.parity();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float all = butterfly(square[i]);
                if (spot.quad == 0)
                    __stcg(sums + (spot.token + 8 * i) * 2, all);
            }
        }
        sums_parity ^= 1;
        end(step, PRODUCT);
    }
    // silu(gate) * up: groups of 8 columns are gates and their ups in turn.
    __device__ __forceinline__ void gate_up(const Step &step) {
        using T = Tile<GATE_UP>;
        const Spot spot(here(threadIdx.x));
        float sum[2][T::N / 2] = {};
        multiply<GATE_UP>(spot, sum);
#pragma unroll
        for (int i = 0; i < T::N / 2; i++)
            sum[0][i] = __fadd_rn(sum[0][i], sum[1][i]);
        sync_threads(2, TENSOR_THREADS + SCALE_THREADS);
        __nv_bfloat16 *const out = of.args.activated + (size_t)(of.first_row(step.half) + spot.token) * MLP +
                                   here(of.block) * (T::N / 2) + 2 * spot.quad;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float scale = load_float(of.shared.scale(spot.token + 8 * i));
            if (spot.token + 8 * i < of.rows(step.half))
#pragma unroll
                for (int j = 0; j < T::N / 16; j++) {
                    const float *gate = sum[0] + 8 * j + 2 * i, *up = gate + 4;
                    const float2 g = {__fmul_rn(gate[0], scale), __fmul_rn(gate[1], scale)};
                    const float2 u = {__fmul_rn(up[0], scale), __fmul_rn(up[1], scale)};
                    store_pair(out + (size_t)8 * i * MLP + 8 * j, GateUp::silu(g.x) * u.x, GateUp::silu(g.y) * u.y);
                }
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
        using T = Tile<QKV>;
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
            barrier_expect(of.shared.swapped_there(), of.padded * 64);
        unsigned position[2], location[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const unsigned row = of.first_row(step.half) + min(spot.token + 8 * i, rows - 1);
            const Token *token = reinterpret_cast<const Token *>(of.args.batch + of.args.tokens_offset) + row;
            position[i] = token->position;
            location[i] = token->location;
        }
        float sum[2][T::N / 2] = {};
        multiply<QKV>(spot, sum);
        const bool lives = spot.lives(of.padded);
        // What turns and norms the thread's pairs is on its way while it waits for scales.
        float4 turn[2][4];
        float2 weights[2][4];
        const float2 *const rope = is_value ? nullptr : layer.rope;
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                turn[i][j] = {1.0f, 0.0f, 1.0f, 0.0f};
                if (rope)
                    turn[i][j] = *reinterpret_cast<const float4 *>(rope + (size_t)position[i] * (HEAD_DIM / 2) + 16 * j + dim);
                weights[i][j] = {1.0f, 1.0f};
                if (normed)
                    weights[i][j] = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(weight + 16 * j + dim + 64 * i));
            }
        }
        sync_threads(2, TENSOR_THREADS + SCALE_THREADS);
        float2 y[2][8]; // by token; the first four of the head's first half
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float scale = load_float(of.shared.scale(spot.token + 8 * i));
#pragma unroll
            for (int j = 0; j < 8; j++)
                y[i][j] = {__fmul_rn(__fadd_rn(sum[0][4 * j + 2 * i], sum[1][4 * j + 2 * i]), scale),
                           __fmul_rn(__fadd_rn(sum[0][4 * j + 2 * i + 1], sum[1][4 * j + 2 * i + 1]), scale)};
        }
        if (lives) {
            float inverse[2] = {1.0f, 1.0f};
            if (normed) {
                float mine[2][2];
                const unsigned barrier = at_neighbour(of.shared.squares_there(), of.rank);
#pragma unroll
                for (int i = 0; i < 2; i++) {
#pragma unroll
                    for (int part = 0; part < 2; part++) {
                        float square[4];
#pragma unroll
                        for (int j = 0; j < 4; j++)
                            square[j] = square_of(y[i][4 * part + j]);
                        mine[i][part] = butterfly(square);
                    }
                    if (spot.quad == 0)
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
                Halves of_head = {y[i][j], y[i][4 + j]};
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
                unsigned pairs[2][8];
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const Halves of_head = finished(i, j);
                        pairs[i][j] = pair_of(of_head.lo);
                        pairs[i][4 + j] = pair_of(of_head.hi);
                    }
                const HalfRows mine = {of.rank, of.shared.swapped(threadIdx.x / 32) + spot.lane * 16, of.shared.swapped_there()};
                mine.swap(pairs, swapped_parity);
                const unsigned at = of.rank ? location[1] : location[0];
                const Fp8Place place =
                    Fp8Place::of<HEAD_DIM>(is_value ? layer.v : layer.k, at / PAGE, KV_HEADS, PAGE, kv_head, at % PAGE);
                mine.keep(pairs, place, !is_value, spot.token + 8 * of.rank < rows, spot.quad);
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
                    for (int j = 0; j < 4; j++) {
                        const unsigned d = 16 * j + dim;
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
        Tensor<FP8>{of}.run();
    } else {
        if constexpr (FP8)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        if (warp == TENSOR_THREADS / 32) {
            if (lane == 0)
                WeightFetcher{of}.run();
        } else {
            dependent_wait();
            if (warp == TENSOR_THREADS / 32 + 1) {
                if (lane == 0)
                    ActivationFetcher{of}.run();
            } else if (warp < TENSOR_THREADS / 32 + 4)
                Scales{of}.run();
        }
    }
    __syncwarp();
    cluster_sync();
}
