//! Rows times a matrix: `out[t] = weight @ x[t]`.
//!
//! ```text
//!              cols                            8 outputs
//!         ┌─ panel ─┬─ panel ─┐ weight       ┌──────────┐
//!    rows │ 8 rows, widened   │        out   │ tile of  │ at most 128 tokens
//!         └─────────┴─────────┘              └──────────┘
//! ```
//!
//! A task takes a few blocks of 8 weight rows and a run of tokens. It widens a panel of the rows to f32 on its stack,
//! where all its tokens use it, and multiplies 4 rows with 3 tokens at a time, which keeps 12 sums in registers.
//!
//! The columns of some matrices are cut into slices, which are added in a binary tree ([`minisgl_core::shard`]): a slice's tile
//! waits on a stack until its neighbour's is there.
//!
//! ```text
//!   slices done   1      2         3         4               …     8
//!   stack         s0     s0+s1     s01 s2    s01+(s2+s3)           (s0123)+(s4567)
//! ```
//!
//! Invariant: a slice, and where there is one alone an output, is the sum over panels, in order, of one dot product each
//! ([`crate::simd::dots`]), whichever task, tile or token count it is computed in.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use minisgl_core::shard::{RANKS_MAX, Slicing};
use rayon::prelude::*;

use crate::simd::{Kernel, dots, fastest};
use crate::weights::Rows;

/// How the columns of o and down are cut: into as wide slices, of whole registers.
pub(crate) const SLICING: Slicing = Slicing { most: RANKS_MAX, block: 16, equal: true };

/// Weight rows of a block.
const ROWS: usize = 8;
/// Tokens of a task.
const TOKENS: usize = 128;
/// Columns widened at once.
const PANEL: usize = 512;
/// Blocks of a task.
const BLOCKS: usize = 4;
/// Tiles that wait for others to be added to, and the one at hand: of 8 slices.
const WAITING: usize = 4;
/// Multiplications worth waking another thread for.
const GRAIN: usize = 1 << 16;

/// `out[t] = weight @ x[t]`; `x` is `[tokens, cols]`, `out` `[tokens, rows]`.
pub fn linear(weight: Rows<'_>, x: &[f32], out: &mut [f32]) {
    let width = weight.count;
    let out = shared(out);
    let rows = |block: usize| std::array::from_fn(|i| (block * ROWS + i).min(width - 1));
    product(weight, x, width.div_ceil(ROWS), rows, |block, token, tile| {
        let first = block * ROWS;
        for (out, value) in out[token * width..][first..width.min(first + ROWS)].iter().zip(tile) {
            out.store(value.to_bits(), Relaxed);
        }
    });
}

/// `out = activation(gate) * up` where `weight` holds the rows of gate, then those of up; `out` is `[tokens, rows / 2]`.
pub fn gate_up(
    weight: Rows<'_>,
    x: &[f32],
    out: &mut [f32],
    activation: impl Fn(f32) -> f32 + Copy + Send + Sync,
) {
    const PAIRS: usize = ROWS / 2;
    let width = weight.count / 2;
    let out = shared(out);
    let rows = |block: usize| {
        std::array::from_fn(|i| (block * PAIRS + i % PAIRS).min(width - 1) + i / PAIRS * width)
    };
    product(weight, x, width.div_ceil(PAIRS), rows, |block, token, tile| {
        let first = block * PAIRS;
        let (gates, ups) = tile.split_at(PAIRS);
        let out = &out[token * width..][first..width.min(first + PAIRS)];
        for (out, (gate, up)) in out.iter().zip(gates.iter().zip(ups)) {
            out.store((activation(*gate) * up).to_bits(), Relaxed);
        }
    });
}

