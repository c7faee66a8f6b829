// What ranks pass to each other within a step: sums of o and down, embedded tokens, columns of logits and of what a matrix cut by rows gets. How,
// and why nobody waits in vain, is in exchange.cuh.
//
//   reduce_one_shot_R   residual[t, :] += the sum over R ranks of sums[t, :], and sumsq        every rank adds up all of it
//   reduce_two_shot_R   the same                                                               every rank adds up a share, and pushes that
//   embed_share         residual[t, :] = table[id(t), :], from the rank that has the row; history, sumsq
//   gather_columns      out[r, :] = all ranks' shares of the columns
//   own_columns         own[t, :] = this rank's columns of residual[t, :]
//   join_columns        residual[t, :] = all ranks' own[t, :], and sumsq
//
//   sums f32, what this rank adds up of its own   residual [tokens, hidden] bf16   sumsq [tokens, segments] f32
//   own [tokens, hidden / ranks] bf16, whole segments of 64   table [rows of the rank, hidden] bf16   share [rows, columns of the rank], out [rows, columns] of 16 bits
//   grid: at most what a GPU holds at once   block THREADS
//
//   inbox of        one shot   [rank][tokens, hidden] f32                                       pushed by the product before (RankSums)
//                   two shots  [other rank][a share of these] f32, then [tokens, hidden] bf16    the former pushed by the product
//                   embed      [tokens, hidden] bf16; where they are carried, [rank][tokens, hidden], and this rank's of no other use
//                   columns    [rank][rows, columns of that rank] of 16 bits; those that a matrix gets have an inbox of their own, between two others' turns
//                   joined     [rank][tokens, hidden / ranks] bf16, by join_columns, and by experts_combine_ranks (experts.cu)
//
// 1. Sums are added in pairs by rank, ((r0 + r1) + (r2 + r3)) + …, the upper levels of the tree of core/src/model/shard.rs, whoever adds
//    them; then the residual is added and rounded as a product's epilogue does it (epilogue/residual.cuh). So neither the number of
//    ranks nor the way changes a bit.
// 2. Four elements are a thread's, a chunk; 16 threads have a segment of 64, and add its squares in the order of that epilogue's 32.
//    Rows are padded to whole segments in inboxes and among a rank's own sums.
// 3. A product pushes what exchange.cuh has a kernel push before it waits: it begins behind the exchange before, as that asks for.
#include <cuda_bf16.h>

#include "step/batch.cuh"
#include "dependent.cuh"
#include "exchange/exchange.cuh"
#include "segment.cuh"

#define THREADS 256
#define BLOCKS_AN_SM 4

__device__ __forceinline__ uint4 bits_of(float4 v) {
    return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}

__device__ __forceinline__ float4 floats_of(uint4 v) {
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w)};
}

