// wgmma: a warpgroup's products of tiles, 64 rows by N columns by 16, bf16 with f32 sums (PTX ISA, "wgmma.mma_async").
//
//   D[64, N] += A[64, 16] B[N, 16]^T      both operands with columns running along a row
//   D's registers                         thread t of the warpgroup holds, as d[4 j + e], row 16 (t / 32) + t % 32 / 4 + 8 (e / 2)
//                                         and column 8 j + 2 (t % 4) + e % 2
//
// The instruction names each of its registers, so there is a wrapper for each N.
#pragma once

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING groups are on their way.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads or writes of accumulators across.
template <int COUNT> __device__ __forceinline__ void hold(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}

// An accumulator's registers: their names in an instruction, from the first on, and what they are bound to, from d[i] on.
#define R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define R16 R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R24 R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define R32 R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define R40 R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define R48 R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define R56 R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define R64 R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define R72 R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define R88 R72 ", %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"
#define R96 R88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define R104 R96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define R112 R104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define R120 R112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define R128 R120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64(i) D32(i), D32(i + 32)

// D = A B^T + (add ? D : 0), N twice the registers. A, B and ADD: the operands' numbers, which follow the registers'.
#define WGMMA_OF_TYPE(NAME, TYPE, N, COUNT, REGISTERS, A, B, ADD, ...) \
    __device__ __forceinline__ void NAME(float (&d)[COUNT], unsigned long long a, unsigned long long b, bool add) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}" \
                     : __VA_ARGS__ \
                     : "l"(a), "l"(b), "r"((int)add)); \
    }
#define WGMMA(...) WGMMA_OF_TYPE(wgmma, "bf16", __VA_ARGS__)
#define WGMMA_OF_HALVES(...) WGMMA_OF_TYPE(wgmma_halves, "f16", __VA_ARGS__)

WGMMA(16, 8, R8, 8, 9, 10, D8(0))
WGMMA(32, 16, R16, 16, 17, 18, D16(0))
WGMMA(48, 24, R24, 24, 25, 26, D16(0), D8(16))
WGMMA(64, 32, R32, 32, 33, 34, D32(0))
WGMMA(72, 36, R32 ", %32, %33, %34, %35", 36, 37, 38, D32(0), D4(32))
WGMMA(80, 40, R40, 40, 41, 42, D32(0), D8(32))
WGMMA(88, 44, R40 ", %40, %41, %42, %43", 44, 45, 46, D32(0), D8(32), D4(40))
WGMMA(96, 48, R48, 48, 49, 50, D32(0), D16(32))
WGMMA(104, 52, R48 ", %48, %49, %50, %51", 52, 53, 54, D32(0), D16(32), D4(48))
WGMMA(112, 56, R56, 56, 57, 58, D32(0), D16(32), D8(48))
WGMMA(120, 60, R56 ", %56, %57, %58, %59", 60, 61, 62, D32(0), D16(32), D8(48), D4(56))
WGMMA(128, 64, R64, 64, 65, 66, D64(0))
WGMMA(144, 72, R72, 72, 73, 74, D64(0), D8(64))
WGMMA(160, 80, R72 ", %72, %73, %74, %75, %76, %77, %78, %79", 80, 81, 82, D64(0), D16(64))
WGMMA(176, 88, R88, 88, 89, 90, D64(0), D16(64), D8(80))
WGMMA(192, 96, R96, 96, 97, 98, D64(0), D32(64))
WGMMA(208, 104, R104, 104, 105, 106, D64(0), D32(64), D8(96))
WGMMA(224, 112, R112, 112, 113, 114, D64(0), D32(64), D16(96))
WGMMA(240, 120, R120, 120, 121, 122, D64(0), D32(64), D16(96), D8(112))
WGMMA(256, 128, R128, 128, 129, 130, D64(0), D64(64))

// The same of f16 numbers.
WGMMA_OF_HALVES(32, 16, R16, 16, 17, 18, D16(0))
WGMMA_OF_HALVES(64, 32, R32, 32, 33, 34, D32(0))
WGMMA_OF_HALVES(96, 48, R48, 48, 49, 50, D32(0), D16(32))
WGMMA_OF_HALVES(128, 64, R64, 64, 65, 66, D64(0))

// The same of e4m3 codes, 64 rows by N columns by 32. Tensor cores keep few bits of such sums: rounded.cuh says how often they are
// taken out.
#define WGMMA_OF_CODES(N, COUNT, REGISTERS, A, B, ADD, ...) \
    __device__ __forceinline__ void wgmma_codes(float (&d)[COUNT], unsigned long long a, unsigned long long b, bool add) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS "}, %" #A ", %" #B ", p, 1, 1;\n}" \
                     : __VA_ARGS__ \
                     : "l"(a), "l"(b), "r"((int)add)); \
    }

