//! Where the rows of a matrix's parts are stored.
//!
//! Gate and up rows are stored in turns, eight and eight, so that one multiplication's tile holds both halves of the
//! same outputs: row `s` of gate goes to `s / 8 * 16 + s % 8`, of up 8 further on. The rows are padded with zeros to a
//! multiple of 128. Experts lie one behind the other, each so. All other matrices lie as they are.
//!
//! Invariant: every row of a part has one place, and no two have the same.

use std::ops::Range;

use minisgl_core::backend::WeightRole;
use minisgl_core::tensor::{HostTensor, TensorData};

use super::fp8_codes::{CodesRow, Fp8Codes};
use super::fp8_tiles::{Fp8Row, Fp8Tiles};
use crate::error::CudaError;

/// Rows of gate, then of up, that lie together.
pub(super) const GROUP: usize = 8;
/// Rows that a stored gate-and-up matrix is padded to a multiple of: the rows of a multiplication's tile.
const GATE_UP_PADDING: usize = 128;

/// Some rows of a tensor and where they go.
#[derive(Clone)]
pub(super) struct Piece<'a> {
    pub(super) tensor: &'a HostTensor,
    /// Rows of the tensor.
    pub(super) rows: Range<usize>,
    pub(super) target: Target,
}

impl<'a> Piece<'a> {
    /// A row of its tensor, which is fp8.
    pub(super) fn fp8_row(&self, tiles: Fp8Tiles, row: usize) -> Result<Fp8Row<'a>, CudaError> {
        let refused = || {
            CudaError::Unsupported(format!(
                "{:?} has scales for other blocks of columns than multiples of {} or whole rows, or beyond {}; use --backend cpu",
                self.tensor,
                Fp8Tiles::COLS,
                tiles.scale_max(),
            ))
        };
        match &self.tensor.data {
            TensorData::Fp8 { owner, range, scales } => {
                let codes = &(**owner).as_ref()[range.clone()];
                Fp8Row::of(tiles, self.tensor, codes, scales, row).ok_or_else(refused)
            }
            _ => Err(CudaError::Unsupported(format!("{:?} is no fp8", self.tensor))),
        }
    }

    /// The same as its codes are.
    pub(super) fn codes_row(&self, row: usize) -> Result<CodesRow<'a>, CudaError> {
        let refused = || CudaError::Unsupported(format!("{:?} has no row {row}", self.tensor));
        match &self.tensor.data {
            TensorData::Fp8 { owner, range, scales } => {
                let codes = &(**owner).as_ref()[range.clone()];
                CodesRow::of(self.tensor, codes, scales, row).ok_or_else(refused)
            }
            _ => Err(CudaError::Unsupported(format!("{:?} is no fp8", self.tensor))),
        }
    }
}

/// Row i of a piece goes to row `first + i / group * stride + i % group` of the matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Target {
    pub(super) first: usize,
    pub(super) group: usize,
    pub(super) stride: usize,
}

impl Target {
    pub(super) fn row(&self, i: usize) -> usize {
        self.first + i / self.group * self.stride + i % self.group
    }
}

/// The pieces of a matrix that `parts` are stacked to, and the rows that it is stored in.
pub(super) fn pieces(role: WeightRole, parts: &[HostTensor]) -> (Vec<Piece<'_>>, usize) {
    let total: usize = parts.iter().map(|part| part.rows).sum();
    // Matrices of gate and up, rows of gate or up in each, and how many rows each is stored in.
    let matrices = gate_ups(role);
    let half_rows = (total / 2).checked_div(matrices).unwrap_or(0);
    let stored_rows = gate_up_rows(half_rows);
    let mut pieces = Vec::with_capacity(parts.len() + 1);
    let mut first = 0;
    for tensor in parts {
        let mut push = |rows: Range<usize>, target| {
            if !rows.is_empty() {
                pieces.push(Piece { tensor, rows, target });
            }
        };
        if matrices == 0 {
            push(0..tensor.rows, Target { first, group: tensor.rows, stride: tensor.rows });
        }
        // The part's rows, cut where gates end and where ups do.
        let mut begin = first;
        while half_rows > 0 && begin < first + tensor.rows {
            let (half, row) = (begin / half_rows, begin % half_rows);
            let count = (half_rows - row).min(first + tensor.rows - begin);
            let (matrix, is_up) = (half / 2 * stored_rows, half % 2);
            let to = matrix + is_up * GROUP + row / GROUP * 2 * GROUP + row % GROUP;
            let target = Target { first: to, group: GROUP, stride: 2 * GROUP };
            push(begin - first..begin - first + count, target);
            begin += count;
        }
        first += tensor.rows;
    }
    (pieces, if matrices > 0 { matrices * stored_rows } else { total })
}

