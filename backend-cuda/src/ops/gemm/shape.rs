//! The sizes of a product, and how its sums are cut: what its bits depend on.
//!
//! ```text
//!   kind              columns summed in
//!   Qkv               2 slices
//!   Residual          4
//!   RankSums          4 of all ranks'
//!   GateUp            2; 1 of a matrix that L2 does not hold
//!   Head, Linear      1
//! ```
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

/// MiB of the largest matrix that L2 holds beside the activations. `gemm_many.cuh` draws the same line.
const L2_MIB: u64 = 24;

fn fits_l2(rows: u32, cols: u32) -> bool {
    u64::from(rows) * u64::from(cols) * 2 <= L2_MIB << 20
}

/// The sizes of a product, as `epilogue.cuh` declares them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) rows: u32,
    pub(super) cols: u32,
    pub(super) tokens: u32,
    pub(super) slices: u32,
}

impl Shape {
    /// A rank's part of gate and up counts as what it is of, by which its sums are cut.
    pub(super) fn fits_l2(&self, kind: Kind) -> bool {
        match kind {
            Kind::GateUp => self.slices > 1 || self.cols <= BLOCK_COLS,
            _ => fits_l2(self.rows, self.cols),
        }
    }
}

plain_params!(Shape);

impl Kind {
    /// Slices that a sum over `cols` columns is cut into, for `rows` rows of w, those of all ranks, which has so many where ranks
    /// share its columns.
    pub(super) fn slices(self, rows: u32, cols: u32, shared: u32) -> u32 {
        match self {
            // Its rows fill the device, and one sum a thread leaves registers for wider tiles.
            Kind::GateUp if !fits_l2(rows, cols) => 1,
            Kind::Qkv | Kind::GateUp => cols.div_ceil(BLOCK_COLS).min(2),
            Kind::Residual | Kind::RankSums => shared,
            Kind::Head | Kind::Linear => 1,
        }
    }

    /// The most of them that its kernels add.
    pub(super) fn slices_max(self) -> u32 {
        match self {
            Kind::Residual => SLICING.most,
            Kind::RankSums => SLICING.most / 2,
            Kind::Qkv | Kind::GateUp => 2,
            Kind::Head | Kind::Linear => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::{assert_declared, source};

    #[test]
    fn sizes_have_the_fields_that_the_kernels_declare() {
        assert_declared!(&["epilogue.cuh"], "Shape", Shape { rows, cols, tokens, slices });
    }

    #[test]
    fn both_sides_think_the_same_matrices_fit_l2() {
        let line = format!("(size_t)shape.rows * shape.cols * 2 <= {L2_MIB}u << 20");
        assert!(source("hopper/gemm/gemm_many.cuh").contains(&line));
    }

    #[test]
    fn no_slice_is_empty() {
        for kind in [Kind::Qkv, Kind::Residual, Kind::GateUp, Kind::Head, Kind::Linear] {
            for cols in (8u32..4096).step_by(8) {
                for rows in [128, 1024, 32_768] {
                    let slices = kind.slices(rows, cols, SLICING.slices(cols as usize));
                    let blocks = cols.div_ceil(BLOCK_COLS).min(kind.slices_max());
                    assert!((1..=blocks).contains(&slices), "{kind:?}, {rows} x {cols}");
                    assert!(slices.is_power_of_two(), "{kind:?}, {rows} x {cols}");
                }
            }
        }
    }
}
