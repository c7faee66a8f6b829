//! Weights on their way up: read from the mapping by all cores into pinned memory, while the piece before is copied.
//!
//! ```text
//!   mapped file ── rayon ──> staging 0 ── copy engine ──> the matrix on the device
//!                  rayon ──> staging 1 ──────^               (bf16; f16 and f32 are rounded on the way)
//! ```
//!
//! A matrix in fp8 is packed into tiles by all cores instead (`fp8_tiles.rs`), 64 stored rows after the other; one whose inputs are
//! rounded, too, lies as it is, with its scales behind it (`fp8_codes.rs`).
//!
//! Dummy weights have no bytes: a kernel makes them in place.

use std::ops::Range;

use bytemuck::cast_slice_mut;
use minisgl_core::backend::{Purpose, Queue, WeightRole};
use minisgl_core::tensor::{HostTensor, TensorData};
use rayon::prelude::*;

use super::fp8_codes::Fp8Codes;
use super::fp8_tiles::Fp8Tiles;
use super::stacking::{GROUP, Piece, Target, gate_ups, pieces};
use super::stored_rows::StoredRows;
use super::{Form, SLICING, Weight};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::Grid;
use crate::memory::{Address, Pinned};

/// Bytes of each of the two staging buffers.
const STAGING_BYTES: usize = 16 << 20;
const THREADS: u32 = 256;

/// Puts weights on a device.
#[derive(Debug, Default)]
pub(crate) struct Loader {
    /// While weights are loaded.
    staging: Option<Staging>,
}

/// The staging memory.
#[derive(Debug)]
struct Staging {
    buffers: [Pinned; 2],
    next: usize,
}

impl Loader {
    /// Puts a matrix on the device; see [`minisgl_core::backend::Ops::load`].
    pub(crate) fn load(
        &mut self,
        gpu: &mut Gpu,
        role: WeightRole,
        parts: &[HostTensor],
    ) -> Result<Weight, CudaError> {
        let (pieces, rows) = pieces(role, parts);
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
        let form = Form::of(role, parts, &pieces)?;
        let bytes = match form {
            Form::Bf16 => rows * cols * 2,
            Form::Tiles(_) => Fp8Tiles::bytes(rows, cols),
            Form::Codes(_) => Fp8Codes { rows, cols }.bytes(),
        };
        let address = gpu.allocate(Purpose::Weights, bytes)?;
        if gate_ups(role) > 0 && form == Form::Bf16 {
            gpu.zero(address, bytes)?;
        }
        let weight = Weight { address, rows, cols, form, slices: 1 };
        let slices = match (form, role) {
            (Form::Codes(_), _) => Fp8Codes { rows, cols }.slices(),
            (
                _,
                WeightRole::Sliced(slices) | WeightRole::SlicedRows(slices) | WeightRole::ExpertsDown(slices),
            ) => slices,
            _ => SLICING.slices(cols),
        };
        let weight = weight.sliced(slices);
        self.reload(gpu, weight, role, parts)?;
        Ok(weight)
    }

