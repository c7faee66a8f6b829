// Programmatic dependent launch (compute_90 and later; nothing before): a kernel may start while the one before it
// drains. It must not read what that kernel writes before `dependent_wait`, and must not write anything before it.
//
//   kernel N      launch ┬ fetch what nobody writes ─ wait ─ work ──────────────────────── end
//   kernel N + 1         └ launch ┬ fetch what nobody writes ─────────── … ───────── wait ─ work ─ end
//   kernel N + 2                  └ launch ─ fetch …                                              wait ─ work
//
// `dependent_launch` says that the next kernel may start where there is room, `dependent_wait` waits until the kernel before
// has ended and what it wrote is there. Each kernel waits before it ends. So where a kernel has waited, not only the one before
// it has ended but all before that one, and what any of them wrote may be read.
//
// 1. Before it waits a kernel reads weights, the packed batch, the page table, slots, and keys and values of steps before.
//    The batch is written by take_batch, table and slots by begin_step: so the embedding waits first and only then lets the layers
//    start (`embed.cu`). take_batch itself is launched without: what the step before wrote is there for all.
// 2. Keys and values of a step's own tokens come from kernels before attention (with fp8 up to three). Its ring is filled with what
//    is older, then it waits, and then with the rest (`attention_ring.cuh`).
// 3. In a divided step a half's attention lets its products start when its last turn is taken, not when it begins: until then
//    their places are the other half's (`attention_kernels.cuh`, `attention_ring.cuh`).
// 4. An epilogue that reads the residual stream looks it up after the wait, one that reads the batch alone before (`EARLY` in
//    `epilogue.cuh`).
// 5. What begins or ends a lane of a divided step waits for an event of the stream, not for a kernel.
// 6. Behind a kernel of whose blocks some wait before they let the next start, and the others end at once, what lies before that kernel
//    may be read at once: so experts' down reads what was chosen, and the kernel that adds up the chosen experts' shares and the
//    residual stream (`experts.cu`).
// 7. So decode rows' attention runs beside prefill rows', which is launched before it: it works at once, and waits before it ends, so
//    that who has waited for it has waited for both (`attention_work.cuh`).
#pragma once

__device__ __forceinline__ void dependent_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void dependent_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
