//! Linear layers made e4m3 when a checkpoint is loaded: tiles of 128 rows by 256 columns.
//!
//! ```text
//!   256 columns of 128 rows ── the best of eight ──> their scale, f32    (core::fp8::best_scale)
//!                           └─ each times 1 / scale ─> e4m3, to the nearest       inputs are rounded by groups of 256 columns
//! ```
//!
//! Tensor cores' sums are moved to f32 after as many columns, and there a tile's scale and a token's are one factor for many sums. e4m3's
//! error is relative, so wide tiles lose little; moving sums is what takes time. Models with experts, whose inputs are not rounded
//! on GPUs, keep the form that Qwen3's and DeepSeek's fp8 checkpoints have: tiles of 128 x 128. Embedding, head, routers, norms and biases
//! stay as they are.

use std::sync::Arc;

use half::{bf16, f16};
use minisgl_core::fp8;
use minisgl_core::spec::{DecoderSpec, Fp8, Inputs, ScaleBlock, WeightFormat};
use minisgl_core::tensor::{Dtype, HostTensor, Scales, TensorData, uniform_element};
use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;

/// Rows that share a scale.
const ROWS: usize = 128;
/// Columns that do, and of a model with experts.
const COLS: usize = 256;
const COLS_OF_EXPERTS: usize = 128;

/// Columns that share a scale in what such a model becomes.
fn cols_of(spec: &DecoderSpec) -> usize {
    let has_experts = spec.layers.iter().any(|layer| layer.experts().is_some());
    if has_experts { COLS_OF_EXPERTS } else { COLS }
}

impl Checkpoint {
    /// Makes linear layers e4m3, with a scale for each tile of 128 rows by 256 columns and inputs rounded to e4m3 by a token's groups of 256
    /// columns; by 128, both, where there are experts. A checkpoint whose weights are e4m3 already stays as it is.
    pub fn quantized(mut self) -> Checkpoint {
        if self.becomes_fp8() {
            let wide = cols_of(&self.config.spec);
            quantize_all(self.tensors.linear_mut(), wide);
        }
        self
    }

    /// The spec of such a checkpoint, from which a device tells whether it computes it before any weight is rounded.
    pub fn quantized_spec(&self) -> DecoderSpec {
        let mut spec = self.config.spec.clone();
        if spec.weights == WeightFormat::Bf16 {
            let cols = cols_of(&spec) as u32;
            let block = ScaleBlock::Tile { rows: ROWS as u32, cols };
            spec.weights = WeightFormat::Fp8(Fp8 { block, inputs: Inputs::PerGroup(cols) });
        }
        spec
    }

    /// The same, where `before` is such a checkpoint and has most of these tensors: only the others are rounded anew.
    pub(crate) fn quantized_like(mut self, before: &Checkpoint) -> Result<Checkpoint, CheckpointError> {
        let (mut stored, mut rounded) = (before.stored()?, before.tensors.clone());
        if self.becomes_fp8() {
            stored.unstack_experts();
            let wide = cols_of(&self.config.spec);
            let earlier = stored.linear_mut().zip(rounded.linear_mut());
            let anew = self.tensors.linear_mut().zip(earlier).filter_map(|(tensor, (stored, rounded))| {
                if !tensor.is_same(stored) {
                    return Some(tensor);
                }
                tensor.data = rounded.data.clone();
                None
            });
            quantize_all(anew, wide);
        }
        Ok(self)
    }

    /// Says from here on that its weights are e4m3; did it not before? Experts that are stacked become matrices by themselves, so that no
    /// tile has rows of two.
    fn becomes_fp8(&mut self) -> bool {
        let is_plain = self.config.spec.weights == WeightFormat::Bf16;
        if is_plain {
            self.config.spec = self.quantized_spec();
            self.quantized = true;
            self.tensors.unstack_experts();
        }
        is_plain
    }
}

/// By all cores, of several tensors at a time: one of an expert's has too few rows for all of them.
fn quantize_all<'a>(tensors: impl Iterator<Item = &'a mut HostTensor>, wide: usize) {
    let mut tensors: Vec<_> = tensors.collect();
    tensors.par_iter_mut().for_each(|tensor| quantize(tensor, wide));
}

