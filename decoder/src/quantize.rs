//! Linear layers made e4m3 when a checkpoint is loaded, in a form that compressed-tensors has: blocks of 1 x 128.
//!
//! ```text
//!   128 columns of a row ── the best of eight ──> their scale, f32       (core::fp8::best_scale)
//!                        └─ each times 1 / scale ─> e4m3, to the nearest           inputs are rounded token by token
//! ```
//!
//! A scale for so few columns, because the search for one gains from the largest elements, of which long rows have more than a scale
//! can serve. Tensor cores' sums are moved to f32 after as many columns anyway. Embedding, head, routers, norms and biases
//! stay as they are.

use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use half::{bf16, f16};
use minisgl_core::fp8;
use minisgl_core::spec::{Fp8, Inputs, ScaleBlock, WeightFormat};
use minisgl_core::tensor::{Dtype, HostTensor, Scales, TensorData, uniform_element};

use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;

/// Columns of a row that share a scale.
const GROUP: usize = 128;
/// What weights become.
const FORMAT: Fp8 = Fp8 { block: ScaleBlock::Tile { rows: 1, cols: GROUP as u32 }, inputs: Inputs::PerToken };

impl Checkpoint {
    /// Makes linear layers e4m3, with a scale for each 128 columns of a row and inputs rounded to e4m3 for each token. A checkpoint
    /// whose weights are e4m3 already stays as it is.
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
    let groups = tensor.cols.div_ceil(GROUP);
    let mut codes = vec![0; tensor.rows * tensor.cols];
    let mut values = vec![0.0; tensor.rows * groups];
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let share = tensor.rows.div_ceil(threads).max(1);
    thread::scope(|scope| {
        let parts =
            codes.chunks_mut(share * tensor.cols.max(1)).zip(values.chunks_mut(share * groups.max(1)));
        for (part, (codes, values)) in parts.enumerate() {
            let tensor = &*tensor;
            scope.spawn(move || {
                let mut row = vec![0.0; tensor.cols];
                let rows = codes.chunks_mut(tensor.cols).zip(values.chunks_mut(groups)).enumerate();
                for (i, (codes, values)) in rows {
                    widen(tensor, part * share + i, &mut row);
                    let groups = row.chunks(GROUP).zip(codes.chunks_mut(GROUP));
                    for ((group, codes), value) in groups.zip(values) {
                        *value = quantize_group(group, codes);
                    }
                }
            });
        }
    });
    let range = 0..codes.len();
    let scales = Scales { values, block: [1, GROUP], inputs: FORMAT.inputs, input_scale: None };
    tensor.data = TensorData::Fp8 { owner: Arc::new(codes), range, scales: Arc::new(scales) };
}

/// Rounds a group, and gives its scale. One with what is no number, or infinite, is no number throughout, so that a damaged
/// weight is not mended.
fn quantize_group(group: &[f32], codes: &mut [u8]) -> f32 {
    let largest = fp8::largest_magnitude(group);
    if largest.is_nan() {
        codes.fill(fp8::NAN);
        return 1.0;
    }
    // Of zeros alone, or of numbers so small that their scale would be none.
    let is_nothing = largest / fp8::MAX < f32::MIN_POSITIVE;
    let scale = if is_nothing { 1.0 } else { fp8::best_scale(group, largest, |scale| scale) };
    fp8::encode_block(group, scale, codes);
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
