// What a block sends to its neighbour, the other of their cluster.
#pragma once

// A place in the shared memory of one of the two, and of the other one than `rank`.
__device__ __forceinline__ unsigned at_rank(unsigned address, unsigned rank) {
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
__device__ __forceinline__ unsigned at_neighbour(unsigned address, unsigned rank) { return at_rank(address, rank ^ 1); }
__device__ __forceinline__ void send(unsigned to, float a, float b, float c, float d, unsigned barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(a),
                 "f"(b), "f"(c), "f"(d), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void send(unsigned to, float a, float b, unsigned barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(a), "f"(b),
                 "r"(barrier)
                 : "memory");
}
