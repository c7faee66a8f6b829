// A warp's own piece of shared memory: 16 tokens by 128 outputs of 16 bits, through which outputs turn from the order of the
// tensor core's registers into rows that the copy engine stores, and rows into that order.
//
//   halves     64 outputs each, [16][64], 128 bytes a row, 1024-byte aligned, chunk c of row r at c ^ (r % 8): the engine's
//              128-byte swizzle, with which registers conflict as little as rows
//   registers  lane l holds, of token l / 4 (+ 8), outputs 8 j + 2 (l % 4) and the next, as one word
//
// Lane 0 speaks with the engine. What the others wrote is `sent` behind a fence of each; what was sent may be written over
// after `free`.
#pragma once

#include "hopper/hopper.cuh"

struct WarpTile {
    static constexpr unsigned HALF = 16 * 128, BYTES = 2 * HALF;
    unsigned base, lane;

    __device__ __forceinline__ unsigned at(unsigned row, unsigned chunk) const {
        return base + chunk / 8 * HALF + row * 128 + ((chunk % 8 ^ row % 8) << 4);
    }
    // Where this lane's row of the four matrices of chunks 2 pair, 2 pair + 1 begins.
    __device__ __forceinline__ unsigned matrices(unsigned pair) const { return at(lane % 16, 2 * pair + lane / 16); }

    // Words of: token l / 4, chunk 2 pair; token l / 4 + 8; then both of chunk 2 pair + 1.
    __device__ __forceinline__ void put(unsigned pair, const unsigned (&words)[4]) const {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(matrices(pair)), "r"(words[0]),
                     "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
    }
    __device__ __forceinline__ void get(unsigned pair, unsigned (&words)[4]) const {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(matrices(pair))
                     : "memory");
    }
    __device__ __forceinline__ uint4 read(unsigned row, unsigned chunk) const {
        uint4 value;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "r"(at(row, chunk))
                     : "memory");
        return value;
    }
    __device__ __forceinline__ unsigned short element(unsigned row, unsigned output) const {
        unsigned short bits;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(at(row, output / 8) + output % 8 * 2) : "memory");
        return bits;
    }

    // Fetches so many halves of the map's rows from (row, col) on.
    template <unsigned HALVES> __device__ __forceinline__ void fetch(const TensorMap *map, unsigned col, unsigned row, unsigned barrier) const {
        if (lane == 0) {
            sent();
            barrier_expect(barrier, HALVES * HALF);
#pragma unroll
            for (unsigned half = 0; half < HALVES; half++)
                bulk_fetch(base + half * HALF, map, col + 64 * half, row, barrier, EVICT_NORMAL);
        }
    }

    // All lanes' writes are known to the engine.
    __device__ __forceinline__ void written() const {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
    }
    // Stores a half as the map's rows from (row, col) on, as far as there are.
    __device__ __forceinline__ void send(unsigned half, const TensorMap *map, unsigned col, unsigned row) const {
        if (lane == 0)
            asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
                         "cp.async.bulk.commit_group;" ::"l"(map), "r"(col), "r"(row), "r"(base + half * HALF)
                         : "memory");
    }
    // The engine has read what lane 0 sent.
    __device__ __forceinline__ void free() const {
        if (lane == 0)
            sent();
        __syncwarp();
    }

  private:
    __device__ __forceinline__ static void sent() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
};
