//! What products are launched as on a device, without one: the same choices that [`super::Gemm`] makes at a launch.

use minisgl_core::shard::Rank;
use minisgl_core::spec::Inputs;

use super::epilogue::Kind;
use super::few::tilings;
use super::many::Tile;
use super::portable::Portable;
use super::product::{Explained, Form, SmShare};
use super::shape::Shape;
use super::{fp8, rounded};
use crate::launch::Grid;
use crate::ops::described::Described;
use crate::weight::{Fp8Codes, Rounding, SLICING};

/// What a product of a rank's `[rows, cols]` with so many tokens is launched as on a device.
pub(in crate::ops) fn explained(
    device: &Described,
    kind: Kind,
    [rows, cols, tokens]: [u32; 3],
    share: SmShare,
    form: Form,
) -> Option<Explained> {
    let shared = Rank { index: 0, count: form.ranks }.slices(cols as usize, SLICING);
    let slices = kind.slices(cols, shared);
    let shape = Shape { rows, cols, tokens, slices };
    if !device.hopper {
        return Some(Portable::explained(kind, &shape));
    }
    let few = match form.weights_fp8 {
        true => fp8::explained(kind, &shape, form),
        false => tilings::explained(kind, &shape, share, form),
    };
    few.or_else(|| Tile::explained(kind, &shape, device.clusters))
}

/// What rounds the inputs of a product with a matrix of codes, whose groups of rows have scales in pairs or not, and what that is
/// launched as.
pub(in crate::ops) fn explained_rounded(
    device: &Described,
    kind: Kind,
    [rows, cols, tokens]: [u32; 3],
    inputs: Inputs,
    pairs: bool,
) -> Option<[Explained; 2]> {
    let words = cols / 2;
    let layout = Fp8Codes { rows: rows as usize, cols: cols as usize };
    let slices = rounded::slices(kind, rows, words, layout.slices());
    let shape = Shape { rows, cols: words, tokens, slices };
    rounded::explained(kind, &shape, Rounding::of(inputs)?, pairs, device.clusters)
}

/// How many blocks widen a matrix of `[rows, cols]` in fp8 for so many tokens, if they are too many for kernels that do it.
pub(in crate::ops) fn widening(rows: u32, cols: u32, tokens: u32) -> Option<Grid> {
    (tokens > fp8::TOKENS_MAX).then(|| fp8::widening(rows, cols))
}

/// What multiplies so many tokens with a norm's scale, for matrices in fp8.
pub(in crate::ops) fn scaling(tokens: u32) -> Grid {
    fp8::scaling(tokens)
}
