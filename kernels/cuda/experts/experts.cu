// experts_*: what stands around the products of a layer's experts, of which each token gets some (minisgl_core::spec::Experts is the
// definition). A layer's kernels, one after the other, in the same grids whatever the tokens chose:
//
//   router     each token's experts and their shares        hopper/experts/experts_router.cu, portable/experts_router.cu
//   dispatch   which pairs are each expert's                grid E                       block 256
//              not of few tokens on Hopper, where each block of a product lists that by itself, of bits (hopper/experts/experts_sort.cuh)
//   gate_up    activated[place] = silu(gate) * up           hopper/experts/experts_products.cuh, portable/experts_products.cu
//   down       given[pair] = w x                            likewise
//   combine    residual[t] += sum of share * given          grid (T, hidden / 2048)      block 256
//              and where the next layer's first product is of fp8 that times its norm's scale by column, in `scaled`
//
// Of several ranks each has a share of the inner width of gate and up, and of the rows of down: between the two exchange.cu's
// gather_columns brings `activated` together, and combine the residual stream.
//
//   E experts, P of a token; a pair is a token and one of its experts, number t P + j, j ascending with the expert
//   chosen [T, P] u16, NOBODY for padding   shares [T, P] f32   begins [E + 1]   pairs [T P]: expert e's are begins[e] .. begins[e + 1]
//   activated [T P, intermediate] bf16, by place in `pairs`   given [T P, hidden] bf16, by pair
//   moves   the weights of experts that somebody chose, once from memory: whoever needs the same ones runs at about the same time
//
// 1. Products find their tiles by counting pairs, of as many tiles as it takes. So nothing is dropped, and a recorded step does for all
//    choices.
// 2. A pair's sums have one order and a token's experts are added in ascending order in f32: a token's bits depend neither on its
//    place nor on the tokens beside it. A share is multiplied in f32, behind the rounding of `given`.
// 3. The norm's scale by column is multiplied into gate and up at load, where they are bf16, and into x for the router, whose weights stay as
//    they are: a choice should not hang on a rounding that can be left out.
#include "dependent.cuh"
#include "exchange/exchange.cuh"
#include "experts/experts_lists.cuh"
#include "segment.cuh"

constexpr unsigned THREADS = 256, WARPS = THREADS / 32;
constexpr unsigned BLOCKS_AN_SM = 3; // of those that wait for other ranks
constexpr unsigned AT_ONCE = 8; // experts of a token that are on their way together

extern "C" __global__ void __launch_bounds__(THREADS)
experts_dispatch(Routing routing) {
    dependent_launch();
    dependent_wait();
    list_pairs<WARPS>(routing, blockIdx.x);
}

// What a token's experts give it in a lane's 8 columns, from the first expert to the last.
struct Given {
    const Routing &routing;
    size_t first; // the token's first pair
    unsigned m;   // the columns' first
    float shares[AT_ONCE];

    __device__ __forceinline__ Given(const Routing &routing, unsigned t, unsigned m)
        : routing(routing), first((size_t)t * routing.per_token), m(m) {
        load_shares(0);
    }

    __device__ __forceinline__ void load_shares(unsigned begin) {
#pragma unroll
        for (unsigned j = 0; j < AT_ONCE; j++)
            shares[j] = begin + j < routing.per_token ? routing.shares[first + begin + j] : 0.0f;
    }

    __device__ __forceinline__ void add_to(float2 (&sum)[4], const __nv_bfloat16 *given, bool chose) {
        for (unsigned begin = 0; chose && begin < routing.per_token; begin += AT_ONCE) {
            if (begin > 0)
                load_shares(begin);
            uint4 y[AT_ONCE];
#pragma unroll
            for (unsigned j = 0; j < AT_ONCE; j++)
                if (begin + j < routing.per_token)
                    y[j] = *reinterpret_cast<const uint4 *>(given + (first + begin + j) * routing.hidden + m);
#pragma unroll
            for (unsigned j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (begin + j < routing.per_token)
                        sum[i] = {fmaf(shares[j], pair_of(y[j], i).x, sum[i].x), fmaf(shares[j], pair_of(y[j], i).y, sum[i].y)};
        }
    }

    __device__ __forceinline__ static float2 pair_of(const uint4 &chunk, int i) {
        return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 *>(&chunk)[i]);
    }
};

// The residual stream's 8 columns and that.
__device__ __forceinline__ uint4 added(uint4 old, const float2 (&sum)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = Given::pair_of(old, i);
        reinterpret_cast<__nv_bfloat162 *>(&old)[i] = __floats2bfloat162_rn(x.x + sum[i].x, x.y + sum[i].y);
    }
    return old;
}

// The sum of squares of a segment, the columns of 8 lanes.
__device__ __forceinline__ float squares_of(const uint4 &chunk) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = Given::pair_of(chunk, i);
        squares = fmaf(x.x, x.x, fmaf(x.y, x.y, squares));
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2)
        squares += __shfl_xor_sync(0xffu << (threadIdx.x & 24), squares, step);
    return squares;
}

// What the products have read is 0 again for the next layer's router.
__device__ __forceinline__ void clear_bits(const Routing &routing, unsigned thread, unsigned threads) {
    const unsigned words = routing.bits != nullptr ? routing.experts * ((routing.tokens + 31) / 32) : 0;
    for (unsigned i = thread; i < words; i += threads)
        routing.bits[i] = 0;
}

