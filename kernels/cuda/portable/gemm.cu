// gemm_*: y[t, m] = sum over k of w[m, k] x[t, k], and what epilogue.cuh does with y. For any GPU from Ampere on.
//
//   w [rows, cols] bf16   x [tokens, cols] bf16   cols a multiple of 8   accumulates in fp32
//   tile    128 rows of w by BN tokens (16, or 64 where there are more), steps of 64 columns
//   grid    (ceil(rows / 128), ceil(tokens / BN))   block 256   shared 3 stages of (128 + BN) * 128 bytes
//   moves   rows * cols * 2 bytes of w for each BN tokens
//
//   stage   16-byte chunk c of a tile's row r lies at chunk c ^ (r % 8): ldmatrix meets no bank twice
//
// 1. Columns are summed in slices, each from zero, k16 by k16 (mma.m16n8k16), then slice after slice in fp32: one
//    order for every number of tokens. The serial slices cost a second set of accumulators.
// 2. The sums go through shared memory, so that a warp holds one token's outputs, as epilogue.cuh wants them.
#include "epilogue.cuh"

constexpr int BM = 128, BK = 64, STAGES = 3, THREADS = 256, WARPS = 8;
constexpr int STAGED = BM + 4; // floats between two tokens' sums: a warp's fragment meets no bank twice

__device__ __forceinline__ unsigned shared_address(const void *at) { return (unsigned)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void ldmatrix4(unsigned (&r)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Fetches ROWS rows of 64 columns at (row, col); what lies outside the matrix becomes zero.
template <int ROWS>
__device__ __forceinline__ void fetch(unsigned to, const __nv_bfloat16 *matrix, unsigned rows, unsigned cols, unsigned row,
                                      unsigned col) {
#pragma unroll
    for (int i = 0; i < ROWS * 8; i += THREADS) {
        const unsigned chunk = i + threadIdx.x, r = chunk / 8, c = chunk % 8;
        if (ROWS * 8 < THREADS && chunk >= ROWS * 8)
            break;
        const bool inside = row + r < rows && col + 8 * c < cols;
        const __nv_bfloat16 *from = inside ? matrix + (size_t)(row + r) * cols + col + 8 * c : matrix;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + r * 128 + ((c ^ (r % 8)) * 16)),
                     "l"(from), "r"(inside ? 16 : 0) : "memory");
    }
}

