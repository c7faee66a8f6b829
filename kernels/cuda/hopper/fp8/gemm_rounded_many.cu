// rounded_many_*, rounded_many_split_*, rounded_many_joint_*, rounded_many_grained_*: products of many tokens whose both operands are e4m3 codes (rounded.cuh); see gemm_many.cuh.
//
//   a group's sums   ── even ──┬─ taken out while odd is multiplied ── times scales, += ──> a slice's
//   the next one's   ── odd  ──┘
//
// 1. A thread has registers for two groups' sums, so that tensor cores always have one more to do, and for a slice's; or, while the
//    second slice is multiplied, for one group's, that slice's, and the first one's. Tiles of 192 rows of gate and up, which are there for
//    the number of blocks that they make, and of 192 tokens, which read the fewest bytes of shared memory for an operation, leave room for
//    one group's and one slice's: there a warpgroup takes sums out while others multiply.
// 2. A group's scales come with the last of its stages, by a warp of their own: loads from L2 take longer than a block.
// 3. Instructions that take sums out keep the tensor cores from their registers: the time of both adds up. Where each 128 rows have two
//    scales at most, a thread makes four products of scales a group; rounded_many_grained_* makes one for each eight rows and token.
#include "hopper/gemm/gemm_many.cuh"
#include "hopper/fp8/rounded.cuh"

template <> constexpr unsigned STAGED_BYTES<Rounded<GateUp>> = WarpTile::HALF;

__device__ __forceinline__ Known look_up(const Rounded<Qkv> &epilogue, unsigned token) {
    const Qkv::Where where = epilogue.where(token);
    return {1.0f, where.position, where.location};
}
__device__ __forceinline__ Known look_up(const Rounded<GateUp> &, unsigned) { return {1.0f, 0, 0}; }
__device__ __forceinline__ constexpr bool is_added(const Rounded<Residual> &) { return true; }
template <unsigned WIDTH>
__device__ __forceinline__ void prepare(const Rounded<Residual> &epilogue, const Outputs &out, unsigned barrier) {
    prepare<WIDTH>(static_cast<const Residual &>(epilogue), out, barrier);
}

template <class E, int COUNT>
__device__ __forceinline__ void scale_by_rows(const Rounded<E> &epilogue, float (&y)[COUNT], const Outputs &out) {
    if (epilogue.row_scales != nullptr)
#pragma unroll
        for (int j = 0; j < COUNT / 4; j++) {
            const float2 by = epilogue.row_scales_at(out.m0 + 8 * j + out.lane() % 4 * 2, out.rows);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                y[4 * j + 2 * h] = __fmul_rn(y[4 * j + 2 * h], by.x);
                y[4 * j + 2 * h + 1] = __fmul_rn(y[4 * j + 2 * h + 1], by.y);
            }
        }
}
template <class E, int COUNT>
__device__ __forceinline__ void finish(const Rounded<E> &epilogue, float (&y)[COUNT], const Outputs &out, const Known *known) {
    scale_by_rows(epilogue, y, out);
    finish(static_cast<const E &>(epilogue), y, out, known);
}
template <int COUNT>
__device__ __forceinline__ void finish_unstaged(const Rounded<GateUp> &epilogue, float (&y)[COUNT], const Outputs &out,
                                                const Known *known) {
    scale_by_rows(epilogue, y, out);
    finish_unstaged(static_cast<const GateUp &>(epilogue), y, out, known);
}

// Where the first of two slices of a tile ends, in blocks of columns; 0 of one slice.
template <class P> __device__ __forceinline__ unsigned slice_cut(const Shared<P> &shared, const Shape &shape) {
    return P::SPLIT * P::HALVES == 1 && shape.slices > 1 ? shared.slice_ends[0] : 0;
}

// Both operands are codes. Their scales lie beside a stage: the tokens', then w's, of eight rows each. PAIRS: groups of eight rows have two
// scales in turn within 128 rows, as blocks of 128 x 128 of gate and up give them; then those of the first groups of each 64 rows lie there.
template <bool PAIRS_> struct Codes {
    CodeScales scales;
    static constexpr bool PAIRS = PAIRS_;
    static constexpr unsigned STEP = PAIRS ? 8 : 4; // groups of rows from fetched scales, four at once, to the next ones
    static constexpr bool CODES = true;
    template <class P> static constexpr unsigned SCALE_BYTES = (P::TOKENS + P::M / 8 / STEP * 4) * 4;

    // A warp's work: tile after tile, block after block.
    template <class P> __device__ __forceinline__ void fetch(const Shared<P> &shared, const Shape &shape) const {
        static_assert(P::M / 8 <= STEP * 32, "a lane has 16 bytes of w's");
        const unsigned lane = threadIdx.x % 32;
        Place<P::STAGES> position;
        dependent_wait();
        for (Tiles<P> tiles(shape); tiles.remain(); tiles.advance()) {
            const float *const x = scales.x + tiles.token() + 4 * lane, *const w = scales.w + tiles.row() / 8 + STEP * lane;
            const unsigned begin = tiles.begin(shape), end = tiles.end(shape), cut = slice_cut<P>(shared, shape);
            for (unsigned i = begin; i < end; i++) {
                const unsigned to = shared.scales(position.at) + 16 * lane;
                barrier_wait(shared.empty + 8 * position.at, position.parity ^ 1); // passes in the first round
                if (scales.group_end(i, i < cut ? cut : end) == i + 1) {
#pragma unroll
                    for (unsigned n = 0; n < P::TOKENS; n += 4 * 32)
                        if (n + 4 * lane < P::TOKENS)
                            fetch_scales(to + 4 * n, x + i * scales.pitch + n);
                    if (lane < P::M / 8 / STEP)
                        fetch_scales(to + P::TOKENS * 4, w + i * scales.groups);
                }
                arrive_with_scales(shared.full + 8 * position.at);
                position.advance();
            }
        }
    }
};

