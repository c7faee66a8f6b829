//! How many elements an exchange has, and how many chunks: what a thread has of them at a time.

use minisgl_core::shard::{GATHERED, Rank};

use crate::ops::operands::SEGMENT;

/// Threads of a block of every kernel here.
pub(super) const THREADS: u32 = 256;
/// Blocks that every SM holds at once, whatever their number of ranks.
pub(super) const BLOCKS_AN_SM: u32 = 4;
/// Elements of a chunk of the residual stream; of columns that are gathered a chunk has [`GATHERED`].
pub(super) const CHUNK: u32 = 4;

/// Elements of a row of the residual stream, in whole segments.
pub(super) fn padded(hidden: u32) -> usize {
    hidden.next_multiple_of(SEGMENT) as usize
}

/// Chunks of so many tokens' rows.
pub(super) fn row_chunks(tokens: u32, hidden: u32) -> u32 {
    tokens * hidden.div_ceil(SEGMENT) * (SEGMENT / CHUNK)
}

/// Chunks of a rank's columns of so many rows.
pub(super) fn column_chunks(rank: Rank, [rows, columns]: [u32; 2]) -> u32 {
    (rows as usize * rank.share(columns as usize).len()).div_ceil(GATHERED) as u32
}

/// Chunks that a rank adds up of so many tokens where they are shared, in whole tiles.
pub(super) fn shares(rank: Rank, tokens: usize, hidden: u32) -> usize {
    let chunks = tokens * padded(hidden) / CHUNK as usize;
    chunks.div_ceil(rank.count as usize * THREADS as usize) * THREADS as usize
}

/// What an inbox takes of them: the others' sums of a share, and what they add up.
pub(super) fn shared_bytes(rank: Rank, tokens: usize, hidden: u32) -> usize {
    (rank.count as usize - 1) * shares(rank, tokens, hidden) * 16 + tokens * padded(hidden) * 2
}

/// Elements of so many rows and columns that a rank passes on, in whole chunks, as many on each.
pub(super) fn share_elements(rank: Rank, [rows, columns]: [usize; 2]) -> usize {
    (rows * columns.div_ceil(rank.count as usize)).next_multiple_of(GATHERED)
}
