// A prototype (H200): a decode step's layers in one kernel, roles by block number. Qwen3-0.6B's shape. Results and what they decide: README.md beside this.
//
//   blocks 0..np-1       the products o, gate_up, down and the next layer's qkv of one half of the rows, then of the other's (divide_products.cu's chain)
//   blocks np..np+ns-1   attention of the halves in turn, layer after layer: AG "attenders" a block, each AW warps that read and one that fills a ring of its own
//
//   phase i = 2 * layer + half     attend(i) waits for chain(i - 2): queries, newest keys and values;  chain(i) waits for attend(i)
//
// Attenders take turns (a piece of a row, a kv head) by one ticket counter that runs on across phases, longest rows first in each. One whose ticket is of the next
// phase fills its ring with old keys and values before that phase's flag is up; only the queries' copy, and the leaf with the newest token, wait.
// No deadlock: all blocks are resident (one an SM, no more than SMs). attend(i) waits for chain(i - 2) only, chain(i) for attend(i) and the products before it;
// tickets are taken in order and each attender works in the order of its tickets: the earliest unfinished phase waits for nothing that is later.
// Arithmetic and order of sums of attention are the product's (attention*.cuh): leaves of 128, tiles of 16, fold leaf by leaf. Lines with chk 1 check every
// output of layers 0, 9, 18, 27 against plain kernels, after poisoning all that is to be written; a hash of the last attention's output is printed: equal for
// equal splits of rows, whatever the ring and the readers.
// Not here: rope and norms of q and k, residual sums, the head, sampling.
//
// Build: nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -DBIG -DPG=64 -DAG=2 -DAW=4 [-DTHREADS=384] [-DONLY: attention alone] [-DNOA: the whole alone]
//        [-DFEW: 68/64 and 80/52 only] [-DCLK: cycles by part, with -DONLY] [-DWEIGHTS='"evict_last"'] divide_layer.cu -lcudart_static
//   PG 16 or 64 tokens a page; BIG: a ring's stage is a leaf's keys or values (32 KB), not half of them. Run: ./divide_layer shapes.txt jobs.txt (a line: see main)
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <algorithm>
#include <vector>
#include <string>
#include <map>
#include <cuda_runtime.h>
#include <cuda_bf16.h>
static volatile unsigned* hung;
#define CK(x) do { cudaError_t e = (x); if (e) { printf("%s line %d: %s (hung: block %d thread %d)\n", #x, __LINE__, cudaGetErrorString(e), hung ? (int)hung[0] - 1 : -1, hung ? (int)hung[1] : -1); exit(1); } } while (0)
typedef __nv_bfloat16 bf16;
#ifndef NOHOIST
#define NOHOIST 1
#endif
#ifndef EARLY
#define EARLY 0
#endif
constexpr int L = 28, SMEM = 231424, STAGE = 16384, XSLOT = 16384;
__device__ __forceinline__ uint32_t sa(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ uint32_t opaque(uint32_t x) { uint32_t y; asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x)); return y; }
__device__ __forceinline__ unsigned long long now() { unsigned long long t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)); return t; }
__device__ volatile unsigned* hang;
struct Dog { unsigned n = 0; unsigned long long t = 0; __device__ __forceinline__ void bark() { if ((++n & 1023) == 0) { unsigned long long x = now(); if (!t) t = x; else if (x - t > 100000000ull) { hang[0] = 1 + blockIdx.x; hang[1] = threadIdx.x; __threadfence_system(); __trap(); } } } };
__device__ __forceinline__ bool tryw(uint32_t b, uint32_t ph) { uint32_t ok; asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ok) : "r"(b), "r"(ph) : "memory"); return ok; }
__device__ __forceinline__ bool test(uint32_t b, uint32_t ph) { uint32_t ok; asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ok) : "r"(b), "r"(ph) : "memory"); return ok; }
__device__ __forceinline__ void wait(uint32_t b, uint32_t ph) { if (tryw(b, ph)) return; Dog d; while (!tryw(b, ph)) d.bark(); }
__device__ __forceinline__ void push(uint32_t dst, const float* v, uint32_t bar) { asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" :: "r"(dst), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar) : "memory"); }
__device__ __forceinline__ void init(uint32_t b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(n)); }
__device__ __forceinline__ void expect(uint32_t b, int n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory"); }
__device__ __forceinline__ uint32_t mapa(uint32_t a, int r) { uint32_t x; asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(r)); return x; }
__device__ __forceinline__ void arrive_at(uint32_t b, int r) { asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" :: "r"(mapa(b, r)) : "memory"); }
__device__ __forceinline__ void bulk(uint32_t dst, const void* src, int n, uint32_t bar, uint64_t pol) { asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" :: "r"(dst), "l"(src), "r"(n), "r"(bar), "l"(pol) : "memory"); }
__device__ __forceinline__ void multi(uint32_t dst, const void* src, int n, uint32_t bar, uint16_t mask) { asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" :: "r"(dst), "l"(src), "r"(n), "r"(bar), "h"(mask) : "memory"); }
__device__ __forceinline__ uint64_t desc(uint32_t a) { return (uint64_t)((a & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }
__device__ __forceinline__ unsigned seen(const unsigned* p) { unsigned v; asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
template <int N> __device__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b);
template <> __device__ __forceinline__ void wgmma<8>(float (&d)[4], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<16>(float (&d)[8], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<24>(float (&d)[12], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}, %12, %13, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<32>(float (&d)[16], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<40>(float (&d)[20], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19}, %20, %21, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<48>(float (&d)[24], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23}, %24, %25, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<56>(float (&d)[28], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n56k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27}, %28, %29, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<64>(float (&d)[32], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<72>(float (&d)[36], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35}, %36, %37, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<80>(float (&d)[40], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, %40, %41, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<96>(float (&d)[48], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, %48, %49, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<104>(float (&d)[52], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n104k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51}, %52, %53, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<112>(float (&d)[56], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55}, %56, %57, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]) : "l"(a), "l"(b)); }
template <> __device__ __forceinline__ void wgmma<120>(float (&d)[60], uint64_t a, uint64_t b) { asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n120k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59}, %60, %61, p, 1, 1, 0, 0; }" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]) : "l"(a), "l"(b)); }
// ---------------------------------------------------------------- attention
#ifdef CLK
#define TICK(i) { unsigned x_ = (unsigned)clock64(); acc[i] += x_ - t0; t0 = x_; }
#else
#define TICK(i)
#endif
#ifndef WEIGHTS
#define WEIGHTS "evict_normal"
#endif
#ifndef PG
#define PG 16
#endif
constexpr int PPL = 128 / PG, LPB = 32 / PPL; // tokens of a page; pages of a leaf; leaves whose pages a warp's lanes hold
struct Att {
    const uint4* plan[2]; unsigned segs[2], rows[2]; // segments of 32 bytes: row, slot, kv_len, first leaf | leaves, base, at, total
    const int* table; unsigned tw; // pages of a slot
    char *k, *v; size_t kvlay;     // [layer][page][8 heads][16 tokens][128] bf16, chunks swizzled
    char* q[2]; size_t qlay;       // [R][2048] bf16
    char* out[2]; size_t outlay;   // o's input, [K/64][R][64] swizzled
    float4* partials; unsigned* arrived; size_t pstride; unsigned astride; // four copies, by phase
    unsigned *done, *cnt, need;    // done[8 * phase]: (row, head)s attended; cnt: the chain's counters
    unsigned* ticket; int phases, passes, R, nst, f0, f1, attenders, prefetch, first;
    unsigned long long* prof; unsigned long long* stall;     // ns that filling warps waited for flags
    const uint32_t* locs;          // [2][128] page << 4 | place of each row's newest token
};
struct Args {
    int ns, np, R, passes; const char* w[4]; size_t wl[4]; char* act; size_t setstride, laystride; float* ss; unsigned long long *stamp, *clk; int gap; Att t;
};
#ifdef BIG
constexpr int KVS = 32768; // a stage holds a leaf's keys or values
#else
constexpr int KVS = 16384; // a stage holds half of them
#endif
constexpr int SIDE = 13 * 16384; // behind the rings: queries [13][512], units [13][64], barriers [13][16], scratch [3][2320], counters [3][64]
__device__ __forceinline__ float lds(uint32_t a) { float x; asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(a) : "memory"); return x; }
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); }
__device__ __forceinline__ void ldm(uint32_t (&a)[4], uint32_t p) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(p) : "memory"); }
__device__ __forceinline__ void ldmt(uint32_t (&a)[4], uint32_t p) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(p) : "memory"); }
__device__ __forceinline__ uint32_t transposed(uint32_t x) { uint32_t y; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x)); return y; }
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float ninf() { return __int_as_float(0xff800000); }
constexpr float SC = 0.12751743082459868f; // log2(e) / sqrt(128)
__device__ __forceinline__ void weights_of(float& m, float leaf, float& ws, float& wl) { float both = fmaxf(m, leaf); wl = leaf == ninf() ? -0.f : ex2(__fmul_rn(__fsub_rn(leaf, both), SC)); ws = ex2(__fmul_rn(__fsub_rn(m, both), SC)); m = both; }
__device__ __forceinline__ float folded(float s, float l, float ws, float wl) { return __fmaf_rn(l, wl, __fmul_rn(s, ws)); }
__device__ __forceinline__ char* outat(char* out, int R, int row, int k) { return out + (size_t)(k >> 6) * R * 128 + row * 128 + ((((k >> 3) & 7) ^ (row & 7)) << 4) + (k & 7) * 2; }
__device__ __forceinline__ uint32_t qslot(uint32_t s, int i) { return s + SIDE + i * 512; }
__device__ __forceinline__ uint32_t unitat(uint32_t s, int i) { return s + SIDE + 13 * 512 + i * 64; }
__device__ __forceinline__ uint32_t fullat(uint32_t s, int i) { return s + SIDE + 13 * 576 + i * 16; }
__device__ __forceinline__ uint32_t scratch(uint32_t s, int g) { return s + SIDE + 13 * 592 + g * 2320; }
__device__ __forceinline__ uint32_t compat(uint32_t s, int g, int p) { return s + SIDE + 13 * 592 + 3 * 2320 + (g * 64 + p) * 4; }

