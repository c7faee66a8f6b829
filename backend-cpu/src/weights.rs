//! Weights: matrices whose rows are read in place, in the type in which the checkpoint stores them.
//!
//! A matrix is a stack of parts (q over k over v, say), each in its own bytes, kept alive by their owner: usually the
//! mapped file, so loading copies nothing. Dummy weights have no bytes yet; they are made here, once, as bf16. A part in
//! e4m3 has scales beside it, and an element is the product of both in f32.
//! A norm's scale or a bias is a few numbers used by every row, so it is widened to f32 at load.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use minisgl_core::backend::{Purpose, WeightRole};
use minisgl_core::fp8;
use minisgl_core::spec::{Inputs, NormForm};
use minisgl_core::tensor::{Dtype, HostTensor, Scales, TensorData, uniform_element};
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
    /// How what it is applied to is rounded before.
    pub rounding: Rounding,
    parts: Vec<Part>,
}

/// Some rows of a matrix.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub matrix: &'a Matrix,
    pub first: usize,
    pub count: usize,
}

impl Rows<'_> {
    /// See [`Matrix::widen`].
    #[inline(always)]
    pub fn widen(&self, row: usize, from: usize, out: &mut [f32]) {
        self.matrix.widen(self.first + row, from, out);
    }
}

/// How activations are rounded to e4m3, all of a row's groups alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rounding {
    /// Not at all.
    None,
    /// So many columns by their largest magnitude.
    Groups(usize),
    /// By this scale.
    Static(f32),
}

struct Part {
    rows: Range<usize>,
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    bytes: Range<usize>,
    elements: Elements,
}

enum Elements {
    Plain(Dtype),
    /// One byte each.
    Fp8(Arc<Scales>),
}

impl Matrix {
    /// The stack of `tensors`.
    pub fn new(role: WeightRole, tensors: &[HostTensor]) -> Result<Matrix, CpuError> {
        let cols = tensors.first().map_or(0, |tensor| tensor.cols);
        let parts = Vec::with_capacity(tensors.len());
        let mut matrix = Matrix { rows: 0, cols, scale: Vec::new(), rounding: Rounding::None, parts };
        for tensor in tensors {
            let invalid = |reason| CpuError::Tensor { name: tensor.name.clone(), reason };
            if tensor.cols != cols {
                return Err(invalid("its rows are not as long as those of the tensor it is stacked on"));
            }
            let part = Part::new(tensor, matrix.rows)?;
            let held = (*part.owner).as_ref().len();
            if part.bytes.len() != tensor.rows * cols * part.elements.bytes() || part.bytes.end > held {
                return Err(invalid("its bytes are not rows * columns elements; the file is damaged"));
            }
            let rounding = part.elements.rounding(cols);
            if !matrix.parts.is_empty() && rounding != matrix.rounding {
                return Err(invalid(
                    "its inputs are quantized in another way than those of the tensor it is stacked on",
                ));
            }
            matrix.rounding = rounding;
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

    /// Becomes the stack of `tensors`, which has the same shape.
    pub fn replace(&mut self, role: WeightRole, tensors: &[HostTensor]) -> Result<(), CpuError> {
        let new = Matrix::new(role, tensors)?;
        if (self.rows, self.cols) != (new.rows, new.cols) {
            let name = tensors.first().map_or_else(String::new, |tensor| tensor.name.clone());
            return Err(CpuError::Tensor { name, reason: "it has not the shape of what it replaces" });
        }
        *self = new;
        Ok(())
    }

    /// All of its rows.
    pub fn all(&self) -> Rows<'_> {
        Rows { matrix: self, first: 0, count: self.rows }
    }

    /// The rows of one of `count` equal matrices that are stacked.
    pub fn one_of(&self, count: usize, index: usize) -> Rows<'_> {
        let rows = self.rows / count;
        Rows { matrix: self, first: index * rows, count: rows }
    }

