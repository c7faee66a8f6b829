//! Weights on their way up: read from the mapping by all cores into pinned memory, while the piece before is copied.
//!
//! ```text
//!   mapped file ── rayon ──> staging 0 ── copy engine ──> the matrix on the device
//!                  rayon ──> staging 1 ──────^               (bf16; f16 and f32 are rounded on the way)
//! ```
//!
//! Gate and up rows are stored in turns, eight and eight, so that one multiplication's tile holds both halves of the
//! same outputs: row `s` of gate goes to `s / 8 * 16 + s % 8`, of up 8 further on. The rows are padded with zeros to a
//! multiple of 128. Experts lie one behind the other, each so. All other matrices lie as they are.
//!
//! A matrix in fp8 is packed into tiles by all cores instead (`fp8_tiles.rs`), 64 stored rows after the other; one whose inputs are
//! rounded, too, lies as it is, with its scales behind it (`fp8_codes.rs`).
//!
//! Dummy weights have no bytes: a kernel makes them in place.

mod fp8_codes;
mod fp8_tiles;

use std::ops::Range;

use bytemuck::cast_slice_mut;
use half::{bf16, f16};
use minisgl_core::backend::{Device, Purpose, Queue, WeightRole};
use minisgl_core::shard::Slicing;
use minisgl_core::spec::Inputs;
use minisgl_core::tensor::{Dtype, HostTensor, TensorData};
use rayon::prelude::*;

use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::Grid;
use crate::memory::{Address, Buffer, Pinned};

/// Bytes of each of the two staging buffers.
const STAGING_BYTES: usize = 16 << 20;
/// Elements that one task converts.
const TASK_ELEMENTS: usize = 256 << 10;
/// Rows of gate, then of up, that lie together.
const GROUP: usize = 8;
/// Rows that a stored gate-and-up matrix is padded to a multiple of: the rows of a multiplication's tile.
const GATE_UP_PADDING: usize = 128;
const THREADS: u32 = 256;

pub(crate) use fp8_codes::{Fp8Codes, Rounding};
pub(crate) use fp8_tiles::Fp8Tiles;

use fp8_codes::CodesRow;
use fp8_tiles::Fp8Row;

/// How the columns of o and down are cut, which ranks share out: a thread that multiplies has registers for the sums of two pairs
/// of slices (`gemm_prefill.cuh`).
pub const SLICING: Slicing = Slicing { most: 4, block: 64, equal: false };

/// How a matrix's elements lie on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Rows of bf16.
    Bf16,
    /// Tiles of e4m3, which are widened on their way to the tensor cores.
    Tiles,
    /// Codes of e4m3, whose inputs are rounded.
    Codes(Codes),
}

/// What tells matrices of codes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Codes {
    /// How inputs are rounded.
    pub(crate) rounding: Rounding,
    /// Has each row one scale?
    pub(crate) by_rows: bool,
}

/// A matrix on the device, in bf16 or fp8; a handle, like a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight {
    address: Address,
    rows: usize,
    cols: usize,
    form: Form,
    /// Into how many slices its columns are cut where ranks share them out: of one rank all that the matrix has.
    slices: u32,
}

impl Weight {
    /// A matrix `[rows, cols]` of bf16 that already lies on the device.
    pub fn new(address: Address, rows: usize, cols: usize) -> Weight {
        Weight { address, rows, cols, form: Form::Bf16, slices: SLICING.slices(cols) }
    }

    /// A rank's columns of a matrix, among which are so many of its slices.
    pub fn sliced(self, slices: u32) -> Weight {
        Weight { slices, ..self }
    }

    /// Into how many slices the columns are cut in products whose sums ranks share.
    pub fn slices(&self) -> u32 {
        self.slices
    }

    /// Is it in fp8?
    pub fn is_fp8(&self) -> bool {
        self.form != Form::Bf16
    }

    /// What it is if its inputs are rounded.
    pub(crate) fn codes(&self) -> Option<Codes> {
        if let Form::Codes(codes) = self.form { Some(codes) } else { None }
    }

    /// Where it begins.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Rows as stored, padding included.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Words of 16 bits that kernels multiply of a row: its columns, or pairs of codes.
    pub(crate) fn words(&self) -> usize {
        if self.codes().is_some() { self.cols / 2 } else { self.cols }
    }
}

/// Some rows of a tensor and where they go.
#[derive(Clone)]
struct Piece<'a> {
    tensor: &'a HostTensor,
    /// Rows of the tensor.
    rows: Range<usize>,
    target: Target,
}

