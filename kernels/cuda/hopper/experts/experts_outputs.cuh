// What becomes of a unit's sums (experts_products.cuh): the two products' outputs, turned in shared memory and stored row by row.
#pragma once

#include "epilogue.cuh"
#include "experts/experts.cuh"
#include "hopper/experts/experts_units.cuh"
#include "hopper/pairs.cuh"

// Four matrices of 8 pairs by 8 outputs; this lane says where the 8 outputs of `pair` go.
__device__ __forceinline__ void store_turned(unsigned turned, unsigned pair, unsigned chunk, const unsigned (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     turned + pair * 128 + ((chunk ^ pair % 8) << 4)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// What is multiplied: `w` [E][rows, cols], and what becomes of it.
// x is [T, hidden], and a pair's row its token's, or [T P, hidden], gathered. It and what lies between the products are 16 bits an element, as
// the form has its `inputs`.
struct GateUpOfExperts {
    __nv_bfloat16 *activated; // [T P, intermediate]
    unsigned *tickets;        // 0 between launches; see Dealer
    static constexpr unsigned CHUNKS = 4; // of 8 outputs, of a warpgroup's rows

    __device__ __forceinline__ unsigned rows(const Routing &routing) const { return routing.stored; }
    __device__ __forceinline__ unsigned cols(const Routing &routing) const { return routing.hidden; }
    // What is known of a pair: its token's scale.
    __device__ __forceinline__ unsigned known(const Routing &routing, unsigned pair) const {
        return __float_as_uint(__ldcg(routing.scales + pair / routing.per_token));
    }
    // Turns COUNT pairs of a warp's sums from `first` on, 32 at most.
    template <class FORM, int N, int COUNT>
    __device__ __forceinline__ void turn(const float (&sum)[N], unsigned first, const unsigned *known, unsigned turned) const {
        const unsigned lane = threadIdx.x % 32, chunk = threadIdx.x / 32 % 4;
        unsigned words[4] = {};
#pragma unroll
        for (int i = 0; i < COUNT / 8; i++) {
            const float *d = sum + first / 2 + 4 * i;
            const float2 scale = *reinterpret_cast<const float2 *>(known + first + 8 * i + lane % 4 * 2);
            const float gate[2] = {__fmul_rn(d[0], scale.x), __fmul_rn(d[1], scale.y)};
            const float up[2] = {__fmul_rn(d[2], scale.x), __fmul_rn(d[3], scale.y)};
            words[i] = FORM::inputs(GateUp::silu(gate[0]) * up[0], GateUp::silu(gate[1]) * up[1]);
        }
        store_turned(turned, first + lane, chunk, words);
    }
    __device__ __forceinline__ __nv_bfloat16 *to(const Routing &routing, unsigned place, unsigned, unsigned m) const {
        return m / 2 < routing.intermediate ? activated + (size_t)place * routing.intermediate + m / 2 : nullptr;
    }

};

struct DownOfExperts {
    __nv_bfloat16 *given; // [T P, hidden]
    unsigned *tickets;    // likewise
    static constexpr unsigned CHUNKS = 8;

    __device__ __forceinline__ unsigned rows(const Routing &routing) const { return routing.hidden; }
    __device__ __forceinline__ unsigned cols(const Routing &routing) const { return routing.intermediate; }
    // Which pair it is.
    __device__ __forceinline__ unsigned known(const Routing &, unsigned pair) const { return pair; }
    template <class, int N, int COUNT>
    __device__ __forceinline__ void turn(const float (&sum)[N], unsigned first, const unsigned *, unsigned turned) const {
        const unsigned lane = threadIdx.x % 32, chunk = threadIdx.x / 32 % 4 * 2 + lane / 8 % 2;
#pragma unroll
        for (int half = 0; half < COUNT / 16; half++) {
            const float *d = sum + first / 2 + 8 * half;
            unsigned words[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                words[i] = bf16_word(d[2 * i], d[2 * i + 1]);
            store_turned(turned, first + 16 * half + lane / 16 * 8 + lane % 8, chunk, words);
        }
    }
    __device__ __forceinline__ __nv_bfloat16 *to(const Routing &routing, unsigned, unsigned pair, unsigned m) const {
        return m < routing.hidden ? given + (size_t)pair * routing.hidden + m : nullptr;
    }
};

// A unit's products on their way out, by a warpgroup.
template <class T, int N, class Product>
__device__ __forceinline__ void finish(const Shared<T> &shared, const Routing &routing, const Product &product, const Unit &unit,
                                       const float (&sum)[N / 2], const unsigned (&known)[(N + 127) / 128]) {
    constexpr unsigned ROUND = N < T::ROUND ? N : T::ROUND, AT_ONCE = 128 / Product::CHUNKS;
    const unsigned thread = threadIdx.x % 128, group = threadIdx.x / 128, chunk = thread % Product::CHUNKS;
    const auto sync = [&] { sync_threads(2 + group, 128); };
#pragma unroll
    for (int i = 0; i < (N + 127) / 128; i++)
        if (128 * i + thread < N)
            shared.known[128 * i + thread] = known[i];
    sync();
    // The first output of this lane's 8 in a row of w's; gate_up has half as many outputs as rows.
    const unsigned m = first_row<T>(unit) + 64 * group + 64 / Product::CHUNKS * chunk;
#pragma unroll
    for (int round = 0; round < N; round += ROUND) {
        if (round >= unit.count)
            break;
        const int end = round + ROUND < N ? round + ROUND : N;
#pragma unroll
        for (int first = round; first < end; first += 32)
            product.template turn<typename T::Form, N / 2, (ROUND < 32 ? ROUND : 32)>(sum, first, shared.known, shared.turned - round * 128);
        sync();
#pragma unroll
        for (unsigned p = thread / Product::CHUNKS; p < end - round; p += AT_ONCE) {
            const unsigned n = round + p;
            if (n >= unit.count)
                break;
            uint4 value;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                         : "r"(shared.turned + p * 128 + ((chunk ^ p % 8) << 4)) : "memory");
            __nv_bfloat16 *to = product.to(routing, unit.first + n, shared.known[n], m);
            if (to != nullptr)
                *reinterpret_cast<uint4 *>(to) = value;
        }
        sync();
    }
}
