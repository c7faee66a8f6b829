//! Matrices in e4m3 as the kernels read them: tiles that lie whole in memory.
//!
//! ```text
//!   matrix   | tiles of rows 0 to 63, one for each 64 columns | of rows 64 to 127 | … |    rows padded to a multiple of 128
//!   tile     | codes of row 0, 64 bytes | of row 1 | … | a scale for each row, 16 bits |
//!   codes    word c of columns 16 k on at byte 16 c + 4 k
//!
//!             columns of a word                             a scale          an element means
//!   dense     2 c + 8, 2 c, 2 c + 9, 2 c + 1 of 16, packed   bf16 times 2^120  the bf16 number nearest to its product   (`fp8_ring.cuh`)
//!   experts   2 c, 2 c + 1, 2 c + 8, 2 c + 9                 f16, 64 times it  a 64th of the f16 number nearest to it   (`experts_tile_fp8.cuh`)
//! ```
//!
//! A scale is rounded to its format. What lies beyond rows or columns is zero.
//!
//! Invariant: every byte of a packed tile is written.

use half::{bf16, f16};
use minisgl_core::fp8;
use minisgl_core::tensor::{HostTensor, Scales};

/// Whose tiles, and so in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fp8Tiles {
    /// Bf16 numbers are made of them by their bits.
    Dense,
    /// F16 numbers are made of them by conversions.
    Experts,
}

impl Fp8Tiles {
    /// Rows and columns of a tile, and its bytes.
    pub(crate) const ROWS: usize = 64;
    pub(crate) const COLS: usize = 64;
    const CODES: usize = Self::ROWS * Self::COLS;
    pub(crate) const BYTES: usize = Self::CODES + Self::ROWS * 2;
    const LIFT: f32 = f32::from_bits((127 + 120) << 23);
    const EXPERTS_LIFT: f32 = 64.0;

    /// The largest scale: 2^120 times it must be a bf16 number, and 448 times 64 times it an f16 number.
    pub(crate) const fn scale_max(self) -> f32 {
        match self {
            Fp8Tiles::Dense => 239.0,
            Fp8Tiles::Experts => 2.0,
        }
    }

    /// Bytes of the tiles beside each other.
    pub(crate) fn across_bytes(cols: usize) -> usize {
        cols.div_ceil(Self::COLS) * Self::BYTES
    }

    /// Bytes of a matrix.
    pub(crate) fn bytes(rows: usize, cols: usize) -> usize {
        rows.next_multiple_of(2 * Self::ROWS) / Self::ROWS * Self::across_bytes(cols)
    }

    /// Packs the tiles beside each other of 64 rows, those of which there are.
    pub(crate) fn pack(self, rows: &[Option<Fp8Row<'_>>], tiles: &mut [u8]) {
        for (block, tile) in tiles.chunks_mut(Self::BYTES).enumerate() {
            let (codes, scales) = tile.split_at_mut(Self::CODES);
            let places = codes.chunks_mut(Self::COLS).zip(scales.as_chunks_mut::<2>().0);
            for (row, (codes, scale)) in rows.iter().zip(places) {
                *scale = match row {
                    Some(row) => row.put(self, block * Self::COLS, codes),
                    None => {
                        codes.fill(0);
                        [0; 2]
                    }
                };
            }
        }
    }
}

/// A row of an e4m3 matrix.
#[derive(Clone, Copy)]
pub(crate) struct Fp8Row<'a> {
    /// Its codes.
    pub(crate) codes: &'a [u8],
    /// The scales of its blocks of columns.
    pub(crate) scales: &'a [f32],
    /// Columns of such a block.
    pub(crate) wide: usize,
}

impl<'a> Fp8Row<'a> {
    /// Row `row` of a tensor with these codes and scales; `None` if a tile's columns have several scales, or one is out of range.
    pub(crate) fn of(
        tiles: Fp8Tiles,
        tensor: &HostTensor,
        codes: &'a [u8],
        scales: &'a Scales,
        row: usize,
    ) -> Option<Self> {
        let (cols, [high, wide]) = (tensor.cols, scales.block);
        let across = cols.div_ceil(wide);
        let scales = scales.values.get(row / high * across..(row / high + 1) * across)?;
        let fits = wide >= cols || wide.is_multiple_of(Fp8Tiles::COLS);
        let in_range = scales.iter().all(|scale| scale.abs() <= tiles.scale_max());
        (fits && in_range).then(|| Fp8Row { codes: &codes[row * cols..][..cols], scales, wide })
    }

    /// Puts 64 codes from column `first` on in their places, and gives their scale.
    fn put(&self, tiles: Fp8Tiles, first: usize, to: &mut [u8]) -> [u8; 2] {
        let mut codes = [0; Fp8Tiles::COLS];
        let there = &self.codes[first..self.codes.len().min(first + Fp8Tiles::COLS)];
        codes[..there.len()].copy_from_slice(there);
        for (k, chunk) in codes.as_chunks::<16>().0.iter().enumerate() {
            for c in 0..4 {
                let word = match tiles {
                    Fp8Tiles::Dense => {
                        packed([chunk[2 * c + 8], chunk[2 * c], chunk[2 * c + 9], chunk[2 * c + 1]])
                    }
                    Fp8Tiles::Experts => [chunk[2 * c], chunk[2 * c + 1], chunk[2 * c + 8], chunk[2 * c + 9]],
                };
                to[16 * c + 4 * k..][..4].copy_from_slice(&word);
            }
        }
        let scale = self.scales[first / self.wide];
        // Who goes by bits knows no code for what is no number.
        let is_number = there.iter().all(|code| code & 0x7f != fp8::NAN);
        match tiles {
            Fp8Tiles::Experts => f16::from_f32(scale * Fp8Tiles::EXPERTS_LIFT).to_le_bytes(),
            Fp8Tiles::Dense if is_number => {
                bf16::from_f32(bf16::from_f32(scale).to_f32() * Fp8Tiles::LIFT).to_le_bytes()
            }
            Fp8Tiles::Dense => bf16::NAN.to_le_bytes(),
        }
    }
}

