// batch_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y, where a block has all tokens of a batch: of up
// to 256 tokens no more than N are multiplied, where gemm_many.cuh's tiles have multiples of 64, and one round of blocks has all rows.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   block    a share of w's rows, in pieces of GRAIN, up to 64 GROUPS a turn, by N tokens, all columns: a warpgroup for each 64 rows
//            that multiplies, and one of which a thread fetches and a warp computes the tokens' scales
//   cluster  two blocks, each of which fetches half of the tokens for both
//   grid     as many blocks as share out the pieces; all have as many, but for the last
//   shared   stages * (64 GROUPS + N) * 128 bytes; 2 barriers a stage; N floats
//   moves    w from memory once; x once for each cluster and turn, from L2
//
// 1. A sum is one slice's: k16 by k16 from zero, in the order of gemm_few.cuh and gemm_many.cuh.
// 2. Rows of w are the M operand, for which a warpgroup has 64, tokens the N operand, of which an instruction takes any multiple of 8.
// 3. A warpgroup without rows in a turn only lets go of the stages. Of one with less than 64, the others are what lay there before: their
//    sums are theirs alone, and are not stored.
// 4. Outputs go from registers to memory: a warp has 8 of each token, which four lanes store.
#pragma once

#include "hopper/gemm/ring.cuh"
#include "hopper/gemm/share_out.cuh"
#include "place.cuh"

// GROUPS: warpgroups that multiply side by side.
template <int GROUPS, int N> struct BatchRing {
    static constexpr unsigned GROUP_BYTES = 64 * 128, W_BYTES = GROUPS * GROUP_BYTES, STAGE_BYTES = W_BYTES + N * 128;
    static constexpr unsigned MULTIPLIERS = 128 * GROUPS, HALF = N / 2;
    static_assert(HALF % 8 == 0, "halves of the tokens are whole groups of the swizzle");
    unsigned base, full, empty, stages;

    __device__ __forceinline__ BatchRing(unsigned base, unsigned stages)
        : base(base), full(base + stages * STAGE_BYTES), empty(full + 8 * stages), stages(stages) {}
    __device__ __forceinline__ unsigned stage(unsigned i) const { return base + i * STAGE_BYTES; }
    __device__ __forceinline__ unsigned end() const { return empty + 8 * stages; }

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < stages; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 2 * 4 * GROUPS);
        }
        barrier_init_fence();
    }
};

// A block's share of w's rows, in pieces of GRAIN, and its turns at them.
template <int GROUPS, int GRAIN> struct Share {
    unsigned first, count, turns, a_turn;

    __device__ __forceinline__ explicit Share(const Shape &shape) {
        const unsigned all = (shape.rows + GRAIN - 1) / GRAIN, each = (all + gridDim.x - 1) / gridDim.x;
        first = blockIdx.x * each;
        count = first < all ? min(each, all - first) : 0;
        turns = (each * GRAIN + 64 * GROUPS - 1) / (64 * GROUPS); // of both blocks of a cluster
        a_turn = (each + turns - 1) / turns;
    }
    // The piece that a turn begins with, where the one before ends.
    __device__ __forceinline__ unsigned begin(unsigned turn) const { return first + min(count, turn * a_turn); }
};

template <int GROUPS, int N, int GRAIN>
__device__ __forceinline__ void fetch_batch(const BatchRing<GROUPS, N> &ring, const TensorMap *w, const TensorMap *x,
                                            const Shape &shape) {
    using R = BatchRing<GROUPS, N>;
    const Share<GROUPS, GRAIN> share(shape);
    const unsigned blocks = shape.blocks(), rank = cluster_rank();
    const auto fetch_w = [&](unsigned at, unsigned turn, unsigned i) {
        const unsigned begin = share.begin(turn), pieces = share.begin(turn + 1) - begin;
        barrier_expect(ring.full + 8 * at, pieces * GRAIN * 128 + N * 128);
        for (unsigned p = 0; p < pieces; p++)
            bulk_fetch(ring.stage(at) + p * GRAIN * 128, w, i * 64, (begin + p) * GRAIN, ring.full + 8 * at, EVICT_FIRST);
    };
    const auto fetch_x = [&](unsigned at, unsigned i) {
        bulk_fetch_shared(ring.stage(at) + R::W_BYTES + rank * R::HALF * 128, x, i * 64, rank * R::HALF, ring.full + 8 * at,
                          EVICT_LAST, 3);
    };
    unsigned ahead = min(ring.stages, blocks);
    for (unsigned i = 0; i < ahead; i++)
        fetch_w(i, 0, i);
    dependent_wait();
    RingPlace place;
    for (unsigned i = 0; i < ahead; i++) {
        fetch_x(i, i);
        place.advance(ring.stages);
    }
    for (unsigned turn = 0; turn < share.turns; turn++, ahead = 0)
        for (unsigned i = ahead; i < blocks; i++) {
            if (turn * blocks + i >= ring.stages)
                barrier_wait(ring.empty + 8 * place.at, place.parity ^ 1);
            fetch_w(place.at, turn, i);
            fetch_x(place.at, i);
            place.advance(ring.stages);
        }
}

