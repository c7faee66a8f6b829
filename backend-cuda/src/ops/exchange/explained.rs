//! What exchanges a step has, known without a device.

use minisgl_core::shard::Rank;
use minisgl_core::spec::Dims;

use super::sizes::{BLOCKS_AN_SM, CHUNK, THREADS, column_chunks, padded, row_chunks};
use super::way::Way;
use crate::launch::Grid;

/// What adds up so many tokens' sums, on GPUs that reach each other's memory.
pub(in crate::ops) fn sums(
    ranks: u32,
    multiprocessors: u32,
    [tokens, hidden]: [u32; 2],
) -> (&'static str, Grid, String) {
    let way = Way::of(ranks, tokens as usize * padded(hidden) * 4);
    let (shares, work) = match way {
        Way::OneShot => (1, "all sums, from all ranks".to_owned()),
        Way::TwoShot => (ranks, format!("of each {ranks} tiles one, whose results go to all ranks")),
    };
    let chunks = row_chunks(tokens, hidden).div_ceil(shares);
    let text = format!("a thread: {CHUNK} elements at a time; {work}");
    (way.kernel(ranks), grid(chunks, multiprocessors), text)
}

/// What passes embedded rows on, of so many tokens, and logits, of so many samples.
pub(in crate::ops) fn ends(
    rank: Rank,
    multiprocessors: u32,
    dims: &Dims,
    [tokens, samples]: [u32; 2],
) -> [Grid; 2] {
    [row_chunks(tokens, dims.hidden), column_chunks(rank, [samples, dims.vocab])]
        .map(|chunks| grid(chunks, multiprocessors))
}

/// What passes inputs of a matrix that is cut by rows on, of so many columns, and what its outputs become.
pub(in crate::ops) fn rows(
    rank: Rank,
    multiprocessors: u32,
    [tokens, columns, hidden]: [u32; 3],
) -> [Grid; 2] {
    let joined = row_chunks(tokens, hidden) / rank.count;
    [column_chunks(rank, [tokens, columns]), joined].map(|chunks| grid(chunks, multiprocessors))
}

fn grid(chunks: u32, multiprocessors: u32) -> Grid {
    Grid::new(chunks.div_ceil(THREADS).min(multiprocessors * BLOCKS_AN_SM), THREADS).dependent()
}
