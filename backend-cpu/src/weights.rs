//! Weights: matrices whose rows are read in place, in the type in which the checkpoint stores them.
//!
//! A matrix is a stack of parts (q over k over v, say), each in its own bytes, kept alive by their owner: usually the
//! mapped file, so loading copies nothing. Dummy weights have no bytes yet; they are made here, once, as bf16. A part in
//! e4m3 has scales beside it, and an element is the product of both in f32.
//! A part may be a window of a larger tensor: then its rows lie apart.
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
    /// Into how many slices the columns are cut, each summed from zero: see [`WeightRole::Sliced`].
    pub slices: usize,
    /// Are the columns shared out where there are several ranks?
    pub shared: bool,
    /// What a norm multiplies by, or a bias, widened; empty for other roles.
    pub scale: Vec<f32>,
    /// How what it is applied to is rounded before.
    pub rounding: Rounding,
    parts: Vec<Stacked>,
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
    /// A whole row by its largest magnitude, be it on this rank or on another.
    Row,
    /// So many columns by their largest magnitude.
    Groups(usize),
    /// By this scale.
    Static(f32),
}

/// A host tensor, or a window of one, as rows of the matrix.
struct Stacked {
    rows: Range<usize>,
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    bytes: Range<usize>,
    elements: Elements,
    /// Where in the tensor that the bytes are its first element lies.
    first: Corner,
    /// Columns of that tensor.
    stored_cols: usize,
}

#[derive(Clone, Copy, Default)]
struct Corner {
    row: usize,
    col: usize,
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
        let slices = match role {
            WeightRole::Sliced(slices) | WeightRole::SlicedRows(slices) | WeightRole::ExpertsDown(slices) => {
                slices as usize
            }
            _ => 1,
        };
        let mut matrix = Matrix {
            rows: 0,
            cols,
            slices,
            shared: matches!(role, WeightRole::Sliced(_)),
            scale: Vec::new(),
            rounding: Rounding::None,
            parts,
        };
        for tensor in tensors {
            let invalid = |reason| CpuError::Tensor { name: tensor.name.clone(), reason };
            if tensor.cols != cols {
                return Err(invalid("its rows are not as long as those of the tensor it is stacked on"));
            }
            if slices == 0 || !slices.is_power_of_two() || !cols.is_multiple_of(slices) {
                return Err(invalid("its columns can't be cut into as many slices as are asked for"));
            }
            let part = Stacked::new(tensor, matrix.rows)?;
            let rounding = part.elements.rounding();
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
        let (row, from) = (part.first.row + row - part.rows.start, part.first.col + from);
        let first = row * part.stored_cols + from;
        let size = part.elements.bytes();
        let bytes = &(*part.owner).as_ref()[part.bytes.clone()][first * size..][..out.len() * size];
        let dtype = match &part.elements {
            Elements::Fp8(scales) => {
                return widen_fp8(bytes, scales, part.stored_cols, row, from, out);
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

    /// How what a matrix of such elements is applied to is rounded.
    fn rounding(&self) -> Rounding {
        let Elements::Fp8(scales) = self else { return Rounding::None };
        match scales.inputs {
            Inputs::Plain => Rounding::None,
            Inputs::PerToken => Rounding::Row,
            Inputs::PerGroup(width) => Rounding::Groups(width as usize),
            Inputs::Static => scales.input_scale.map_or(Rounding::None, Rounding::Static),
        }
    }
}

impl Stacked {
    fn new(tensor: &HostTensor, first_row: usize) -> Result<Stacked, CpuError> {
        let invalid = |reason| CpuError::Tensor { name: tensor.name.clone(), reason };
        let rows = first_row..first_row + tensor.rows;
        let (stored, first) = match &tensor.data {
            TensorData::Window { whole, first_row, first_col } => {
                (&**whole, Corner { row: *first_row, col: *first_col })
            }
            _ => (tensor, Corner::default()),
        };
        if first.row + tensor.rows > stored.rows || first.col + tensor.cols > stored.cols {
            return Err(invalid("it is a window that reaches beyond its tensor"));
        }
        let (owner, bytes, elements) = match &stored.data {
            TensorData::Bytes { owner, range, dtype } => (owner, range, Elements::Plain(*dtype)),
            TensorData::Fp8 { owner, range, scales } => {
                check_scales(stored, scales).map_err(invalid)?;
                (owner, range, Elements::Fp8(scales.clone()))
            }
            TensorData::Uniform { seed, low, high } => {
                let bytes = uniform_bytes(tensor, (stored.cols, first), *seed, *low, *high)?;
                let (bytes, owner) = (0..bytes.len(), Arc::new(bytes));
                let (elements, first) = (Elements::Plain(Dtype::Bf16), Corner::default());
                return Ok(Stacked { rows, owner, bytes, elements, first, stored_cols: tensor.cols });
            }
            TensorData::Window { .. } => return Err(invalid("it is a window of a window")),
        };
        let held = (**owner).as_ref().len();
        if bytes.len() != stored.rows * stored.cols * elements.bytes() || bytes.end > held {
            return Err(invalid("its bytes are not rows * columns elements; the file is damaged"));
        }
        let (owner, bytes) = (owner.clone(), bytes.clone());
        Ok(Stacked { rows, owner, bytes, elements, first, stored_cols: stored.cols })
    }
}

fn check_scales(tensor: &HostTensor, scales: &Scales) -> Result<(), &'static str> {
    let [block_rows, block_cols] = scales.block;
    if block_rows * block_cols == 0 || scales.inputs == Inputs::PerGroup(0) {
        return Err("its scales are of blocks of no elements");
    }
    if scales.inputs == Inputs::Static && scales.input_scale.is_none() {
        return Err("its inputs are rounded by a scale that it does not have");
    }
    match scales.values.len() == tensor.rows.div_ceil(block_rows) * tensor.cols.div_ceil(block_cols) {
        true => Ok(()),
        false => Err("it has not one scale for each block of its elements"),
    }
}

/// The elements of a uniform tensor, little-endian bf16: of one that begins in a corner of a tensor of so many columns.
fn uniform_bytes(
    tensor: &HostTensor,
    (stored_cols, first): (usize, Corner),
    seed: u64,
    low: f32,
    high: f32,
) -> Result<Vec<u8>, CpuError> {
    const ELEMENTS: usize = 1 << 14;
    let bytes = tensor.rows * tensor.cols * 2;
    let error =
        || CpuError::OutOfMemory { purpose: Purpose::Weights, bytes: bytes as u64, free: available().0 };
    let mut out: Vec<u8> = Vec::new();
    out.try_reserve_exact(bytes).map_err(|_| error())?;
    out.resize(bytes, 0);
    out.par_chunks_mut(2 * ELEMENTS).enumerate().for_each(|(chunk, out)| {
        for (i, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let i = chunk * ELEMENTS + i;
            let (row, col) = (first.row + i / tensor.cols, first.col + i % tensor.cols);
            let element: bf16 = uniform_element(seed, (row * stored_cols + col) as u64, low, high);
            *out = element.to_le_bytes();
        }
    });
    Ok(out)
}
