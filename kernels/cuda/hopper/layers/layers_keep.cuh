// How blocks of layers_fp8.cu that multiply keep keys and values in fp8 (fp8_rows.cuh). Two neighbours have every second pair of a row's dims,
// but its scale is the whole row's: so they swap, and each keeps every second eight of the rows.
//
//   before   a lane has dims 16 j + 4 quad + 2 rank and the next one, for j of 8, of tokens t and t + 8
//   swap     what it has of token t + 8 (1 - rank) goes to its neighbour's lane
//   after    it has dims 16 j + 4 quad and the next three of token t + 8 rank: a quad has the row
//   words    a word's higher dims are two lanes on: of two chunks each of both lanes makes the words of one
//
// Where two warps share the rows, each has every second j before, and four of the eight rows after: a quad has every second j again, and
// two of them a row.
#pragma once

#include "fp8_rows.cuh"
#include "hopper/layers/layers_flags.cuh"
#include "hopper/layers/layers_neighbour.cuh"
#include "hopper/pairs.cuh"

struct HalfRows {
    unsigned rank, received, there; // where the lane's first 16 bytes arrive, 512 before the others, and the barrier that says so

    __device__ __forceinline__ static float2 wide(unsigned pair) {
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&pair));
    }

    // The lane's pairs of both tokens become those of one: its own, then the neighbour's.
    __device__ __forceinline__ void swap(unsigned (&pairs)[2][8], unsigned parity) const {
        const unsigned to = at_neighbour(received, rank), barrier = at_neighbour(there, rank);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const unsigned first = pairs[0][j], second = pairs[1][j];
            pairs[0][j] = rank ? second : first;
            pairs[1][j] = rank ? first : second;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const unsigned(&sent)[8] = pairs[1];
            send(to + j * 512, __uint_as_float(sent[4 * j]), __uint_as_float(sent[4 * j + 1]), __uint_as_float(sent[4 * j + 2]),
                 __uint_as_float(sent[4 * j + 3]), barrier);
        }
        await(there, parity);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint4 words = load_words(received + j * 512);
            pairs[1][4 * j] = words.x, pairs[1][4 * j + 1] = words.y, pairs[1][4 * j + 2] = words.z, pairs[1][4 * j + 3] = words.w;
        }
    }
    // The pairs of the quad's row, in their order.
    __device__ __forceinline__ void row_of(float2 (&row)[1][16], const unsigned (&pairs)[2][8]) const {
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                row[0][2 * j + i] = wide(i ? rank ? pairs[0][j] : pairs[1][j] : rank ? pairs[1][j] : pairs[0][j]);
    }
    // Of two warps that share the rows: the group's pairs go to who keeps their tokens; of token 4 group + lane / 8 of the own eight, the
    // lane gets the pairs that its half of eight lanes is for. `received` is where the warps' first 16 bytes arrive.
    __device__ __forceinline__ void share(float2 (&row)[1][8], const unsigned (&pairs)[2][4], unsigned group, unsigned lane,
                                          unsigned parity) const {
#pragma unroll
        for (unsigned to = 0; to < 2; to++)
            send(at_rank(received + rank * 1024 + group * 512 + lane * 16, to), __uint_as_float(pairs[to][0]), __uint_as_float(pairs[to][1]),
                 __uint_as_float(pairs[to][2]), __uint_as_float(pairs[to][3]), at_rank(there, to));
        await(there, parity);
        const unsigned at = received + lane / 4 % 2 * 512 + ((4 * group + lane / 8) * 4 + lane % 4) * 16;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 words = load_words(at + i * 1024);
            row[0][i] = wide(words.x), row[0][2 + i] = wide(words.y), row[0][4 + i] = wide(words.z), row[0][6 + i] = wide(words.w);
        }
    }
    // Rounds the row of the quad, or of the two beside each other, and stores it if it exists. The lane has N pairs of it, of chunks
    // `first` + STEP j.
    template <int N, int STEP>
    __device__ __forceinline__ static void keep(const float2 (&row)[1][N], const Fp8Place &place, bool is_key, bool exists, unsigned quad,
                                                unsigned first) {
        unsigned codes[1][N], largest[1] = {0};
        float scale[1];
#pragma unroll
        for (int j = 0; j < N; j++)
            largest[0] = max(largest[0], fp8_magnitude(row[0][j]));
#pragma unroll
        for (int lanes = 1; lanes <= 2 * STEP; lanes *= 2)
            largest[0] = max(largest[0], __shfl_xor_sync(0xffffffffu, largest[0], lanes));
        fp8_round<4 * STEP>(codes, scale, row, largest, [](unsigned parts) {
#pragma unroll
            for (int lanes = 1; lanes <= 2 * STEP; lanes *= 2)
                parts += __shfl_xor_sync(0xffffffffu, parts, lanes);
            return parts;
        });
        if (exists && quad == 0 && first == 0)
            *place.scale = fp8_kept_scale(scale[0], is_key);
        const bool is_high = quad >= 2;
        const unsigned c = quad % 2 * 2;
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            const unsigned even = codes[0][4 * j] | codes[0][4 * j + 1] << 16, odd = codes[0][4 * j + 2] | codes[0][4 * j + 3] << 16;
            const unsigned mine = is_high ? odd : even, other = __shfl_xor_sync(0xffffffffu, is_high ? even : odd, 2);
            const unsigned low = is_high ? other : mine, high = is_high ? mine : other, chunk = first + STEP * (2 * j + is_high);
            if (!exists)
                continue;
            if (is_key) {
                unsigned *const at = reinterpret_cast<unsigned *>(place.tile + fp8_key_at<HEAD_DIM>(place.t, chunk, c));
                at[0] = fp8_key_word(low, high);
                at[4] = fp8_key_word(low >> 16, high >> 16);
            } else {
                *reinterpret_cast<uint2 *>(place.tile + fp8_value_at<HEAD_DIM>(place.t, chunk) + 4 * c) =
                    make_uint2(fp8_value_word(low, high), fp8_value_word(low >> 16, high >> 16));
            }
        }
    }
};
