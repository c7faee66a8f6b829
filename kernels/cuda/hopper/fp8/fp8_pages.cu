// fp8_encode_*, fp8_widen_*: between pages in fp8 and the wide ones, room for a layer's pages in two bytes an element that all layers
// share. What multiplies many rows at once works on those: products of many tokens store keys and values there, in bf16; prefill
// attends to what is there then, codes as f16 numbers, whose scales it finds in the pages in fp8.
//
//   encode   rows of the step's tokens that a product of many has stored: wide -> fp8, and wide again, as codes
//            grid  eight tokens and a head's keys or values for each warp
//   widen    what prefill rows see, or what of that came before the step: fp8 -> wide
//            grid  any number of blocks for each of the rows        unit of a warp: a tile of a head's keys or values
//   pages    of both have the same numbers, heads and rows (fp8_rows.cuh, attention.cuh)
//   moves    encode tokens * kv_heads * head_dim * 10 bytes, widen 6 for each position that is seen
//
// 1. Four lanes have a row: lane c dims 16 c to 16 c + 15, and of 128 dims 64 further on as many again. A word of values is a
//    lane's own; keys' words go from lane to lane, since 16 bytes hold one word of each of four lanes.
// 2. Rows of one page may be shared by rows of a step: who widens them twice writes the same bytes.
// 3. A tile may hold rows that nobody has written yet: they are widened to garbage, as the page would be.
#include "step/batch.cuh"
#include "dependent.cuh"
#include "fp8_rows.cuh"
#include "hopper/transpose.cuh"

struct Fp8Args {
    const unsigned *batch;
    char *k, *v;                     // pages in fp8
    __nv_bfloat16 *wide_k, *wide_v;  // the wide ones
    unsigned kv_heads, page_shift;

    __device__ __forceinline__ char *kept(bool is_key) const { return is_key ? k : v; }
    __device__ __forceinline__ __nv_bfloat16 *wide(bool is_key) const { return is_key ? wide_k : wide_v; }

    // A row of a head among all rows of the wide pages' heads.
    __device__ __forceinline__ size_t line(unsigned page, unsigned head, unsigned row) const {
        return (((size_t)page * kv_heads + head) << page_shift) + row;
    }
    template <int HD> __device__ __forceinline__ Fp8Place place(bool is_key, unsigned page, unsigned head, unsigned row) const {
        return Fp8Place::of<HD>(kept(is_key), page, kv_heads, 1u << page_shift, head, row);
    }
};

// The 16 bytes of a wide row that hold dims 8 chunk on.
template <int HD> __device__ __forceinline__ uint4 *wide_at(__nv_bfloat16 *wide, size_t line, unsigned chunk) {
    return reinterpret_cast<uint4 *>(wide + line * HD) + (chunk ^ line % 8);
}

__device__ __forceinline__ uint4 words_of(const unsigned (&words)[4]) { return make_uint4(words[0], words[1], words[2], words[3]); }

// Stores 16 dims from their words, keys' or values'.
template <int HD>
__device__ __forceinline__ void store_wide(__nv_bfloat16 *wide, size_t line, unsigned chunk, const unsigned (&words)[4], bool is_key) {
    unsigned low[4], high[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        fp8_halves(low[i], high[i], is_key ? words[i] : fp8_in_order(words[i]));
    *wide_at<HD>(wide, line, 2 * chunk) = words_of(low);
    *wide_at<HD>(wide, line, 2 * chunk + 1) = words_of(high);
}

// A row's pairs of dims, from the lane's chunks.
template <int HD>
__device__ __forceinline__ void load_row(float2 (&row)[HD / 8], __nv_bfloat16 *wide, size_t line, unsigned c) {
#pragma unroll
    for (int i = 0; i < HD / 32; i++) {
        const uint4 four = *wide_at<HD>(wide, line, 2 * (c + i / 2 * 4) + i % 2);
        const unsigned words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            row[4 * i + j] = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&words[j]));
    }
}