/// Floats that several tasks write, each its own: columns of a matrix cannot be split into slices.
fn shared(out: &mut [f32]) -> &[AtomicU32] {
    let words: &mut [u32] = bytemuck::cast_slice_mut(out);
    let (start, len) = (words.as_mut_ptr().cast::<AtomicU32>(), words.len());
    // SAFETY: an AtomicU32 has the size, alignment and values of a u32, and the exclusive borrow of the words lasts as
    // long as the shared one of the atomics that replaces it.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// Calls `write(block, token, values)` with the products of every token and each block's rows.
fn product(
    weight: Rows<'_>,
    x: &[f32],
    blocks: usize,
    rows: impl Fn(usize) -> [usize; ROWS] + Copy + Send + Sync,
    write: impl Fn(usize, usize, &[f32; ROWS]) + Copy + Send + Sync,
) {
    let cols = weight.matrix.cols;
    let tokens = x.len() / cols;
    let runs = tokens.div_ceil(TOKENS);
    let groups = blocks.div_ceil(BLOCKS);
    let work = cols * ROWS * BLOCKS * tokens.min(TOKENS);
    let tasks = (0..runs * groups).into_par_iter().with_min_len(1 + GRAIN / work.max(1));
    tasks.for_each(|task| {
        let (run, group) = (task / groups, task % groups);
        fastest(Task {
            weight,
            x,
            tokens: run * TOKENS..tokens.min((run + 1) * TOKENS),
            blocks: group * BLOCKS..blocks.min((group + 1) * BLOCKS),
            rows,
            write,
        });
    });
}

struct Task<'a, R, W> {
    weight: Rows<'a>,
    x: &'a [f32],
    tokens: Range<usize>,
    blocks: Range<usize>,
    rows: R,
    write: W,
}

impl<R, W> Kernel for Task<'_, R, W>
where
    R: Fn(usize) -> [usize; ROWS],
    W: Fn(usize, usize, &[f32; ROWS]),
{
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let cols = self.weight.matrix.cols;
        let x = &self.x[self.tokens.start * cols..self.tokens.end * cols];
        let width = cols / self.weight.matrix.slices;
        let mut panel = [[0.0; PANEL]; ROWS];
        let mut tiles = [[[0.0; ROWS]; TOKENS]; WAITING];
        for block in self.blocks {
            let rows = (self.rows)(block);
            let mut waiting = 0;
            for slice in 0..self.weight.matrix.slices {
                let tile = &mut tiles[waiting][..self.tokens.len()];
                tile.fill([0.0; ROWS]);
                for from in (slice * width..(slice + 1) * width).step_by(PANEL) {
                    let len = PANEL.min((slice + 1) * width - from);
                    for (row, panel) in rows.iter().zip(&mut panel) {
                        self.weight.widen(*row, from, &mut panel[..len]);
                    }
                    add_panel::<FMA>(&panel, &x[from..], cols, len, tile);
                }
                waiting += 1;
                for _ in 0..(slice + 1).trailing_zeros() {
                    waiting -= 1;
                    join(&mut tiles[waiting - 1..=waiting], self.tokens.len());
                }
            }
            for (token, values) in self.tokens.clone().zip(&tiles[0]) {
                (self.write)(block, token, values);
            }
        }
    }
}

/// Adds the second of two tiles to the first.
#[inline(always)]
fn join(tiles: &mut [[[f32; ROWS]; TOKENS]], tokens: usize) {
    let [left, right] = tiles else { return };
    for (left, right) in left[..tokens].iter_mut().zip(right) {
        left.iter_mut().zip(right).for_each(|(left, right)| *left += *right);
    }
}

/// Adds to each token's tile the products with one panel, three tokens at a time.
#[inline(always)]
fn add_panel<const FMA: bool>(
    panel: &[[f32; PANEL]; ROWS],
    x: &[f32],
    cols: usize,
    len: usize,
    tile: &mut [[f32; ROWS]],
) {
    for half in [0, ROWS / 2] {
        let w: [&[f32]; ROWS / 2] = std::array::from_fn(|i| &panel[half + i][..len]);
        let row = |t: usize| &x[t * cols..][..len];
        let mut t = 0;
        while t + 3 <= tile.len() {
            add_sums(&mut tile[t..], half, dots::<FMA, _, 3>(w, [row(t), row(t + 1), row(t + 2)]));
            t += 3;
        }
        if t + 2 == tile.len() {
            add_sums(&mut tile[t..], half, dots::<FMA, _, 2>(w, [row(t), row(t + 1)]));
        } else if t < tile.len() {
            add_sums(&mut tile[t..], half, dots::<FMA, _, 1>(w, [row(t)]));
        }
    }
}

#[inline(always)]
fn add_sums<const X: usize>(tile: &mut [[f32; ROWS]], half: usize, sums: [[f32; ROWS / 2]; X]) {
    for (tile, sums) in tile.iter_mut().zip(sums) {
        for (out, sum) in tile[half..].iter_mut().zip(sums) {
            *out += sum;
        }
    }
}