WGMMA_OF_CODES(16, 8, R8, 8, 9, 10, D8(0))
WGMMA_OF_CODES(32, 16, R16, 16, 17, 18, D16(0))
WGMMA_OF_CODES(64, 32, R32, 32, 33, 34, D32(0))
WGMMA_OF_CODES(128, 64, R64, 64, 65, 66, D64(0))
WGMMA_OF_CODES(192, 96, R96, 96, 97, 98, D64(0), D32(64))

// A in registers: its numbers are those of its four words.
#define WGMMA_OF_REGISTERS_OF_TYPE(NAME, TYPE, N, COUNT, REGISTERS, A0, A1, A2, A3, B, ADD, ...) \
    __device__ __forceinline__ void NAME(float (&d)[COUNT], const unsigned (&a)[4], unsigned long long b, bool add) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 \
                     "}, %" #B ", p, 1, 1, 0;\n}" \
                     : __VA_ARGS__ \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add)); \
    }
#define WGMMA_OF_REGISTERS(...) WGMMA_OF_REGISTERS_OF_TYPE(wgmma, "bf16", __VA_ARGS__)

WGMMA_OF_REGISTERS_OF_TYPE(wgmma_halves, "f16", 8, 4, "%0, %1, %2, %3", 4, 5, 6, 7, 8, 9, D4(0))
WGMMA_OF_REGISTERS_OF_TYPE(wgmma_halves, "f16", 16, 8, R8, 8, 9, 10, 11, 12, 13, D8(0))
WGMMA_OF_REGISTERS_OF_TYPE(wgmma_halves, "f16", 32, 16, R16, 16, 17, 18, 19, 20, 21, D16(0))
WGMMA_OF_REGISTERS_OF_TYPE(wgmma_halves, "f16", 64, 32, R32, 32, 33, 34, 35, 36, 37, D32(0))
WGMMA_OF_REGISTERS_OF_TYPE(wgmma_halves, "f16", 128, 64, R64, 64, 65, 66, 67, 68, 69, D64(0))
WGMMA_OF_REGISTERS_OF_TYPE(wgmma_halves, "f16", 192, 96, R96, 96, 97, 98, 99, 100, 101, D64(0), D32(64))
WGMMA_OF_REGISTERS(8, 4, "%0, %1, %2, %3", 4, 5, 6, 7, 8, 9, D4(0))
WGMMA_OF_REGISTERS(16, 8, R8, 8, 9, 10, 11, 12, 13, D8(0))
WGMMA_OF_REGISTERS(32, 16, R16, 16, 17, 18, 19, 20, 21, D16(0))
WGMMA_OF_REGISTERS(64, 32, R32, 32, 33, 34, 35, 36, 37, D32(0))
WGMMA_OF_REGISTERS(128, 64, R64, 64, 65, 66, 67, 68, 69, D64(0))
WGMMA_OF_REGISTERS(192, 96, R96, 96, 97, 98, 99, 100, 101, D64(0), D32(64))

#undef R8
#undef R16
#undef R24
#undef R32
#undef R40
#undef R48
#undef R56
#undef R64
#undef R72
#undef R88
#undef R96
#undef R104
#undef R112
#undef R120
#undef R128
#undef D4
#undef D8
#undef D16
#undef D32
#undef D64
#undef WGMMA_OF_TYPE
#undef WGMMA
#undef WGMMA_OF_HALVES
#undef WGMMA_OF_CODES
#undef WGMMA_OF_REGISTERS_OF_TYPE
#undef WGMMA_OF_REGISTERS

// The same for 288 rows of B, which are more than one instruction takes.
__device__ __forceinline__ void wgmma(float (&d)[144], unsigned long long a, unsigned long long b, bool add) {
    float(&halves)[2][72] = reinterpret_cast<float(&)[2][72]>(d);
    wgmma(halves[0], a, b, add);
    wgmma(halves[1], a, b + 144 * 128 / 16, add);
}

// The same with A in registers: the four words are D's eight values of 16 columns as pairs. B is [16, N] here, a
// tile's 16 rows, and the next 16 are 2048 bytes further on.
#define WGMMA_TRANSPOSED(NAME, TYPE) \
__device__ __forceinline__ void NAME(float (&d)[32], const unsigned (&a)[4], unsigned long long b, bool add) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}" \
                 : \
                 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
                 "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
                 "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
                 "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add)); \
}

WGMMA_TRANSPOSED(wgmma_transposed, "bf16")
WGMMA_TRANSPOSED(wgmma_transposed_halves, "f16")
#undef WGMMA_TRANSPOSED