template <int HD> __device__ __forceinline__ void encode(const Fp8Args &args, unsigned tokens_offset, unsigned tokens) {
    const unsigned lane = threadIdx.x % 32, c = lane % 4, unit = blockIdx.x * 8 + threadIdx.x / 32, sides = 2 * args.kv_heads;
    const unsigned token = unit / sides * 8 + lane / 4, head = unit % sides / 2;
    const bool is_key = unit % 2 == 0;
    if (unit / sides * 8 >= tokens)
        return;
    const unsigned location = reinterpret_cast<const Token *>(args.batch + tokens_offset)[min(token, tokens - 1)].location;
    const unsigned page = location >> args.page_shift, in_page = location & ((1u << args.page_shift) - 1);
    const size_t line = args.line(page, head, in_page);
    float2 row[1][HD / 8];
    load_row<HD>(row[0], args.wide(is_key), line, c);
    unsigned codes[1][HD / 8], largest[1] = {0};
#pragma unroll
    for (int i = 0; i < HD / 8; i++)
        largest[0] = max(largest[0], fp8_magnitude(row[0][i]));
    largest[0] = max(largest[0], __shfl_xor_sync(0xffffffffu, largest[0], 1));
    largest[0] = max(largest[0], __shfl_xor_sync(0xffffffffu, largest[0], 2));
    float scale[1];
    fp8_round<4>(codes, scale, row, largest, [](unsigned parts) {
        parts += __shfl_xor_sync(0xffffffffu, parts, 1);
        return parts + __shfl_xor_sync(0xffffffffu, parts, 2);
    });
    const Fp8Place place = args.place<HD>(is_key, page, head, in_page);
    const bool exists = token < tokens;
    if (exists && c == 0)
        *place.scale = fp8_kept_scale(scale[0], is_key);
#pragma unroll
    for (int i = 0; i < HD / 64; i++) {
        const unsigned(&of)[8] = reinterpret_cast<const unsigned(&)[8]>(codes[0][8 * i]);
        unsigned keys[4], values[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            keys[j] = fp8_key_word(of[j], of[j + 4]);
            values[j] = fp8_value_word(of[j], of[j + 4]);
        }
        transpose(keys, lane);
        const unsigned at = is_key ? fp8_key_at<HD>(place.t, 4 * i, c) : fp8_value_at<HD>(place.t, 4 * i + c);
        if (exists) {
            *reinterpret_cast<uint4 *>(place.tile + at) = is_key ? words_of(keys) : words_of(values);
            store_wide<HD>(args.wide(is_key), line, 4 * i + c, values, false);
        }
    }
}

struct Seen {
    const unsigned *page_table;
    unsigned rows_offset, table_width, window;
    unsigned all; // 1; 0: what came before the step
};

template <int HD> __device__ __forceinline__ void widen(const Fp8Args &args, const Seen &seen) {
    const Row row = reinterpret_cast<const Row *>(args.batch + seen.rows_offset)[blockIdx.y];
    const unsigned lane = threadIdx.x % 32, c = lane % 4, sides = 2 * args.kv_heads;
    const unsigned begin = row.position + 1 > seen.window ? row.position + 1 - seen.window : 0;
    const unsigned end = seen.all ? row.kv_len : row.position, first = begin / FP8_TILE;
    const unsigned units = end > begin ? ((end + FP8_TILE - 1) / FP8_TILE - first) * sides : 0;
    const unsigned *pages = seen.page_table + (size_t)row.slot * seen.table_width;
    for (unsigned unit = blockIdx.x * 8 + threadIdx.x / 32; unit < units; unit += gridDim.x * 8) {
        const unsigned token = (first + unit / sides) * FP8_TILE, head = unit % sides / 2;
        const bool is_key = unit % 2 == 0;
        const unsigned page = pages[token >> args.page_shift], top = (token & ((1u << args.page_shift) - 1)) + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned in_page = top + 8 * half;
            const size_t line = args.line(page, head, in_page);
            const Fp8Place place = args.place<HD>(is_key, page, head, in_page);
#pragma unroll
            for (int i = 0; i < HD / 64; i++) {
                const unsigned at = is_key ? fp8_key_at<HD>(place.t, 4 * i, c) : fp8_value_at<HD>(place.t, 4 * i + c);
                const uint4 four = *reinterpret_cast<const uint4 *>(place.tile + at);
                unsigned words[4] = {four.x, four.y, four.z, four.w};
                if (is_key)
                    transpose(words, lane);
                store_wide<HD>(args.wide(is_key), line, 4 * i + c, words, is_key);
            }
        }
    }
}

#define FP8_PAGES(HD)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) fp8_encode_##HD(Fp8Args args, unsigned tokens_offset, unsigned tokens) { \
        dependent_launch();                                                                                                  \
        dependent_wait();                                                                                                    \
        encode<HD>(args, tokens_offset, tokens);                                                                             \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) fp8_widen_##HD(Fp8Args args, Seen seen) {                              \
        dependent_launch();                                                                                                  \
        dependent_wait();                                                                                                    \
        widen<HD>(args, seen);                                                                                               \
    }

FP8_PAGES(64)
FP8_PAGES(128)
