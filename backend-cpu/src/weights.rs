//! Weights: matrices whose rows are read in place, in the type in which the checkpoint stores them.
//!
//! A matrix is a stack of parts (q over k over v, say), each in its own bytes, kept alive by their owner: usually the
//! mapped file, so loading copies nothing. Dummy weights have no bytes yet; they are made here, once, as bf16.
//! A norm's scale or a bias is a few numbers used by every row, so it is widened to f32 at load.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use minisgl_core::backend::{Purpose, WeightRole};
use minisgl_core::spec::NormForm;
use minisgl_core::tensor::{Dtype, HostTensor, TensorData, uniform_element};
use rayon::prelude::*;

use crate::error::CpuError;
use crate::memory::available;

/// A loaded weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight(pub(crate) usize);

/// A weight's elements.
pub struct Matrix {
    /// Outputs of a linear layer.
    pub rows: usize,
    /// Inputs of a linear layer.
    pub cols: usize,
    /// What a norm multiplies by, or a bias, widened; empty for other roles.
    pub scale: Vec<f32>,
    parts: Vec<Part>,
}

struct Part {
    rows: Range<usize>,
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    bytes: Range<usize>,
    dtype: Dtype,
}

impl Matrix {
    /// The stack of `tensors`.
    pub fn new(role: WeightRole, tensors: &[HostTensor]) -> Result<Matrix, CpuError> {
        let cols = tensors.first().map_or(0, |tensor| tensor.cols);
        let mut matrix =
            Matrix { rows: 0, cols, scale: Vec::new(), parts: Vec::with_capacity(tensors.len()) };
        for tensor in tensors {
            let invalid = |reason| CpuError::Tensor { name: tensor.name.clone(), reason };
            if tensor.cols != cols {
                return Err(invalid("its rows are not as long as those of the tensor it is stacked on"));
            }
            let part = Part::new(tensor, matrix.rows)?;
            let held = (*part.owner).as_ref().len();
            if part.bytes.len() != tensor.rows * cols * part.dtype.bytes() || part.bytes.end > held {
                return Err(invalid("its bytes are not rows * columns elements; the file is damaged"));
            }
            matrix.rows = part.rows.end;
            matrix.parts.push(part);
        }
        if matches!(role, WeightRole::Norm(_) | WeightRole::Bias) {
            let mut scale = vec![0.0; matrix.rows * cols];
            for (row, scale) in scale.chunks_mut(cols).enumerate() {
                matrix.widen(row, 0, scale);
            }
            if role == WeightRole::Norm(NormForm::OnePlusScale) {
                scale.iter_mut().for_each(|scale| *scale += 1.0);
            }
            matrix.scale = scale;
        }
        Ok(matrix)
    }

    /// Columns `from..` of a row, as many as `out` is long, widened to f32.
    #[inline(always)]
    pub fn widen(&self, row: usize, from: usize, out: &mut [f32]) {
        let part = self.parts.iter().find(|part| part.rows.contains(&row));
        let part = part.expect("a row below `rows` lies in a part");
        let first = (row - part.rows.start) * self.cols + from;
        let size = part.dtype.bytes();
        let bytes = &(*part.owner).as_ref()[part.bytes.clone()][first * size..][..out.len() * size];
        match part.dtype {
            Dtype::Bf16 => {
                for (x, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            Dtype::F16 => {
                for (x, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = f16::from_le_bytes(*bytes).to_f32();
                }
            }
            Dtype::F32 => {
                for (x, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*bytes);
                }
            }
        }
    }
}

impl Part {
    fn new(tensor: &HostTensor, first_row: usize) -> Result<Part, CpuError> {
        let rows = first_row..first_row + tensor.rows;
        Ok(match &tensor.data {
            TensorData::Bytes { owner, range, dtype } => {
                Part { rows, owner: owner.clone(), bytes: range.clone(), dtype: *dtype }
            }
            TensorData::Uniform { seed, low, high } => {
                let bytes = uniform_bytes(tensor.rows * tensor.cols, *seed, *low, *high)?;
                Part { rows, bytes: 0..bytes.len(), owner: Arc::new(bytes), dtype: Dtype::Bf16 }
            }
        })
    }
}

/// The elements of a uniform tensor, little-endian bf16.
fn uniform_bytes(elements: usize, seed: u64, low: f32, high: f32) -> Result<Vec<u8>, CpuError> {
    const ELEMENTS: usize = 1 << 14;
    let bytes = elements * 2;
    let error =
        || CpuError::OutOfMemory { purpose: Purpose::Weights, bytes: bytes as u64, free: available().0 };
    let mut out: Vec<u8> = Vec::new();
    out.try_reserve_exact(bytes).map_err(|_| error())?;
    out.resize(bytes, 0);
    out.par_chunks_mut(2 * ELEMENTS).enumerate().for_each(|(chunk, out)| {
        for (i, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let element: bf16 = uniform_element(seed, (chunk * ELEMENTS + i) as u64, low, high);
            *out = element.to_le_bytes();
        }
    });
    Ok(out)
}
