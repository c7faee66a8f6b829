// read_all, empty, edge: what the device does at best, for the ceilings in perf-cuda; push_sums: what a product does for an exchange.
//
//   read_all   reads `count` 16-byte words once     grid multiprocessors * 2   block 1024   moves count * 16 bytes
//   empty      nothing                              grid 1                     block 32
//   edge       nothing, behind a dependent launch   grid 1                     block 32
//   push_sums  sums [tokens, rows] f32 to ranks     grid tokens                block 256
//
// 1. Eight independent loads a thread before the first use; neighbouring threads read neighbouring words.
// 2. The words are combined and stored only where they come out as one value of 2^32, so that no load is dropped.
#include "dependent.cuh"
#include "epilogue.cuh"

extern "C" __global__ void __launch_bounds__(1024)
read_all(const uint4 *words, unsigned long long count, unsigned *sink) {
    const unsigned long long stride = (unsigned long long)gridDim.x * 1024;
    unsigned long long i = (unsigned long long)blockIdx.x * 1024 + threadIdx.x;
    unsigned all = 0;
    for (; i + 7 * stride < count; i += 8 * stride) {
        uint4 word[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            word[j] = words[i + j * stride];
#pragma unroll
        for (int j = 0; j < 8; j++)
            all ^= word[j].x ^ word[j].y ^ word[j].z ^ word[j].w;
    }
    for (; i < count; i += stride)
        all ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    if (all == 0x5eed5eedu)
        *sink = all;
}

extern "C" __global__ void empty() {}

extern "C" __global__ void edge() {
    dependent_launch();
    dependent_wait();
}

extern "C" __global__ void __launch_bounds__(256) push_sums(const float *sums, unsigned rows, const __grid_constant__ RankSums ranks) {
    dependent_launch();
    dependent_wait();
    for (unsigned m = threadIdx.x * 2; m < rows; m += 512) {
        const float2 y = *reinterpret_cast<const float2 *>(sums + (size_t)blockIdx.x * rows + m);
        ranks.put(ranks.segment(blockIdx.x, m, rows), m % SEGMENT, y);
    }
}
