//! Rows of a tensor as they lie in a file, on their way to bf16, by all cores: f16 and f32 are rounded to the nearest, ties to even.

use std::ops::Range;

use bytemuck::cast_slice_mut;
use half::{bf16, f16};
use minisgl_core::tensor::Dtype;
use rayon::prelude::*;

/// Elements that one task converts.
const TASK_ELEMENTS: usize = 256 << 10;

/// Rows of a tensor, or of its columns `cols`, as they lie in memory.
pub(super) struct StoredRows<'a> {
    /// From the beginning of the first row on.
    pub(super) bytes: &'a [u8],
    pub(super) dtype: Dtype,
    /// Elements from row to row.
    pub(super) pitch: usize,
    pub(super) cols: Range<usize>,
}

impl StoredRows<'_> {
    pub(super) fn rows(&self) -> usize {
        self.bytes.len() / (self.pitch * self.dtype.bytes()).max(1)
    }

    /// Some of them, `[rows, cols]`, to the nearest bf16.
    pub(super) fn to_bf16(&self, rows: Range<usize>, out: &mut [bf16]) {
        let row_bytes = self.pitch * self.dtype.bytes();
        let bytes = &self.bytes[rows.start * row_bytes..rows.end * row_bytes];
        if self.cols.len() == self.pitch {
            return to_bf16(bytes, self.dtype, out);
        }
        let part = self.cols.start * self.dtype.bytes()..self.cols.end * self.dtype.bytes();
        let rows = out.par_chunks_mut(self.cols.len().max(1)).zip(bytes.par_chunks(row_bytes.max(1)));
        rows.for_each(|(out, row)| to_bf16(&row[part.clone()], self.dtype, out));
    }
}

/// Little-endian elements to bf16, to the nearest, ties to even.
fn to_bf16(bytes: &[u8], dtype: Dtype, out: &mut [bf16]) {
    let tasks = out.par_chunks_mut(TASK_ELEMENTS).zip(bytes.par_chunks(TASK_ELEMENTS * dtype.bytes()));
    tasks.for_each(|(out, bytes)| match dtype {
        Dtype::Bf16 => cast_slice_mut::<bf16, u8>(out).copy_from_slice(bytes),
        Dtype::F16 => {
            for (out, &[a, b]) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16::from_f32(f16::from_le_bytes([a, b]).to_f32());
            }
        }
        Dtype::F32 => {
            for (out, &element) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16::from_f32(f32::from_le_bytes(element));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wider_floats_are_rounded_to_the_nearest_bf16() {
        let values = [1.0f32, -2.718_012_3, 1.0 + 1.0 / 256.0, 65504.0, 1e-30];
        let f32s: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut out = [bf16::ZERO; 5];
        to_bf16(&f32s, Dtype::F32, &mut out);
        assert_eq!(out, values.map(bf16::from_f32));
        let f16s: Vec<u8> = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
        to_bf16(&f16s, Dtype::F16, &mut out);
        assert_eq!(out, values.map(|value| bf16::from_f32(f16::from_f32(value).to_f32())));
        let bf16s: Vec<u8> = out.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut same = [bf16::ZERO; 5];
        to_bf16(&bf16s, Dtype::Bf16, &mut same);
        assert_eq!(same, out);
    }
}
