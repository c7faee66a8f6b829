// divided_layers_fp8: all layers of a decode step in one kernel (layers_divide.cuh), whose keys and values are kept in fp8.
#include "hopper/layers/layers_divide.cuh"

extern "C" __global__ void __launch_bounds__(LAYERS_FP8_THREADS, 1)
divided_layers_fp8(const __grid_constant__ Layers args, const __grid_constant__ LayerMaps maps) {
    divided<true>(args, maps);
}