// The warp that fills attender g's ring: takes turns, looks up pages, copies keys, values and queries.
__device__ __forceinline__ bool elect() { uint32_t p; asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(p)); return p; }
struct Cursor { int at = 0; uint32_t par = 0; __device__ __forceinline__ void skip(int n, int nst) { at += n; if (at >= nst) at -= nst, par ^= 1; } };
// A stage's pages (lanes 4 * half to 4 * half + 3 of `page` have their numbers).
__device__ __forceinline__ void copy_pages(uint32_t dst, const char* base, int page, int half, int n, unsigned item, uint32_t bar, int bytes, uint64_t pol) {
#ifdef BIG
    constexpr int NP = 128 / PG, PT = PG / 16; const char* p[NP];
    #pragma unroll
    for (int i = 0; i < NP; i++) p[i] = base + ((size_t)__shfl_sync(~0u, page, i) * 8 + item) * (PG * 256);
    if (elect()) { expect(bar, bytes);
        if (n == 8) {
            #pragma unroll
            for (int i = 0; i < NP; i++) bulk(dst + i * PG * 256, p[i], PG * 256, bar, pol);
        } else
            #pragma unroll
            for (int i = 0; i < NP; i++) if (i * PT < n) bulk(dst + i * PG * 256, p[i], min(PT, n - i * PT) * 4096, bar, pol); }
#elif PG == 64
    const char* p = base + ((size_t)__shfl_sync(~0u, page, half) * 8 + item) * 16384;
    if (elect()) { expect(bar, bytes); bulk(dst, p, n * 4096, bar, pol); }
#else
    const char* p[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) p[i] = base + ((size_t)__shfl_sync(~0u, page, half * 4 + i) * 8 + item) * 4096;
    if (elect()) { expect(bar, bytes);
        if (n == 4) {
            #pragma unroll
            for (int i = 0; i < 4; i++) bulk(dst + i * 4096, p[i], 4096, bar, pol);
        } else
            #pragma unroll
            for (int i = 0; i < 3; i++) if (i < n) bulk(dst + i * 4096, p[i], 4096, bar, pol); }
#endif
    __syncwarp();
}
__device__ __forceinline__ void fill(const Att& a, const uint32_t sm, const int g, const int me, const int flight, const int lane) {
    const int nst = a.nst, s0 = g * nst; Cursor c; int known = a.passes - 1; // phases known to be ready
    uint64_t pol; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(pol));
    auto ready = [&](int p) { if (p <= known || !a.need) return true; if (seen(a.cnt + ((p - a.passes) * 4 + 4) * 8) < a.need) return false; known = p; asm volatile("fence.proxy.async.global;" ::: "memory"); return true; };
    const unsigned T0 = a.segs[0] * 8, TT = T0 + (a.passes == 2 ? a.segs[1] * 8 : 0);
    unsigned nphase, nitem; uint4 n0, n1; int pgt = 0, pg = 0, pgb = 0, step = 2; unsigned raw = 0; unsigned long long waited = 0;
    auto take = [&](unsigned n) { unsigned l = n / TT, r = n % TT, set = r >= T0; nphase = l * a.passes + set; r -= set ? T0 : 0; nitem = r & 7; if (nphase < (unsigned)a.phases) { const uint4* s = a.plan[set] + (r >> 3) * 2; n0 = __ldg(s); n1 = __ldg(s + 1); } step = 1; };
    auto look = [&](unsigned slot, unsigned kv, unsigned leaf) { unsigned p = leaf * PPL + lane; return p * PG < kv ? __ldg(a.table + (size_t)slot * a.tw + p) : 0; };
    auto pages = [&]() { if (nphase < (unsigned)a.phases) pgt = look(n0.y, n0.z, n0.w); step = 2; };
#ifdef CLK
    unsigned long long acc[4] = {}; unsigned t0 = (unsigned)clock64();
#endif
    take(me); pages();
    while (nphase < (unsigned)a.phases) {
        const unsigned row = n0.x, slot = n0.y, kv = n0.z, first = n0.w, leaves = n1.x, item = nitem, phase = nphase; const uint4 s0v = n0, s1v = n1; pg = pgt;
        if (lane == 0) raw = atomicAdd(a.ticket, 1); step = 0;
        const int set = a.passes == 2 ? phase & 1 : 0, layer = a.passes == 2 ? phase >> 1 : phase; const char *K = a.k + layer * a.kvlay, *V = a.v + layer * a.kvlay, *Q = a.q[set] + layer * a.qlay + (size_t)row * 4096 + item * 512;
        int pend = -1; // stage whose queries are not on their way yet
        auto flush = [&]() { if (elect()) asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(qslot(sm, pend)), "l"(Q), "r"(512), "r"(fullat(sm, pend)) : "memory"); pend = -1; __syncwarp(); };
        auto until = [&](uint32_t bar, uint32_t ph) { if (pend >= 0) { unsigned long long b = now(); Dog d; while (!__any_sync(~0u, tryw(bar, ph))) { if (__all_sync(~0u, ready(phase))) { flush(); waited += now() - b; break; } d.bark(); } } wait(bar, ph); };
        auto block = [&]() { if (__all_sync(~0u, ready(phase))) { if (pend >= 0) flush(); return; } unsigned long long b = now(); Dog d; while (!__all_sync(~0u, ready(phase))) d.bark(); if (pend >= 0) flush(); waited += now() - b; };
        if (!a.prefetch) block();
        for (unsigned leaf = first; leaf < first + leaves; leaf++) {
            const unsigned rel = leaf - first; if (rel && rel % LPB == 0) pg = pgb; if (rel % LPB == 0 && rel + LPB < leaves) pgb = look(slot, kv, leaf + LPB);
            const unsigned tiles = min((kv - leaf * 128 + 15) / 16, 8u); const bool newest = (leaf + 1) * 128 >= kv;
            if (newest) block();
            const int page = __shfl_sync(~0u, pg, rel % LPB * PPL + lane % PPL);
            const int halves = KVS == 16384 && tiles > 4 ? 2 : 1;
            #pragma unroll 1
            for (int h4 = 0; h4 < 2 * halves; h4++) { const bool val = h4 >= halves; const int half = val ? h4 - halves : h4, n = KVS == 32768 ? (int)tiles : min((int)tiles - half * 4, 4), at = s0 + c.at;
                TICK(0) until(fullat(sm, at) + 8, c.par ^ 1); TICK(1)
                const int before = c.at >= flight ? c.at - flight : c.at + nst - flight; if (flight < nst) until(fullat(sm, s0 + before), c.par ^ (before > c.at)); TICK(2)
                const bool wantsq = h4 == 0 && rel == 0;
                if (h4 == 0 && lane < 3) { const uint4 v = lane == 0 ? s0v : lane == 1 ? s1v : make_uint4(item, leaf, phase, 0); asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" :: "r"(unitat(sm, at) + lane * 16), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); } __syncwarp();
                copy_pages(sm + at * KVS, val ? V : K, page, half, n, item, fullat(sm, at), n * 4096 + (wantsq ? 512 : 0), pol);
                if (wantsq) { pend = at; if (__all_sync(~0u, ready(phase))) flush(); }
                c.skip(1, nst); }
            if (step == 0) take(a.attenders + __shfl_sync(~0u, raw, 0)); else if (step == 1) pages();
        }
        if (pend >= 0) block();
        if (step == 0) take(a.attenders + __shfl_sync(~0u, raw, 0)); if (step == 1) pages();
    }
#ifdef CLK
    if (lane == 0) for (int i = 0; i < 3; i++) a.prof[me * 16 + i] = acc[i];