/// Do groups of eight rows take scales of two blocks of rows in turn, or of one, within each [`Fp8Codes::PAIRED`] stored rows? Blocks of
/// 128 rows of gate and up do, and those of all parts that are no others' neighbours within so many rows.
pub(super) fn has_pairs(pieces: &[Piece<'_>]) -> bool {
    let rows = pieces
        .iter()
        .filter_map(|piece| piece.rows.len().checked_sub(1).map(|last| piece.target.row(last) + 1));
    let mut blocks = vec![[None; 2]; rows.max().unwrap_or(0).div_ceil(Fp8Codes::PAIRED)];
    pieces.iter().enumerate().all(|(part, piece)| {
        let TensorData::Fp8 { scales, .. } = &piece.tensor.data else { return false };
        piece.rows.clone().enumerate().all(|(i, row)| {
            let (stored, block) = (piece.target.row(i), (part, row / scales.block[0]));
            let turns: &mut [Option<_>; 2] = &mut blocks[stored / Fp8Codes::PAIRED];
            *turns[stored / Fp8Codes::GROUP % 2].get_or_insert(block) == block
        })
    })
}

/// Rows that gate and up, of so many each, are stored in.
pub(crate) fn gate_up_rows(half_rows: usize) -> usize {
    (half_rows.div_ceil(GROUP) * 2 * GROUP).next_multiple_of(GATE_UP_PADDING)
}

/// How many matrices of gate and up are stacked.
pub(super) fn gate_ups(role: WeightRole) -> usize {
    match role {
        WeightRole::GateUp => 1,
        WeightRole::ExpertsGateUp(count) => count as usize,
        WeightRole::Norm(_)
        | WeightRole::Bias
        | WeightRole::Embedding
        | WeightRole::Linear
        | WeightRole::Sliced(_)
        | WeightRole::SlicedRows(_)
        | WeightRole::ExpertsDown(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use minisgl_core::spec::Inputs;
    use minisgl_core::tensor::Scales;

    use super::*;

    fn tensor(rows: usize) -> HostTensor {
        let data = TensorData::Uniform { seed: 0, low: 0.0, high: 1.0 };
        HostTensor { name: "t".into(), rows, cols: 8, data }
    }

    /// `(part, row)` at each stored row.
    fn stored(role: WeightRole, part_rows: &[usize]) -> Vec<Option<(usize, usize)>> {
        let parts: Vec<_> = part_rows.iter().map(|rows| tensor(*rows)).collect();
        let (pieces, rows) = pieces(role, &parts);
        let mut stored = vec![None; rows];
        for piece in pieces {
            let part = parts.iter().position(|part| std::ptr::eq(part, piece.tensor)).unwrap();
            for (i, row) in piece.rows.clone().enumerate() {
                let place = &mut stored[piece.target.row(i)];
                assert_eq!(*place, None, "two rows in one place");
                *place = Some((part, row));
            }
        }
        stored
    }

    #[test]
    fn gate_and_up_rows_take_turns_in_blocks_of_eight() {
        for parts in [vec![24, 24], vec![48]] {
            let stored = stored(WeightRole::GateUp, &parts);
            assert_eq!(stored.len(), 128);
            for s in 0..24 {
                let up = if parts.len() == 2 { (1, s) } else { (0, 24 + s) };
                assert_eq!(stored[s / 8 * 16 + s % 8], Some((0, s)));
                assert_eq!(stored[s / 8 * 16 + 8 + s % 8], Some(up));
            }
            assert!(stored[48..].iter().all(Option::is_none));
        }
    }

    #[test]
    fn experts_lie_one_behind_the_other_whether_they_come_stacked_or_one_by_one() {
        let role = WeightRole::ExpertsGateUp(3);
        let (stacked, one_by_one) = (stored(role, &[6 * 24]), stored(role, &[24; 6]));
        assert_eq!((stacked.len(), one_by_one.len()), (3 * 128, 3 * 128));
        for (row, (whole, part)) in stacked.iter().zip(&one_by_one).enumerate() {
            let place = (row % 128 < 48).then(|| {
                let (expert, row) = (row / 128, row % 128);
                (2 * expert + row / 8 % 2, row / 16 * 8 + row % 8)
            });
            assert_eq!(*part, place);
            assert_eq!(*whole, place.map(|(part, row)| (0, 24 * part + row)));
        }
    }

    #[test]
    fn scales_are_in_pairs_where_no_tile_has_a_third() {
        let fp8 = |rows: usize, high: usize| {
            let scales = Scales {
                values: vec![1.0; rows.div_ceil(high)],
                block: [high, 8],
                inputs: Inputs::PerGroup(8),
                input_scale: None,
            };
            let codes = vec![0u8; rows * 8];
            let data =
                TensorData::Fp8 { range: 0..codes.len(), owner: Arc::new(codes), scales: Arc::new(scales) };
            HostTensor { name: "t".into(), rows, cols: 8, data }
        };
        let has_pairs = |role, parts: &[HostTensor]| has_pairs(&pieces(role, parts).0);
        assert!(has_pairs(WeightRole::GateUp, &[fp8(320, 128), fp8(320, 128)]));
        assert!(has_pairs(WeightRole::GateUp, &[fp8(320, 64), fp8(320, 64)]));
        assert!(has_pairs(WeightRole::GateUp, &[fp8(512, 128)]));
        // Ups begin within a block.
        assert!(!has_pairs(WeightRole::GateUp, &[fp8(704, 128)]));
        assert!(has_pairs(WeightRole::Linear, &[fp8(256, 128), fp8(128, 128), fp8(200, 128)]));
        assert!(!has_pairs(WeightRole::Linear, &[fp8(192, 128), fp8(64, 128)]));
        assert!(!has_pairs(WeightRole::Linear, &[fp8(256, 64)]));
        assert!(!has_pairs(WeightRole::Linear, &[tensor(256)]));
    }

    #[test]
    fn a_linear_layers_parts_are_stacked() {
        let stored = stored(WeightRole::Linear, &[3, 1, 2]);
        let rows = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)];
        assert_eq!(stored, rows.map(Some));
    }
}