// Eight columns of the residual stream times the scales of the next layer's norm (fp8_weights.cu does so where no experts come before).
__device__ __forceinline__ uint4 times(uint4 x, const uint4 &scales) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 a = Given::pair_of(x, i), b = Given::pair_of(scales, i);
        reinterpret_cast<__nv_bfloat162 *>(&x)[i] = __floats2bfloat162_rn(__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y));
    }
    return x;
}

// A warp takes 256 columns of a token, a lane 8. Products let their successors start behind their own wait, so all but `given` is there when
// this starts.
extern "C" __global__ void __launch_bounds__(THREADS)
experts_combine(Routing routing, const __nv_bfloat16 *given, __nv_bfloat16 *residual, float *sumsq, Ahead ahead) {
    dependent_launch();
    const unsigned t = blockIdx.x, lane = threadIdx.x % 32, hidden = routing.hidden;
    const unsigned m = 256 * (blockIdx.y * WARPS + threadIdx.x / 32) + 8 * lane;
    const bool is_there = m < hidden;
    uint4 *at = reinterpret_cast<uint4 *>(residual + (size_t)t * hidden + m);
    uint4 old = is_there ? *at : make_uint4(0, 0, 0, 0);
    const bool scales = is_there && ahead.norm != nullptr;
    const uint4 norm = scales ? *reinterpret_cast<const uint4 *>(ahead.norm + m) : make_uint4(0, 0, 0, 0);
    const bool chose = is_there && routing.chosen[(size_t)t * routing.per_token] != NOBODY;
    Given of_token(routing, t, m);
    dependent_wait();
    clear_bits(routing, (blockIdx.y * gridDim.x + t) * THREADS + threadIdx.x, gridDim.y * gridDim.x * THREADS);
    float2 sum[4] = {};
    of_token.add_to(sum, given, chose);
    const uint4 now = added(old, sum);
    const float squares = squares_of(now);
    if (is_there)
        *at = now;
    if (scales)
        *reinterpret_cast<uint4 *>(ahead.scaled + (size_t)t * hidden + m) = times(now, norm);
    if (is_there && lane % 8 == 0)
        sumsq[(size_t)t * segments_of(hidden) + m / SEGMENT] = squares;
}

// The same by one of several ranks, which has a share of `given`'s columns, whole segments: it sends the others what its columns of the
// residual stream become, and takes theirs. Each element is added up and rounded by one rank, as where there is none beside it.
// A launch `sends`, or `takes`, or both; where words are carried it leaves in `sent`, [tokens, columns of the rank], what is to be.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AN_SM)
experts_combine_ranks(Routing routing, const __nv_bfloat16 *given, __nv_bfloat16 *residual, float *sumsq, Ahead ahead, uint4 *sent,
                      unsigned sends, unsigned takes, const __grid_constant__ Ranks ranks) {
    const unsigned a_row = routing.hidden / 8, chunks = routing.tokens * a_row, step = gridDim.x * THREADS;
    const unsigned begin = blockIdx.x * THREADS + threadIdx.x;
    uint4 *rows = reinterpret_cast<uint4 *>(residual);
    const auto at = [&](unsigned rank, unsigned chunk) {
        return (size_t)(chunk / a_row) * a_row * ranks.count + rank * a_row + chunk % a_row;
    };
    const auto keep = [&](size_t at, const uint4 &now) {
        rows[at] = now;
        if (ahead.norm != nullptr)
            reinterpret_cast<uint4 *>(ahead.scaled)[at] = times(now, reinterpret_cast<const uint4 *>(ahead.norm)[at % (a_row * ranks.count)]);
        const float squares = squares_of(now);
        if (threadIdx.x % 8 == 0)
            sumsq[at / 8] = squares;
    };
    begin_waiting(ranks);
    dependent_launch();
    dependent_wait();
    clear_bits(routing, begin, step);
    for (unsigned chunk = begin; sends && chunk < chunks; chunk += step) {
        const unsigned t = chunk / a_row;
        float2 sum[4] = {};
        const bool chose = routing.chosen[(size_t)t * routing.per_token] != NOBODY;
        Given(routing, t, chunk % a_row * 8).add_to(sum, given, chose);
        const uint4 now = added(rows[at(ranks.rank, chunk)], sum), bits = sendable(now);
        for (unsigned i = 1; i < ranks.count && !ranks.carried; i++)
            push(reinterpret_cast<uint4 *>(ranks.inbox[(ranks.rank + i) % ranks.count]) + (size_t)ranks.rank * chunks + chunk, bits);
        if (ranks.carried)
            sent[chunk] = now;
        keep(at(ranks.rank, chunk), now);
    }
    for (unsigned i = 1; takes && i < ranks.count; i++) {
        const unsigned from = (ranks.rank + i) % ranks.count;
        uint4 *inbox = reinterpret_cast<uint4 *>(ranks.inbox[ranks.rank]) + (size_t)from * chunks;
        for (unsigned chunk = begin; chunk < chunks; chunk += step)
            keep(at(from, chunk), take(inbox + chunk, ranks, from));
    }
}
