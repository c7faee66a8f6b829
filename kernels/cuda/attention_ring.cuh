// attention_ring: a warp's private ring of tiles in shared memory, filled by asynchronous copies of 16 tokens each.
//
//   fill, fill, ...  `stages` times; then take (or two), (all lanes read the tile, __syncwarp), fill (or two), take, ...
//
// On Hopper a tile is one bulk copy (the block's bytes as they lie, swizzled already) that completes on the stage's
// barrier; its bytes are read once, so L2 is told to evict them first. Elsewhere all lanes copy 16 bytes each, a tile
// a group.
//
// Invariant: the i-th take gets the i-th fill. Fills are `stages` ahead; past the last tile they fill nothing, but count.
//
// 1. A stage is refilled after __syncwarp behind the last read. Ordinary reads before it are ordered before the bulk
//    copy by program order through that barrier; ordinary writes into a tile need `written_before_next_copy` as well,
//    because the copy runs in the async proxy.
// 2. A stage's barrier expects one arrival a phase, the filling lane's, with the bytes of the tile; it is filled again
//    only after every lane has seen the phase end, so that waiting for the parity of take / stages is unambiguous.
#pragma once
#include "attention.cuh"

#if __CUDA_ARCH__ >= 900
#define BULK_COPIES 1
#else
#define BULK_COPIES 0
#endif

__device__ __forceinline__ void written_before_next_copy() {
#if BULK_COPIES
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

template <int HD, int STAGES> struct Ring {
    static constexpr unsigned TILE_BYTES = TILE * HD * 2;
    unsigned tiles, barriers; // shared-memory addresses of the warp's stages
    unsigned stages;          // STAGES, or more where fewer warps work; all together are what the block has
    unsigned filling, taking, parity;
    unsigned long long policy;

    __device__ __forceinline__ Ring(unsigned char *shared, unsigned warp, unsigned warps, unsigned working,
                                    unsigned lane)
        : stages(BULK_COPIES ? warps * STAGES / working : STAGES), filling(0), taking(0), parity(0), policy(0) {
        const unsigned base = (unsigned)__cvta_generic_to_shared(shared);
        tiles = base + warp * stages * TILE_BYTES;
        barriers = base + warps * STAGES * TILE_BYTES + warp * stages * 8;
#if BULK_COPIES
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        for (unsigned i = lane; i < stages; i += 32)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + i * 8) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
#endif
    }

    // Starts the copy of a tile into the next stage. All lanes call it.
    __device__ __forceinline__ void fill(const bf16 *source, unsigned lane) {
        const unsigned tile = tiles + filling * TILE_BYTES;
#if BULK_COPIES
        if (lane == 0) {
            const unsigned barrier = barriers + filling * 8;
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(TILE_BYTES) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                         "[%0], [%1], %2, [%3], %4;" ::"r"(tile), "l"(source), "r"(TILE_BYTES), "r"(barrier), "l"(policy)
                         : "memory");
        }
        __syncwarp();
#else
#pragma unroll
        for (unsigned offset = 0; offset < TILE_BYTES; offset += 512)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(tile + offset + lane * 16),
                         "l"(source + (offset + lane * 16) / 2)
                         : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
        filling = filling + 1 == stages ? 0 : filling + 1;
    }

    __device__ __forceinline__ void fill_nothing() {
#if !BULK_COPIES
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    // Waits for the tile that was filled first among those not taken, and returns its shared-memory address.
    __device__ __forceinline__ unsigned take() {
        const unsigned tile = tiles + taking * TILE_BYTES;
#if BULK_COPIES
        const unsigned barrier = barriers + taking * 8;
        unsigned done;
        do
            asm volatile("{\n.reg .pred p;\n"
                         "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                         "selp.u32 %0, 1, 0, p;\n}"
                         : "=r"(done)
                         : "r"(barrier), "r"(parity)
                         : "memory");
        while (!done);
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
#endif
        __syncwarp();
        if (++taking == stages) {
            taking = 0;
            parity ^= 1;
        }
        return tile;
    }
};
