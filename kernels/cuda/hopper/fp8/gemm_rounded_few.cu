// rounded_few_*: products of few tokens whose both operands are e4m3 codes (rounded.cuh); see gemm_few.cuh.
//
// 1. A thread has registers for two groups' sums where they fit, so that one is multiplied while the other is taken out.
#include "hopper/gemm/gemm_few.cuh"
#include "hopper/fp8/rounded.cuh"

// A matrix of codes, and its scales and the tokens'. A thread has so many SETS of a group's sums.
template <int SETS> struct CodesMatrix {
    const TensorMap *map;
    CodeScales scales;
};

template <int SETS> __device__ __forceinline__ const CodesMatrix<SETS> &fetched(const CodesMatrix<SETS> &w) { return w; }

// ring.cuh for codes: beside a stage lie the scales of its N tokens, then those of eight rows of w each, behind what is known of tokens.
template <int GROUPS, int N, int SETS> struct CodesRing : Ring<GROUPS, N, 1> {
    using Base = Ring<GROUPS, N, 1>;
    using Base::full, Base::empty, Base::stages;
    static constexpr unsigned SCALE_BYTES = (N + 8 * GROUPS) * 4;
    unsigned scales;

    __device__ __forceinline__ CodesRing(unsigned base, unsigned stages, unsigned, unsigned)
        : Base(base, stages, 0), scales(base + stages * (Base::STAGE_BYTES + 16) + N * 4) {}

    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < stages; i++) {
            barrier_init(full + 8 * i, 33); // a warp's lanes fetch scales
            barrier_init(empty + 8 * i, 4 * GROUPS);
        }
        barrier_init_fence();
    }

    __device__ __forceinline__ void fetch(const CodesMatrix<SETS> &w, const TensorMap *x, unsigned first, unsigned blocks, unsigned m0,
                                          unsigned n0) const {
        Base::fetch(w.map, x, first, blocks, m0, n0);
    }
    // The other warp's work: scales.
    __device__ __forceinline__ void fetch_beside(const CodesMatrix<SETS> &w, unsigned first, unsigned blocks, unsigned m0, unsigned n0) const {
        const unsigned lane = threadIdx.x % 32;
        const float *const of_tokens = w.scales.x + n0 + 4 * lane, *const of_rows = w.scales.w + m0 / 8 + 4 * lane;
        unsigned at = 0, parity = 1;
        const unsigned end = first + blocks;
        dependent_wait();
        for (unsigned i = first; i < end; i++) {
            const unsigned to = scales + at * SCALE_BYTES + 16 * lane;
            barrier_wait(empty + 8 * at, parity); // passes in the first round
            if (w.scales.group_end(i, end) == i + 1) {
                if (lane < N / 4)
                    fetch_scales(to, of_tokens + i * w.scales.pitch);
                if (lane < 2 * GROUPS)
                    fetch_scales(to + N * 4, of_rows + i * w.scales.groups);
            }
            arrive_with_scales(full + 8 * at);
            if (++at == stages) {
                at = 0;
                parity ^= 1;
            }
        }
    }

    // Starts the products of the block at hand, a warpgroup's 64 rows the left operand, the tokens the right one, and adds them to `part`,
    // or to zero. Where it lies.
    __device__ __forceinline__ unsigned start(RingPosition &position, float (&part)[N / 2], bool add) const {
        const unsigned at = position.at, stage = this->stage(at);
        barrier_wait(full + 8 * at, position.parity);
        const unsigned long long a = tile_descriptor(stage + threadIdx.x / 128 * 64 * 128);
        const unsigned long long b = tile_descriptor(stage + Base::W_BYTES);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma_codes(part, a + 2 * k, b + 2 * k, add || k > 0);
        wgmma_commit();
        position.advance(stages);
        return at;
    }
    // Waits until so many blocks at most are on their way, and takes out the sums of a group of columns, whose scales lie at stage `at`.
    template <int PENDING>
    __device__ __forceinline__ void take(RingPosition &position, unsigned at, float (&part)[N / 2], float (&sum)[N / 2]) const {
        const unsigned lane = threadIdx.x % 32, rows = threadIdx.x / 32 * 2, own = scales + at * SCALE_BYTES;
        const float2 of = load_two_scales(own + (N + rows) * 4);
        wgmma_wait<PENDING>();
        hold(part);
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            const float2 by = load_two_scales(own + (8 * j + lane % 4 * 2) * 4);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float both = __fmul_rn(e < 2 ? of.x : of.y, e % 2 == 0 ? by.x : by.y);
                sum[4 * j + e] = fmaf(part[4 * j + e], both, sum[4 * j + e]);
            }
        }
        __syncwarp(); // all lanes have read scales
        this->release(position, at);
    }
    // The sums over blocks begin .. end of the columns. Where the outer loop goes round nothing is on its way: the compiler follows products'
    // registers no further, and would put all in a row. GROUPED: groups are of several blocks.
    template <bool GROUPED>
    __device__ __forceinline__ void multiply_groups(RingPosition &position, const CodeScales &scales, unsigned begin, unsigned end,
                                                    float (&sum)[N / 2]) const {
        float even[N / 2], odd[N / 2]; // of one set, odd is never used
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            even[i] = odd[i] = 0.0f;
        hold(even);
        if constexpr (SETS == 2)
            hold(odd);
        unsigned at = 0; // the last block that was begun
        // Blocks behind the first of a group: the one before is multiplied then.
        const auto add_blocks = [&](unsigned i, unsigned last, float(&part)[N / 2]) {
#pragma unroll 1
            for (; GROUPED && i < last; i++) {
                const unsigned before = at;
                at = start(position, part, true);
                wgmma_wait<1>();
                this->release(position, before);
            }
        };
        const auto group_end = [&](unsigned first) { return GROUPED ? scales.group_end(first, end) : first + 1; };
#pragma unroll 1
        for (unsigned first = begin, last; first < end; first = last) {
            last = group_end(first);
            at = start(position, even, false);
            add_blocks(first + 1, last, even);
            if constexpr (SETS == 2)
                if (last < end) {
                    const unsigned second = last, of_even = at;
                    last = group_end(second);
                    at = start(position, odd, false);
                    take<1>(position, of_even, even, sum);
                    add_blocks(second + 1, last, odd);
                    take<0>(position, at, odd, sum);
                    continue;
                }
            take<0>(position, at, even, sum);
        }
    }
    __device__ __forceinline__ void multiply(RingPosition &position, const CodesMatrix<SETS> &w, unsigned begin, unsigned end,
                                             float (&sum)[N / 2]) const {
        if (w.scales.shift > 0)
            multiply_groups<true>(position, w.scales, begin, end, sum);
        else
            multiply_groups<false>(position, w.scales, begin, end, sum);
    }
};

