// layers_divide: all layers of a decode step of up to 256 rows in one kernel, from the first attention to the last: behind the first layer's
// qkv, and before the second half's last o, gate_up and down, beside which there is nothing to attend to.
// Half of an H200's multiprocessors fill its memory: so some blocks attend, the others multiply, each on a multiprocessor of its own.
//
//   blocks 0 .. 63      o, gate_up, down and the next layer's qkv of one half of the rows, then of the other     layers_multiply.cuh
//   blocks 64 ..        attention of the halves in turn, whose rings are never empty across the change           layers_attend.cuh
//   who waits for whom                                                                                             layers_flags.cuh
//
//   attends      A0  B0  A1  B1  A2 …            A, B: the halves; a number: the layer
//   multiplies       A0  B0  A1  B1 …       and the last layer's A
//
//   grid     as many blocks as multiprocessors, an even number     block 384, in fp8 512     cluster 2     shared LAYERS_SHARED
//   moves    every key and value once, every weight twice: for the second half from L2, mostly
//
// Bits are those of the kernels of single operations.
#pragma once

#include "hopper/layers/layers_attend.cuh"
#include "hopper/layers/layers_multiply.cuh"

// What a block does, of keys and values in bf16 or in fp8.
template <bool FP8> __device__ __forceinline__ void divided(const Layers &args, const LayerMaps &maps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned base = shared_address(shared), block = blockIdx.x;
    if (block < MULTIPLIERS) {
        multiply<FP8>(args, maps, here(base), block);
    } else {
        // The last products wait with their first weights where those who multiply have left.
        dependent_launch();
        attend<FP8>(args, here(base), block - MULTIPLIERS, gridDim.x - MULTIPLIERS);
    }
    __syncthreads();
    Flags(args).leave(reinterpret_cast<unsigned *>(shared));
}