// Takes out the sums of a group of columns, whose scales lie at stage `at`, and calls `release` when they are read.
template <class P, class Release>
__device__ __forceinline__ void take(const Shared<P> &shared, unsigned at, float (&part)[P::M / 2], float (&sum)[P::M / 2],
                                     const Release &release) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned scales = shared.scales(at), token = scales + (16 * warp + lane / 4) * 4, of_rows = scales + P::TOKENS * 4;
    const float by[2] = {load_scale(token), load_scale(token + 32)};
    if constexpr (P::Operands::PAIRS) {
        constexpr int ROWS = P::M % 128 == 0 ? 128 : 64, COUNT = P::M / ROWS;
        float2 of[COUNT];
#pragma unroll
        for (int q = 0; q < COUNT; q++)
            of[q] = load_two_scales(of_rows + 16 * (ROWS / 64 * q));
        __syncwarp();
        release();
#pragma unroll
        for (int q = 0; q < COUNT; q++) {
            const float both[2][2] = {{__fmul_rn(of[q].x, by[0]), __fmul_rn(of[q].x, by[1])},
                                      {__fmul_rn(of[q].y, by[0]), __fmul_rn(of[q].y, by[1])}};
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++)
                sum[ROWS / 2 * q + i] = fmaf(part[ROWS / 2 * q + i], both[i / 4 % 2][i % 4 / 2], sum[ROWS / 2 * q + i]);
        }
    } else {
        static_assert(P::M % 32 == 0, "four groups of rows at a time");
#pragma unroll
        for (int q = 0; q < P::M / 32; q++) {
            const float4 four = load_shared(of_rows + 16 * q);
            const float of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < 16; i++)
                sum[16 * q + i] = fmaf(part[16 * q + i], __fmul_rn(of[i / 4], by[i % 4 / 2]), sum[16 * q + i]);
        }
        __syncwarp();
        release();
    }
}

// Groups of columns whose sums a thread has at once beside a slice's: one is multiplied while the other is taken out.
template <class P> constexpr int SETS_OF = P::M <= 128 && P::GROUPS <= 2 ? 2 : 1;

// The sums over blocks begin .. end of the columns. `open` is called once, with the last two blocks on their way at most. Where the outer
// loop goes round nothing is on its way: the compiler follows products' registers no further, and would put all in a row. GROUPED: groups
// are of several blocks, which to ask of each would cost those of one 2 to 5%.
template <bool GROUPED, int SETS, class P, class Open>
__device__ __forceinline__ void multiply_groups(const Shared<P> &shared, const CodeScales &scales, Turn<P> &position, unsigned begin,
                                                unsigned end, float (&sum)[P::M / 2], const Open &open) {
    const unsigned lane = threadIdx.x % 32, sharer = cluster_rank() ^ lane; // of clusters with two a side
    float even[P::M / 2], odd[P::M / 2]; // of one set, odd is never used
#pragma unroll
    for (int i = 0; i < P::M / 2; i++)
        even[i] = odd[i] = sum[i] = 0.0f;
    hold(even);
    if constexpr (SETS == 2)
        hold(odd);
    unsigned at = 0; // the last block that was begun
    const auto group_end = [&](unsigned first) { return GROUPED ? scales.group_end(first, end) : first + 1; };
    const auto begin_next = [&](unsigned i, float(&part)[P::M / 2], bool is_first) {
        start_block(shared, position, part, is_first);
        if (i + 1 == end)
            open();
        at = position.at;
        position.advance();
    };
    const auto release = [&](unsigned stage) { position.release(shared.empty + 8 * stage, lane, sharer); };
    // Blocks behind the first of a group: the one before is multiplied then, and its stage free.
    const auto add_blocks = [&](unsigned i, unsigned last, float(&part)[P::M / 2]) {
#pragma unroll 1
        for (; GROUPED && i < last; i++) {
            const unsigned before = at;
            begin_next(i, part, false);
            wgmma_wait<1>();
            release(before);
        }
    };
    const auto take_out = [&](unsigned stage, float(&part)[P::M / 2]) {
        hold(part);
        take(shared, stage, part, sum, [&] { release(stage); });
    };
#pragma unroll 1
    for (unsigned first = begin, last; first < end; first = last) {
        last = group_end(first);
        begin_next(first, even, true);
        add_blocks(first + 1, last, even);
        if constexpr (SETS == 2)
            if (last < end) {
                const unsigned second = last, of_even = at;
                last = group_end(second);
                begin_next(second, odd, true);
                wgmma_wait<1>();
                take_out(of_even, even);
                add_blocks(second + 1, last, odd);
                wgmma_wait<0>();
                take_out(at, odd);
                continue;
            }
        wgmma_wait<0>();
        take_out(at, even);
    }
}