/// Four codes packed, as the kernels widen them (`fp8.cuh`): the bits of the second and the fourth where bf16 has them.
fn packed(codes: [u8; 4]) -> [u8; 4] {
    let word = u32::from_le_bytes(codes);
    let in_place = word & 0x8000_8000 | word >> 4 & 0x07f0_07f0;
    let around = word << 8 & 0x7000_7000 | word << 4 & 0x0800_0800 | word & 0x000f_000f;
    (in_place | around).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::constant;

    #[test]
    fn weights_of_experts_are_as_many_times_as_their_inputs_are_parts() {
        assert_eq!(constant("experts/experts_f16.cuh", "EXPERTS_INPUTS_UNIT") as f32, Fp8Tiles::EXPERTS_LIFT);
    }

    /// What a packed word becomes in registers, in the codes' order, scaled by one (`fp8_widen`).
    fn widened(word: [u8; 4]) -> [f32; 4] {
        let word = u32::from_le_bytes(word);
        let (odd, even) = (word & 0x87f0_87f0, word << 4 & 0x80f0_80f0 | word >> 4 & 0x0700_0700);
        [even, odd, even >> 16, odd >> 16].map(|bits| bf16::from_bits(bits as u16).to_f32() * Fp8Tiles::LIFT)
    }

    #[test]
    fn packed_codes_are_widened_to_what_they_mean() {
        for code in (0..=u8::MAX).filter(|code| code & 0x7f != fp8::NAN) {
            for codes in [
                [code, 0, 0xfe, 0x01],
                [0x81, code, 0, 0xff ^ 1],
                [0x7e, 0x80, code, 0],
                [0, 0x55, 0xaa, code],
            ] {
                assert_eq!(widened(packed(codes)), codes.map(fp8::decode), "{codes:?}");
            }
        }
    }

    #[test]
    fn every_code_has_one_place_and_what_is_beyond_is_zero() {
        let cols = 72;
        let codes: Vec<u8> = (0..cols as u8).map(|col| col + 1).collect();
        let scales = [0.5, 2.0];
        let row = Fp8Row { codes: &codes, scales: &scales, wide: 64 };
        let mut rows = [None; Fp8Tiles::ROWS];
        rows[3] = Some(row);
        for form in [Fp8Tiles::Dense, Fp8Tiles::Experts] {
            let mut tiles = vec![0xa5; Fp8Tiles::across_bytes(cols)];
            form.pack(&rows, &mut tiles);
            for (block, tile) in tiles.chunks(Fp8Tiles::BYTES).enumerate() {
                let (codes, scales) = tile.split_at(Fp8Tiles::CODES);
                for (r, codes) in codes.chunks(64).enumerate() {
                    for (place, word) in codes.as_chunks::<4>().0.iter().enumerate() {
                        let (c, k) = (place / 4, place % 4);
                        let col_of = |i| 64 * block + 16 * k + 2 * c + i;
                        let code_of = |i| if r == 3 && col_of(i) < cols { col_of(i) as u8 + 1 } else { 0 };
                        let expected = match form {
                            Fp8Tiles::Dense => packed([8, 0, 9, 1].map(code_of)),
                            Fp8Tiles::Experts => [0, 1, 8, 9].map(code_of),
                        };
                        assert_eq!(*word, expected, "{form:?}, row {r}, column {}", col_of(0));
                    }
                }
                for (r, scale) in scales.as_chunks::<2>().0.iter().enumerate() {
                    let (scale, lift) = match form {
                        Fp8Tiles::Dense => (bf16::from_le_bytes(*scale).to_f32(), 2f32.powi(120)),
                        Fp8Tiles::Experts => (f16::from_le_bytes(*scale).to_f32(), 64.0),
                    };
                    assert_eq!(scale, if r == 3 { [0.5, 2.0][block] * lift } else { 0.0 }, "{form:?}");
                }
            }
        }
    }

    #[test]
    fn a_code_that_is_no_number_spoils_its_tiles_row() {
        let mut codes = vec![0x38; 128];
        codes[100] = 0xff;
        let row = Fp8Row { codes: &codes, scales: &[1.0], wide: 128 };
        let mut to = [0; 64];
        assert!(!bf16::from_le_bytes(row.put(Fp8Tiles::Dense, 0, &mut to)).is_nan());
        assert!(bf16::from_le_bytes(row.put(Fp8Tiles::Dense, 64, &mut to)).is_nan());
        // Or stays one.
        assert!(!f16::from_le_bytes(row.put(Fp8Tiles::Experts, 64, &mut to)).is_nan());
        assert_eq!(to.iter().filter(|code| **code & 0x7f == fp8::NAN).count(), 1);
    }
}
