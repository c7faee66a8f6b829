//! Tensors on the host, on their way to a device.
//!
//! A tensor's bytes lie in somebody else's memory (a mapped file, kept alive by the `Arc`) and are read in place, or
//! are made from a seed: dummy weights have no bytes until a backend makes them, the same on every backend.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use half::bf16;

use crate::spec::Inputs;

/// Element type of a host tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }
}

/// A row-major matrix (a vector has one column per element and one row).
#[derive(Clone)]
pub struct HostTensor {
    /// The tensor's name in the checkpoint, for messages.
    pub name: String,
    /// Rows: outputs of a linear layer.
    pub rows: usize,
    /// Columns: inputs of a linear layer.
    pub cols: usize,
    /// The elements.
    pub data: TensorData,
}

/// Where a tensor's elements come from.
#[derive(Clone)]
pub enum TensorData {
    /// Little-endian elements within bytes kept alive by `owner`, at any alignment.
    Bytes {
        /// The memory, usually a mapped file.
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        /// The tensor's bytes in it: `rows * cols * dtype.bytes()` of them.
        range: Range<usize>,
        /// Type of the elements.
        dtype: Dtype,
    },
    /// e4m3 elements, likewise, and what they are multiplied by.
    Fp8 {
        /// The memory, usually a mapped file.
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        /// The tensor's bytes in it: `rows * cols` of them.
        range: Range<usize>,
        /// The scales.
        scales: Arc<Scales>,
    },
    /// Uniform in `[low, high)`, bf16: see [`uniform_element`].
    Uniform {
        /// Tells tensors apart.
        seed: u64,
        /// Least value.
        low: f32,
        /// Bound above.
        high: f32,
    },
    /// Some rows and columns of a larger one.
    Window {
        /// The larger one; no window itself.
        whole: Arc<HostTensor>,
        /// Which of its rows is the first.
        first_row: usize,
        /// Which of its columns.
        first_col: usize,
    },
}

/// Scales of an e4m3 matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Scales {
    /// `[rows / block rows, cols / block cols]`, rounded up: what the elements of each block are multiplied by.
    pub values: Vec<f32>,
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// What the matrix is applied to.
    pub inputs: Inputs,
    /// The scale of [`Inputs::Static`].
    pub input_scale: Option<f32>,
}

impl Scales {
    /// Those of some rows of a matrix of `[rows, cols]`; `None` where a block has rows before them, too, but not all of the matrix.
    pub fn of_rows(&self, part: Range<usize>, [rows, cols]: [usize; 2]) -> Option<Scales> {
        let [high, wide] = self.block;
        if high < rows && !part.start.is_multiple_of(high) {
            return None;
        }
        let across = cols.div_ceil(wide);
        let values = self.values.get(part.start / high * across..part.end.div_ceil(high) * across)?.to_vec();
        Some(Scales { values, ..self.clone() })
    }
}

impl HostTensor {
    /// Bytes of its elements on the host, scales included.
    pub fn bytes(&self) -> usize {
        let elements = self.rows * self.cols;
        match &self.data {
            TensorData::Bytes { dtype, .. } => elements * dtype.bytes(),
            TensorData::Fp8 { scales, .. } => elements + size_of_val(scales.values.as_slice()),
            TensorData::Uniform { .. } => elements * Dtype::Bf16.bytes(),
            TensorData::Window { whole, .. } => whole.bytes() * elements / (whole.rows * whole.cols).max(1),
        }
    }

    /// These rows and columns of it, read where they lie.
    ///
    /// # Panics
    /// If it has them not.
    pub fn window(&self, rows: Range<usize>, cols: Range<usize>) -> HostTensor {
        assert!(rows.end <= self.rows && cols.end <= self.cols, "{rows:?}, {cols:?} of {self:?}");
        let (whole, row, col) = match &self.data {
            TensorData::Window { whole, first_row, first_col } => (whole.clone(), *first_row, *first_col),
            _ => (Arc::new(self.clone()), 0, 0),
        };
        let data = TensorData::Window { whole, first_row: row + rows.start, first_col: col + cols.start };
        HostTensor { name: self.name.clone(), rows: rows.len(), cols: cols.len(), data }
    }

    /// What it is a window of, and where there its rows and columns begin; of no window itself.
    pub fn whole(&self) -> (&HostTensor, usize, usize) {
        match &self.data {
            TensorData::Window { whole, first_row, first_col } => (whole, *first_row, *first_col),
            _ => (self, 0, 0),
        }
    }

    /// Has it the same elements as `other` in the same memory, or made in the same way? Equal elements elsewhere are not the same.
    pub fn is_same(&self, other: &HostTensor) -> bool {
        (self.rows, self.cols) == (other.rows, other.cols) && self.data.is_same(&other.data)
    }
}

impl TensorData {
    fn is_same(&self, other: &TensorData) -> bool {
        use TensorData::{Bytes, Fp8, Uniform, Window};
        match (self, other) {
            (
                Bytes { owner, range, dtype },
                Bytes { owner: other, range: other_range, dtype: other_dtype },
            ) => Arc::ptr_eq(owner, other) && (range, dtype) == (other_range, other_dtype),
            (
                Fp8 { owner, range, scales },
                Fp8 { owner: other, range: other_range, scales: other_scales },
            ) => Arc::ptr_eq(owner, other) && (range, scales) == (other_range, other_scales),
            (Uniform { seed, low, high }, Uniform { seed: other, low: other_low, high: other_high }) => {
                (seed, low, high) == (other, other_low, other_high)
            }
            (
                Window { whole, first_row, first_col },
                Window { whole: other, first_row: other_row, first_col: other_col },
            ) => whole.is_same(other) && (first_row, first_col) == (other_row, other_col),
            _ => false,
        }
    }
}

impl core::fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let kind = match &self.data {
            TensorData::Bytes { dtype, .. } => alloc::format!("{dtype:?}"),
            TensorData::Fp8 { scales, .. } => alloc::format!("e4m3, blocks of {:?}", scales.block),
            TensorData::Uniform { seed, .. } => alloc::format!("uniform, seed {seed}"),
            TensorData::Window { whole, first_row, first_col } => {
                alloc::format!("from row {first_row}, column {first_col} of {whole:?}")
            }
        };
        write!(f, "{} [{}, {}] {kind}", self.name, self.rows, self.cols)
    }
}

/// Element `index` of a [`TensorData::Uniform`] tensor: SplitMix64's output function (Steele et al., 2014) of
/// `seed + index`, its top 24 bits as a fraction, scaled in f32 (a product, then a sum) and rounded to bf16.
pub fn uniform_element(seed: u64, index: u64, low: f32, high: f32) -> bf16 {
    let fraction = (splitmix64(seed.wrapping_add(index)) >> 40) as f32 * (1.0 / 16_777_216.0);
    bf16::from_f32(low + (high - low) * fraction)
}

/// FNV-1a (Fowler, Noll and Vo, 1991) with 64 bits.
pub fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let step = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// SplitMix64: the increment, then the mixing function.
pub fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