    /// Enqueues the copies of a matrix's elements to where it is; see [`minisgl_core::backend::Ops::reload`]. Padding stays.
    pub(crate) fn reload(
        &mut self,
        gpu: &mut Gpu,
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
        if Form::of(role, parts, &pieces)? != weight.form {
            return Err(CudaError::Unsupported(format!("{parts:?} is put into a matrix of another form")));
        }
        match weight.form {
            Form::Bf16 => {}
            Form::Tiles(tiles) => return self.upload_fp8(gpu, tiles, &pieces, weight),
            Form::Codes(_) => return self.upload_codes(gpu, &pieces, weight),
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
                    make_uniform(gpu, &piece, pitch, seed, *low, *high, address)?;
                }
                TensorData::Bytes { owner, range, dtype } => {
                    let bytes = &(**owner).as_ref()[range.clone()];
                    let row_bytes = pitch * dtype.bytes();
                    let bytes = &bytes[first * row_bytes..(first + piece.rows.len()) * row_bytes];
                    let rows = StoredRows { bytes, dtype: *dtype, pitch, cols: first_col..first_col + cols };
                    self.upload_rows(gpu, &rows, piece.target, address)?;
                }
            }
        }
        Ok(())
    }

    /// Frees the staging memory: no more weights come.
    pub(crate) fn free_staging(&mut self) {
        self.staging = None;
    }

    /// Multiplies column c of `matrix` by element c of `norm`, in place. One in fp8 stays: its inputs are multiplied.
    pub(crate) fn scale_columns(&self, gpu: &Gpu, norm: Weight, matrix: Weight) -> Result<(), CudaError> {
        if matrix.is_fp8() {
            return Ok(());
        }
        let kernel = gpu.modules.kernel("weights", "fold_norm", 0)?;
        let cols = matrix.cols as u32;
        let grid = Grid::new(matrix.rows as u32, THREADS);
        gpu.launcher.launch(&kernel, grid, [&matrix.address, &cols, &norm.address])
    }

    fn take_staging(&mut self, gpu: &mut Gpu) -> Result<Staging, CudaError> {
        match self.staging.take() {
            Some(staging) => Ok(staging),
            None => Ok(Staging {
                buffers: [gpu.alloc_pinned(STAGING_BYTES / 4)?, gpu.alloc_pinned(STAGING_BYTES / 4)?],
                next: 0,
            }),
        }
    }

    /// Packs a matrix in fp8 into tiles, a staging buffer at a time.
    fn upload_fp8(
        &mut self,
        gpu: &mut Gpu,
        form: Fp8Tiles,
        pieces: &[Piece<'_>],
        weight: Weight,
    ) -> Result<(), CudaError> {
        let mut rows = vec![None; weight.rows.next_multiple_of(2 * Fp8Tiles::ROWS)];
        for piece in pieces {
            for (i, row) in piece.rows.clone().enumerate() {
                rows[piece.target.row(i)] = Some(piece.fp8_row(form, row)?);
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
        let mut staging = self.take_staging(gpu)?;
        let mut to = weight.address;
        for rows in rows.chunks(at_once) {
            let bytes = rows.len() / Fp8Tiles::ROWS * across;
            let buffer = &mut staging.buffers[staging.next % 2];
            staging.next += 1;
            let packed = &mut cast_slice_mut::<u32, u8>(gpu.words_mut(buffer)?)[..bytes];
            let tiles = packed.par_chunks_mut(across).zip(rows.par_chunks(Fp8Tiles::ROWS));
            tiles.for_each(|(tiles, rows)| form.pack(rows, tiles));
            upload_staged(gpu, buffer, bytes, to)?;
            to = to.offset(bytes);
        }
        self.staging = Some(staging);
        Ok(())
    }

    /// Copies codes as they are, a staging buffer at a time, and scales behind them.
    fn upload_codes(&mut self, gpu: &mut Gpu, pieces: &[Piece<'_>], weight: Weight) -> Result<(), CudaError> {
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
        let mut staging = self.take_staging(gpu)?;
        let at_once = (STAGING_BYTES / cols.max(1)).max(1);
        for (i, rows) in rows.chunks(at_once).enumerate() {
            let buffer = &mut staging.buffers[staging.next % 2];
            staging.next += 1;
            let staged = cast_slice_mut::<u32, u8>(gpu.words_mut(buffer)?);
            let Some(staged) = staged.get_mut(..rows.len() * cols) else {
                return Err(CudaError::Unsupported(format!(
                    "a matrix of {cols} columns is too wide to be loaded"
                )));
            };
            staged.par_chunks_mut(cols.max(1)).zip(rows).for_each(|(to, row)| match row {
                Some(row) => to.copy_from_slice(row.codes),
                None => to.fill(0),
            });
            upload_staged(gpu, buffer, rows.len() * cols, weight.address.offset(i * at_once * cols))?;
        }
        for (i, part) in scales.chunks(STAGING_BYTES / 4).enumerate() {
            let buffer = &mut staging.buffers[staging.next % 2];
            staging.next += 1;
            let words = gpu.words_mut(buffer)?;
            words.iter_mut().zip(part).for_each(|(word, scale)| *word = scale.to_bits());
            upload_staged(
                gpu,
                buffer,
                part.len() * 4,
                weight.address.offset(layout.scales_at() + i * STAGING_BYTES),
            )?;
        }
        self.staging = Some(staging);
        Ok(())
    }

    /// Copies rows to their places, a staging buffer at a time.
    fn upload_rows(
        &mut self,
        gpu: &mut Gpu,
        from: &StoredRows<'_>,
        target: Target,
        matrix: Address,
    ) -> Result<(), CudaError> {
        let (rows, cols) = (from.rows(), from.cols.len());
        let chunk_rows = chunk_rows(rows, cols)?;
        let mut staging = self.take_staging(gpu)?;
        for first in (0..rows).step_by(chunk_rows) {
            let count = chunk_rows.min(rows - first);
            let buffer = &mut staging.buffers[staging.next % 2];
            staging.next += 1;
            let words = gpu.words_mut(buffer)?;
            from.to_bf16(first..first + count, &mut cast_slice_mut(words)[..count * cols]);
            scatter_rows(gpu, buffer, first..first + count, cols, target, matrix)?;
        }
        self.staging = Some(staging);
        Ok(())
    }
}

fn make_uniform(
    gpu: &Gpu,
    piece: &Piece<'_>,
    pitch: usize,
    seed: u64,
    low: f32,
    high: f32,
    matrix: Address,
) -> Result<(), CudaError> {
    let kernel = gpu.modules.kernel("weights", "uniform", 0)?;
    let (cols, target) = (piece.tensor.cols, piece.target);
    let out = matrix.offset(target.first * cols * 2);
    let (group, stride, width) = (target.group as u32, target.stride as u32, high - low);
    gpu.launcher.launch(
        &kernel,
        Grid::new(piece.rows.len() as u32, THREADS),
        [&out, &(cols as u32), &group, &stride, &(pitch as u32), &seed, &low, &width],
    )
}

/// Enqueues the copy of the first bytes of a staging buffer.
fn upload_staged(gpu: &Gpu, buffer: &mut Pinned, bytes: usize, to: Address) -> Result<(), CudaError> {
    gpu.upload_bytes(Queue::Compute, buffer, 0, bytes, to)?;
    let stream = gpu.launcher.stream(Queue::Compute);
    let recorded = buffer.uploaded.record(stream);
    recorded.map_err(|error| gpu.launcher.failed("recording an event", error))
}

/// Enqueues the copy of staged rows, which are rows `rows` of their piece.
fn scatter_rows(
    gpu: &Gpu,
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
        gpu.upload_strided(staged, width, whole, first, pitch)?;
    }
    let done = whole * target.group;
    if done < rows.len() {
        let start = done * row_bytes;
        let bytes = (rows.len() - done) * row_bytes;
        let to = matrix.offset(target.row(rows.start + done) * row_bytes);
        gpu.upload_bytes(Queue::Compute, staged, start, bytes, to)?;
    }
    let stream = gpu.launcher.stream(Queue::Compute);
    staged.uploaded.record(stream).map_err(|error| gpu.launcher.failed("recording an event", error))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_of_rows_fits_the_staging_buffer_in_whole_groups() {
        for (rows, cols) in [(1, 151_936), (151_936, 1024), (12_288, 5120), (9, 1 << 20), (1, 4 << 20)] {
            let chunk = chunk_rows(rows, cols).unwrap();
            assert!(chunk * cols * 2 <= STAGING_BYTES);
            assert!(chunk == rows || chunk.is_multiple_of(GROUP));
        }
        assert!(chunk_rows(9, 2 << 20).is_err());
    }
}