template <class P, int SETS = SETS_OF<P>, class Open>
__device__ __forceinline__ void multiply_codes(const Shared<P> &shared, const typename P::Operands &operands, Turn<P> &position,
                                               unsigned begin, unsigned end, float (&sum)[P::M / 2], const Open &open) {
    if (operands.scales.shift > 0)
        multiply_groups<true, SETS>(shared, operands.scales, position, begin, end, sum, open);
    else
        multiply_groups<false, SETS>(shared, operands.scales, position, begin, end, sum, open);
}

// A tile's sums. Of two slices, the first one's stay in registers, which leaves one set of a group's to the second. `between` is called once.
template <class P, class Between>
__device__ __forceinline__ void multiply_codes_tile(const Shared<P> &shared, const typename P::Operands &operands, Turn<P> &position,
                                                    const Shape &shape, float (&total)[P::M / 2], const Between &between) {
    between();
    if constexpr (SETS_OF<P> == 1) { // there is one slice
        multiply_codes(shared, operands, position, 0, shape.blocks(), total, [] {});
    } else {
        multiply_codes(shared, operands, position, 0, shared.slice_ends[0], total, [] {});
        if (shape.slices > 1) {
            float second[P::M / 2];
            multiply_codes<P, 1>(shared, operands, position, shared.slice_ends[0], shape.blocks(), second, [] {});
#pragma unroll
            for (int i = 0; i < P::M / 2; i++)
                total[i] += second[i];
        }
    }
}

// SPLIT: a cluster takes one of so many slices of a tile at a time; 1: all of them.
#define ROUNDED_MANY_OF(NAME, PAIRS, GROUPS, M, SPLIT, EPILOGUE)                                                             \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)                                                      \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, CodeScales scales, Rounded<EPILOGUE> epilogue, Partials partials) {                                    \
        multiply_many<Plan<GROUPS, M, 2, 1, SPLIT, Rounded<EPILOGUE>, Codes<PAIRS>>>(                                        \
            &w, &x, &out, shape, epilogue, partials, Codes<PAIRS>{scales});                                                  \
    }
// Of clusters of two blocks that have half of the columns each.
#define ROUNDED_MANY_JOINT(NAME, GROUPS, EPILOGUE)                                                                           \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)                                                      \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
         Shape shape, CodeScales scales, Rounded<EPILOGUE> epilogue, Partials partials) {                                    \
        multiply_many<Plan<GROUPS, 128, 1, 1, 1, Rounded<EPILOGUE>, Codes<true>, 2>>(                                        \
            &w, &x, &out, shape, epilogue, partials, Codes<true>{scales});                                                   \
    }
#define ROUNDED_MANY(NAME, GROUPS, M, SPLIT, EPILOGUE) ROUNDED_MANY_OF(NAME, true, GROUPS, M, SPLIT, EPILOGUE)
#define ROUNDED_MANY_GRAINED(NAME, EPILOGUE) ROUNDED_MANY_OF(NAME, false, 2, 128, 1, EPILOGUE)

ROUNDED_MANY(rounded_many_qkv_narrow, 2, 128, 1, Qkv)
ROUNDED_MANY(rounded_many_residual_narrow, 2, 128, 1, Residual)
ROUNDED_MANY(rounded_many_split_residual_short, 2, 64, 2, Residual)
ROUNDED_MANY_JOINT(rounded_many_joint_residual_short, 1, Residual)
ROUNDED_MANY_JOINT(rounded_many_joint_residual_narrow, 2, Residual)
ROUNDED_MANY_JOINT(rounded_many_joint_residual_middle, 3, Residual)
ROUNDED_MANY(rounded_many_gate_up_narrow, 2, 128, 1, GateUp)
ROUNDED_MANY(rounded_many_gate_up_middle, 3, 128, 1, GateUp)
ROUNDED_MANY(rounded_many_gate_up_tall, 2, 192, 1, GateUp)
ROUNDED_MANY_GRAINED(rounded_many_grained_qkv_narrow, Qkv)
ROUNDED_MANY_GRAINED(rounded_many_grained_residual_narrow, Residual)
ROUNDED_MANY_GRAINED(rounded_many_grained_gate_up_narrow, GateUp)
