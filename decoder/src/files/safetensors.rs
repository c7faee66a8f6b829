//! One `*.safetensors` file, mapped or read into memory: a length, a JSON header, then the tensors' bytes back to back.
//!
//! ```text
//!   | n: u64 | header: n bytes of JSON | data: name -> [begin, end) of it |
//! ```
//!
//! Nothing is copied: tensors are ranges of the memory, which lives as long as the last of them. The format aligns
//! nothing: a header of odd length puts every element at an odd address.
//!
//! A tensor that comes from elsewhere is a shard of its own.
//!
//! Invariant: once a [`Shard`] is there, every tensor that the header lists lies within the file, and its
//! byte count is its shape's times its element's.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;
use minisgl_core::tensor::{Dtype, HostTensor, Scales, TensorData};
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::CheckpointError;
use crate::tensors::Shape;

/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;
/// Headers are far smaller (a 14B model's has 50 KB); a longer one is no header.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// A tensor's elements, widened.
pub(crate) struct Numbers {
    /// As the file gives it.
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: Vec<f32>,
}

/// A file whose header has been checked.
pub(crate) struct Shard {
    /// The file's, or words that say where it comes from.
    path: PathBuf,
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    header: Metadata,
    /// Where the tensors' bytes begin in the file.
    data_start: usize,
}

impl Shard {
    /// Maps the file and checks its header against its length.
    pub(crate) fn map(path: &Path) -> Result<Shard, CheckpointError> {
        let unreadable = |error| CheckpointError::Unreadable { path: path.to_owned(), reason: error };
        let file = File::open(path).map_err(unreadable)?;
        if !file.metadata().map_err(unreadable)?.is_file() {
            return Err(malformed(path, "it is not a regular file"));
        }
        // SAFETY: the mapping is read-only and nothing here writes to the file. What remains is what every mapped file
        // has: another process that shortens or rewrites the checkpoint while it is in use breaks the reading.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        Shard::of(path, map)
    }

    /// Reads the file, which may be changed afterwards, and checks its header against its length.
    pub(crate) fn read(path: &Path) -> Result<Shard, CheckpointError> {
        let unreadable = |error| CheckpointError::Unreadable { path: path.to_owned(), reason: error };
        Shard::of(path, fs::read(path).map_err(unreadable)?)
    }

