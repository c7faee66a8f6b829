// rounded_many_*, rounded_many_split_*, rounded_many_joint_*, rounded_many_grained_*: products of many tokens whose both operands are e4m3 codes (rounded.cuh); see gemm_many.cuh.
//
//   a block's sums   ── even ──┬─ taken out while odd is multiplied ── times scales, += ──> a slice's
//   the next one's   ── odd  ──┘
//
// 1. A thread has registers for two blocks' sums, so that tensor cores always have one more to do, and for a slice's. The first
//    slice's wait in memory for the second's, and are fetched while the last block is multiplied. Tiles of 192 rows of gate and up,
//    which are there for the number of blocks that they make, and of 192 tokens, which read the fewest bytes of shared memory for an
//    operation, leave room for one: there a warpgroup takes sums out while others multiply.
// 2. Blocks' scales come with the ring's stages, by a warp of their own: loads from L2 take longer than a block.
// 3. Instructions that take sums out keep the tensor cores from their registers: the time of both adds up. Where each 128 rows have two
//    scales at most, a thread makes four products of scales a block; rounded_many_grained_* makes one for each eight rows and token.
#include "hopper/gemm/gemm_many.cuh"
#include "hopper/fp8/rounded.cuh"

template <> constexpr unsigned STAGED_BYTES<Rounded<GateUp>> = WarpTile::HALF;

__device__ __forceinline__ Known look_up(const Rounded<Qkv> &epilogue, unsigned token) {
    const Qkv::Where where = epilogue.where(token);
    return {1.0f, where.position, where.location, 0};
}
__device__ __forceinline__ Known look_up(const Rounded<GateUp> &, unsigned) { return {1.0f, 0, 0, 0}; }
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
            for (unsigned i = tiles.begin(shape); i < tiles.end(shape); i++) {
                const unsigned to = shared.scales(position.at) + 16 * lane;
                barrier_wait(shared.empty + 8 * position.at, position.parity ^ 1); // passes in the first round
#pragma unroll
                for (unsigned n = 0; n < P::TOKENS; n += 4 * 32)
                    if (n + 4 * lane < P::TOKENS)
                        fetch_scales(to + 4 * n, x + i * scales.pitch + n);
                if (lane < P::M / 8 / STEP)
                    fetch_scales(to + P::TOKENS * 4, w + i * scales.groups);
                arrive_with_scales(shared.full + 8 * position.at);
                position.advance();
            }
        }
    }
};

// Starts the products of the block at hand.
template <class P>
__device__ __forceinline__ void start(const Shared<P> &shared, const Place<P::STAGES> &position, float (&part)[P::M / 2]) {
    const unsigned stage = shared.stage(position.at);
    barrier_wait(shared.full + 8 * position.at, position.parity);
    const unsigned long long a = tile_descriptor(stage + threadIdx.x / 128 * 64 * 128);
    const unsigned long long b = tile_descriptor(stage + P::X_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++)
        wgmma_codes(part, a + 2 * k, b + 2 * k, k > 0);
    wgmma_commit();
}

// Takes out the sums of block i, which lies at `at`. Behind block `cut` the slice's go to `aside`.
template <class P>
__device__ __forceinline__ void take(const Shared<P> &shared, unsigned at, unsigned i, unsigned cut, float (&part)[P::M / 2],
                                     float (&sum)[P::M / 2], float4 *aside) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned scales = shared.scales(at), token = scales + (16 * warp + lane / 4) * 4, of_rows = scales + P::TOKENS * 4;
    const float by[2] = {load_scale(token), load_scale(token + 32)};
    hold(part);
    if constexpr (P::Operands::PAIRS) {
        constexpr int ROWS = P::M % 128 == 0 ? 128 : 64;
#pragma unroll
        for (int q = 0; q < P::M / ROWS; q++) {
            const float2 of = load_two_scales(of_rows + 16 * (ROWS / 64 * q));
            const float both[2][2] = {{__fmul_rn(of.x, by[0]), __fmul_rn(of.x, by[1])}, {__fmul_rn(of.y, by[0]), __fmul_rn(of.y, by[1])}};
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
    }
    barrier_arrive(shared.empty + 8 * at); // who read scales says so
    if (lane > 0 && lane < P::SHARERS)
        barrier_arrive_at(shared.empty + 8 * at, cluster_rank() ^ lane); // of clusters with two a side
    if (i + 1 == cut)
#pragma unroll
        for (int j = 0; j < P::M / 8; j++) {
            __stcg(aside + 32 * j, make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]));
            sum[4 * j] = sum[4 * j + 1] = sum[4 * j + 2] = sum[4 * j + 3] = 0.0f;
        }
}

// Blocks whose products follow each other with no wait but for the one before.
template <class P> constexpr unsigned IN_A_ROW = P::M > 128 || P::GROUPS > 2 ? 1 : 2;

// The sums over blocks begin .. end of the columns, of two slices if one ends at `cut`. Where a loop goes round nothing is on its way:
// the compiler follows products' registers no further, and would put all in a row. `open` is called once, with the last two blocks on their way
// at most.
template <class P, class Open>
__device__ __forceinline__ void multiply_codes(const Shared<P> &shared, Place<P::STAGES> &position, unsigned begin, unsigned end,
                                               float (&sum)[P::M / 2], const Open &open, unsigned cut = 0, float4 *aside = nullptr) {
    float even[P::M / 2], odd[P::M / 2]; // of one block in a row, odd is never used
#pragma unroll
    for (int i = 0; i < P::M / 2; i++)
        even[i] = odd[i] = sum[i] = 0.0f;
    unsigned i = begin, at;
    const auto begin_next = [&](float(&part)[P::M / 2]) {
        start(shared, position, part);
        at = position.at;
        position.advance();
    };
    if constexpr (IN_A_ROW<P> == 2)
#pragma unroll 1
        for (; i + 2 <= end; i += 2) {
            begin_next(even);
            const unsigned first = at;
            begin_next(odd);
            if (i + 2 == end)
                open();
            wgmma_wait<1>();
            take(shared, first, i, cut, even, sum, aside);
            wgmma_wait<0>();
            take(shared, at, i + 1, cut, odd, sum, aside);
        }
#pragma unroll 1
    for (; i < end; i++) {
        begin_next(even);
        if (i + 1 == end)
            open();
        wgmma_wait<0>();
        take(shared, at, i, cut, even, sum, aside);
    }
}

// A tile's sums. `between` is called once.
template <class P, class Between>
__device__ __forceinline__ void multiply_codes_tile(const Shared<P> &shared, Place<P::STAGES> &position, const Shape &shape,
                                                    float (&total)[P::M / 2], const Partials &partials, const Between &between) {
    float4 *const aside = partials.sums + (blockIdx.x * P::WARPS + threadIdx.x / 32) * (P::M / 8 * 32) + threadIdx.x % 32;
    between();
    multiply_codes(shared, position, 0, shape.blocks(), total, [] {}, shape.slices > 1 ? shared.slice_ends[0] : 0, aside);
    if (shape.slices > 1)
#pragma unroll
        for (int j = 0; j < P::M / 8; j++) {
            const float4 first = __ldcg(aside + 32 * j);
            total[4 * j] += first.x, total[4 * j + 1] += first.y, total[4 * j + 2] += first.z, total[4 * j + 3] += first.w;
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
ROUNDED_MANY(rounded_many_qkv_middle, 3, 128, 1, Qkv)
ROUNDED_MANY(rounded_many_residual_narrow, 2, 128, 1, Residual)
ROUNDED_MANY(rounded_many_residual_middle, 3, 128, 1, Residual)
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