#endif
    wait(fullat(sm, s0 + c.at) + 8, c.par ^ 1);
    if (lane == 0) { asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" :: "r"(unitat(sm, s0 + c.at) + 16), "r"(0) : "memory"); arrive(fullat(sm, s0 + c.at)); if (a.stall) a.stall[me] = waited; }
}
template <int W> struct Reader {
    static constexpr int TPW = 8 / W, N = W * 32;
    const Att& a; const uint32_t sm; const int g, w, lane; int at = 0; uint32_t par = 0; uint32_t q[8][2]; float m[2], l[2], o[TPW][4]; uint32_t pr, mx_, flag;
    __device__ __forceinline__ Reader(const Att& a, uint32_t sm, int g, int w, int lane) : a(a), sm(sm), g(g), w(w), lane(lane) { pr = scratch(sm, g); mx_ = pr + 2048; flag = mx_ + 256; clear(); }
    __device__ __forceinline__ void clear() { m[0] = m[1] = ninf(); l[0] = l[1] = 0.f;
        #pragma unroll
        for (int i = 0; i < TPW; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f; }
    __device__ __forceinline__ void bar() { asm volatile("bar.sync %0, %1;" :: "r"(g + 1), "n"(N) : "memory"); }
    __device__ __forceinline__ void next(int& i, uint32_t& p) { if (++i == a.nst) i = 0, p ^= 1; }
    __device__ __forceinline__ void finished(unsigned phase) { __syncwarp(); if (lane == 0) { asm volatile("red.release.cta.shared::cta.add.u32 [%0], 1;" :: "r"(compat(sm, g, phase)) : "memory"); if (w == 0) asm volatile("st.release.cta.shared.u32 [%0], %1;" :: "r"(compat(sm, g, 63)), "r"(phase) : "memory"); } }
    // Folds a row's partials, each thread an element at a time.
    __device__ __forceinline__ void merge(unsigned row, unsigned item, unsigned phase, unsigned base, unsigned total) {
        const int set = a.passes == 2 ? phase & 1 : 0, layer = a.passes == 2 ? phase >> 1 : phase; const float* P = (const float*)(a.partials + (phase & 3) * a.pstride) + ((size_t)base * 8 + item) * 260;
        for (int e = w * 32 + lane; e < 256; e += N) { float M = 0, L = 0, O = 0; const int second = e & 1, quad = e >> 2;
            for (unsigned f = 0; f < total; f += 8) { float x[8], y[8], z[8];
                #pragma unroll
                for (int i = 0; i < 8; i++) if (f + i < total) { const float* p = P + (size_t)(f + i) * 8 * 260; x[i] = __ldcg(p + 256 + second); y[i] = __ldcg(p + 258 + second); z[i] = __ldcg(p + e); }
                #pragma unroll
                for (int i = 0; i < 8; i++) if (f + i < total) { if (f + i == 0) M = x[0], L = y[0], O = z[0]; else { float ws, wl; weights_of(M, x[i], ws, wl); L = folded(L, y[i], ws, wl); O = folded(O, z[i], ws, wl); } } }
            const int dim = quad / 8 * 16 + quad % 8 + (e >> 1 & 1) * 8; *(bf16*)outat(a.out[set] + layer * a.outlay, a.R, row, (item * 2 + second) * 128 + dim) = __float2bfloat16_rn(__fmul_rn(O, __frcp_rn(L))); }
        if (w == 0 && lane == 0) a.arrived[(phase & 3) * a.astride + row * 8 + item] = 0;
    }
    template <int G> __device__ __forceinline__ void run() {
#ifdef CLK
        unsigned long long acc[9] = {}; unsigned t0 = (unsigned)clock64();
#endif
        while (true) {
            wait(fullat(sm, g * a.nst + at), par);
            uint4 u0, u1, u2; const uint32_t u = unitat(sm, g * a.nst + at);
            asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(u0.x), "=r"(u0.y), "=r"(u0.z), "=r"(u0.w) : "r"(u) : "memory"); asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(u1.x), "=r"(u1.y), "=r"(u1.z), "=r"(u1.w) : "r"(u + 16) : "memory"); asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(u2.x), "=r"(u2.y), "=r"(u2.z), "=r"(u2.w) : "r"(u + 32) : "memory");
            const unsigned row = u0.x, kv = u0.z, first = u0.w, leaves = u1.x, item = u2.x, leaf = u2.y, phase = u2.z;
            if (leaves == 0) break;
            const int tiles = min((kv - leaf * 128 + 15) / 16, 8u), two = KVS == 16384 && tiles > 4; uint32_t tok0 = sm + (g * a.nst + at) * KVS, tok1 = KVS == 32768 ? tok0 + 16384 : tok0; const uint32_t e0 = fullat(sm, g * a.nst + at) + 8; uint32_t e1 = e0;
            if (leaf == first) { const uint32_t r = qslot(sm, g * a.nst + at) + (lane / 4) * 256 + (lane & 3) * 4; const bool there = lane / 4 < 2;
                #pragma unroll
                for (int k = 0; k < 8; k++)
                    #pragma unroll
                    for (int h = 0; h < 2; h++) { uint32_t x = 0; if (there) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(r + k * 32 + h * 16) : "memory"); q[k][h] = x; } }
            next(at, par);
            if (two) { wait(fullat(sm, g * a.nst + at), par); tok1 = sm + (g * a.nst + at) * KVS; e1 = fullat(sm, g * a.nst + at) + 8; next(at, par); }
            TICK(0)
            float s[TPW][4]; const bool whole = (leaf + 1) * 128 <= kv;
            #pragma unroll
            for (int j = 0; j < TPW; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
            if (whole) {
                const uint32_t row_ = (lane & 15) * 256; uint32_t base[TPW];
                #pragma unroll
                for (int j = 0; j < TPW; j++) { const int t = w + W * j; base[j] = (t & 4 ? tok1 : tok0) + (t & 3) * 4096 + row_; }
                #pragma unroll
                for (int kk = 0; kk < 8; kk += 4) { uint32_t x[4][TPW][4];
                    #pragma unroll
                    for (int k = 0; k < 4; k++)
                        #pragma unroll
                        for (int j = 0; j < TPW; j++) ldm(x[k][j], base[j] + (((2 * (kk + k) + (lane >> 4)) ^ (lane & 7)) << 4));
                    #pragma unroll
                    for (int k = 0; k < 4; k++)
                        #pragma unroll
                        for (int j = 0; j < TPW; j++) mma(s[j], x[k][j], q[kk + k]); }
            } else {
                #pragma unroll
                for (int j = 0; j < TPW; j++) { const int t = w + W * j; if (t < tiles)
                    #pragma unroll
                    for (int k = 0; k < 8; k++) { uint32_t x[4]; ldm(x, (t & 4 ? tok1 : tok0) + (t & 3) * 4096 + (lane & 15) * 256 + (((2 * k + (lane >> 4)) ^ (lane & 7)) << 4)); mma(s[j], x, q[k]); } }
            }
            __syncwarp(); if (lane == 0) { arrive(e0); if (two) arrive(e1); }
            TICK(1)
            float lm[2] = {ninf(), ninf()};
            #pragma unroll
            for (int j = 0; j < TPW; j++) { const unsigned tk = leaf * 128 + (w + W * j) * 16 + lane / 4; if (tk >= kv) s[j][0] = s[j][1] = ninf(); if (tk + 8 >= kv) s[j][2] = s[j][3] = ninf();
                #pragma unroll
                for (int i = 0; i < 2; i++) lm[i] = fmaxf(lm[i], fmaxf(s[j][i], s[j][i + 2])); }
            #pragma unroll
            for (int i = 0; i < 2; i++) { lm[i] = fmaxf(lm[i], __shfl_xor_sync(~0u, lm[i], 4)); lm[i] = fmaxf(lm[i], __shfl_xor_sync(~0u, lm[i], 8)); lm[i] = fmaxf(lm[i], __shfl_xor_sync(~0u, lm[i], 16)); }
            if (lane < 4) asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(mx_ + w * 32 + lane * 8), "f"(lm[0]), "f"(lm[1]) : "memory");
            TICK(2) bar(); TICK(3)
            #pragma unroll
            for (int j = 0; j < W; j++) { float x, y; asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(mx_ + j * 32 + (lane & 3) * 8) : "memory"); lm[0] = fmaxf(lm[0], x); lm[1] = fmaxf(lm[1], y); }
            #pragma unroll
            for (int j = 0; j < TPW; j++) { uint32_t p[2];
                #pragma unroll
                for (int h = 0; h < 2; h++) { float x[2];
                    #pragma unroll
                    for (int i = 0; i < 2; i++) x[i] = ex2(__fmaf_rn(s[j][2 * h + i], SC, lm[i] == ninf() ? 0.f : -__fmul_rn(lm[i], SC)));
                    __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]); p[h] = transposed(*(uint32_t*)&pair); }
                asm volatile("st.shared.v2.u32 [%0], {%1, %2};" :: "r"(pr + (w + W * j) * 256 + lane * 8), "r"(p[0]), "r"(p[1]) : "memory"); }
            TICK(4)
            wait(fullat(sm, g * a.nst + at), par); const uint32_t v0 = sm + (g * a.nst + at) * KVS, f0 = fullat(sm, g * a.nst + at) + 8; uint32_t v1 = KVS == 32768 ? v0 + 16384 : v0, f1 = f0; next(at, par);
            uint32_t off[TPW], x0[4][TPW][4]; constexpr bool EARLYV = TPW == 1;
            #pragma unroll
            for (int i = 0; i < TPW; i++) off[i] = ((lane & 7) + ((lane >> 4) << 3)) * 256 + (((2 * (w * TPW + i) + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
            if (EARLYV && whole)
                #pragma unroll
                for (int j = 0; j < 4; j++)
                    #pragma unroll
                    for (int i = 0; i < TPW; i++) ldmt(x0[j][i], v0 + j * 4096 + off[i]);
            TICK(5) bar();
            if (two) { wait(fullat(sm, g * a.nst + at), par); v1 = sm + (g * a.nst + at) * KVS; f1 = fullat(sm, g * a.nst + at) + 8; next(at, par); }
            const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80}; float ll[4] = {}, lo[TPW][4] = {}; const unsigned valid = kv - leaf * 128;
            TICK(6)
            if (whole) {
                uint32_t p[8][2], x1[4][TPW][4];
                #pragma unroll
                for (int j = 0; j < 8; j++) asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(p[j][0]), "=r"(p[j][1]) : "r"(pr + j * 256 + lane * 8) : "memory");
                if (!EARLYV)
                    #pragma unroll
                    for (int j = 0; j < 4; j++)
                        #pragma unroll
                        for (int i = 0; i < TPW; i++) ldmt(x0[j][i], v0 + j * 4096 + off[i]);
                #pragma unroll
                for (int j = 0; j < 4; j++)
                    #pragma unroll
                    for (int i = 0; i < TPW; i++) ldmt(x1[j][i], v1 + j * 4096 + off[i]);
                #pragma unroll
                for (int j = 0; j < 8; j++) { mma(ll, ones, p[j]);
                    #pragma unroll
                    for (int i = 0; i < TPW; i++) mma(lo[i], j < 4 ? x0[j & 3][i] : x1[j & 3][i], p[j]); }
            } else {
                #pragma unroll
                for (int j = 0; j < 8; j++) if (j < tiles) { uint32_t p[2]; asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(p[0]), "=r"(p[1]) : "r"(pr + j * 256 + lane * 8) : "memory"); mma(ll, ones, p);
                #pragma unroll
                for (int i = 0; i < TPW; i++) { uint32_t x[4]; const int token = (lane & 7) + ((lane >> 4) << 3); ldmt(x, (j & 4 ? v1 : v0) + (j & 3) * 4096 + token * 256 + (((2 * (w * TPW + i) + ((lane >> 3) & 1)) ^ (lane & 7)) << 4));
                    if ((j + 1) * 16 > valid) { const unsigned left = valid - j * 16;
                        #pragma unroll
                        for (int z = 0; z < 4; z++) { const unsigned tk = (lane & 3) * 2 + z / 2 * 8; x[z] &= tk + 1 < left ? 0xffffffffu : tk < left ? 0xffffu : 0; } }
                    mma(lo[i], x, p); } }
            }
            TICK(7)
            __syncwarp(); if (lane == 0) { arrive(f0); if (two) arrive(f1); }
            const unsigned total = u1.w; const bool last = leaf + 1 == first + leaves, folds = first == 0;
            if (folds) { float ws[2], wl[2];
                #pragma unroll
                for (int i = 0; i < 2; i++) { weights_of(m[i], lm[i], ws[i], wl[i]); l[i] = folded(l[i], ll[i], ws[i], wl[i]); }
                #pragma unroll
                for (int i = 0; i < TPW; i++)
                    #pragma unroll
                    for (int z = 0; z < 4; z++) o[i][z] = folded(o[i][z], lo[i][z], ws[z & 1], wl[z & 1]); }
            if (last && total == 0) { const int set = a.passes == 2 ? phase & 1 : 0, layer = a.passes == 2 ? phase >> 1 : phase; char* out = a.out[set] + layer * a.outlay;
                if ((lane & 3) == 0) {
                    #pragma unroll
                    for (int i = 0; i < 2; i++) { const float inv = __frcp_rn(l[i]);
                        #pragma unroll
                        for (int t = 0; t < TPW; t++) { const int k = (item * 2 + i) * 128 + (w * TPW + t) * 16 + lane / 4; *(bf16*)outat(out, a.R, row, k) = __float2bfloat16_rn(__fmul_rn(o[t][i], inv)); *(bf16*)outat(out, a.R, row, k + 8) = __float2bfloat16_rn(__fmul_rn(o[t][i + 2], inv)); } } }
                finished(phase);
            } else if (total && (last || !folds)) { const unsigned index = u1.z + (folds ? 0 : leaf - first); float4* P = a.partials + (phase & 3) * a.pstride + ((size_t)index * 8 + item) * 65;
                if ((lane & 3) == 0) {
                    #pragma unroll
                    for (int t = 0; t < TPW; t++) P[(w * TPW + t) * 8 + lane / 4] = folds ? make_float4(o[t][0], o[t][1], o[t][2], o[t][3]) : make_float4(lo[t][0], lo[t][1], lo[t][2], lo[t][3]);
                    if (w == 0 && lane == 0) P[64] = folds ? make_float4(m[0], m[1], l[0], l[1]) : make_float4(lm[0], lm[1], ll[0], ll[1]); }
                if (last) { bar(); if (w == 0 && lane == 0) { const unsigned c = folds ? 1 : leaves; unsigned b; asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(b) : "l"(a.arrived + (phase & 3) * a.astride + row * 8 + item), "r"(c) : "memory"); asm volatile("st.shared.u32 [%0], %1;" :: "r"(flag), "r"(b + c == total ? 1 : 0) : "memory"); }
                    bar(); uint32_t f; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(f) : "r"(flag) : "memory"); if (f) { merge(row, item, phase, u1.y, total); finished(phase); } } }
            if (last) clear();
            TICK(8)
        }