__device__ __forceinline__ float2 pair_of(unsigned bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

__device__ __forceinline__ unsigned rounded(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const unsigned *>(&pair);
}

// Rows of the residual stream in chunks of four elements, 16 a segment.
struct Stream {
    uint2 *residual; // [tokens, hidden] bf16
    float *sumsq;    // [tokens, segments]
    unsigned hidden, segments, chunks;

    __device__ __forceinline__ Stream(void *residual, float *sumsq, unsigned tokens, unsigned hidden)
        : residual(static_cast<uint2 *>(residual)), sumsq(sumsq), hidden(hidden), segments(segments_of(hidden)),
          chunks(tokens * segments_of(hidden) * (SEGMENT / 4)) {}

    // Where a chunk lies among the rows' own, in fours; none of padding.
    __device__ __forceinline__ bool find(unsigned chunk, size_t &at) const {
        if (hidden % SEGMENT == 0) {
            at = chunk;
            return chunk < chunks;
        }
        const unsigned a_row = segments * (SEGMENT / 4), row = chunk / a_row, within = chunk % a_row;
        at = (size_t)row * (hidden / 4) + within;
        return chunk < chunks && within < hidden / 4;
    }

    // A chunk of the new residual, and its segment's squares: all 16 threads of the segment call it, `is_there` or not.
    __device__ __forceinline__ void keep(unsigned chunk, bool is_there, size_t at, uint2 value) const {
        if (is_there)
            residual[at] = value;
        const float2 x = pair_of(value.x), y = pair_of(value.y);
        float a = is_there ? fmaf(x.x, x.x, __fmul_rn(x.y, x.y)) : 0.0f;
        float b = is_there ? fmaf(y.x, y.x, __fmul_rn(y.y, y.y)) : 0.0f;
        const unsigned mask = 0xffffu << (threadIdx.x & 16);
#pragma unroll
        for (int lane = 8; lane > 0; lane /= 2) {
            a += __shfl_xor_sync(mask, a, lane);
            b += __shfl_xor_sync(mask, b, lane);
        }
        if (threadIdx.x % 16 == 0 && chunk < chunks)
            sumsq[chunk / 16] = a + b;
    }
};

__device__ __forceinline__ uint2 added(uint2 old, float4 sum) {
    const float2 x = pair_of(old.x), y = pair_of(old.y);
    return {rounded(x.x + sum.x, x.y + sum.y), rounded(y.x + sum.z, y.y + sum.w)};
}

// What all ranks have of a chunk, added in pairs; that of rank r comes to `inbox` + `place(r)`.
template <int R, typename Place>
__device__ __forceinline__ float4 sum_of_all(float4 own, uint4 *inbox, const Place &place, const Ranks &ranks) {
    uint4 all[R];
#pragma unroll
    for (int r = 0; r < R; r++)
        all[r] = r == ranks.rank ? bits_of(own) : look(inbox + place(r));
    Patience patience;
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r != ranks.rank) {
            while (is_empty(all[r]) && patience.looks_again(ranks, r))
                all[r] = look(inbox + place(r));
            empty(inbox + place(r));
        }
    float4 sums[R];
#pragma unroll
    for (int r = 0; r < R; r++)
        sums[r] = floats_of(all[r]);
#pragma unroll
    for (int left = R / 2; left > 0; left /= 2)
#pragma unroll
        for (int i = 0; i < left; i++)
            sums[i] = sums[2 * i] + sums[2 * i + 1];
    return sums[0];
}

template <int R>
__device__ __forceinline__ void reduce_one_shot(const float4 *sums, const Stream &stream, const Ranks &ranks) {
    begin_waiting(ranks);
    dependent_launch();
    dependent_wait();
    for (unsigned chunk = blockIdx.x * THREADS + threadIdx.x; chunk < stream.chunks; chunk += gridDim.x * THREADS) {
        size_t at;
        const bool is_there = stream.find(chunk, at);
        uint2 value = {};
        if (is_there) {
            const uint2 old = stream.residual[at];
            uint4 *inbox = reinterpret_cast<uint4 *>(ranks.inbox[ranks.rank]) + chunk;
            value = added(old, sum_of_all<R>(sums[chunk], inbox, [&](unsigned from) { return (size_t)from * stream.chunks; }, ranks));
        }
        stream.keep(chunk, is_there, at, value);
    }
}

// Chunks by tiles of a block's threads, R tiles a group: tile r of a group belongs to rank r.
template <int R>
__device__ __forceinline__ void reduce_two_shot(const float4 *sums, const Stream &stream, const Ranks &ranks) {
    const unsigned groups = (stream.chunks + R * THREADS - 1) / (R * THREADS);
    const size_t shares = (size_t)groups * THREADS; // chunks that a rank adds up
    const auto share_of = [&](unsigned from) { return (from + R - ranks.rank - 1) % R * shares; };
    const auto result_at = [&](unsigned rank, unsigned chunk) {
        return reinterpret_cast<uint2 *>(ranks.inbox[rank] + (R - 1) * shares * 4) + chunk;
    };
    const auto chunk_of = [&](unsigned group, unsigned rank) { return (group * R + rank) * THREADS + threadIdx.x; };
    size_t at;
    begin_waiting(ranks);
    dependent_launch();
    dependent_wait();
    for (unsigned group = blockIdx.x; group < groups; group += gridDim.x) {
        const unsigned chunk = chunk_of(group, ranks.rank), share = group * THREADS + threadIdx.x;
        const bool is_there = stream.find(chunk, at);
        uint2 value = {};
        if (is_there) {
            const uint2 old = stream.residual[at];
            value = added(old, sum_of_all<R>(sums[share], reinterpret_cast<uint4 *>(ranks.inbox[ranks.rank]) + share, share_of, ranks));
            const uint2 bits = sendable(value);
#pragma unroll
            for (int i = 1; i < R; i++)
                push(result_at((ranks.rank + i) % R, chunk), bits);
        }
        stream.keep(chunk, is_there, at, value);
    }
    for (unsigned group = blockIdx.x; group < groups; group += gridDim.x)
#pragma unroll
        for (int i = 1; i < R; i++) {
            const unsigned from = (ranks.rank + i) % R, chunk = chunk_of(group, from);
            const bool is_there = stream.find(chunk, at);
            const uint2 value = is_there ? take(result_at(ranks.rank, chunk), ranks, from) : uint2{};
            stream.keep(chunk, is_there, at, value);
        }
}

