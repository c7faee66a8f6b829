// edge: nothing, behind a dependent launch: what one edge of the chain of decode kernels costs at least.
//
//   grid 1   block 32
#include "dependent.cuh"

extern "C" __global__ void edge() {
    dependent_launch();
    dependent_wait();
}
