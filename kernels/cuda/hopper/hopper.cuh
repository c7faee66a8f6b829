// Hopper's own instructions, one wrapper each: barriers in shared memory, the bulk copy engine, clusters; wgmma is in wgmma.cuh.
//
//   a tile in shared memory   [rows][64] bf16, 128 bytes a row, 1024-byte aligned, 16-byte chunk c of row r at c ^ (r % 8):
//                             what the copy engine writes and wgmma reads with the 128-byte swizzle
#pragma once

#include "hopper/wgmma.cuh"

struct __align__(64) TensorMap {
    unsigned long long words[16];
};

// What the L2 cache should think of a bulk copy's lines: weights pass through once, activations come back.
constexpr unsigned long long EVICT_FIRST = 0x12F0000000000000ull, EVICT_LAST = 0x14F0000000000000ull,
                             EVICT_NORMAL = 0x1000000000000000ull;

__device__ __forceinline__ unsigned shared_address(const void *at) { return (unsigned)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the barrier's phase of this parity.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Fetches the map's box at (row, col) to shared memory; its bytes count towards the barrier.
__device__ __forceinline__ void bulk_fetch(unsigned to, const TensorMap *map, unsigned col, unsigned row, unsigned barrier,
                                           unsigned long long policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(col), "r"(row), "r"(barrier), "l"(policy)
                 : "memory");
}

// The same with a map of three dimensions.
__device__ __forceinline__ void bulk_fetch(unsigned to, const TensorMap *map, unsigned x, unsigned y, unsigned z,
                                           unsigned barrier, unsigned long long policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy)
                 : "memory");
}

// Fetches bytes that lie side by side, whole sixteens of them.
__device__ __forceinline__ void bulk_fetch_bytes(unsigned to, const void *from, unsigned bytes, unsigned barrier,
                                                 unsigned long long policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// A box for several blocks of the cluster, those whose bits are set in `ranks`: the box goes to the place `to` of each, and
// its bytes count towards each one's barrier.
__device__ __forceinline__ void bulk_fetch_shared(unsigned to, const TensorMap *map, unsigned col, unsigned row,
                                                  unsigned barrier, unsigned long long policy, unsigned short ranks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to), "l"(map), "r"(col), "r"(row), "r"(barrier),
                 "h"(ranks), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A barrier of `threads` threads of the block; id 0 is __syncthreads'.
__device__ __forceinline__ void sync_threads(unsigned id, unsigned threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ unsigned cluster_size() {
    unsigned size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// All threads of the cluster; what they wrote to shared memory before, all of them can read after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same without the memory: all threads got here. Stores on their way are not waited for.
__device__ __forceinline__ void cluster_sync_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Arrives at the barrier of another block of the cluster that lies where `barrier` does in this one.
__device__ __forceinline__ void barrier_arrive_at(unsigned barrier, unsigned rank) {
    asm volatile("{\n"
                 ".reg .u32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(barrier), "r"(rank) : "memory");
}

// Puts a word at the place `at` of a block's shared memory; its bytes count towards that block's barrier.
__device__ __forceinline__ void store_remote(unsigned at, unsigned value, unsigned barrier, unsigned rank) {
    asm volatile("{\n"
                 ".reg .u32 there, its_barrier;\n"
                 "mapa.shared::cluster.u32 there, %0, %3;\n"
                 "mapa.shared::cluster.u32 its_barrier, %2, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %1, [its_barrier];\n"
                 "}" ::"r"(at), "r"(value), "r"(barrier), "r"(rank) : "memory");
}

// The same of four floats.
__device__ __forceinline__ void store_remote(unsigned at, float4 value, unsigned barrier, unsigned rank) {
    asm volatile("{\n"
                 ".reg .u32 there, its_barrier;\n"
                 "mapa.shared::cluster.u32 there, %0, %6;\n"
                 "mapa.shared::cluster.u32 its_barrier, %5, %6;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1, %2, %3, %4}, [its_barrier];\n"
                 "}" ::"r"(at), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier), "r"(rank) : "memory");
}

__device__ __forceinline__ float4 load_shared(unsigned at) {
    float4 value;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(at) : "memory");
    return value;
}

// Two floats at the place `at` of another block's shared memory.
__device__ __forceinline__ float2 load_remote(unsigned at, unsigned rank) {
    float2 value;
    asm volatile("{\n"
                 ".reg .u32 there;\n"
                 "mapa.shared::cluster.u32 there, %2, %3;\n"
                 "ld.shared::cluster.v2.f32 {%0, %1}, [there];\n"
                 "}" : "=f"(value.x), "=f"(value.y) : "r"(at), "r"(rank) : "memory");
    return value;
}
// Four of them.
__device__ __forceinline__ float4 load_four_remote(unsigned at, unsigned rank) {
    float4 value;
    asm volatile("{\n"
                 ".reg .u32 there;\n"
                 "mapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
                 "}" : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(at), "r"(rank) : "memory");
    return value;
}

// x, which all lanes of a warp have alike. Now the compiler knows it too: what hangs on it alone is computed once a warp, and behind a
// branch by it no lane is waited for, so that wgmma finds its descriptors where it wants them.
__device__ __forceinline__ unsigned uniform(unsigned x) { return __reduce_or_sync(0xffffffffu, x); }

// Describes a tile to wgmma: address / 16, 1024 bytes between groups of 8 rows, 128-byte swizzle. 16 columns further on
// is 32 bytes, 2 in the descriptor.
__device__ __forceinline__ unsigned long long tile_descriptor(unsigned tile) {
    return (unsigned long long)((tile & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// The same for a tile whose address needs no mask, so that what is added to it fits one register.
__device__ __forceinline__ unsigned long long tile_descriptor_at(unsigned tile) {
    return (unsigned long long)(64u | 1u << 30) << 32 | (tile / 16 + (1u << 16));
}

// And `columns` further on, by a sum of 32 bits.
__device__ __forceinline__ unsigned long long tile_descriptor_at(unsigned tile, unsigned columns) {
    unsigned long long descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(tile / 16 + (1u << 16) + columns / 8), "r"(64u | 1u << 30));
    return descriptor;
}

// Describes [8, 16] bf16 in 256 bytes, 8 columns of all rows and then the other 8.
__device__ __forceinline__ unsigned long long small_descriptor(unsigned at) {
    return (unsigned long long)(at / 16) | 8ull << 16 | 8ull << 32;
}
