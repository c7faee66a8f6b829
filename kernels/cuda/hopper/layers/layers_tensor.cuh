// A thread of a multiplying block's tensor-core warps (layers_multiply.cuh): its place in a product, and its sums.
#pragma once

#include "hopper/layers/layers_multiplier.cuh"

// Keeps the compiler from computing addresses of all products ahead of the layers' loop, which spills.
__device__ __forceinline__ unsigned here(unsigned x) {
    unsigned y;
    asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

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
    // A product each, to its end.
    template <int PRODUCT> __device__ __forceinline__ void add(const Step &step); // o, down: layers_add.cuh
    __device__ __forceinline__ void gate_up(const Step &step);                    // layers_gate_up.cuh
    __device__ __forceinline__ void qkv(const Step &step);                        // of the next layer: layers_qkv.cuh
    __device__ __forceinline__ void norm_heads(const Spot &spot, const float2 (&y)[2][2 * GROUPS], float (&inverse)[2]) const;
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