#ifdef CLK
        if (w == 0 && lane == 0) for (int i = 0; i < 9; i++) a.prof[((blockIdx.x - (gridDim.x - a.attenders / G)) + g * (a.attenders / G)) * 16 + 3 + i] = acc[i];
#endif
        bar(); if (w == 0 && lane == 0) asm volatile("st.release.cta.shared.u32 [%0], %1;" :: "r"(compat(sm, g, 63)), "r"(a.phases) : "memory");
    }
};
// Adds up what readers have finished: one lane an attender, so that no reader waits for its outputs to be seen everywhere.
__device__ __forceinline__ void tell(const Att& a, uint32_t sm, int G, int W, int lane) {
    if (lane >= G) return; unsigned sent = 0; int ph = 0; Dog d;
    auto at = [&](int i) { unsigned x; asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(x) : "r"(compat(sm, lane, i)) : "memory"); return x; };
    auto send = [&](unsigned n) { if (n != sent) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(a.done + ph * 8), "r"(n - sent) : "memory"); sent = n; return true; } return false; };
    while (ph < a.phases) { if (send(at(ph) / W)) continue; int lp = (int)at(63); if (lp > ph) { send(at(ph) / W); ph++; sent = 0; } else { __nanosleep(64); d.bark(); } }
}
template <int G, int W> __device__ __forceinline__ void attend(const Att& a, const uint32_t sm, const int me) {
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    if (t == 0) { for (int i = 0; i < 13; i++) init(fullat(sm, i), 1), init(fullat(sm, i) + 8, W); asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
    for (int i = t; i < G * 64; i += blockDim.x) asm volatile("st.shared.u32 [%0], 0;" :: "r"(compat(sm, 0, i)) : "memory");
    __syncthreads();
    if (warp < G * W) Reader<W>(a, sm, warp / W, warp % W, lane).template run<G>();
    else if (warp < G * W + G) { const int g = warp - G * W; fill(a, sm, g, me + g * a.attenders / G, g & 1 ? a.f1 : a.f0, lane); }
    else if (warp == G * W + G) tell(a, sm, G, W, lane);
}
__host__ __device__ constexpr int nout(int p) { return p == 1 ? 6144 : p == 3 ? 4096 : 1024; }
__host__ __device__ constexpr int kin(int p) { return p == 0 ? 2048 : p == 2 ? 3072 : 1024; }
__host__ __device__ constexpr int chunks(int p, int C) { return p == 0 ? 32 / C : p == 2 ? 48 / C : 16; }
__host__ __device__ constexpr int kpw(int n, int nch) { return n * 512 <= 16384 && nch % 4 == 0 ? 4 : n * 256 <= 16384 && nch % 2 == 0 ? 2 : 1; }
__host__ __device__ constexpr int units(int p, int n, int C) { return p == 0 || p == 2 ? (1024 + n - 1) / n * C : ((p == 1 ? 6144 : 4096) + n * C - 1) / (n * C) * C; }
__host__ __device__ constexpr int mx(int a, int b) { return a > b ? a : b; }
// where each buffer of a layer lies, in chunks of R x 64: input of o = first 32 chunks of the last qkv
__host__ __device__ __forceinline__ size_t inoff(int p) { return p == 0 ? 0 : p == 1 ? 64 : p == 2 ? 80 : 128; }
template <int TM, int C, int NOD, int NG, int NQ, int XSN> struct Cfg {
    static constexpr int T = 256, TT = TM * 128, XS = XSN, WSLOT = mx(mx(NOD * 128 * kpw(NOD, chunks(0, C)), NOD * 128 * kpw(NOD, chunks(2, C))), mx(NG * 128 * kpw(NG, 16), NQ * 128 * kpw(NQ, 16))), OWN = (NOD / 8 + C - 1) / C, RED = (C - 1) * OWN * TT * 16, WS0 = (SMEM - XS * XSLOT - RED) / WSLOT, WS = WS0 > 16 ? 16 : WS0;
};
template <int P, int TM, int C, int NOD, int NG, int NQ> struct Pr { static constexpr int N = P == 1 ? NG : P == 3 ? NQ : NOD, NCH = chunks(P, C), KW = kpw(N, NCH), U = units(P, N, C); static constexpr bool KS = P == 0 || P == 2; };
struct St { int sx = 0, sw = 0; uint32_t px = 0, pw = 0, pr = 0; };
template <int P, int TM, int C, int NOD, int NG, int NQ, int XSN> __device__ __forceinline__ void product(const Args& a, St& st, uint32_t xb, uint32_t fx, uint32_t ex, uint32_t fw, uint32_t ew, uint32_t red, const float* sc, int b_, int rank, char* out, float* ssout, unsigned* done, int idx, const uint32_t* locs = nullptr, char* knew = nullptr, char* vnew = nullptr) {
    using K = Cfg<TM, C, NOD, NG, NQ, XSN>; using Q = Pr<P, TM, C, NOD, NG, NQ>; constexpr int N = Q::N, T = K::T, NW = TM == 2 ? N : (N / 2 + 7) / 8 * 8, JN = NW / 8; // 128 rows: a warpgroup has 64 tokens; up to 64: half of the columns (one 8-column block may be done twice)
    if (b_ >= Q::U) return;
#if NOHOIST // keeps the compiler from hoisting every column's address out of the layers' loop (which spilled: see notes); compiled without spills, not yet run
    const int b = (int)opaque(b_), tid = (int)opaque(threadIdx.x);
#else
    const int b = b_, tid = threadIdx.x;
#endif
    const int lane = tid & 31, wg = tid >> 7, w = (tid >> 5) & 3, g = lane >> 2, t = lane & 3, R = a.R, kpx = R > 64 ? 1 : R > 32 ? 2 : 4, tw = TM == 2 ? wg : 0, cw = TM == 2 ? 0 : wg, j0 = cw * (N - NW) / 8, tix = TM == 2 ? tid : tid & 127;
    uint32_t l0 = 0, l1 = 0; if (P == 3) { const int r = tw * 64 + w * 16 + g; l0 = __ldg(locs + (r < R ? r : 0)); l1 = __ldg(locs + (r + 8 < R ? r + 8 : 0)); }
    float acc[NW / 2];
    #pragma unroll
    for (int i = 0; i < NW / 2; i++) acc[i] = 0.f;
    const uint32_t wb = xb + K::XS * XSLOT; int lx = -1, lw = -1, ix = 0;
    auto release = [&]() { if (lw >= 0 && lane == 0) arrive(ew + lw * 8); if (lx >= 0 && lane < C) arrive_at(ex + lx * 8, lane); };
    auto get = [&](uint32_t bar, uint32_t ph) { if (EARLY) { if (!__any_sync(~0u, test(bar, ph))) { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); release(); lx = lw = -1; wait(bar, ph); } } else wait(bar, ph); };
    if (Q::KS && tid == 0) expect(red, (C - 1) * ((N / 8 - rank + C - 1) / C) * R * 2 * 16);
    #pragma unroll 1
    for (int c = 0; c < Q::NCH; c += Q::KW) {
        get(fw + st.sw * 8, st.pw);
        #pragma unroll
        for (int cc = 0; cc < Q::KW; cc++) {
            if (ix == 0) get(fx + st.sx * 8, st.px);
            uint64_t da = desc(xb + st.sx * XSLOT + ix * R * 128 + tw * 8192), db = desc(wb + st.sw * K::WSLOT + cc * N * 128 + j0 * 1024);
            {
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                #pragma unroll
                for (int k = 0; k < 4; k++) wgmma<NW>(acc, da + k * 2, db + k * 2);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            }
            release(); lx = lw = -1;
            if (++ix == kpx) { ix = 0; lx = st.sx; if (++st.sx == K::XS) st.sx = 0, st.px ^= 1; }
            if (cc == Q::KW - 1) { lw = st.sw; if (++st.sw == K::WS) st.sw = 0, st.pw ^= 1; }
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); release();
    #pragma unroll
    for (int i = 0; i < NW / 2; i++) asm volatile("" : "+f"(acc[i]) :: "memory");
    const int r0 = tw * 64 + w * 16 + g;
    if constexpr (Q::KS) {
        constexpr int NB = N / 8; const uint32_t rb = wb + K::WS * K::WSLOT; const int cl = b / C; const bool live = tw * 64 + w * 16 < R; // 8-column block j belongs to block j % C of the cluster; the others push their sums there
        if (live) {
            #pragma unroll
            for (int j = 0; j < JN; j++) { int J = j0 + j; if (J % C == rank || (cw && J < JN)) continue; int o = J % C, slot = rank < o ? rank : rank - 1; push(mapa(rb + ((slot * K::OWN + J / C) * K::TT + tix) * 16, o), acc + 4 * j, mapa(red, o)); }
        }
        wait(red, st.pr); st.pr ^= 1; float q0 = 0, q1 = 0;
        if (live) {
            #pragma unroll
            for (int j = 0; j < JN; j++) { int J = j0 + j; if (J % C != rank || (cw && J < JN)) continue; float f[4];
                #pragma unroll
                for (int r = 0; r < C; r++) { float4 v; if (r == rank) v = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]); else { int slot = r < rank ? r : r - 1; asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(rb + ((slot * K::OWN + J / C) * K::TT + tix) * 16) : "memory"); }
                    if (r == 0) f[0] = v.x, f[1] = v.y, f[2] = v.z, f[3] = v.w; else f[0] += v.x, f[1] += v.y, f[2] += v.z, f[3] += v.w; }
                q0 += f[0] * f[0] + f[1] * f[1]; q1 += f[2] * f[2] + f[3] * f[3]; int u = cl * NB + J; char* o = out + (size_t)(u >> 3) * R * 128 + t * 4 + (((u & 7) ^ (r0 & 7)) << 4);
                __nv_bfloat162 h0 = __floats2bfloat162_rn(f[0], f[1]), h1 = __floats2bfloat162_rn(f[2], f[3]); if (u < 128) { *(uint32_t*)(o + r0 * 128) = *(uint32_t*)&h0; *(uint32_t*)(o + (r0 + 8) * 128) = *(uint32_t*)&h1; } }
            q0 += __shfl_xor_sync(~0u, q0, 1); q1 += __shfl_xor_sync(~0u, q1, 1); q0 += __shfl_xor_sync(~0u, q0, 2); q1 += __shfl_xor_sync(~0u, q1, 2);
            if (t == 0) { int e = TM == 2 ? b : b * 2 + cw; ssout[e * R + r0] = q0, ssout[e * R + r0 + 8] = q1; }
        }
    } else {
        asm volatile("bar.sync 2, %0;" :: "n"(T + 64) : "memory");
        auto scale = [&](int r) { return r >= R ? 0.f : TM == 2 ? sc[r] : rsqrtf((sc[r] + sc[64 + r]) / 1024 + 1e-6f); }; float s0 = scale(r0), s1 = scale(r0 + 8);
        if (P == 3) { // queries [R][2048]; the newest keys and values to their places in pages
            
            #pragma unroll
            for (int j = 0; j < JN; j++) { int u = b * (N / 8) + j0 + j; if (u >= 512) break;
                __nv_bfloat162 h0 = __floats2bfloat162_rn(acc[4 * j] * s0, acc[4 * j + 1] * s0), h1 = __floats2bfloat162_rn(acc[4 * j + 2] * s1, acc[4 * j + 3] * s1);
                char *o0, *o1;
                if (u < 256) o0 = out + (size_t)r0 * 4096 + u * 16, o1 = o0 + 8 * 4096;
                else { char* kv = u < 384 ? knew : vnew; const int h = (u >> 4) & 7, c = u & 15; o0 = kv + ((size_t)((l0 / PG) * 8 + h) * PG + l0 % PG) * 256 + ((c ^ (l0 & 7)) << 4); o1 = kv + ((size_t)((l1 / PG) * 8 + h) * PG + l1 % PG) * 256 + ((c ^ (l1 & 7)) << 4); }
                if (r0 < R) *(uint32_t*)(o0 + t * 4) = *(uint32_t*)&h0; if (r0 + 8 < R) *(uint32_t*)(o1 + t * 4) = *(uint32_t*)&h1; }
        } else {
            #pragma unroll
            for (int j = 0; j < JN; j += 2)
                #pragma unroll
                for (int h = 0; h < 2; h++) { // gate and up are neighbours in a thread; two lanes swap, so that each stores two neighbouring columns
                    float s = h ? s1 : s0, x0 = acc[4 * j + 2 * h] * s, y0 = acc[4 * j + 2 * h + 1] * s, z0 = x0 / (1.f + __expf(-x0)) * y0, z1 = 0.f;
                    if (j + 1 < JN) { float x1 = acc[4 * j + 4 + 2 * h] * s, y1 = acc[4 * j + 4 + 2 * h + 1] * s; z1 = x1 / (1.f + __expf(-x1)) * y1; }
                    float got = __shfl_xor_sync(~0u, t & 1 ? z0 : z1, 1); __nv_bfloat162 v = t & 1 ? __floats2bfloat162_rn(got, z1) : __floats2bfloat162_rn(z0, got);
                    int col = b * (N / 2) + 4 * (j0 + j + (t & 1)) + (t & 2), r = r0 + 8 * h;
                    if (r < R && col < 3072 && (j + 1 < JN || !(t & 1))) *(uint32_t*)(out + (size_t)(col >> 6) * R * 128 + r * 128 + ((((col >> 3) & 7) ^ (r & 7)) << 4) + (col & 7) * 2) = *(uint32_t*)&v;
                }
        }
    }
    asm volatile("bar.sync 1, %0;" :: "n"(T) : "memory");
    if (tid == 0) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(done) : "memory"); }
}
// Attention on ns SMs (of 132, roles as in the whole), a chain of so many ns in the products' place.
template <int G, int W> __global__ void __launch_bounds__((G * W + G + 1) * 32, 1) attention_only(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) char sm[]; const int b = blockIdx.x; const Att& t = a.t; unsigned long long c0 = clock64(), n0 = now();
    if (b >= a.np) { attend<G, W>(t, sa(sm), b - a.np); __syncthreads(); if (b == a.np && threadIdx.x == 0) a.clk[0] = clock64() - c0, a.clk[1] = now() - n0; }
    else if (b == 0 && threadIdx.x == 0) for (int i = 0; i < t.phases; i++) {
        a.stamp[i * 3] = now(); { Dog d; while (seen(t.done + i * 8) < t.rows[a.passes == 2 ? i & 1 : 0] * 8) d.bark(); } unsigned long long x = now(); a.stamp[i * 3 + 1] = x;
        while (now() < x + a.gap) ; a.stamp[i * 3 + 2] = now(); asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(t.cnt + (i * 4 + 4) * 8), "r"(t.need) : "memory"); }
}
#ifndef AG
#define AG 2
#define AW 4
#endif
#ifndef THREADS
#define THREADS 384
#endif
static_assert((AG * AW + AG + 1) * 32 <= THREADS, "warps");
template <int TM, int C, int NOD, int NG, int NQ, int XSN> __global__ void __launch_bounds__(THREADS, 1) divided(const __grid_constant__ Args a) {
    using K = Cfg<TM, C, NOD, NG, NQ, XSN>;
    extern __shared__ __align__(1024) char sm[]; __shared__ uint64_t bars[2 * 16 + 2 * K::XS + 1]; __shared__ float sc[128];
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5; const int b = blockIdx.x, rank = b % C;
    const uint32_t fw = opaque(sa(bars)), smb = opaque(sa(sm)), ew = fw + 128, fx = ew + 128, ex = fx + K::XS * 8, red = ex + K::XS * 8;
    if (sa(sm) & 1023) __trap();
    if (t == 0) { for (int s = 0; s < 16; s++) init(fw + s * 8, 1), init(ew + s * 8, 8); for (int s = 0; s < K::XS; s++) init(fx + s * 8, 1), init(ex + s * 8, C * 8); init(red, 1); asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
    __syncthreads(); asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (b >= a.np) { unsigned long long c0 = clock64(), n0 = now(); attend<AG, AW>(a.t, smb, b - a.np); __syncthreads(); if (b == a.np && t == 0) a.clk[0] = clock64() - c0, a.clk[1] = now() - n0; return; }
    constexpr int NN[4] = {NOD, NG, NOD, NQ}; const int R = a.R, kpx = R > 64 ? 1 : R > 32 ? 2 : 4; unsigned* const cnt = a.t.cnt;
    constexpr int U[4] = {units(0, NOD, C), units(1, NG, C), units(2, NOD, C), units(3, NQ, C)}, NCH[4] = {chunks(0, C), chunks(1, C), chunks(2, C), chunks(3, C)};
    auto area = [&](int l, int set) { return a.act + (size_t)set * a.setstride + (size_t)l * a.laystride; };
    auto until = [&](const unsigned* c, unsigned n) { Dog d; while (seen(c) < n) d.bark(); };
    const int total = a.t.phases;
    if (warp == 8) { // weights
        uint64_t pol; asm volatile("createpolicy.fractional.L2::" WEIGHTS ".b64 %0, 1.0;" : "=l"(pol));
        if (lane == 0) { int s = 0; uint32_t ph = 1;
            for (int i = 0; i < total; i++) { int l = i / a.passes;
                #pragma unroll
                for (int p = 0; p < 4; p++) if (b < U[p]) { constexpr int KWs[4] = {kpw(NOD, NCH[0]), kpw(NG, NCH[1]), kpw(NOD, NCH[2]), kpw(NQ, NCH[3])}; const int sb = NN[p] * 128 * KWs[p]; const char* from = a.w[p] + l * a.wl[p] + (size_t)b * NCH[p] * NN[p] * 128;
                    for (int c = 0; c < NCH[p]; c += KWs[p]) { wait(ew + s * 8, ph); if (a.gap & 4) arrive(fw + s * 8); else expect(fw + s * 8, sb), bulk(smb + K::XS * XSLOT + s * K::WSLOT, from, sb, fw + s * 8, pol); from += sb; if (++s == K::WS) s = 0, ph ^= 1; } } } }
    } else if (warp == 9) { // activations
        uint64_t pol; asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(pol));
        if (lane == 0) { int s = 0; uint32_t ph = 1; const int sb = R * 128 * kpx;
            for (int i = 0; i < total; i++) { int l = i / a.passes, set = i % a.passes;
                #pragma unroll
                for (int p = 0; p < 4; p++) if (b < U[p]) {
                    if (b == 0 && p == 0) a.stamp[i * 3] = now();
                    if (p == 0) until(a.t.done + i * 8, a.t.rows[set] * 8); else until(cnt + (i * 4 + p) * 8, U[p - 1]);
                    asm volatile("fence.proxy.async.global;" ::: "memory"); if (b == 0 && p == 0) a.stamp[i * 3 + 1] = now();
                    const char* from = area(l, set) + inoff(p) * R * 128; if (p == 0 || p == 2) from += (size_t)rank * NCH[p] * R * 128;
                    for (int c = 0; c < NCH[p]; c += kpx) { wait(ex + s * 8, ph); uint32_t dst = smb + s * XSLOT;
                        if (a.gap & 2) arrive(fx + s * 8); else { expect(fx + s * 8, sb); if (p == 0 || p == 2) bulk(dst, from, sb, fx + s * 8, pol); else { int sl = sb / C; multi(dst + rank * sl, from + rank * sl, sl, fx + s * 8, (1 << C) - 1); } }
                        from += sb; if (++s == K::XS) s = 0, ph ^= 1; } } } }
    } else if (warp == 10 || warp == 11) { // row scales
        for (int i = 0; i < total; i++)
            #pragma unroll
            for (int p = 1; p < 4; p += 2) if (b < U[p]) { int set = i % a.passes;
                if (lane == 0) until(cnt + (i * 4 + p) * 8, U[p - 1]); __syncwarp(); const int half = TM == 2 ? 0 : warp - 10, row = TM == 2 ? (t - 320) * 2 : lane * 2; constexpr int step = TM == 2 ? 1 : 2;
                if (row < R) { const float* q = a.ss + ((size_t)set * 2 + (p == 3)) * 128 * 128 + half * R + row; float x = 0, y = 0;
                    #pragma unroll
                    for (int k0 = 0; k0 < U[p - 1]; k0 += 26) { float2 v[26];
                        #pragma unroll
                        for (int k = 0; k < 26; k++) if (k0 + k < U[p - 1]) asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v[k].x), "=f"(v[k].y) : "l"(q + (k0 + k) * step * R));
                        #pragma unroll
                        for (int k = 0; k < 26; k++) if (k0 + k < U[p - 1]) x += v[k].x, y += v[k].y; }
                    if (TM == 2) sc[row] = rsqrtf(x / 1024 + 1e-6f), sc[row + 1] = rsqrtf(y / 1024 + 1e-6f); else sc[half * 64 + row] = x, sc[half * 64 + row + 1] = y; }
                asm volatile("bar.sync 2, %0;" :: "n"(K::T + 64) : "memory"); }
    } else if (warp < 8) {
        St st;
        for (int i = 0; i < total; i++) { int l = i / a.passes, set = i % a.passes; char* x = area(l, set); float* ss = a.ss + (size_t)set * 2 * 128 * 128; unsigned* d = cnt + (i * 4 + 1) * 8; const size_t ch = (size_t)R * 128;
            product<0, TM, C, NOD, NG, NQ, XSN>(a, st, smb, fx, ex, fw, ew, red, sc, b, rank, x + 64 * ch, ss, d, i * 4);
            product<1, TM, C, NOD, NG, NQ, XSN>(a, st, smb, fx, ex, fw, ew, red, sc, b, rank, x + 80 * ch, nullptr, d + 8, i * 4 + 1);
            product<2, TM, C, NOD, NG, NQ, XSN>(a, st, smb, fx, ex, fw, ew, red, sc, b, rank, x + 128 * ch, ss + 128 * 128, d + 16, i * 4 + 2);
            product<3, TM, C, NOD, NG, NQ, XSN>(a, st, smb, fx, ex, fw, ew, red, sc, b, rank, a.t.q[set] + (l + 1) * a.t.qlay, nullptr, d + 24, i * 4 + 3, a.t.locs + set * 128, a.t.k + (l + 1) * a.t.kvlay, a.t.v + (l + 1) * a.t.kvlay);
            if (b == 0 && t == 0) a.stamp[i * 3 + 2] = now(); }
    }
    __syncwarp(); asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// ---------------------------------------------------------------- host