// Lane l has outputs l / 4 (its gate and its up) of tokens 8 j + 2 (l % 4) and the next, and stores outputs 2 (l % 4) and the next of
// token 8 j + l / 4.
template <int N>
__device__ __forceinline__ void finish_batch(const GateUp &e, const float (&sum)[N / 2], const float *scales,
                                             const Shape &shape, unsigned row) {
    const unsigned lane = threadIdx.x % 32, m = row / 2 + lane % 4 * 2;
    __nv_bfloat16 *to = e.out + (size_t)(lane / 4) * e.intermediate + m;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float2 scale = *reinterpret_cast<const float2 *>(scales + 8 * j + lane % 4 * 2);
        const float *gate = sum + 4 * j, *up = gate + 2;
        unsigned pair = bits_of(GateUp::silu(__fmul_rn(gate[0], scale.x)) * __fmul_rn(up[0], scale.x),
                                GateUp::silu(__fmul_rn(gate[1], scale.y)) * __fmul_rn(up[1], scale.y));
        asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
        if (8 * j + lane / 4 < shape.tokens && m < e.intermediate)
            *reinterpret_cast<unsigned *>(to + (size_t)8 * j * e.intermediate) = pair;
    }
}

template <int GROUPS, int N, int GRAIN, class Epilogue>
__device__ __forceinline__ void multiply_batch(const TensorMap *w, const TensorMap *x, const Shape &shape, unsigned stages,
                                               const Epilogue &epilogue) {
    using R = BatchRing<GROUPS, N>;
    extern __shared__ __align__(1024) unsigned char shared[];
    dependent_launch();
    const unsigned base = (shared_address(shared) + 1023) & ~1023u, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const R ring(base, stages);
    float *scales = reinterpret_cast<float *>(shared + (ring.end() - shared_address(shared)));
    if (threadIdx.x == R::MULTIPLIERS) {
        prefetch_map(x);
        ring.init_barriers();
    }
    cluster_sync();
    constexpr unsigned SCALES_KNOWN = 1;
    if (threadIdx.x >= R::MULTIPLIERS) {
        // Sums take most of the registers: the rest is for the fetching thread and a few scales at a time.
        if (GROUPS == 3)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x == R::MULTIPLIERS)
            fetch_batch<GROUPS, N, GRAIN>(ring, w, x, shape);
        if (warp == R::MULTIPLIERS / 32 + 1) {
#pragma unroll 1
            for (unsigned n = 0; n < N; n += 32)
                scale_rows<32>(epilogue, shape, n, scales + n);
            sync_threads(SCALES_KNOWN, R::MULTIPLIERS + 32);
        }
        return;
    }
    if (GROUPS == 3)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    dependent_wait();
    const Share<GROUPS, GRAIN> share(shape);
    const unsigned blocks = shape.blocks(), group = threadIdx.x / 128;
    unsigned refills = share.turns * blocks > stages ? share.turns * blocks - stages : 0;
    const auto release = [&](unsigned at) {
        if (lane < 2 && refills > 0)
            barrier_arrive_at(ring.empty + 8 * at, lane);
        refills -= refills > 0;
    };
    RingPlace place;
#pragma unroll 1
    for (unsigned turn = 0; turn < share.turns; turn++) {
        const unsigned row = share.begin(turn) * GRAIN, rows = share.begin(turn + 1) * GRAIN - row;
        if (group * 64 >= rows) {
            for (unsigned i = 0; i < blocks; i++) {
                barrier_wait(ring.full + 8 * place.at, place.parity);
                release(place.at);
                place.advance(stages);
            }
            if (turn == 0)
                sync_threads(SCALES_KNOWN, R::MULTIPLIERS + 32);
            continue;
        }
        float sum[N / 2] = {};
        unsigned before = 0;
        hold(sum);
#pragma unroll 1
        for (unsigned i = 0; i < blocks; i++) {
            barrier_wait(ring.full + 8 * place.at, place.parity);
            const unsigned long long a = tile_descriptor(ring.stage(place.at) + group * R::GROUP_BYTES);
            const unsigned long long b = tile_descriptor(ring.stage(place.at) + R::W_BYTES);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++)
                multiply_unit<GROUPS, N>(sum, a + 2 * k, b + 2 * k, i > 0 || k > 0);
            wgmma_commit();
            if (i > 0) {
                wgmma_wait<1>();
                release(before);
            }
            before = place.at;
            place.advance(stages);
        }
        wgmma_wait<0>();
        hold(sum);
        release(before);
        if (turn == 0)
            sync_threads(SCALES_KNOWN, R::MULTIPLIERS + 32);
        if (GRAIN == 64 || warp * 16 < rows)
            finish_batch<N>(epilogue, sum, scales, shape, row + warp * 16);
    }
}

#define BATCH(NAME, GROUPS, N, GRAIN, EPILOGUE)                                                                              \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, GROUPS == 3 || N > 64 ? 1 : 2)                         \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Shape shape, unsigned stages,             \
         EPILOGUE epilogue) {                                                                                                \
        multiply_batch<GROUPS, N, GRAIN>(&w, &x, shape, stages, epilogue);                                                   \
    }
