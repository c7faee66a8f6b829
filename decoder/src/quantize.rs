//! Linear layers made e4m3 when a checkpoint is loaded, as compressed-tensors' `FP8_DYNAMIC` stores them.
//!
//! ```text
//!   row of a matrix ── largest magnitude / 448 ──> its scale, f32
//!                   └─ each element / scale ─────> e4m3, to the nearest           inputs are rounded token by token
//! ```
//!
//! A scale for each row, not for tiles: e4m3's error is relative, so smaller blocks lose no less, and one factor a row leaves
//! a sum over all columns alone, for tensor cores to add up in f32. Embedding, head, routers, norms and biases stay as they are.

use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use half::{bf16, f16};
use minisgl_core::fp8;
use minisgl_core::spec::{Fp8, Inputs, ScaleBlock, WeightFormat};
use minisgl_core::tensor::{Dtype, HostTensor, Scales, TensorData, uniform_element};

use crate::checkpoint::{Checkpoint, CheckpointError};

/// What weights become.
const FORMAT: Fp8 = Fp8 { block: ScaleBlock::Row, inputs: Inputs::PerToken };

impl Checkpoint {
    /// Makes linear layers e4m3, with a scale for each row and inputs rounded to e4m3 for each token. A checkpoint whose weights
    /// are e4m3 already stays as it is.
    pub fn quantized(mut self) -> Checkpoint {
        if self.becomes_fp8() {
            self.tensors.linear_mut().for_each(quantize);
        }
        self
    }

    /// The same, where `before` is such a checkpoint and has most of these tensors: only the others are rounded anew.
    pub(crate) fn quantized_like(mut self, before: &Checkpoint) -> Result<Checkpoint, CheckpointError> {
        let (mut stored, mut rounded) = (before.stored()?, before.tensors.clone());
        if self.becomes_fp8() {
            let earlier = stored.linear_mut().zip(rounded.linear_mut());
            for (tensor, (stored, rounded)) in self.tensors.linear_mut().zip(earlier) {
                if tensor.is_same(stored) {
                    tensor.data = rounded.data.clone();
                } else {
                    quantize(tensor);
                }
            }
        }
        Ok(self)
    }

    /// Says from here on that its weights are e4m3; did it not before?
    fn becomes_fp8(&mut self) -> bool {
        let is_plain = self.config.spec.weights == WeightFormat::Bf16;
        if is_plain {
            self.config.spec.weights = WeightFormat::Fp8(FORMAT);
            self.quantized = true;
        }
        is_plain
    }
}

fn quantize(tensor: &mut HostTensor) {
    let mut codes = vec![0; tensor.rows * tensor.cols];
    let mut values = vec![0.0; tensor.rows];
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let rows = tensor.rows.div_ceil(threads).max(1);
    thread::scope(|scope| {
        let parts = codes.chunks_mut(rows * tensor.cols.max(1)).zip(values.chunks_mut(rows)).enumerate();
        for (part, (codes, values)) in parts {
            let tensor = &*tensor;
            scope.spawn(move || {
                let mut row = vec![0.0; tensor.cols];
                for (i, (codes, value)) in codes.chunks_mut(tensor.cols).zip(values).enumerate() {
                    widen(tensor, part * rows + i, &mut row);
                    *value = quantize_row(&row, codes);
                }
            });
        }
    });
    let range = 0..codes.len();
    let scales = Scales { values, block: [1, tensor.cols], inputs: FORMAT.inputs, input_scale: None };
    tensor.data = TensorData::Fp8 { owner: Arc::new(codes), range, scales: Arc::new(scales) };
}

/// Rounds a row, and gives its scale. A row with what is no number, or infinite, is no number throughout, so that a damaged
/// weight is not mended.
fn quantize_row(row: &[f32], codes: &mut [u8]) -> f32 {
    let largest = fp8::largest_magnitude(row);
    if largest.is_nan() {
        codes.fill(fp8::NAN);
        return 1.0;
    }
    let scale = largest / fp8::MAX;
    // Of zeros alone, or of numbers so small that their scale would be none.
    let scale = if scale < f32::MIN_POSITIVE { 1.0 } else { scale };
    for (code, x) in codes.iter_mut().zip(row) {
        *code = fp8::encode(x / scale);
    }
    scale
}

/// A row of a tensor that is not e4m3.
fn widen(tensor: &HostTensor, row: usize, out: &mut [f32]) {
    let first = row * tensor.cols;
    match &tensor.data {
        TensorData::Bytes { owner, range, dtype } => {
            let size = dtype.bytes();
            let bytes = &(**owner).as_ref()[range.clone()][first * size..][..tensor.cols * size];
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
        // Whole tensors are quantized, and once.
        TensorData::Fp8 { .. } | TensorData::Window { .. } => out.fill(f32::NAN),
    }
}