__device__ __forceinline__ unsigned long long mix(unsigned long long i, unsigned seed) { unsigned long long z = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull; z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull; z = (z ^ (z >> 27)) * 0x94D049BB133111EBull; return z ^ z >> 31; }
__device__ __forceinline__ float rnd(unsigned long long i, unsigned seed) { unsigned long long z = mix(i, seed); return (((z & 0xffff) + ((z >> 16) & 0xffff) + ((z >> 32) & 0xffff) + ((z >> 48) & 0xffff)) / 65536.f - 2.f) * 1.7320508f; }
__global__ void fillk(bf16* p, size_t n, float s, unsigned seed) { for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) p[i] = __float2bfloat16(rnd(i, seed) * s); }
__global__ void fillpages(uint4* p, size_t n, unsigned seed) { // uniform in (-2, 2), every bit of the mantissa drawn
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) { unsigned long long z = mix(i, seed), y = mix(i, seed + 1); bf16 v[8];
        for (int k = 0; k < 8; k++) { int x = (int)((k < 4 ? z >> (16 * k) : y >> (16 * (k - 4))) & 0xffff) - 32768; v[k] = __float2bfloat16(x / 16384.f); } p[i] = *(uint4*)v; } }
__global__ void pack(uint4* d, const bf16* w, int p, int n, int nch, int U, int C, int layers) {
    size_t per = (size_t)U * nch * n * 8, all = per * layers; int K = kin(p), N = nout(p);
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < all; i += (size_t)gridDim.x * blockDim.x) { int l = i / per; size_t j = i % per; int q = j & 7; j >>= 3; int row = j % n; j /= n; int c = j % nch, b = j / nch;
        int r = (p == 0 || p == 2 ? b / C : b) * n + row, k = ((p == 0 || p == 2 ? (b % C) * nch : 0) + c) * 64 + (q ^ (row & 7)) * 8; if (p == 1 && r < N) r = (r & 1) * 3072 + r / 2;
        d[i] = r < N ? *(const uint4*)(w + ((size_t)l * N + r) * K + k) : make_uint4(0, 0, 0, 0); } }