#define REDUCE(R)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AN_SM)                                                      \
    reduce_one_shot_##R(const float4 *sums, void *residual, float *sumsq, unsigned tokens, unsigned hidden,          \
                        const __grid_constant__ Ranks ranks) {                                                               \
        reduce_one_shot<R>(sums, Stream(residual, sumsq, tokens, hidden), ranks);                                            \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AN_SM)                                                      \
    reduce_two_shot_##R(const float4 *sums, void *residual, float *sumsq, unsigned tokens, unsigned hidden,          \
                        const __grid_constant__ Ranks ranks) {                                                               \
        reduce_two_shot<R>(sums, Stream(residual, sumsq, tokens, hidden), ranks);                                            \
    }

REDUCE(2)
REDUCE(4)
REDUCE(8)

// The first of the vocabulary's tokens, or columns, that a rank has.
__device__ __forceinline__ unsigned first_of(unsigned rank, unsigned vocab, const Ranks &ranks) {
    return (unsigned)((unsigned long long)rank * vocab / ranks.count);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AN_SM)
embed_share(const unsigned *batch, unsigned tokens_offset, const unsigned *token_pool, const uint2 *table, unsigned vocab,
            void *residual, float *sumsq, unsigned tokens, unsigned hidden, unsigned *history,
            const __grid_constant__ Ranks ranks) {
    const Stream stream(residual, sumsq, tokens, hidden);
    const unsigned a_row = stream.segments * (SEGMENT / 4), step = gridDim.x * THREADS, begin = blockIdx.x * THREADS + threadIdx.x;
    const Token *all = reinterpret_cast<const Token *>(batch + tokens_offset);
    const auto id_of = [&](const Token &token) { return token.id == LAST_TOKEN ? token_pool[token.slot] : token.id; };
    const auto owner_of = [&](unsigned id) { return (unsigned)(((id + 1ull) * ranks.count - 1) / vocab); };
    const auto inbox_at = [&](unsigned rank, unsigned chunk) { return reinterpret_cast<uint2 *>(ranks.inbox[rank]) + chunk; };
    const unsigned first = first_of(ranks.rank, vocab, ranks), apart = ranks.carried ? stream.chunks : 0;
    begin_waiting(ranks);
    dependent_wait();
    dependent_launch();
    for (unsigned chunk = begin; chunk < stream.chunks; chunk += step) {
        const Token token = all[chunk / a_row];
        const unsigned id = id_of(token), within = chunk % a_row;
        if (within == 0)
            history[token.location] = id;
        if (owner_of(id) != ranks.rank)
            continue;
        size_t at;
        const bool is_there = stream.find(chunk, at);
        const uint2 value = is_there ? sendable(table[(size_t)(id - first) * (hidden / 4) + within]) : uint2{};
        for (unsigned i = 1; is_there && i < ranks.count; i++)
            push(inbox_at((ranks.rank + i) % ranks.count, chunk), value);
        stream.keep(chunk, is_there, at, value);
    }
    for (unsigned chunk = begin; chunk < stream.chunks; chunk += step) {
        const unsigned owner = owner_of(id_of(all[chunk / a_row]));
        if (owner == ranks.rank)
            continue;
        size_t at;
        const bool is_there = stream.find(chunk, at);
        const uint2 value = is_there ? take(inbox_at(ranks.rank, owner * apart + chunk), ranks, owner) : uint2{};
        stream.keep(chunk, is_there, at, value);
    }
}

