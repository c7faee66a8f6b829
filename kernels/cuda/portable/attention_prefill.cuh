// attention_prefill: many tokens a row, each over its row's positions up to its own.
//
//   q, out  [tokens, kv_heads * group, head_dim] bf16      k, v  pages (attention.cuh)
//   plan    count, tokens of an item, another set's word, then (row, first token, 2 words for a set that splits items) for each
//   grid    kv_heads * the most items that the step can have; those beyond count return at once
//   block   256      shared 2 * 128 * head_dim * 2 bytes
//   moves   each item reads the keys and values up to its last token, mostly from L2; 4 * head_dim operations a (query, key)
//
// An item is as many tokens of a row as have up to 128 queries in the group of one kv head, and all that they see. A query is a column, token by
// token, so that a group's queries share every key and value and columns beside each other end at about the same
// position. Each warp holds 16 columns against all keys of a leaf, which the block copies to shared memory.
//
//   columns      [ t0 h0 | t0 h1 | t1 h0 | t1 h1 | ... ]      128 of them, 16 a warp
//   leaves       0 .. 127 | 128 .. 255 | ...                  folded in order (attention.cuh: decode gives the same bits)
//   spans        0 ..                 2047 | 2048 .. | ...    folded in order, each when its last leaf is
//
// 1. Tokens behind the item's last or before its window are copied as zeros: their probability is 0, and 0 times what a page held before may
//    be NaN.
// 2. A warp skips leaves and tiles that lie behind all of its columns, and leaves before all of their windows.
// 3. A leaf's output is made for 32 dims at a time: 128 would not fit the registers beside the state. What is folded of whole
//    spans does not fit either: the compiler keeps it in memory, and touches it once in 16 leaves.
#pragma once
#include "attention/attention.cuh"

#define COLUMNS 128
#define PREFILL_THREADS 256
#define NQ 2

// A kernel parameter: backend-cuda/src/ops/attention/params.rs declares the same fields.
struct PrefillParams {
    const unsigned *plan;
    const Row *rows;
    const unsigned *page_table;
    const bf16 *q, *k, *v;
    bf16 *out;
    unsigned table_width, page_shift, kv_heads, group, window;
};

// A column's query: index of its token in the step and of its head, and how many positions it attends to.
struct Column {
    bool exists;
    size_t query;
    unsigned limit;

    __device__ __forceinline__ Column(const PrefillParams &args, const Row &row, unsigned first, unsigned head, unsigned column) {
        const unsigned offset = column / args.group, token = first + offset;
        exists = offset < COLUMNS / args.group && token < row.tokens;
        query = (size_t)(row.first_token + token) * args.kv_heads * args.group + head * args.group + column % args.group;
        limit = exists ? row.position + token + 1 : 1; // one that does not exist attends to the first position
    }
};

// The query of column lane / 4 as the B operand, dims x queries; zeros where there is none.
template <int HD>
__device__ __forceinline__ void load_query(unsigned (&b)[2], const bf16 *query, unsigned k, unsigned lane) {
    const unsigned *words = reinterpret_cast<const unsigned *>(query) + k * 8 + lane % 4;
    b[0] = query ? words[0] : 0;
    b[1] = query ? words[4] : 0;
}

// Scores of a tile: s[n][0, 1] are token lane / 4 and columns 2 (lane % 4) + {0, 1}; s[n][2, 3] token lane / 4 + 8.
template <int HD>
__device__ __forceinline__ void score(float (&s)[NQ][4], const unsigned (&q)[HD / 16][NQ][2], unsigned tile,
                                      unsigned lane) {
#pragma unroll
    for (int n = 0; n < NQ; n++)
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < HD / 16; k++) {
        unsigned a[4];
        load_keys<HD>(a, tile, k, lane);
#pragma unroll
        for (int n = 0; n < NQ; n++)
            mma(s[n], a, q[k][n]);
    }
}

// The leaf's maxima, m[n][0, 1] of columns 2 (lane % 4) + {0, 1}, and its probabilities as B operands, tokens x queries.
template <int HD>
__device__ __forceinline__ void softmax(unsigned (&p)[LEAF_TILES][NQ][2], float (&m)[NQ][2],
                                        const float (&s)[LEAF_TILES][NQ][4]) {
    const float c = score_scale<HD>();
#pragma unroll
    for (int n = 0; n < NQ; n++) {
        float offset[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x = minus_infinity();
#pragma unroll
            for (int j = 0; j < LEAF_TILES; j++)
                x = fmaxf(x, fmaxf(s[j][n][i], s[j][n][i + 2]));
            x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 4));
            x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 8));
            x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 16));
            m[n][i] = x;
            offset[i] = x == minus_infinity() ? 0.0f : -__fmul_rn(x, c);
        }
#pragma unroll
        for (int j = 0; j < LEAF_TILES; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float x = exp2_approx(__fmaf_rn(s[j][n][2 * half], c, offset[0]));
                const float y = exp2_approx(__fmaf_rn(s[j][n][2 * half + 1], c, offset[1]));
                const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
                p[j][n][half] = transposed(*reinterpret_cast<const unsigned *>(&pair));
            }
    }
}