__global__ void poison(char* k, char* v, size_t kvlay, const uint32_t* locs, int layers) { // newest keys and values of layers from 1 on
    uint32_t loc = locs[blockIdx.x]; for (int l = 1 + blockIdx.y; l < layers; l += gridDim.y) for (int h = 0; h < 8; h++) { size_t o = l * kvlay + ((size_t)((loc / PG) * 8 + h) * PG + loc % PG) * 256 + threadIdx.x * 4; *(uint32_t*)(k + o) = 0x7fff7fff; *(uint32_t*)(v + o) = 0x7fff7fff; } }
__device__ __forceinline__ const bf16* at(const char* x, int R, int r, int k) { return (const bf16*)(x + (size_t)(k >> 6) * R * 128 + r * 128 + ((((k >> 3) & 7) ^ (r & 7)) << 4) + (k & 7) * 2); }
__device__ float dot(const char* x, int R, int r, const bf16* w, int K) { float s = 0; for (int k = (threadIdx.x & 31) * 8; k < K; k += 256) { uint4 u = *(const uint4*)at(x, R, r, k), v = *(const uint4*)(w + k); const __nv_bfloat162 *a = (const __nv_bfloat162*)&u, *b = (const __nv_bfloat162*)&v; for (int i = 0; i < 4; i++) { float2 f = __bfloat1622float2(a[i]), g = __bfloat1622float2(b[i]); s += f.x * g.x + f.y * g.y; } } for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o); return s; }
__global__ void check(const char* x, const char* y, const bf16* w, int p, int R, double* e, const char* k, const char* v, const uint32_t* locs) { // a warp an output column of one row
    int n = blockIdx.x * 8 + (threadIdx.x >> 5), r = blockIdx.y, K = kin(p), NO = p == 1 ? 3072 : nout(p); if (n >= NO) return; float s = 1;
    if (p & 1) { float q = 0; for (int j = threadIdx.x & 31; j < K; j += 32) { float f = __bfloat162float(*at(x, R, r, j)); q += f * f; } for (int o = 16; o; o >>= 1) q += __shfl_xor_sync(~0u, q, o); s = rsqrtf(q / K + 1e-6f); }
    float want = dot(x, R, r, w + (size_t)n * K, K) * s; if (p == 1) { float u = dot(x, R, r, w + (size_t)(n + 3072) * K, K) * s; want = want / (1.f + expf(-want)) * u; }
    if ((threadIdx.x & 31) == 0) { const bf16* g; if (p != 3) g = at(y, R, r, n); else if (n < 2048) g = (const bf16*)(y + (size_t)r * 4096) + n; else { int c = n & 1023, h = c >> 7, d = c & 127; uint32_t loc = locs[r]; g = (const bf16*)((n < 3072 ? k : v) + ((size_t)((loc / PG) * 8 + h) * PG + loc % PG) * 256 + (((d >> 3) ^ (loc & 7)) << 4)) + (d & 7); }
        float got = __bfloat162float(*g); if (!(fabsf(got) < 1e4f)) atomicAdd(e + 2, 1.0); else { atomicAdd(e, (double)(got - want) * (got - want)); atomicAdd(e + 1, (double)want * want); } } }