impl<'a> Piece<'a> {
    /// A row of its tensor, which is fp8.
    fn fp8_row(&self, row: usize) -> Result<Fp8Row<'a>, CudaError> {
        let refused = || {
            CudaError::Unsupported(format!(
                "{:?} has scales for other blocks of columns than multiples of {} or whole rows, or beyond {}; use --backend cpu",
                self.tensor,
                Fp8Tiles::COLS,
                Fp8Tiles::SCALE_MAX,
            ))
        };
        match &self.tensor.data {
            TensorData::Fp8 { owner, range, scales } => {
                let codes = &(**owner).as_ref()[range.clone()];
                Fp8Row::of(self.tensor, codes, scales, row).ok_or_else(refused)
            }
            _ => Err(CudaError::Unsupported(format!("{:?} is no fp8", self.tensor))),
        }
    }

    /// The same as its codes are.
    fn codes_row(&self, row: usize) -> Result<CodesRow<'a>, CudaError> {
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

/// Rows of a tensor, or of its columns `cols`, as they lie in memory.
struct StoredRows<'a> {
    /// From the beginning of the first row on.
    bytes: &'a [u8],
    dtype: Dtype,
    /// Elements from row to row.
    pitch: usize,
    cols: Range<usize>,
}

impl StoredRows<'_> {
    fn rows(&self) -> usize {
        self.bytes.len() / (self.pitch * self.dtype.bytes()).max(1)
    }

    /// Some of them, `[rows, cols]`, to the nearest bf16.
    fn to_bf16(&self, rows: Range<usize>, out: &mut [bf16]) {
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

/// Row i of a piece goes to row `first + i / group * stride + i % group` of the matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Target {
    first: usize,
    group: usize,
    stride: usize,
}

impl Target {
    fn row(&self, i: usize) -> usize {
        self.first + i / self.group * self.stride + i % self.group
    }
}

