// A row of the residual stream in segments: each one's squares are summed by whoever writes it, sumsq [tokens, segments_of(hidden)] f32, and
// a norm adds up a row's sums. One order of additions for all who do.
#pragma once

// Elements. No constexpr, for that would be a word of each module's memory.
enum : unsigned { SEGMENT = 64 };

__device__ __forceinline__ constexpr unsigned segments_of(unsigned columns) { return (columns + SEGMENT - 1) / SEGMENT; }