__global__ void checkatt(const char* q, const char* k, const char* v, const char* out, const int* table, unsigned tw, const unsigned* lens, int slot0, int R, double* e) { // a block a (row, head): plain softmax in float32
    __shared__ float s[2048], qq[128], red[4]; int row = blockIdx.x, head = blockIdx.y, t = threadIdx.x, n = lens[row]; const int* pg = table + (size_t)(slot0 + row) * tw; qq[t] = __bfloat162float(((const bf16*)(q + (size_t)row * 4096))[head * 128 + t]); __syncthreads(); float mx = -INFINITY;
    for (int i = t; i < n; i += 128) { const char* p = k + ((size_t)pg[i / PG] * 8 + head / 2) * (PG * 256) + (i % PG) * 256; float x = 0; for (int d = 0; d < 128; d++) x += qq[d] * __bfloat162float(((const bf16*)(p + (((d >> 3) ^ (i & 7)) << 4)))[d & 7]); s[i] = x * 0.08838834764831845f; mx = fmaxf(mx, s[i]); }
    for (int o = 16; o; o >>= 1) mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, o)); if ((t & 31) == 0) red[t >> 5] = mx; __syncthreads(); mx = fmaxf(fmaxf(red[0], red[1]), fmaxf(red[2], red[3])); __syncthreads(); float sum = 0;
    for (int i = t; i < n; i += 128) { s[i] = expf(s[i] - mx); sum += s[i]; } for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o); if ((t & 31) == 0) red[t >> 5] = sum; __syncthreads(); sum = red[0] + red[1] + red[2] + red[3]; float x = 0;
    for (int i = 0; i < n; i++) x += s[i] * __bfloat162float(((const bf16*)(v + ((size_t)pg[i / PG] * 8 + head / 2) * (PG * 256) + (i % PG) * 256 + (((t >> 3) ^ (i & 7)) << 4)))[t & 7]); x /= sum;
    float got = __bfloat162float(*at(out, R, row, head * 128 + t)); if (!(fabsf(got) < 1e4f)) atomicAdd(e + 2, 1.0); else { atomicAdd(e, (double)(got - x) * (got - x)); atomicAdd(e + 1, (double)x * x); } }
__global__ void hashk(const char* out, int R, int rows, unsigned long long* h) { int r = blockIdx.x; if (r >= rows) return; for (int k = threadIdx.x; k < 2048; k += blockDim.x) atomicAdd(h, mix(*(const unsigned short*)at(out, R, r, k), r * 2048 + k)); }
typedef void (*Kern)(const Args);
struct Var { int C, np, nod, ng, nq, xs; Kern k[2]; };
#define V(C, NP, NOD, NG, NQ, X) {C, NP, NOD, NG, NQ, X, {divided<1, C, NOD, NG, NQ, X>, divided<2, C, NOD, NG, NQ, X>}}
#ifdef ONLY
Var vars[] = {};
#else
Var vars[] = { V(2, 68, 32, 96, 64, 6),
#ifndef FEW
    V(2, 60, 40, 104, 72, 6),
#endif
    V(2, 52, 40, 120, 80, 6) };
#endif
bf16* W[4]; char* WP[4]; Args a; double* err; unsigned long long* hsh; cudaEvent_t e0, e1; int packed = -1;
float gains[4] = {1.f, 1.f, 1.7f, 2.5f};
constexpr int PAGES = 17000 * 16 / PG; constexpr size_t KVLAY = (size_t)PAGES * PG * 2048;
struct Shape { int n[2], R; std::vector<unsigned> len[2]; size_t tokens; };
std::map<std::string, Shape> shapes; std::string loaded; int* table; uint4* plans[2]; unsigned *lens[2]; uint32_t* locs; unsigned* ctrl;
void need(int v) {
    if (packed == v) return; packed = v; Var& x = vars[v]; int n[4] = {x.nod, x.ng, x.nod, x.nq};
    for (int p = 0; p < 4; p++) { int nch = chunks(p, x.C), U = units(p, n[p], x.C); a.w[p] = WP[p]; a.wl[p] = (size_t)U * nch * n[p] * 128; if (U > x.np) { printf("config %d product %d: %d units over %d blocks\n", v, p, U, x.np); exit(1); } pack<<<2048, 256>>>((uint4*)WP[p], W[p], p, n[p], nch, U, x.C, L); } CK(cudaDeviceSynchronize());
}
unsigned long long rs = 88172645463325252ull; unsigned rnd32() { rs ^= rs << 13; rs ^= rs >> 7; rs ^= rs << 17; return rs >> 20; }
void load(const std::string& name) { // pages in no order
    if (loaded == name) return; loaded = name; Shape& s = shapes.at(name); std::vector<int> pages(PAGES - 1), tab(256 * 128, 0); for (int i = 0; i < PAGES - 1; i++) pages[i] = i; rs = 88172645463325252ull; for (int i = PAGES - 2; i > 0; i--) std::swap(pages[i], pages[rnd32() % (i + 1)]);
    std::vector<uint32_t> lc(256, (PAGES - 1) * PG); int at = 0; for (int h = 0; h < 2; h++) { for (int r = 0; r < s.n[h]; r++) { unsigned n = s.len[h][r]; for (unsigned p = 0; p * PG < n; p++) { if (at == PAGES - 1 || p == 128) { printf("%s: too many pages\n", name.c_str()); exit(1); } tab[(h * 128 + r) * 128 + p] = pages[at++]; } lc[h * 128 + r] = tab[(h * 128 + r) * 128 + (n - 1) / PG] * PG + (n - 1) % PG; }
        CK(cudaMemcpy(lens[h], s.len[h].data(), s.n[h] * 4, cudaMemcpyHostToDevice)); }
    CK(cudaMemcpy(table, tab.data(), tab.size() * 4, cudaMemcpyHostToDevice)); CK(cudaMemcpy(locs, lc.data(), 1024, cudaMemcpyHostToDevice));
}
// The product's cut of many rows (plan.rs): whole, but for those longer than what is left for each attender, least pieces of `least` leaves.
unsigned plan(Shape& s, int h, int blocks, unsigned least, unsigned& partials) {
    std::vector<unsigned> idx(s.n[h]); for (int i = 0; i < s.n[h]; i++) idx[i] = i; std::stable_sort(idx.begin(), idx.end(), [&](unsigned x, unsigned y) { return s.len[h][x] > s.len[h][y]; }); std::vector<unsigned> out; unsigned long long rest = 0; for (unsigned n : s.len[h]) rest += n; unsigned base = 0, segs = 0;
    for (unsigned i : idx) { unsigned kv = s.len[h][i], leaves = (kv + 127) / 128; unsigned long long largest = std::max<unsigned long long>(rest * 8 / (128ull * blocks), least); unsigned count = (leaves + largest - 1) / largest, first = leaves / count; count = std::min(count, 1 + leaves - first); unsigned total = count == 1 ? 0 : 1 + leaves - first; if (count == 1) first = leaves;
        auto cut = [&](unsigned j) { return j == 0 ? 0u : j == 1 ? first : first + (leaves - first) * (j - 1) / (count - 1); };
        for (unsigned j = 0; j < count; j++) { unsigned b = cut(j), e = j + 1 == count ? leaves : cut(j + 1); out.insert(out.end(), {i, (unsigned)(h * 128) + i, kv, b, e - b, base, j == 0 ? base : base + 1 + b - first, total}); segs++; } base += total; rest -= kv; }
    partials = base; CK(cudaMemcpy(plans[h], out.data(), out.size() * 4, cudaMemcpyHostToDevice)); return segs;
}
bool run(char kind, int ns, int np, const std::string& shape, int G, int Wp, int nst, int f0, int f1, int passes, int gap, int need_, int prefetch, int least, bool chk, int warm, int reps, const char* note) {
    if (!shapes.count(shape)) { printf("no shape %s\n", shape.c_str()); return false; } Shape& s = shapes[shape]; load(shape); int v = -1; Kern k = nullptr; int threads = THREADS, total = L * passes, C = 2;
    if (kind == 'd') { if (G != AG || Wp != AW) { printf("built for %d x %d\n", AG, AW); return false; } for (int i = 0; i < (int)(sizeof vars / sizeof(Var)); i++) if (vars[i].np == np || (np == 64 && vars[i].np == 68)) v = i; if (v < 0) { printf("no variant for np %d\n", np); return false; } ::need(v); k = vars[v].k[s.R > 64]; }
    else { threads = (G * Wp + G + 1) * 32; 
#ifndef NOA
        k = G == 1 && Wp == 8 ? attention_only<1, 8> : G == 2 && Wp == 4 ? attention_only<2, 4> : G == 3 && Wp == 4 ? attention_only<3, 4> : nullptr;
#endif
        if (!k) { printf("no such readers\n"); return false; } }
    if (G * nst * KVS > 13 * 16384) { printf("ring too large\n"); return false; }
    size_t per = (size_t)144 * s.R * 128; a.ns = ns; a.np = np; a.R = s.R; a.passes = passes; a.laystride = chk ? per : 0; a.setstride = chk ? per * (L + 1) : per; a.gap = gap; Att& t = a.t; int att = ns * G; unsigned pt[2];
    for (int h = 0; h < 2; h++) { t.segs[h] = plan(s, h, att, least, pt[h]); t.rows[h] = s.n[h]; t.plan[h] = plans[h]; t.q[h] = a.t.q[0] + (h ? (size_t)128 * 4096 * (L + 1) : 0); t.out[h] = a.act + h * a.setstride; }
    if ((size_t)std::max(pt[0], pt[1]) * 8 * 65 > t.pstride) { printf("too many partials\n"); return false; }
    t.table = table; t.tw = 128; t.kvlay = KVLAY; t.qlay = chk && kind == 'd' ? (size_t)128 * 4096 : 0; t.outlay = a.laystride; t.astride = 1024; t.ticket = ctrl; t.done = ctrl + 64; t.cnt = ctrl + 1024; t.arrived = ctrl + 8192; t.phases = total; t.passes = passes; t.R = s.R; t.nst = nst; t.f0 = f0; t.f1 = f1; t.attenders = att; t.prefetch = prefetch; t.locs = locs; int n4 = v < 0 ? 0 : vars[v].nq; t.need = kind == 'd' ? units(3, n4, 2) : need_;
    cudaLaunchConfig_t cf = {}; cf.gridDim = dim3(ns + np); cf.blockDim = dim3(threads); cf.dynamicSmemBytes = SMEM; cudaLaunchAttribute at[1]; at[0].id = cudaLaunchAttributeClusterDimension; at[0].val.clusterDim.x = C; at[0].val.clusterDim.y = at[0].val.clusterDim.z = 1; cf.attrs = at; cf.numAttrs = 1;
    CK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM)); int mc = 0; CK(cudaOccupancyMaxActiveClusters(&mc, k, &cf)); if (mc < (ns + np) / C) { printf("%d %d: only %d clusters fit\n", ns, np, mc); return false; }
    if (chk && kind == 'd') { for (int h = 0; h < 2; h++) { CK(cudaMemset(t.q[h], 0xff, (size_t)128 * 4096 * (L + 1))); } CK(cudaMemset(a.act, 0xff, per * (L + 1) * 2)); poison<<<dim3(256, 8), 64>>>(t.k, t.v, KVLAY, locs, L + 1); }
    if (chk && kind == 'a') CK(cudaMemset(a.act, 0xff, per * (L + 1) * 2));
    for (int h = 0; h < 2; h++) fillk<<<128, 256>>>((bf16*)t.q[h], (size_t)128 * 2048, 2.5f, 77 + h);
    std::vector<float> times; std::vector<unsigned long long> st(64 * 3), clk(2);
    for (int r = 0; r < warm + reps; r++) {
        CK(cudaMemsetAsync(ctrl, 0, 65536)); cudaEventRecord(e0); CK(cudaLaunchKernelEx(&cf, k, (const Args)a)); cudaEventRecord(e1); if (r >= warm || r % 8 == 7) CK(cudaEventSynchronize(e1)); if (r >= warm) { float ms; cudaEventElapsedTime(&ms, e0, e1); times.push_back(ms); }
    }
    CK(cudaDeviceSynchronize()); std::sort(times.begin(), times.end()); double med = times[times.size() / 2], mn = times[0]; CK(cudaMemcpy(st.data(), a.stamp, 64 * 24, cudaMemcpyDeviceToHost)); CK(cudaMemcpy(clk.data(), a.clk, 16, cudaMemcpyDeviceToHost)); std::vector<unsigned long long> stall(att); CK(cudaMemcpy(stall.data(), t.stall, att * 8, cudaMemcpyDeviceToHost));
    double tok = 0; for (int h = 0; h < passes; h++) for (unsigned n : s.len[h]) tok += n; double bytes = tok * 4096; // a layer's
    int i0 = 2 * passes, i1 = total - 1 - (total - 1 - i0) % passes; double steady = (double)(st[i1 * 3 + 1] - st[i0 * 3 + 1]) / 1e3 / ((i1 - i0) / passes); double chain = 0, idle = 0; for (int i = i0; i < total - passes; i++) chain += (double)(st[i * 3 + 2] - st[i * 3 + 1]) / 1e3, idle += (double)(st[i * 3 + 1] - st[i * 3]) / 1e3; chain /= total - passes - i0; idle /= total - passes - i0; double sm = 0; for (auto x : stall) sm += x / 1e3 / att;
    CK(cudaMemset(hsh, 0, 16)); for (int h = 0; h < passes; h++) hashk<<<128, 256>>>(t.out[h] + (L - 1) * t.outlay, s.R, s.n[h], hsh + h); unsigned long long hh[2]; CK(cudaMemcpy(hh, hsh, 16, cudaMemcpyDeviceToHost));
    printf("%c pg%d %3d/%-2d %-9s %dx%d ring %3d fly %3d p%d gap %5.1f %s | layer %6.1f us (whole/28 %6.1f, best %6.1f) | %5.2f TB/s = %4.1f GB/s/SM | chain %5.1f idle %5.1f stall %6.1f | segs %u %u | %4.0f MHz | %04llx%04llx %s", kind, PG, ns, np, shape.c_str(), G, Wp, G * nst * (KVS / 1024), (f0 * ((G + 1) / 2) + f1 * (G / 2)) * (KVS / 1024), passes, gap / 1e3, t.need ? prefetch ? "" : "NOPREF" : "FREE", steady, med * 1e3 / 28, mn * 1e3 / 28, bytes / steady / 1e6, bytes / steady / 1e3 / ns, chain, idle, sm, t.segs[0], t.segs[1], clk[0] * 1e3 / clk[1], hh[0] & 0xffff, hh[1] & 0xffff, note);
    if (chk) { double wa = 0, wp = 0, wild = 0; auto get = [&](double& w, const char* what, int h, int l, int p) { double ev[3]; CK(cudaMemcpy(ev, err, 24, cudaMemcpyDeviceToHost)); double rel = sqrt(ev[0] / ev[1]); wild += ev[2]; if (!(rel < 1e-2) || ev[2]) printf(" [%s set %d layer %d product %d: %.2e, %g wild, norm %.3g]", what, h, l, p, rel, ev[2], ev[1]); if (!(rel <= w)) w = rel; };
        for (int l = 0; l < L; l += 9) for (int h = 0; h < passes; h++) { CK(cudaMemset(err, 0, 24)); checkatt<<<dim3(s.n[h], 16), 128>>>(t.q[h] + (kind == 'd' ? l * t.qlay : 0), t.k + l * KVLAY, t.v + l * KVLAY, t.out[h] + l * t.outlay, table, 128, lens[h], h * 128, s.R, err); get(wa, "attention", h, l, 0);
            if (kind == 'd') for (int p = 0; p < 4; p++) { char* x = a.act + h * a.setstride + l * a.laystride; const char* y = p == 3 ? t.q[h] + (l + 1) * t.qlay : x + inoff(p + 1) * s.R * 128; CK(cudaMemset(err, 0, 24)); check<<<dim3((p == 1 ? 3072 : nout(p)) / 8, s.n[h]), 256>>>(x + inoff(p) * s.R * 128, y, W[p] + (size_t)l * nout(p) * kin(p), p, s.R, err, t.k + (l + 1) * KVLAY, t.v + (l + 1) * KVLAY, locs + h * 128); get(wp, "product", h, l, p); } }
        printf(" | errors: attention %.1e products %.1e wild %g %s", wa, wp, wild, wa < 1e-2 && wp < 1e-2 && !wild ? "OK" : "BAD"); }