/// Gives `wide` columns of as many rows as a tile has a scale.
fn quantize(tensor: &mut HostTensor, wide: usize) {
    let (cols, across) = (tensor.cols.max(1), tensor.cols.div_ceil(wide).max(1));
    let mut codes = vec![0; tensor.rows * tensor.cols];
    let mut values = vec![0.0; tensor.rows.div_ceil(ROWS) * across];
    let bands = codes.par_chunks_mut(ROWS * cols).zip(values.par_chunks_mut(across)).enumerate();
    bands.for_each_init(
        || vec![0.0; ROWS * cols],
        |rows, (band, (codes, values))| {
            let rows = &mut rows[..codes.len()];
            for (row, out) in rows.chunks_mut(cols).enumerate() {
                widen(tensor, band * ROWS + row, out);
            }
            quantize_tiles(rows, cols, wide, codes, values);
        },
    );
    let range = 0..codes.len();
    let inputs = Inputs::PerGroup(wide as u32);
    let scales = Scales { values, block: [ROWS, wide], inputs, input_scale: None };
    tensor.data = TensorData::Fp8 { owner: Arc::new(codes), range, scales: Arc::new(scales) };
}

/// Rounds the tiles beside each other, of `wide` columns, of rows of `cols`, and gives their scales.
fn quantize_tiles(rows: &[f32], cols: usize, wide: usize, codes: &mut [u8], values: &mut [f32]) {
    let mut tile = Vec::with_capacity(ROWS * wide);
    for (value, begin) in values.iter_mut().zip((0..cols).step_by(wide)) {
        let end = cols.min(begin + wide);
        tile.clear();
        rows.chunks(cols).for_each(|row| tile.extend_from_slice(&row[begin..end]));
        *value = scale(&tile);
        for (row, codes) in tile.chunks(end - begin).zip(codes.chunks_mut(cols)) {
            let codes = &mut codes[begin..end];
            match value.is_nan() {
                true => codes.fill(fp8::NAN),
                false => fp8::encode_block(row, *value, codes),
            }
        }
        // Codes that are none say it by themselves.
        if value.is_nan() {
            *value = 1.0;
        }
    }
}

/// A tile's scale. One with what is no number, or infinite, has none and is no number throughout, so that a damaged weight is
/// not mended.
fn scale(tile: &[f32]) -> f32 {
    let largest = fp8::largest_magnitude(tile);
    // Of zeros alone, or of numbers so small that their scale would be none.
    let is_nothing = largest / fp8::MAX < f32::MIN_POSITIVE;
    match largest.is_nan() {
        true => f32::NAN,
        false if is_nothing => 1.0,
        false => fp8::best_scale(tile, largest, |scale| scale),
    }
}

/// A row of a tensor that is not e4m3.
fn widen(tensor: &HostTensor, row: usize, out: &mut [f32]) {
    let (whole, first_row, first_col) = tensor.whole();
    let first = (first_row + row) * whole.cols + first_col;
    match &whole.data {
        TensorData::Bytes { owner, range, dtype } => {
            let size = dtype.bytes();
            let bytes = &(**owner).as_ref()[range.clone()][first * size..][..out.len() * size];
            let pairs = out.iter_mut().zip(bytes.as_chunks::<2>().0);
            match dtype {
                Dtype::Bf16 => pairs.for_each(|(x, pair)| *x = bf16::from_le_bytes(*pair).to_f32()),
                Dtype::F16 => pairs.for_each(|(x, pair)| *x = f16::from_le_bytes(*pair).to_f32()),
                Dtype::F32 => {
                    let fours = out.iter_mut().zip(bytes.as_chunks::<4>().0);
                    fours.for_each(|(x, four)| *x = f32::from_le_bytes(*four));
                }
            }
        }
        TensorData::Uniform { seed, low, high } => {
            let elements = (first as u64..).map(|i| uniform_element(*seed, i, *low, *high).to_f32());
            out.iter_mut().zip(elements).for_each(|(x, element)| *x = element);
        }
        // A tensor is quantized once, and no window is of a window.
        TensorData::Fp8 { .. } | TensorData::Window { .. } => out.fill(f32::NAN),
    }
}
