//! The tilings of products of few tokens. Of a kind's list the first that suits a launch is taken.
//!
//! Matrices that L2 does not hold have lists of their own (`large.rs`, else `fitting.rs`), and so have products that leave half of each
//! multiprocessor to others (`half.rs`).
//!
//! Invariant: which is taken is a matter of speed alone.

pub(super) mod fitting;
pub(super) mod half;
pub(super) mod large;
#[cfg(test)]
mod tests;

use super::tiling::Tiling;
use crate::ops::gemm::epilogue::Kind;
use crate::ops::gemm::product::{Explained, Form, SmShare};
use crate::ops::gemm::shape::Shape;

/// The kernels of a tile of queries, keys and values: for any model and for [`Epilogue::is_normed`], with keys and values in bf16
/// and in fp8.
macro_rules! qkv {
    ($team:literal, $tile:literal) => {
        [
            [concat!($team, "_qkv_", $tile), concat!($team, "_qkv_normed_", $tile)],
            [concat!($team, "_qkv_fp8_", $tile), concat!($team, "_qkv_fp8_normed_", $tile)],
        ]
    };
}
use qkv;

/// A kind's tilings for a matrix of this size; none where a kind has none.
pub(super) fn all(kind: Kind, shape: &Shape, share: SmShare) -> &'static [Tiling] {
    match share {
        SmShare::Whole if shape.fits_l2() => fitting::of(kind),
        SmShare::Whole => large::of(kind),
        SmShare::Half => half::of(kind),
    }
}

/// Which of them is for the shape; none where another kernel is the quicker one. For what a divided step launches there is no
/// other in half of each multiprocessor: the last one then takes all that are too many for those before it.
pub(super) fn index(tilings: &[Tiling], kind: Kind, shape: &Shape, share: SmShare) -> Option<usize> {
    let is_divided = share == SmShare::Half && matches!(kind, Kind::Qkv | Kind::Residual | Kind::GateUp);
    let last = tilings.len().checked_sub(1).filter(|_| is_divided);
    tilings.iter().position(|tiling| tiling.suits(shape)).or(last)
}

/// What a product is launched as; `None` as above.
pub(in crate::ops::gemm) fn explained(
    kind: Kind,
    shape: &Shape,
    share: SmShare,
    form: Form,
) -> Option<Explained> {
    let tilings = all(kind, shape, share);
    Some(tilings[index(tilings, kind, shape, share)?].explained(shape, form))
}

/// Is there one for so many tokens?
pub(in crate::ops::gemm) fn there_is(kind: Kind, shape: &Shape, share: SmShare) -> bool {
    index(all(kind, shape, share), kind, shape, share).is_some()
}
