//! Matrices in e4m3 whose inputs are rounded too, as the kernels read them (`rounded.cuh`).
//!
//! ```text
//!   matrix       | codes [rows, cols] | scales [ceil(cols / 128), groups] f32 | scales of rows [rows] f32 | of all inputs, f32 |
//!   groups       of 8 stored rows, which share their scales; so many that whole tiles of rows find theirs
//! ```
//!
//! Either blocks of columns have scales, and rows' are ones, or rows have one each, and blocks' are ones.
//!
//! Invariant: every byte is written, but for those between codes and scales and behind the inputs' scale, which no kernel reads.

use minisgl_core::spec::Inputs;
use minisgl_core::tensor::{HostTensor, Scales};

/// How inputs are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// A scale for each so many columns of a token, [`Fp8Codes::BLOCK_COLS`] or [`Fp8Codes::WIDE_COLS`].
    Groups(u32),
    /// A scale for a token.
    Rows,
    /// A scale that the matrix has.
    Fixed,
}

impl Rounding {
    /// How these inputs are; `None` where they are not, or in groups that the kernels don't sum.
    pub(crate) fn of(inputs: Inputs) -> Option<Rounding> {
        match inputs {
            Inputs::PerToken => Some(Rounding::Rows),
            Inputs::PerGroup(width @ (Fp8Codes::BLOCK_COLS | Fp8Codes::WIDE_COLS)) => {
                Some(Rounding::Groups(width))
            }
            Inputs::Static => Some(Rounding::Fixed),
            Inputs::Plain | Inputs::PerGroup(_) => None,
        }
    }
}

/// The form of a matrix of these sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fp8Codes {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Fp8Codes {
    /// Columns that have scales of their own.
    pub(crate) const BLOCK_COLS: u32 = 128;
    /// Columns of a token that have a scale of their own where `--quantize` made the matrix.
    pub(crate) const WIDE_COLS: u32 = 256;
    /// Columns after which tensor cores' sums are taken out at the latest.
    pub(crate) const SUMMED_COLS: u32 = 512;
    /// Rows that share their scales.
    pub(crate) const GROUP: usize = 8;
    /// Rows of which kernels for many tokens read the first two groups' scales, where the others have the same in turn.
    pub(crate) const PAIRED: usize = 128;
    /// Rows of tiles that lie beside each other. Where tiles of 192 do, their last may read scales behind these, of rows that nobody
    /// stores: the scales of rows, or the next block's, are there.
    const TILES: usize = 256;

    /// Blocks of columns.
    pub(crate) fn blocks(self) -> usize {
        self.cols.div_ceil(Self::BLOCK_COLS as usize)
    }

    /// Into how many slices o's and down's columns are cut, whatever their role says: two fill the device, and no rank shares them out.
    pub(crate) fn slices(self) -> u32 {
        self.blocks().min(2) as u32
    }

    /// Groups of rows, with those that only fill tiles.
    pub(crate) fn groups(self) -> usize {
        self.rows.next_multiple_of(Self::TILES) / Self::GROUP
    }

    /// Where blocks' scales begin, in bytes.
    pub(crate) fn scales_at(self) -> usize {
        (self.rows * self.cols).next_multiple_of(Self::TILES)
    }

    /// Where rows' scales do.
    pub(crate) fn row_scales_at(self) -> usize {
        self.scales_at() + self.blocks() * self.groups() * 4
    }

    /// Where the scale of all inputs is.
    pub(crate) fn input_scale_at(self) -> usize {
        self.row_scales_at() + self.rows.next_multiple_of(Self::TILES) * 4
    }

    /// Bytes of all.
    pub(crate) fn bytes(self) -> usize {
        self.input_scale_at() + 16
    }

    /// Blocks' scales and then rows' (ones where blocks have them), of these stored rows; `None` where eight rows have different ones, or blocks are no
    /// multiples of 128 columns, or some rows have one scale and others several.
    pub(crate) fn scales(self, rows: &[Option<CodesRow<'_>>]) -> Option<Vec<f32>> {
        let whole = |row: &CodesRow<'_>| row.wide >= self.cols;
        let has_rows = rows.iter().flatten().any(whole);
        let (blocks, groups) = (self.blocks(), self.groups());
        let mut scales = vec![1.0; blocks * groups];
        let mut of_rows = vec![1.0; self.rows.next_multiple_of(Self::TILES)];
        if has_rows {
            for (scale, row) in of_rows.iter_mut().zip(rows) {
                let Some(row) = row else { continue };
                *scale = *row.scales.first().filter(|_| whole(row))?;
            }
        } else {
            for (group, rows) in rows.chunks(Self::GROUP).enumerate() {
                let Some(first) = rows.iter().flatten().next() else { continue };
                let fits = |row: &CodesRow<'_>| {
                    row.wide == first.wide
                        && row.wide.is_multiple_of(Self::BLOCK_COLS as usize)
                        && row.scales == first.scales
                };
                if !rows.iter().flatten().all(fits) {
                    return None;
                }
                for block in 0..blocks {
                    scales[block * groups + group] =
                        *first.scales.get(block * Self::BLOCK_COLS as usize / first.wide)?;
                }
            }
        }
        scales.extend(of_rows);
        Some(scales)
    }
}

/// A row of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodesRow<'a> {
    /// Its codes.
    pub(crate) codes: &'a [u8],
    /// The scales of its blocks of columns.
    pub(crate) scales: &'a [f32],
    /// Columns of such a block.
    pub(crate) wide: usize,
}

impl<'a> CodesRow<'a> {
    /// Row `row` of a tensor with these codes and scales.
    pub(crate) fn of(tensor: &HostTensor, codes: &'a [u8], scales: &'a Scales, row: usize) -> Option<Self> {
        let (cols, [high, wide]) = (tensor.cols, scales.block);
        let across = cols.div_ceil(wide);
        let scales = scales.values.get(row / high * across..(row / high + 1) * across)?;
        Some(CodesRow { codes: codes.get(row * cols..(row + 1) * cols)?, scales, wide })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::constant;

    #[test]
    fn the_kernel_that_rounds_inputs_knows_the_same_wide_groups() {
        assert_eq!(constant("hopper/fp8/fp8_inputs.cu", "WIDE_COLS"), Fp8Codes::WIDE_COLS);
        assert_eq!(
            Rounding::of(Inputs::PerGroup(Fp8Codes::WIDE_COLS)),
            Some(Rounding::Groups(Fp8Codes::WIDE_COLS))
        );
        assert_eq!(Rounding::of(Inputs::PerGroup(2 * Fp8Codes::WIDE_COLS)), None);
    }
}
