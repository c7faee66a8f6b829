// ring.cuh for matrices in fp8: w comes as tiles that lie whole in memory, and is widened to bf16 in the registers that are wgmma's
// left operand.
//
//   w        [rows / 64][cols / 64] tiles of 4,224 bytes: [64 rows][64 codes], then a row's scale each, 2^120 times it, bf16
//   a row's codes   word c of dims 16 k on lies at byte 16 c + 4 k: columns 2 c + 8, 2 c, 2 c + 9, 2 c + 1 of those 16, packed (fp8.cuh),
//                   so that 16 bytes are what a lane has of four wgmmas
//   stage    N tokens, 64 columns of each, as hopper.cuh describes them; GROUPS tiles of w apart from them, which lie below each other
//
// 1. What w means is a bf16 number, rounded once; from there on sums are those of a matrix of such numbers, bit by bit.
// 2. Registers of a block of columns are written while the one before is multiplied: there are two sets.
#pragma once

#include "dependent.cuh"
#include "fp8.cuh"
#include "hopper/hopper.cuh"
#include "place.cuh"
#include "words.cuh"

// A matrix in fp8: a kernel's parameter.
struct Fp8Matrix {
    const char *tiles;
    unsigned across, down; // tiles beside and below each other
    static constexpr unsigned TILE_BYTES = 64 * 64 + 64 * 2;
};

template <int GROUPS, int N> struct Fp8Ring {
    static constexpr int ROWS = 64 * GROUPS, W_BYTES = GROUPS * Fp8Matrix::TILE_BYTES, STAGE_BYTES = N * 128 + W_BYTES;
    static constexpr int MULTIPLIERS = 128 * GROUPS;
    unsigned base, tiles, full, empty, stages;

    __device__ __forceinline__ Fp8Ring(unsigned base, unsigned stages, unsigned, unsigned)
        : base(base), tiles(base + stages * N * 128), full(base + stages * STAGE_BYTES), empty(full + 8 * stages), stages(stages) {}

    // One thread's call, before any other member's.
    __device__ __forceinline__ void init_barriers() const {
        for (unsigned i = 0; i < stages; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, MULTIPLIERS);
        }
        barrier_init_fence();
    }

    __device__ __forceinline__ void fetch_w(const Fp8Matrix &w, unsigned at, unsigned block, unsigned m0) const {
        constexpr unsigned BYTES = Fp8Matrix::TILE_BYTES;
        barrier_expect(full + 8 * at, STAGE_BYTES);
#pragma unroll
        for (unsigned group = 0; group < GROUPS; group++) {
            const unsigned row = min(m0 / 64 + group, w.down - 1); // nobody wants what is multiplied with rows that are none
            bulk_fetch_bytes(tiles + at * W_BYTES + group * BYTES, w.tiles + ((size_t)row * w.across + block) * BYTES, BYTES,
                             full + 8 * at, EVICT_FIRST);
        }
    }

    __device__ __forceinline__ void fetch_x(const TensorMap *x, unsigned at, unsigned block, unsigned n0) const {
        bulk_fetch(base + at * N * 128, x, block * 64, n0, full + 8 * at, EVICT_LAST);
    }

    // The fetching thread's work: `blocks` blocks of 64 columns from block `first` on.
    __device__ __forceinline__ void fetch(const Fp8Matrix &w, const TensorMap *x, unsigned first, unsigned blocks, unsigned m0,
                                          unsigned n0) const {
        const unsigned ahead = blocks < stages ? blocks : stages;
        for (unsigned i = 0; i < ahead; i++)
            fetch_w(w, i, first + i, m0);
        dependent_wait();
        for (unsigned i = 0; i < ahead; i++)
            fetch_x(x, i, first + i, n0);
        unsigned at = 0, parity = 0;
        for (unsigned i = ahead; i < blocks; i++) {
            barrier_wait(empty + 8 * at, parity);
            fetch_w(w, at, first + i, m0);
            fetch_x(x, at, first + i, n0);
            if (++at == stages) {
                at = 0;
                parity ^= 1;
            }
        }
    }

    // The thread has read a stage, which may be filled again, if that is to happen.
    __device__ __forceinline__ void release(RingPosition &position, unsigned at) const {
        if (position.refills > 0)
            barrier_arrive(empty + 8 * at);
        position.refills -= position.refills > 0;
    }

    // The lane's part of a tile, for four wgmmas.
    __device__ __forceinline__ void widen(unsigned (&a)[4][4], unsigned at) const {
        const unsigned lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
        const unsigned tile = tiles + at * W_BYTES + threadIdx.x / 128 * Fp8Matrix::TILE_BYTES, codes = tile + row * 64 + lane % 4 * 16;
        unsigned short scales[2];
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scales[0]) : "r"(tile + 4096 + row * 2) : "memory");
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scales[1]) : "r"(tile + 4096 + row * 2 + 16) : "memory");
        const uint4 low = load_words(codes), high = load_words(codes + 8 * 64);
        const unsigned lows[4] = {low.x, low.y, low.z, low.w}, highs[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            fp8_widen(a[k][0], a[k][2], lows[k], scales[0] * 0x10001u);
            fp8_widen(a[k][1], a[k][3], highs[k], scales[1] * 0x10001u);
        }
    }

    // Widens the block at hand and starts its products; those of the block before are done when it returns.
    __device__ __forceinline__ void take(RingPosition &position, unsigned (&a)[4][4], float (&sum)[N / 2], unsigned &before,
                                         bool is_first) const {
        barrier_wait(full + 8 * position.at, position.parity);
        widen(a, position.at);
        const unsigned long long b = tile_descriptor(base + position.at * N * 128);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma(sum, a[k], b + 2 * k, !is_first || k > 0);
        wgmma_commit();
        if (!is_first) {
            wgmma_wait<1>();
            release(position, before);
        }
        before = position.at;
        position.advance(stages);
    }

    // A warpgroup's work: the sums of its 64 rows over the next `blocks` blocks of columns, from zero.
    __device__ __forceinline__ void multiply(RingPosition &position, unsigned blocks, float (&sum)[N / 2]) const {
        unsigned even[4][4], odd[4][4], before = 0;
        hold(sum); // else the compiler zeroes it between two wgmmas, and must put them in a row
        for (unsigned i = 0; i < blocks; i += 2) {
            take(position, even, sum, before, i == 0);
            if (i + 1 < blocks)
                take(position, odd, sum, before, false);
        }
        wgmma_wait<0>();
        hold(sum);
        release(position, before);
    }
};
