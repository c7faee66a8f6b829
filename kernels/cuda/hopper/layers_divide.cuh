// layers_divide: all layers of a decode step of up to 256 rows, behind the first layer's qkv and before the last norm, in one kernel.
// Half of an H200's multiprocessors fill its memory: so some blocks attend, the others multiply, each on a multiprocessor of its own.
//
//   blocks 0 .. 63      o, gate_up, down and the next layer's qkv of one half of the rows, then of the other     layers_multiply.cuh
//   blocks 64 ..        attention of the halves in turn, whose rings are never empty across the change           layers_attend.cuh
//   who waits for whom                                                                                             layers_flags.cuh
//
//   attends      A0  B0  A1  B1  A2 …            A, B: the halves; a number: the layer
//   multiplies       A0  B0  A1  B1 …
//
//   grid     as many blocks as multiprocessors, an even number     block 384, in fp8 512     cluster 2     shared LAYERS_SHARED
//   moves    every key and value once, every weight twice: for the second half from L2, mostly
//
// Bits are those of the kernels of single operations.
#pragma once

#include "layers_attend.cuh"
#include "layers_multiply.cuh"

// What a block does, of keys and values in bf16 or in fp8.
template <bool FP8> __device__ __forceinline__ void divided(const Layers &args, const LayerMaps &maps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned base = shared_address(shared), block = blockIdx.x;
    if (block < MULTIPLIERS)
        multiply<FP8>(args, maps, here(base), block);
    else
        attend<FP8>(args, here(base), block - MULTIPLIERS, gridDim.x - MULTIPLIERS);
    __syncthreads();
    dependent_launch();
    Flags(args).leave(reinterpret_cast<unsigned *>(shared));
}
