//! The sizes of a product, and how its sums are cut: what its bits depend on.
//!
//! ```text
//!   kind              columns summed in
//!   Residual          4 slices
//!   RankSums          4 of all ranks'
//!   Qkv               2; 1 of up to 1,024 columns
//!   GateUp            1
//!   Head, Linear      1
//! ```
//!
//! One slice's sums leave a thread registers for wider tiles. Gate and up have rows enough to fill the device. Heads are few: of many columns,
//! a batch of rows is multiplied sooner where two blocks have half of them each.
//!
//! Slices are added in pairs, then pairs of pairs, so that a rank's columns of o and down, which it shares with others, are a whole
//! subtree ([`minisgl_core::shard`]).
//!
//! Invariant: how a sum is cut depends on the matrix alone, never on the number of tokens.

use super::epilogue::Kind;
use crate::param::plain_params;
use crate::weight::SLICING;

/// Columns of a block; slices are whole blocks.
pub(super) const BLOCK_COLS: u32 = SLICING.block as u32;

/// Columns up to which one block sums all of a query's, key's or value's.
const WHOLE_COLS: u32 = 1024;

/// MiB of the largest matrix that L2 holds beside the activations. `many_tiles.cuh` draws the same line.
const L2_MIB: u64 = 24;

pub(super) fn fits_l2(rows: u32, cols: u32) -> bool {
    u64::from(rows) * u64::from(cols) * 2 <= L2_MIB << 20
}

/// The sizes of a product, as `shape.cuh` declares them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) tokens: u32,
    pub(super) slices: u32,
}

impl Shape {
    pub(super) fn fits_l2(&self) -> bool {
        fits_l2(self.rows, self.cols)
    }
}

plain_params!(Shape);

impl Kind {
    /// Slices that a sum over `cols` columns is cut into, which has so many where ranks share its columns.
    pub(super) fn slices(self, cols: u32, shared: u32) -> u32 {
        match self {
            Kind::Qkv if cols > WHOLE_COLS => 2,
            Kind::Residual | Kind::RankSums => shared,
            Kind::Qkv | Kind::GateUp | Kind::Head | Kind::Linear => 1,
        }
    }

    /// The most of them that its kernels add.
    pub(super) fn slices_max(self) -> u32 {
        match self {
            Kind::Residual => SLICING.most,
            Kind::RankSums => SLICING.most / 2,
            Kind::Qkv => 2,
            Kind::GateUp | Kind::Head | Kind::Linear => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::{assert_declared, source};

    #[test]
    fn sizes_have_the_fields_that_the_kernels_declare() {
        assert_declared!(&["shape.cuh"], "Shape", Shape { rows, cols, tokens, slices });
    }

    #[test]
    fn both_sides_think_the_same_matrices_fit_l2() {
        let line = format!("(size_t)shape.rows * shape.cols * 2 <= {L2_MIB}u << 20");
        assert!(source("hopper/gemm/many_tiles.cuh").contains(&line));
    }

    #[test]
    fn no_slice_is_empty() {
        for kind in [Kind::Qkv, Kind::Residual, Kind::GateUp, Kind::Head, Kind::Linear] {
            for cols in (8u32..4096).step_by(8) {
                let slices = kind.slices(cols, SLICING.slices(cols as usize));
                let blocks = cols.div_ceil(BLOCK_COLS).min(kind.slices_max());
                assert!((1..=blocks).contains(&slices), "{kind:?}, {cols} columns");
                assert!(slices.is_power_of_two(), "{kind:?}, {cols} columns");
            }
        }
    }
}
