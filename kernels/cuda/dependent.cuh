// Programmatic dependent launch (compute_90 and later; nothing before): a kernel may start while the one before it
// drains. It must not read what that kernel writes before `dependent_wait`, and must not write anything before it.
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