/// The pieces of a matrix that `parts` are stacked to, and the rows that it is stored in.
fn pieces(role: WeightRole, parts: &[HostTensor]) -> (Vec<Piece<'_>>, usize) {
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

/// Rows that gate and up, of so many each, are stored in.
pub(crate) fn gate_up_rows(half_rows: usize) -> usize {
    (half_rows.div_ceil(GROUP) * 2 * GROUP).next_multiple_of(GATE_UP_PADDING)
}

/// How many matrices of gate and up are stacked.
fn gate_ups(role: WeightRole) -> usize {
    match role {
        WeightRole::GateUp => 1,
        WeightRole::ExpertsGateUp(count) => count as usize,
        WeightRole::Norm(_)
        | WeightRole::Bias
        | WeightRole::Embedding
        | WeightRole::Linear
        | WeightRole::Sliced(_)
        | WeightRole::ExpertsDown(_) => 0,
    }
}

/// The staging memory, alive while weights are loaded.
#[derive(Debug)]
pub(crate) struct Staging {
    buffers: [Pinned; 2],
    next: usize,
}

impl Cuda {
    /// Puts a matrix on the device; see [`minisgl_core::backend::Ops::load`].
    pub fn load_weight(&mut self, role: WeightRole, parts: &[HostTensor]) -> Result<Weight, CudaError> {
        let (_, rows) = pieces(role, parts);
        let cols = parts.first().map_or(0, |part| part.cols);
        let is_fp8 = |part: &HostTensor| matches!(part.data, TensorData::Fp8 { .. });
        let fp8 = parts.iter().any(is_fp8);
        if let Some(odd) = parts.iter().find(|part| fp8 && !is_fp8(part)) {
            return Err(CudaError::Unsupported(format!("{odd:?} is stacked on fp8, and is not")));
        }
        if fp8 && role == WeightRole::Embedding {
            return Err(CudaError::Unsupported(format!(
                "{:?} is an embedding in fp8, which the kernels don't read; use --backend cpu",
                parts[0]
            )));
        }
        let form = form(parts)?;
        let bytes = match form {
            Form::Bf16 => rows * cols * 2,
            Form::Tiles => Fp8Tiles::bytes(rows, cols),
            Form::Codes(_) => Fp8Codes { rows, cols }.bytes(),
        };
        let address = self.allocate(Purpose::Weights, bytes)?;
        if gate_ups(role) > 0 && form == Form::Bf16 {
            self.zero(address, bytes)?;
        }
        let weight = Weight { address, rows, cols, form, slices: 1 };
        let slices = match (form, role) {
            (Form::Codes(_), _) => Fp8Codes { rows, cols }.slices(),
            (_, WeightRole::Sliced(slices) | WeightRole::ExpertsDown(slices)) => slices,
            _ => SLICING.slices(cols),
        };
        let weight = weight.sliced(slices);
        self.reload_weight(weight, role, parts)?;
        Ok(weight)
    }

    /// Enqueues the copies of a matrix's elements to where it is; see [`minisgl_core::backend::Ops::reload`]. Padding stays.
    pub fn reload_weight(
        &mut self,
        weight: Weight,
        role: WeightRole,
        parts: &[HostTensor],
    ) -> Result<(), CudaError> {
        let (pieces, rows) = pieces(role, parts);
        let Weight { address, cols, .. } = weight;
        if rows != weight.rows {
            return Err(CudaError::Unsupported(format!(
                "{parts:?} is put into a matrix of {} rows",
                weight.rows
            )));
        }
        if let Some(odd) = parts.iter().find(|part| part.cols != cols) {
            return Err(CudaError::Unsupported(format!(
                "{odd:?} is stacked below a matrix of {cols} columns"
            )));
        }
        if pieces
            .iter()
            .any(|piece| piece.target.first % GROUP != 0 && piece.target.stride > piece.target.group)
        {
            return Err(CudaError::Unsupported(format!(
                "{:?} is split within a block of {GROUP} rows",
                parts[0]
            )));
        }
        match weight.form {
            Form::Bf16 => {}
            Form::Tiles => return self.upload_fp8(&pieces, weight),
            Form::Codes(_) => return self.upload_codes(&pieces, weight),
        }
        for piece in pieces {
            let (whole, first_row, first_col) = piece.tensor.whole();
            let (first, pitch) = (first_row + piece.rows.start, whole.cols);
            match &whole.data {
                TensorData::Fp8 { .. } | TensorData::Window { .. } => {
                    return Err(CudaError::Unsupported(format!("{:?} is fp8", piece.tensor)));
                }
                TensorData::Uniform { seed, low, high } => {
                    let seed = seed.wrapping_add((first * pitch + first_col) as u64);
                    self.make_uniform(&piece, pitch, seed, *low, *high, address)?;
                }
                TensorData::Bytes { owner, range, dtype } => {
                    let bytes = &(**owner).as_ref()[range.clone()];
                    let row_bytes = pitch * dtype.bytes();
                    let bytes = &bytes[first * row_bytes..(first + piece.rows.len()) * row_bytes];
                    let rows = StoredRows { bytes, dtype: *dtype, pitch, cols: first_col..first_col + cols };
                    self.upload_rows(&rows, piece.target, address)?;
                }
            }
        }
        Ok(())
    }

    /// Frees the staging memory: no more weights come.
    pub fn free_staging(&mut self) {
        self.staging = None;
    }

    /// Multiplies column c of `matrix` by element c of `norm`, in place. One in fp8 stays: its inputs are multiplied.
    pub fn scale_columns(&mut self, norm: Weight, matrix: Weight) -> Result<(), CudaError> {
        if matrix.is_fp8() {
            return Ok(());
        }
        let kernel = self.modules.kernel("weights", "fold_norm", 0)?;
        let cols = matrix.cols as u32;
        let grid = Grid::new(matrix.rows as u32, THREADS);
        self.launcher.launch(&kernel, grid, [&matrix.address, &cols, &norm.address])
    }

    fn make_uniform(
        &mut self,
        piece: &Piece<'_>,
        pitch: usize,
        seed: u64,
        low: f32,
        high: f32,
        matrix: Address,
    ) -> Result<(), CudaError> {
        let kernel = self.modules.kernel("weights", "uniform", 0)?;
        let (cols, target) = (piece.tensor.cols, piece.target);
        let out = matrix.offset(target.first * cols * 2);
        let (group, stride, width) = (target.group as u32, target.stride as u32, high - low);
        self.launcher.launch(
            &kernel,
            Grid::new(piece.rows.len() as u32, THREADS),
            [&out, &(cols as u32), &group, &stride, &(pitch as u32), &seed, &low, &width],
        )
    }

    fn take_staging(&mut self) -> Result<Staging, CudaError> {
        match self.staging.take() {
            Some(staging) => Ok(staging),
            None => Ok(Staging {
                buffers: [self.alloc_pinned(STAGING_BYTES / 4)?, self.alloc_pinned(STAGING_BYTES / 4)?],
                next: 0,
            }),
        }
    }

    /// Packs a matrix in fp8 into tiles, a staging buffer at a time.
    fn upload_fp8(&mut self, pieces: &[Piece<'_>], weight: Weight) -> Result<(), CudaError> {
        let mut rows = vec![None; weight.rows.next_multiple_of(2 * Fp8Tiles::ROWS)];
        for piece in pieces {
            for (i, row) in piece.rows.clone().enumerate() {
                rows[piece.target.row(i)] = Some(piece.fp8_row(row)?);
            }
        }
        let across = Fp8Tiles::across_bytes(weight.cols);
        let at_once = STAGING_BYTES / across * Fp8Tiles::ROWS;
        if at_once == 0 {
            let cols = weight.cols;
            return Err(CudaError::Unsupported(format!(
                "a matrix of {cols} columns is too wide to be loaded"
            )));
        }
        let mut staging = self.take_staging()?;
        let mut to = weight.address;
        for rows in rows.chunks(at_once) {
            let bytes = rows.len() / Fp8Tiles::ROWS * across;
            let buffer = &mut staging.buffers[staging.next % 2];
            staging.next += 1;
            let packed = &mut cast_slice_mut::<u32, u8>(self.words_mut(buffer)?)[..bytes];
            let tiles = packed.par_chunks_mut(across).zip(rows.par_chunks(Fp8Tiles::ROWS));
            tiles.for_each(|(tiles, rows)| Fp8Tiles::pack(rows, tiles));
            self.upload_staged(buffer, bytes, to)?;
            to = to.offset(bytes);
        }
        self.staging = Some(staging);
        Ok(())
    }

    /// Copies codes as they are, a staging buffer at a time, and scales behind them.
    fn upload_codes(&mut self, pieces: &[Piece<'_>], weight: Weight) -> Result<(), CudaError> {
        let (cols, layout) = (weight.cols, Fp8Codes { rows: weight.rows, cols: weight.cols });
        let mut rows = vec![None; weight.rows];
        let mut input_scale = None;
        for piece in pieces {
            for (i, row) in piece.rows.clone().enumerate() {
                rows[piece.target.row(i)] = Some(piece.codes_row(row)?);
            }
            if let TensorData::Fp8 { scales, .. } = &piece.tensor.data {
                if input_scale.is_some_and(|scale| Some(scale) != scales.input_scale) {
                    return Err(CudaError::Unsupported(format!(
                        "{:?} has another scale of its inputs than what it is stacked on; use --plain-inputs",
                        piece.tensor
                    )));
                }
                input_scale = scales.input_scale;
            }
        }
        let Some(mut scales) = layout.scales(&rows) else {
            return Err(CudaError::Unsupported(format!(
                "{} has scales for other blocks than multiples of {} rows and {} columns, or whole rows; use --plain-inputs",
                pieces.iter().map(|piece| piece.tensor.name.as_str()).collect::<Vec<_>>().join(", "),
                Fp8Codes::GROUP,
                Fp8Codes::BLOCK_COLS,
            )));
        };
        scales.push(input_scale.unwrap_or(1.0));
        let mut staging = self.take_staging()?;
        let at_once = (STAGING_BYTES / cols.max(1)).max(1);
        for (i, rows) in rows.chunks(at_once).enumerate() {
            let buffer = &mut staging.buffers[staging.next % 2];
            staging.next += 1;
            let staged = cast_slice_mut::<u32, u8>(self.words_mut(buffer)?);
            let Some(staged) = staged.get_mut(..rows.len() * cols) else {
                return Err(CudaError::Unsupported(format!(
                    "a matrix of {cols} columns is too wide to be loaded"
                )));
            };
            staged.par_chunks_mut(cols.max(1)).zip(rows).for_each(|(to, row)| match row {
                Some(row) => to.copy_from_slice(row.codes),
                None => to.fill(0),
            });
            self.upload_staged(buffer, rows.len() * cols, weight.address.offset(i * at_once * cols))?;
        }
        for (i, part) in scales.chunks(STAGING_BYTES / 4).enumerate() {
            let buffer = &mut staging.buffers[staging.next % 2];
            staging.next += 1;
            let words = self.words_mut(buffer)?;
            words.iter_mut().zip(part).for_each(|(word, scale)| *word = scale.to_bits());
            self.upload_staged(
                buffer,
                part.len() * 4,
                weight.address.offset(layout.scales_at() + i * STAGING_BYTES),
            )?;
        }
        self.staging = Some(staging);
        Ok(())
    }

    /// Enqueues the copy of the first bytes of a staging buffer.
    fn upload_staged(&mut self, buffer: &mut Pinned, bytes: usize, to: Address) -> Result<(), CudaError> {
        self.upload_bytes(buffer, 0, bytes, to)?;
        let stream = self.launcher.stream(Queue::Compute);
        let recorded = buffer.uploaded.record(stream);
        recorded.map_err(|error| self.launcher.failed("recording an event", error))
    }

    /// Copies rows to their places, a staging buffer at a time.
    fn upload_rows(
        &mut self,
        from: &StoredRows<'_>,
        target: Target,
        matrix: Address,
    ) -> Result<(), CudaError> {
        let (rows, cols) = (from.rows(), from.cols.len());
        let chunk_rows = chunk_rows(rows, cols)?;
        let mut staging = self.take_staging()?;
        for first in (0..rows).step_by(chunk_rows) {
            let count = chunk_rows.min(rows - first);
            let buffer = &mut staging.buffers[staging.next % 2];
            staging.next += 1;
            let words = self.words_mut(buffer)?;
            from.to_bf16(first..first + count, &mut cast_slice_mut(words)[..count * cols]);
            self.scatter_rows(buffer, first..first + count, cols, target, matrix)?;
        }
        self.staging = Some(staging);
        Ok(())
    }

    /// Enqueues the copy of staged rows, which are rows `rows` of their piece.
    fn scatter_rows(
        &mut self,
        staged: &mut Pinned,
        rows: Range<usize>,
        cols: usize,
        target: Target,
        matrix: Address,
    ) -> Result<(), CudaError> {
        let row_bytes = cols * 2;
        let whole = if target.group == target.stride { 0 } else { rows.len() / target.group };
        if whole > 0 {
            let first = matrix.offset(target.row(rows.start) * row_bytes);
            let (width, pitch) = (target.group * row_bytes, target.stride * row_bytes);
            self.upload_strided(staged, width, whole, first, pitch)?;
        }
        let done = whole * target.group;
        if done < rows.len() {
            let start = done * row_bytes;
            let bytes = (rows.len() - done) * row_bytes;
            let to = matrix.offset(target.row(rows.start + done) * row_bytes);
            self.upload_bytes(staged, start, bytes, to)?;
        }
        let stream = self.launcher.stream(Queue::Compute);
        staged.uploaded.record(stream).map_err(|error| self.launcher.failed("recording an event", error))
    }
}

/// How a matrix of such parts lies on the device: of one in fp8 all parts' inputs are rounded alike.
fn form(parts: &[HostTensor]) -> Result<Form, CudaError> {
    let mut forms = parts.iter().map(|part| match &part.data {
        TensorData::Fp8 { scales, .. } if scales.inputs == Inputs::Plain => Ok(Form::Tiles),
        TensorData::Fp8 { scales, .. } => match Rounding::of(scales.inputs) {
            Some(rounding) => Ok(Form::Codes(Codes { rounding, by_rows: scales.block[1] >= part.cols })),
            None => Err(CudaError::Unsupported(format!(
                "{part:?} has inputs that are rounded in groups of other than {} columns; use --plain-inputs",
                Fp8Codes::BLOCK_COLS
            ))),
        },
        _ => Ok(Form::Bf16),
    });
    let first = forms.next().unwrap_or(Ok(Form::Bf16))?;
    for other in forms {
        if other? != first {
            return Err(CudaError::Unsupported(format!(
                "the parts of {parts:?} have scales of different kinds; use --plain-inputs"
            )));
        }
    }
    Ok(first)
}

/// Rows that fit a staging buffer: whole groups, unless all rows fit.
fn chunk_rows(rows: usize, cols: usize) -> Result<usize, CudaError> {
    let fit = STAGING_BYTES / (cols * 2).max(1);
    match fit {
        _ if rows <= fit => Ok(rows.max(1)),
        0..GROUP => {
            Err(CudaError::Unsupported(format!("a matrix of {cols} columns is too wide to be loaded")))
        }
        _ => Ok(fit / GROUP * GROUP),
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

impl From<Weight> for Buffer {
    /// The matrix as a buffer of activations, to be downloaded.
    fn from(weight: Weight) -> Buffer {
        Buffer::new(weight.address, minisgl_core::backend::Element::Activation, weight.rows * weight.cols)
    }
}

#[cfg(test)]
mod tests {
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
    fn a_linear_layers_parts_are_stacked() {
        let stored = stored(WeightRole::Linear, &[3, 1, 2]);
        let rows = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)];
        assert_eq!(stored, rows.map(Some));
    }

    #[test]
    fn a_chunk_of_rows_fits_the_staging_buffer_in_whole_groups() {
        for (rows, cols) in [(1, 151_936), (151_936, 1024), (12_288, 5120), (9, 1 << 20), (1, 4 << 20)] {
            let chunk = chunk_rows(rows, cols).unwrap();
            assert!(chunk * cols * 2 <= STAGING_BYTES);
            assert!(chunk == rows || chunk.is_multiple_of(GROUP));
        }
        assert!(chunk_rows(9, 2 << 20).is_err());
    }

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