// l += the sums of a tile's probabilities: l[n][0, 1] of columns 2 (lane % 4) + {0, 1}.
__device__ __forceinline__ void add_sums(float (&l)[NQ][4], const unsigned (&p)[NQ][2]) {
    const unsigned ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
#pragma unroll
    for (int n = 0; n < NQ; n++)
        mma(l[n], ones, p[n]);
}

// o += V^T P of a tile, for the dims' m-tile d: o[n][0, 1] are dim 16 d + lane / 4 and columns 2 (lane % 4) + {0, 1};
// o[n][2, 3] the dim 8 further on.
template <int HD>
__device__ __forceinline__ void add_values(float (&o)[NQ][4], const unsigned (&p)[NQ][2], unsigned tile, unsigned d,
                                           unsigned lane) {
    unsigned a[4];
    load_values<HD>(a, tile, d, lane);
#pragma unroll
    for (int n = 0; n < NQ; n++)
        mma(o[n], a, p[n]);
}

__device__ __forceinline__ void copy_or_zero(unsigned to, const bf16 *from, bool copies) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copies ? 16 : 0) : "memory");
}

// Starts copying a leaf's keys and values, those from `kv_begin` to `kv_end`.
template <int HD>
__device__ __forceinline__ void copy_leaf(const PrefillParams &args, const unsigned *pages, unsigned head, unsigned leaf,
                                          unsigned kv_begin, unsigned kv_end, unsigned keys, unsigned values) {
    constexpr unsigned CHUNKS = HD / 8, TOKENS = PREFILL_THREADS / CHUNKS;
    const unsigned chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    unsigned page[LEAF / TOKENS]; // looked up all at once; a token behind the end has the last one's
#pragma unroll
    for (int i = 0; i < LEAF / TOKENS; i++)
        page[i] = pages[min(leaf * LEAF + first + i * TOKENS, kv_end - 1) >> args.page_shift];
#pragma unroll
    for (int i = 0; i < LEAF / TOKENS; i++) {
        const unsigned t = first + i * TOKENS, token = leaf * LEAF + t, in_page = token & ((1u << args.page_shift) - 1);
        const size_t at = ((((size_t)page[i] * args.kv_heads + head) << args.page_shift) + in_page) * HD + chunk * 8;
        const bool seen = token >= kv_begin && token < kv_end;
        copy_or_zero(keys + (t * CHUNKS + chunk) * 16, args.k + at, seen);
        copy_or_zero(values + (t * CHUNKS + chunk) * 16, args.v + at, seen);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// What a warp has folded so far of its 16 columns.
template <int HD> struct PrefillState {
    float m[NQ][2], l[NQ][2], o[HD / 16][NQ][4];

    __device__ __forceinline__ PrefillState() {
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            m[n][0] = m[n][1] = minus_infinity();
            l[n][0] = l[n][1] = 0.0f;
#pragma unroll
            for (int d = 0; d < HD / 16; d++)
                o[d][n][0] = o[d][n][1] = o[d][n][2] = o[d][n][3] = 0.0f;
        }
    }
    __device__ __forceinline__ void fold(const PrefillState &later) {
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            Weights weights[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                weights[i] = fold_maximum<HD>(m[n][i], later.m[n][i]);
                l[n][i] = folded(l[n][i], later.l[n][i], weights[i]);
            }
#pragma unroll
            for (int d = 0; d < HD / 16; d++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    o[d][n][i] = folded(o[d][n][i], later.o[d][n][i], weights[i % 2]);
        }
    }
};

// Attends to `tiles` tiles of a leaf, the first of whose tokens has position `first`, and folds the result. ALL: the leaf
// is whole and lies before the end and within the window of every column.
template <int HD, bool ALL>
__device__ __forceinline__ void attend_leaf(PrefillState<HD> &state, const unsigned (&q)[HD / 16][NQ][2],
                                            const unsigned (&limit)[NQ][2], unsigned window, unsigned first, unsigned tiles,
                                            unsigned keys, unsigned values, unsigned lane) {
    constexpr unsigned TILE_BYTES = TILE * HD * 2;
    float s[LEAF_TILES][NQ][4];
#pragma unroll
    for (int j = 0; j < LEAF_TILES; j++) {
        if (ALL || j < tiles)
            score<HD>(s[j], q, keys + j * TILE_BYTES, lane);
        if (ALL)
            continue;
        const unsigned token = first + j * TILE + lane / 4;
#pragma unroll
        for (int n = 0; n < NQ; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (token + i / 2 * 8 >= limit[n][i % 2] || token + i / 2 * 8 + window < limit[n][i % 2])
                    s[j][n][i] = minus_infinity();
    }
    unsigned p[LEAF_TILES][NQ][2];
    float m[NQ][2], l[NQ][4] = {};
    softmax<HD>(p, m, s);
    Weights weights[NQ][2];
#pragma unroll
    for (int j = 0; j < LEAF_TILES; j++)
        if (ALL || j < tiles)
            add_sums(l, p[j]);
#pragma unroll
    for (int n = 0; n < NQ; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            weights[n][i] = fold_maximum<HD>(state.m[n][i], m[n][i]);
            state.l[n][i] = folded(state.l[n][i], l[n][i], weights[n][i]);
        }
#pragma unroll
    for (int d = 0; d < HD / 16; d += 2) {
        float o[2][NQ][4] = {};
#pragma unroll
        for (int j = 0; j < LEAF_TILES; j++)
            if (ALL || j < tiles) {
                add_values<HD>(o[0], p[j], values + j * TILE_BYTES, d, lane);
                add_values<HD>(o[1], p[j], values + j * TILE_BYTES, d + 1, lane);
            }
#pragma unroll
        for (int n = 0; n < NQ; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state.o[d][n][i] = folded(state.o[d][n][i], o[0][n][i], weights[n][i % 2]);
                state.o[d + 1][n][i] = folded(state.o[d + 1][n][i], o[1][n][i], weights[n][i % 2]);
            }
    }
}

template <int HD>
__device__ __forceinline__ void write_columns(const PrefillParams &args, const Row &row, unsigned first, unsigned head,
                                              const PrefillState<HD> &state, unsigned column, unsigned lane) {
#pragma unroll
    for (int n = 0; n < NQ; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Column c(args, row, first, head, column + n * 8 + lane % 4 * 2 + i);
            if (!c.exists)
                continue;
            bf16 *out = args.out + c.query * HD + lane / 4;
            const float inverse = __frcp_rn(state.l[n][i]);
#pragma unroll
            for (int d = 0; d < HD / 16; d++) {
                out[d * 16] = __float2bfloat16_rn(__fmul_rn(state.o[d][n][i], inverse));
                out[d * 16 + 8] = __float2bfloat16_rn(__fmul_rn(state.o[d][n][i + 2], inverse));
            }
        }
}

template <int HD> __device__ __forceinline__ void prefill(const PrefillParams &args, unsigned char *shared) {
    constexpr unsigned BLOCK_BYTES = LEAF * HD * 2;
    const unsigned item = blockIdx.x / args.kv_heads, head = blockIdx.x % args.kv_heads;
    if (item >= args.plan[0])
        return;
    const Row row = args.rows[args.plan[3 + 4 * item]];
    const unsigned first = args.plan[4 + 4 * item], lane = threadIdx.x % 32, column = threadIdx.x / 32 * (NQ * 8);
    const unsigned kv_end = row.position + min(first + COLUMNS / args.group, row.tokens);
    const unsigned limit_min = row.position + first + 1, window = args.window;
    const unsigned kv_begin = limit_min > window ? limit_min - window : 0;
    const unsigned keys = (unsigned)__cvta_generic_to_shared(shared), values = keys + BLOCK_BYTES;
    const unsigned *pages = args.page_table + (size_t)row.slot * args.table_width;

    unsigned q[HD / 16][NQ][2], limit[NQ][2], longest = 0, shortest = 0xffffffffu;
#pragma unroll
    for (int n = 0; n < NQ; n++) {
        const Column c(args, row, first, head, column + n * 8 + lane / 4);
#pragma unroll
        for (int k = 0; k < HD / 16; k++)
            load_query<HD>(q[k][n], c.exists ? args.q + c.query * HD : nullptr, k, lane);
        longest = max(longest, __reduce_max_sync(FULL_WARP, c.limit));
        shortest = min(shortest, __reduce_min_sync(FULL_WARP, c.limit));
        limit[n][0] = Column(args, row, first, head, column + n * 8 + lane % 4 * 2).limit;
        limit[n][1] = Column(args, row, first, head, column + n * 8 + lane % 4 * 2 + 1).limit;
    }

    PrefillState<HD> state, span;
    for (unsigned begin = kv_begin / LEAF * LEAF; begin < kv_end; begin += LEAF) {
        __syncthreads(); // every warp is done with the leaf before
        copy_leaf<HD>(args, pages, head, begin / LEAF, kv_begin, kv_end, keys, values);
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads(); // the leaf is here
        if (begin % SPAN == 0 && begin > kv_begin) {
            state.fold(span);
            span = PrefillState<HD>();
        }
        if (begin >= longest || begin + LEAF + window <= shortest)
            continue;
        if (begin + LEAF <= shortest && begin + window >= longest)
            attend_leaf<HD, true>(span, q, limit, window, begin, LEAF_TILES, keys, values, lane);
        else
            attend_leaf<HD, false>(span, q, limit, window, begin, min((longest - begin + TILE - 1) / TILE, LEAF_TILES), keys, values,
                                   lane);
    }
    state.fold(span);
    write_columns<HD>(args, row, first, head, state, column, lane);
}
