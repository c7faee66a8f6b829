// experts_*: what stands around the products of a layer's experts, of which each token gets some (minisgl_core::spec::Experts is the
// definition). A layer's kernels, one after the other, in the same grids whatever the tokens chose:
//
//   router     each token's experts and their shares        hopper/experts_router.cu, portable/experts_router.cu
//   dispatch   which pairs are each expert's                grid E                       block 256
//              not of few tokens on Hopper, where each block of a product lists that by itself (hopper/experts_sort.cuh)
//   gate_up    activated[place] = silu(gate) * up           hopper/experts_products.cuh, portable/experts_products.cu
//   down       given[pair] = w x                            likewise
//   combine    residual[t] += sum of share * given          grid (T, hidden / 2048)      block 256
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
#include "experts_lists.cuh"

constexpr unsigned THREADS = 256, WARPS = THREADS / 32;
constexpr unsigned AT_ONCE = 8; // experts of a token that are on their way together

extern "C" __global__ void __launch_bounds__(THREADS)
experts_dispatch(Routing routing) {
    dependent_launch();
    dependent_wait();
    list_pairs<WARPS>(routing, blockIdx.x);
}

// A warp takes 256 columns of a token, a lane 8. Products let their successors start behind their own wait, so all but `given` is there when
// this starts.
extern "C" __global__ void __launch_bounds__(THREADS)
experts_combine(Routing routing, const __nv_bfloat16 *given, __nv_bfloat16 *residual, float *sumsq) {
    dependent_launch();
    const unsigned t = blockIdx.x, lane = threadIdx.x % 32, hidden = routing.hidden, per_token = routing.per_token;
    const unsigned m = 256 * (blockIdx.y * WARPS + threadIdx.x / 32) + 8 * lane;
    const bool is_there = m < hidden;
    const size_t first = (size_t)t * per_token;
    const auto pairs = [](const uint4 &chunk, int i) {
        return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 *>(&chunk)[i]);
    };
    uint4 *at = reinterpret_cast<uint4 *>(residual + (size_t)t * hidden + m);
    uint4 old = is_there ? *at : make_uint4(0, 0, 0, 0);
    const bool chose = is_there && routing.chosen[first] != NOBODY;
    float shares[AT_ONCE];
    const auto load_shares = [&](unsigned begin) {
#pragma unroll
        for (unsigned j = 0; j < AT_ONCE; j++)
            shares[j] = begin + j < per_token ? routing.shares[first + begin + j] : 0.0f;
    };
    load_shares(0);
    dependent_wait();
    float2 sum[4] = {};
    for (unsigned begin = 0; chose && begin < per_token; begin += AT_ONCE) {
        if (begin > 0)
            load_shares(begin);
        uint4 y[AT_ONCE];
#pragma unroll
        for (unsigned j = 0; j < AT_ONCE; j++)
            if (begin + j < per_token)
                y[j] = *reinterpret_cast<const uint4 *>(given + (first + begin + j) * hidden + m);
#pragma unroll
        for (unsigned j = 0; j < AT_ONCE; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (begin + j < per_token)
                    sum[i] = {fmaf(shares[j], pairs(y[j], i).x, sum[i].x), fmaf(shares[j], pairs(y[j], i).y, sum[i].y)};
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = pairs(old, i);
        const __nv_bfloat162 now = __floats2bfloat162_rn(x.x + sum[i].x, x.y + sum[i].y);
        reinterpret_cast<__nv_bfloat162 *>(&old)[i] = now;
        const float2 y = __bfloat1622float2(now);
        squares = fmaf(y.x, y.x, fmaf(y.y, y.y, squares));
    }
    if (is_there)
        *at = old;
#pragma unroll
    for (int step = 4; step > 0; step /= 2) // the 64 columns of 8 lanes
        squares += __shfl_xor_sync(0xffffffffu, squares, step);
    if (is_there && lane % 8 == 0)
        sumsq[(size_t)t * ((hidden + 63) / 64) + m / 64] = squares;
}