#ifdef CLK
    { std::vector<unsigned long long> p(att * 16); CK(cudaMemcpy(p.data(), t.prof, p.size() * 8, cudaMemcpyDeviceToHost)); double units = 0; for (int h = 0; h < passes; h++) for (unsigned n : s.len[h]) units += (n + 127) / 128; units *= 8.0 * L / att; printf(" | cycles a unit (filler: work, empty, flight; reader: waitK QK max bar exp bar waitV PV rest)"); for (int i = 0; i < 12; i++) { double x = 0; for (int b = 0; b < att; b++) x += p[b * 16 + i]; printf(" %.0f", x / att / units); } }
#endif
    printf("\n"); fflush(stdout); return true;
}
int main(int argc, char** argv) {
    unsigned* hh; CK(cudaHostAlloc((void**)&hh, 64, cudaHostAllocMapped)); hh[0] = hh[1] = 0; CK(cudaMemcpyToSymbol(hang, &hh, 8)); hung = hh; cudaEventCreate(&e0); cudaEventCreate(&e1);
    FILE* f = fopen(argv[1], "r"); static char line[65536]; while (fgets(line, sizeof line, f)) { char name[32]; int n0, n1, off; if (sscanf(line, "%31s %d %d%n", name, &n0, &n1, &off) < 3) continue; Shape s; s.n[0] = n0; s.n[1] = n1; s.R = (std::max(n0, n1) + 15) / 16 * 16; char* p = line + off; for (int h = 0; h < 2; h++) for (int i = 0; i < s.n[h]; i++) s.len[h].push_back(strtoul(p, &p, 10)); shapes[name] = s; } fclose(f);
    CK(cudaMalloc(&a.t.k, KVLAY * (L + 1))); CK(cudaMalloc(&a.t.v, KVLAY * (L + 1))); fillpages<<<4096, 256>>>((uint4*)a.t.k, KVLAY * (L + 1) / 16, 11); fillpages<<<4096, 256>>>((uint4*)a.t.v, KVLAY * (L + 1) / 16, 21);
    for (int p = 0; p < 4; p++) { size_t n = (size_t)nout(p) * kin(p); CK(cudaMalloc(&W[p], n * 2 * L)); fillk<<<4096, 256>>>(W[p], n * L, gains[p] / sqrtf(kin(p)), p); CK(cudaMalloc(&WP[p], (n * 2 * L) / 10 * 12)); }
    CK(cudaMalloc(&a.act, (size_t)144 * 128 * 128 * (L + 1) * 2)); CK(cudaMalloc(&a.ss, 4 * 128 * 128 * 4)); CK(cudaMemset(a.ss, 0, 4 * 128 * 128 * 4)); CK(cudaMemset(a.act, 0, (size_t)144 * 128 * 128 * (L + 1) * 2)); CK(cudaMalloc(&ctrl, 65536)); CK(cudaMalloc(&a.stamp, 64 * 24)); CK(cudaMalloc(&a.clk, 16)); CK(cudaMalloc(&err, 24)); CK(cudaMalloc(&hsh, 16)); CK(cudaMalloc(&a.t.q[0], (size_t)128 * 4096 * (L + 1) * 2)); CK(cudaMalloc(&table, 256 * 128 * 4)); CK(cudaMalloc(&locs, 1024)); CK(cudaMalloc(&a.t.stall, 8 * 1024)); CK(cudaMalloc(&a.t.prof, 8 * 16 * 1024));
    for (int h = 0; h < 2; h++) { CK(cudaMalloc(&plans[h], 1 << 16)); CK(cudaMalloc(&lens[h], 512)); } a.t.pstride = (size_t)1024 * 8 * 65; CK(cudaMalloc(&a.t.partials, a.t.pstride * 16 * 4)); CK(cudaDeviceSynchronize());
    // a line: kind(a|d) ns np shape G W nst f0 f1 passes gap_ns need prefetch least chk warm reps note
    f = argc > 2 ? fopen(argv[2], "r") : stdin; while (f && fgets(line, sizeof line, f)) { char kind[4], sh[32], nt[64] = ""; int ns, np, G, Wp, nst, f0, f1, ps, gap, nd, pf, least, chk, warm, reps; if (line[0] == '#') { fputs(line, stdout); continue; } if (sscanf(line, "%3s %d %d %31s %d %d %d %d %d %d %d %d %d %d %d %d %d %63s", kind, &ns, &np, sh, &G, &Wp, &nst, &f0, &f1, &ps, &gap, &nd, &pf, &least, &chk, &warm, &reps, nt) < 17) continue; run(kind[0], ns, np, sh, G, Wp, nst, f0, f1, ps, gap, nd, pf, least, chk, warm, reps, nt); }
}