template <int GROUPS, int N, int SETS>
__device__ __forceinline__ void fetch_beside(const CodesRing<GROUPS, N, SETS> &ring, const CodesMatrix<SETS> &w, unsigned first,
                                             unsigned blocks, unsigned m0, unsigned n0) {
    ring.fetch_beside(w, first, blocks, m0, n0);
}

template <int SETS> constexpr bool IN_GROUPS<CodesMatrix<SETS>> = true;

template <int GROUPS, int N, int SETS> struct RingOf<GROUPS, N, Beside::NOBODY, CodesMatrix<SETS>> {
    using Type = CodesRing<GROUPS, N, SETS>;
};

#define ROUNDED_FEW(NAME, GROUPS, N, BESIDE, SETS, EPILOGUE)                                                                 \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + 64, BESIDE)                                                  \
    NAME(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Shape shape, unsigned stages,             \
         CodeScales scales, Rounded<EPILOGUE> epilogue) {                                                                    \
        multiply_few<GROUPS, 1, N, 1, Beside::NOBODY>(CodesMatrix<SETS>{&w, scales}, &x, shape, stages, epilogue);           \
    }

ROUNDED_FEW(rounded_few_qkv_128x16, 2, 16, 2, 1, Qkv)
ROUNDED_FEW(rounded_few_qkv_128x32, 2, 32, 2, 1, Qkv)
ROUNDED_FEW(rounded_few_qkv_128x64, 2, 64, 1, 2, Qkv)
ROUNDED_FEW(rounded_few_qkv_128x128, 2, 128, 1, 1, Qkv)
ROUNDED_FEW(rounded_few_residual_64x16, 1, 16, 2, 2, Residual)
ROUNDED_FEW(rounded_few_residual_64x32, 1, 32, 2, 2, Residual)
ROUNDED_FEW(rounded_few_residual_64x64, 1, 64, 2, 2, Residual)
ROUNDED_FEW(rounded_few_gate_up_128x16, 2, 16, 2, 1, GateUp)
ROUNDED_FEW(rounded_few_gate_up_128x32, 2, 32, 2, 1, GateUp)
ROUNDED_FEW(rounded_few_gate_up_128x64, 2, 64, 2, 1, GateUp)
ROUNDED_FEW(rounded_few_gate_up_192x16, 3, 16, 1, 2, GateUp)
ROUNDED_FEW(rounded_few_gate_up_192x32, 3, 32, 1, 2, GateUp)
ROUNDED_FEW(rounded_few_gate_up_192x64, 3, 64, 1, 2, GateUp)