    fn of(path: &Path, file: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Shard, CheckpointError> {
        let (header, data_start) = read_header(path, file.as_ref())?;
        Ok(Shard { path: path.to_owned(), owner: Arc::new(file), header, data_start })
    }

    /// One tensor, of little-endian elements.
    pub(crate) fn given(
        path: &Path,
        name: &str,
        dtype: safetensors::Dtype,
        shape: Vec<usize>,
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    ) -> Result<Shard, CheckpointError> {
        let bytes = (*owner).as_ref().len();
        let reason =
            format!("tensor `{name}` has {bytes} bytes, which is not what {dtype} of {shape:?} take");
        let info = TensorInfo { dtype, shape, data_offsets: (0, bytes) };
        let header = Metadata::new(None, vec![(name.to_owned(), info)]);
        let header = header.map_err(|_| malformed(path, reason))?;
        Ok(Shard { path: path.to_owned(), owner, header, data_start: 0 })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors in the file.
    pub(crate) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// The tensor, after checking its type and shape; `None` where the file does not have it. If its elements are e4m3,
    /// `scales` finds what belongs to them, or says that there may be none.
    pub(crate) fn tensor(
        &self,
        name: &str,
        shape: Shape,
        scales: impl FnOnce() -> Result<Option<Scales>, CheckpointError>,
    ) -> Result<Option<HostTensor>, CheckpointError> {
        let Some(info) = self.header.info(name) else { return Ok(None) };
        let is_fp8 = info.dtype == safetensors::Dtype::F8_E4M3;
        // Elements that are packed give a matrix another shape, which says less.
        if !is_fp8 {
            self.dtype(name, info)?;
        }
        if info.shape != shape.dims() {
            return Err(CheckpointError::WrongShape {
                name: name.to_owned(),
                path: self.path.clone(),
                shape: info.shape.clone(),
                expected: shape.dims(),
            });
        }
        let (owner, range) = (self.owner.clone(), shape.within(self.range(info)));
        let fp8 = if is_fp8 { scales()? } else { None };
        let data = match fp8 {
            Some(scales) => TensorData::Fp8 { owner, range, scales: Arc::new(scales) },
            None => TensorData::Bytes { owner, range, dtype: self.dtype(name, info)? },
        };
        let (rows, cols) = shape.rows_cols();
        Ok(Some(HostTensor { name: name.to_owned(), rows, cols, data }))
    }

    /// A small tensor's elements, widened to f32; `None` where the file does not have it.
    pub(crate) fn numbers(&self, name: &str) -> Result<Option<Numbers>, CheckpointError> {
        let Some(info) = self.header.info(name) else { return Ok(None) };
        let bytes = &(*self.owner).as_ref()[self.range(info)];
        let pairs = || bytes.as_chunks::<2>().0.iter();
        let values = match self.dtype(name, info)? {
            Dtype::Bf16 => pairs().map(|pair| bf16::from_le_bytes(*pair).to_f32()).collect(),
            Dtype::F16 => pairs().map(|pair| f16::from_le_bytes(*pair).to_f32()).collect(),
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect(),
        };
        Ok(Some(Numbers { shape: info.shape.clone(), values }))
    }

    /// Where a tensor's bytes are in the file.
    fn range(&self, info: &TensorInfo) -> Range<usize> {
        self.data_start + info.data_offsets.0..self.data_start + info.data_offsets.1
    }

    fn dtype(&self, name: &str, info: &TensorInfo) -> Result<Dtype, CheckpointError> {
        match info.dtype {
            safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
            safetensors::Dtype::F16 => Ok(Dtype::F16),
            safetensors::Dtype::F32 => Ok(Dtype::F32),
            other => Err(CheckpointError::WrongDtype {
                name: name.to_owned(),
                path: self.path.clone(),
                dtype: format!("{other:?}"),
            }),
        }
    }
}

/// The header, and where the data behind it begins.
fn read_header(path: &Path, file: &[u8]) -> Result<(Metadata, usize), CheckpointError> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        let reason = format!("it has {} bytes, too few for a safetensors header", file.len());
        return Err(malformed(path, reason));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX || length > rest.len() as u64 {
        let reason = format!(
            "its header claims {length} bytes, but {} follow: it is truncated or not a safetensors file",
            rest.len()
        );
        return Err(malformed(path, reason));
    }
    let (header, data) = rest.split_at(length as usize);
    let header: Metadata = serde_json::from_slice(header)
        .map_err(|error| malformed(path, format!("its header is not valid: {error}")))?;
    match header.data_len() {
        end if end > data.len() => Err(malformed(path, truncation(&header, data.len()))),
        end if end < data.len() => {
            let reason = format!("{} bytes follow the last tensor", data.len() - end);
            Err(malformed(path, reason))
        }
        _ => Ok((header, LENGTH_BYTES + length as usize)),
    }
}

/// Says which tensor is the first that the file has not whole.
fn truncation(header: &Metadata, data_bytes: usize) -> String {
    let cut = header
        .offset_keys()
        .into_iter()
        .find_map(|name| header.info(&name).filter(|info| info.data_offsets.1 > data_bytes).map(|_| name));
    format!(
        "it is truncated within tensor `{}`: {data_bytes} of {} bytes of data are there; download it again",
        cut.unwrap_or_default(),
        header.data_len()
    )
}

fn malformed(path: &Path, reason: impl Into<String>) -> CheckpointError {
    CheckpointError::Malformed { path: path.to_owned(), reason: reason.into() }
}