// Eight of a rank's elements, which lie one row behind the other, to their columns.
__device__ __forceinline__ void scatter(unsigned short *out, unsigned rows, unsigned columns, unsigned first, unsigned width,
                                        unsigned chunk, uint4 v) {
    if (columns % 8 == 0 && first % 8 == 0 && width % 8 == 0) {
        const unsigned row = chunk / (width / 8), within = chunk % (width / 8);
        *reinterpret_cast<uint4 *>(out + (size_t)row * columns + first + within * 8) = v;
        return;
    }
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (unsigned i = 0; i < 8; i++) {
        const unsigned index = chunk * 8 + i, row = index / width, column = index % width;
        if (row < rows)
            out[(size_t)row * columns + first + column] = (unsigned short)(words[i / 2] >> (i % 2 * 16));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AN_SM)
gather_columns(const uint4 *share, unsigned short *out, unsigned rows, unsigned columns, const __grid_constant__ Ranks ranks) {
    const unsigned step = gridDim.x * THREADS, begin = blockIdx.x * THREADS + threadIdx.x;
    const size_t apart = ((size_t)rows * ((columns + ranks.count - 1) / ranks.count) + 7) / 8;
    const auto chunks_of = [&](unsigned width) { return (rows * width + 7) / 8; };
    begin_waiting(ranks);
    dependent_launch();
    dependent_wait();
    for (unsigned i = 0; i < ranks.count; i++) {
        const unsigned from = (ranks.rank + i) % ranks.count, first = first_of(from, columns, ranks);
        const unsigned width = first_of(from + 1, columns, ranks) - first;
        for (unsigned chunk = begin; chunk < chunks_of(width); chunk += step) {
            uint4 value;
            if (i == 0) {
                value = share[chunk];
                const uint4 bits = sendable(value);
                for (unsigned to = 1; to < ranks.count && !ranks.carried; to++)
                    push(reinterpret_cast<uint4 *>(ranks.inbox[(ranks.rank + to) % ranks.count]) + ranks.rank * apart + chunk,
                         bits);
            } else {
                value = take(reinterpret_cast<uint4 *>(ranks.inbox[ranks.rank]) + from * apart + chunk, ranks, from);
            }
            scatter(out, rows, columns, first, width, chunk, value);
        }
    }
}

// A rank's columns of the residual stream, in chunks of four elements.
struct OwnColumns {
    unsigned a_row, chunks, ranks;

    __device__ __forceinline__ OwnColumns(unsigned tokens, unsigned hidden, const Ranks &ranks)
        : a_row(hidden / 4 / ranks.count), chunks(tokens * a_row), ranks(ranks.count) {}

    // Where a rank's chunk lies in the stream.
    __device__ __forceinline__ unsigned at(unsigned rank, unsigned chunk) const {
        return (chunk / a_row * ranks + rank) * a_row + chunk % a_row;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AN_SM)
own_columns(uint2 *own, const uint2 *residual, unsigned tokens, unsigned hidden, const __grid_constant__ Ranks ranks) {
    const OwnColumns columns(tokens, hidden, ranks);
    dependent_launch();
    dependent_wait();
    for (unsigned chunk = blockIdx.x * THREADS + threadIdx.x; chunk < columns.chunks; chunk += gridDim.x * THREADS)
        own[chunk] = residual[columns.at(ranks.rank, chunk)];
}

// The 16 threads of a segment come to the same turns, for a rank has whole segments.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AN_SM)
join_columns(const uint2 *own, void *residual, float *sumsq, unsigned tokens, unsigned hidden,
             const __grid_constant__ Ranks ranks) {
    const OwnColumns columns(tokens, hidden, ranks);
    const Stream stream(residual, sumsq, tokens, hidden);
    const unsigned step = gridDim.x * THREADS, begin = blockIdx.x * THREADS + threadIdx.x;
    const auto inbox_at = [&](unsigned rank, unsigned from, unsigned chunk) {
        return reinterpret_cast<uint2 *>(ranks.inbox[rank]) + (size_t)from * columns.chunks + chunk;
    };
    begin_waiting(ranks);
    dependent_launch();
    dependent_wait();
    for (unsigned chunk = begin; chunk < columns.chunks; chunk += step) {
        const uint2 value = own[chunk], bits = sendable(value);
        for (unsigned i = 1; i < ranks.count && !ranks.carried; i++)
            push(inbox_at((ranks.rank + i) % ranks.count, ranks.rank, chunk), bits);
        const unsigned at = columns.at(ranks.rank, chunk);
        stream.keep(at, true, at, value);
    }
    for (unsigned i = 1; i < ranks.count; i++) {
        const unsigned from = (ranks.rank + i) % ranks.count;
        for (unsigned chunk = begin; chunk < columns.chunks; chunk += step) {
            const unsigned at = columns.at(from, chunk);
            stream.keep(at, true, at, take(inbox_at(ranks.rank, from, chunk), ranks, from));
        }
    }
}
