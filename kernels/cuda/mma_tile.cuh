// A block's tile of a matrix product by mma.m16n8k16, for any GPU from Ampere on: 128 rows of w by BN tokens, 64 columns a stage.
//
//   stage   128 rows of w, then BN rows of x, 128 bytes each: 16-byte chunk c of row r lies at chunk c ^ (r % 8), so that
//           ldmatrix meets no bank twice
//   warps   8; a warp holds TM x TN fragments of 16 rows by 8 tokens
//
// 1. Columns are summed in slices, each from zero, k16 by k16, which are added in fp32 in pairs, these in pairs (Shape): one order
//    for every number of tokens. The serial slices cost a second set of accumulators, more than two of them a third.
// 2. The sums go through shared memory, so that a warp holds one token's outputs, as epilogue.cuh wants them.
#pragma once

#include "epilogue.cuh"
#include "shape.cuh"

constexpr int BM = 128, BK = 64, THREADS = 256, WARPS = 8;
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

// SLICES: at most, 4 of them.
template <int BN, int SLICES = 2> struct Tile {
    static constexpr int WARPS_N = BN >= 64 ? 2 : 1, WARPS_M = WARPS / WARPS_N;
    static constexpr int TM = BM / WARPS_M / 16, TN = BN / WARPS_N / 8; // fragments a warp holds
    static constexpr int STAGE_BYTES = (BM + BN) * BK * 2;

    static constexpr bool PAIRS = SLICES > 2;

    float sum[TM][TN][4], total[TM][TN][4], pair[PAIRS ? TM : 1][PAIRS ? TN : 1][4];

    __device__ __forceinline__ static unsigned warp_m() { return threadIdx.x / 32 / WARPS_N * TM * 16; }
    __device__ __forceinline__ static unsigned warp_n() { return threadIdx.x / 32 % WARPS_N * TN * 8; }

    // Calls f(i, j, e) for each of the thread's sums.
    template <class F> __device__ __forceinline__ static void each(const F &f) {
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TN; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    f(i, j, e);
    }

    __device__ __forceinline__ void clear() {
        each([&](int i, int j, int e) { sum[i][j][e] = 0.0f; });
    }

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
        each([&](int i, int j, int e) {
            total[i][j][e] = first ? sum[i][j][e] : total[i][j][e] + sum[i][j][e];
            sum[i][j][e] = 0.0f;
        });
    }

    // The same of one of four: the third one's sum waits for the last one's.
    __device__ __forceinline__ void end_slice_of_pair(unsigned slice) {
        each([&](int i, int j, int e) {
            if (slice == 2) {
                pair[i][j][e] = sum[i][j][e];
            } else {
                const float added = slice == 3 ? pair[i][j][e] + sum[i][j][e] : sum[i][j][e];
                total[i][j][e] = slice == 0 ? added : total[i][j][e] + added;
            }
            sum[i][j][e] = 0.0f;
        });
    }

    // Writes the totals as [token][row] to shared memory.
    __device__ __forceinline__ void stage_totals(float *staged) const {
        const unsigned lane = threadIdx.x % 32;
        each([&](int i, int j, int e) {
            const unsigned m = warp_m() + 16 * i + lane / 4 + e / 2 * 8;
            const unsigned n = warp_n() + 8 * j + lane % 4 * 2 + e % 2;
            staged[n * STAGED + m] = total[i][j][e];
        });
    }
};

// All columns' steps of a tile, through a ring of STAGES stages. `fetch(stage, block)` fetches both operands' rows of a block of
// 64 columns; all threads take part.
template <int BN, int STAGES, int SLICES, class Fetch>
__device__ __forceinline__ void accumulate(Tile<BN, SLICES> &tile, const Shape &shape, unsigned ring, Fetch fetch) {
    const unsigned blocks = shape.blocks();
    auto fetch_block = [&](unsigned block) {
        if (block < blocks)
            fetch(ring + block % STAGES * Tile<BN>::STAGE_BYTES, block);
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
        if (block + 1 == shape.slice_begin(slice + 1)) {
            if constexpr (Tile<BN, SLICES>::PAIRS)
                tile.end_slice_of_pair(slice++);
            else
                tile.end_slice(slice++ == 0);
        }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
}