template <int BN> struct Tile {
    static constexpr int WARPS_N = BN >= 64 ? 2 : 1, WARPS_M = WARPS / WARPS_N;
    static constexpr int TM = BM / WARPS_M / 16, TN = BN / WARPS_N / 8; // fragments a warp holds
    static constexpr int STAGE_BYTES = (BM + BN) * BK * 2;

    float sum[TM][TN][4], total[TM][TN][4];

    __device__ __forceinline__ static unsigned warp_m() { return threadIdx.x / 32 / WARPS_N * TM * 16; }
    __device__ __forceinline__ static unsigned warp_n() { return threadIdx.x / 32 % WARPS_N * TN * 8; }

    __device__ __forceinline__ void multiply(unsigned stage) {
        const unsigned lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < BK / 8; k += 2) { // chunks of 8 columns
            unsigned a[TM][4];
#pragma unroll
            for (int i = 0; i < TM; i++) {
                const unsigned r = warp_m() + 16 * i + lane % 16, c = k + lane / 16;
                ldmatrix4(a[i], stage + r * 128 + ((c ^ (r % 8)) * 16));
            }
#pragma unroll
            for (int j = 0; j < TN; j += 2) {
                unsigned b[4];
                const unsigned r = warp_n() + 8 * j + lane / 16 * 8 + lane % 8, c = k + lane / 8 % 2;
                ldmatrix4(b, stage + BM * BK * 2 + r * 128 + ((c ^ (r % 8)) * 16));
#pragma unroll
                for (int i = 0; i < TM; i++) {
                    mma(sum[i][j], a[i], b[0], b[1]);
                    mma(sum[i][j + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    // Ends a slice: total = total + sum, sum = 0.
    __device__ __forceinline__ void end_slice(bool first) {
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    total[i][j][e] = first ? sum[i][j][e] : total[i][j][e] + sum[i][j][e];
                    sum[i][j][e] = 0.0f;
                }
    }

    // Writes the totals as [token][row] to shared memory.
    __device__ __forceinline__ void stage_totals(float *staged) const {
        const unsigned lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const unsigned m = warp_m() + 16 * i + lane / 4 + e / 2 * 8;
                    const unsigned n = warp_n() + 8 * j + lane % 4 * 2 + e % 2;
                    staged[n * STAGED + m] = total[i][j][e];
                }
    }
};

// All columns' steps of a tile, through a ring of STAGES stages.
template <int BN>
__device__ __forceinline__ void accumulate(Tile<BN> &tile, const Shape &shape, const __nv_bfloat16 *w,
                                           const __nv_bfloat16 *x, unsigned m0, unsigned n0, unsigned ring) {
    const unsigned blocks = shape.blocks();
    auto fetch_block = [&](unsigned block) {
        const unsigned stage = ring + block % STAGES * Tile<BN>::STAGE_BYTES;
        if (block < blocks) {
            fetch<BM>(stage, w, shape.rows, shape.cols, m0, block * BK);
            fetch<BN>(stage + BM * BK * 2, x, shape.tokens, shape.cols, n0, block * BK);
        }
        asm volatile("cp.async.commit_group;" ::: "memory"); // an empty group keeps the count
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++)
        fetch_block(s);
    tile.end_slice(true);
    unsigned slice = 0;
    for (unsigned block = 0; block < blocks; block++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads(); // the block has landed for all, and all are done with the stage fetched next
        fetch_block(block + STAGES - 1);
        tile.multiply(ring + block % STAGES * Tile<BN>::STAGE_BYTES);
        if (block + 1 == shape.slice_begin(slice + 1))
            tile.end_slice(slice++ == 0);
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
}

template <int BN, class Epilogue>
__device__ __forceinline__ void gemm(const __nv_bfloat16 *w, const __nv_bfloat16 *x, const Shape &shape,
                                     const Epilogue &epilogue) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float scales[BN];
    const unsigned m0 = blockIdx.x * BM, n0 = blockIdx.y * BN, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (Epilogue::SCALED && threadIdx.x < BN && n0 + threadIdx.x < shape.tokens)
        scales[threadIdx.x] = epilogue.scale(n0 + threadIdx.x);
    Tile<BN> tile;
#pragma unroll
    for (int i = 0; i < Tile<BN>::TM; i++)
#pragma unroll
        for (int j = 0; j < Tile<BN>::TN; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                tile.sum[i][j][e] = 0.0f;
    accumulate<BN>(tile, shape, w, x, m0, n0, shared_address(shared));
    float *staged = reinterpret_cast<float *>(shared);
    tile.stage_totals(staged);
    __syncthreads();
    for (unsigned n = warp; n < BN && n0 + n < shape.tokens; n += WARPS) {
        const float scale = Epilogue::SCALED ? scales[n] : 1.0f;
        const typename Epilogue::template Ahead<2> ahead[1] = {
            epilogue.template ahead<2>(epilogue.where(n0 + n), n0 + n, m0, shape.rows, lane)};
        float2 v[1][2];
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const float2 sum = *reinterpret_cast<const float2 *>(staged + n * STAGED + 64 * b + 2 * lane);
            v[0][b] = {__fmul_rn(sum.x, scale), __fmul_rn(sum.y, scale)};
        }
        epilogue.template store<1, 2>(ahead, v, Taken{n0 + n, 0, 1}, m0, shape.rows, lane);
    }
}

#define GEMM(NAME, BN, EPILOGUE)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                 \
    NAME(const __nv_bfloat16 *w, const __nv_bfloat16 *x, Shape shape, EPILOGUE epilogue) {                                   \
        gemm<BN>(w, x, shape, epilogue);                                                                                     \
    }

GEMM(gemm_qkv_16, 16, Qkv)
GEMM(gemm_qkv_64, 64, Qkv)
GEMM(gemm_residual_16, 16, Residual)
GEMM(gemm_residual_64, 64, Residual)
GEMM(gemm_gate_up_16, 16, GateUp)
GEMM(gemm_gate_up_64, 64, GateUp)
GEMM(gemm_head_16, 16, Head)
GEMM(gemm_head_64, 64, Head)
GEMM(gemm_linear_16, 16, Linear)
GEMM(gemm_linear_64, 64, Linear)