    /// Columns `from..` of a row, as many as `out` is long, widened to f32.
    #[inline(always)]
    pub fn widen(&self, row: usize, from: usize, out: &mut [f32]) {
        let part = &self.parts[self.parts.partition_point(|part| part.rows.end <= row)];
        let first = (row - part.rows.start) * self.cols + from;
        let size = part.elements.bytes();
        let bytes = &(*part.owner).as_ref()[part.bytes.clone()][first * size..][..out.len() * size];
        let dtype = match &part.elements {
            Elements::Fp8(scales) => {
                return widen_fp8(bytes, scales, self.cols, row - part.rows.start, from, out);
            }
            Elements::Plain(dtype) => dtype,
        };
        match dtype {
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

/// Columns `from..` of a row of an e4m3 matrix of `cols` columns, block by block.
#[inline(always)]
fn widen_fp8(bytes: &[u8], scales: &Scales, cols: usize, row: usize, from: usize, out: &mut [f32]) {
    let [block_rows, block_cols] = scales.block;
    let row_scales = &scales.values[row / block_rows * cols.div_ceil(block_cols)..];
    let (mut at, mut column) = (0, from);
    while at < bytes.len() {
        let len = (block_cols - column % block_cols).min(bytes.len() - at);
        let scale = row_scales[column / block_cols];
        for (x, byte) in out[at..at + len].iter_mut().zip(&bytes[at..at + len]) {
            *x = fp8::VALUES[usize::from(*byte)] * scale;
        }
        (at, column) = (at + len, column + len);
    }
}

impl Elements {
    /// Bytes of an element.
    fn bytes(&self) -> usize {
        match self {
            Elements::Plain(dtype) => dtype.bytes(),
            Elements::Fp8(_) => 1,
        }
    }

    /// How what a matrix of such elements and so many columns is applied to is rounded.
    fn rounding(&self, cols: usize) -> Rounding {
        let Elements::Fp8(scales) = self else { return Rounding::None };
        match scales.inputs {
            Inputs::Plain => Rounding::None,
            Inputs::PerToken => Rounding::Groups(cols),
            Inputs::PerGroup(width) => Rounding::Groups(width as usize),
            Inputs::Static => scales.input_scale.map_or(Rounding::None, Rounding::Static),
        }
    }
}

impl Part {
    fn new(tensor: &HostTensor, first_row: usize) -> Result<Part, CpuError> {
        let rows = first_row..first_row + tensor.rows;
        Ok(match &tensor.data {
            TensorData::Bytes { owner, range, dtype } => {
                let elements = Elements::Plain(*dtype);
                Part { rows, owner: owner.clone(), bytes: range.clone(), elements }
            }
            TensorData::Fp8 { owner, range, scales } => {
                let [block_rows, block_cols] = scales.block;
                let invalid = |reason| CpuError::Tensor { name: tensor.name.clone(), reason };
                if block_rows * block_cols == 0 || scales.inputs == Inputs::PerGroup(0) {
                    return Err(invalid("its scales are of blocks of no elements"));
                }
                let blocks = tensor.rows.div_ceil(block_rows) * tensor.cols.div_ceil(block_cols);
                if scales.inputs == Inputs::Static && scales.input_scale.is_none() {
                    return Err(invalid("its inputs are rounded by a scale that it does not have"));
                }
                if scales.values.len() != blocks {
                    return Err(invalid("it has not one scale for each block of its elements"));
                }
                let elements = Elements::Fp8(scales.clone());
                Part { rows, owner: owner.clone(), bytes: range.clone(), elements }
            }
            TensorData::Uniform { seed, low, high } => {
                let bytes = uniform_bytes(tensor.rows * tensor.cols, *seed, *low, *high)?;
                let elements = Elements::Plain(Dtype::Bf16);
                Part { rows, bytes: 0..bytes.len(), owner: Arc::new(bytes), elements }
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
