//! A matrix on the device, and how its elements lie.
//!
//! ```text
//!   stacking.rs      which row of which part is stored where
//!   stored_rows.rs   a file's elements as bf16
//!   fp8_tiles.rs     codes in tiles, which kernels widen        fp8_codes.rs   codes as they are, multiplied by rounded inputs
//!   upload.rs        how all of them get there
//! ```

mod fp8_codes;
mod fp8_tiles;
mod stacking;
mod stored_rows;
mod upload;

use minisgl_core::backend::{Element, WeightRole};
use minisgl_core::shard::Slicing;
use minisgl_core::spec::Inputs;
use minisgl_core::tensor::{HostTensor, TensorData};

use crate::error::CudaError;
use crate::memory::{Address, Buffer};

pub(crate) use fp8_codes::{Fp8Codes, Rounding};
pub(crate) use fp8_tiles::Fp8Tiles;
pub(crate) use stacking::gate_up_rows;
pub(crate) use upload::Loader;

use stacking::{Piece, has_pairs};

/// How the columns of o and down are cut, which ranks share out: a thread that multiplies has registers for the sums of two pairs
/// of slices (`gemm_many.cuh`).
pub const SLICING: Slicing = Slicing { most: 4, block: 64, equal: false };

/// How a matrix's elements lie on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Rows of bf16.
    Bf16,
    /// Tiles of e4m3, which are widened on their way to the tensor cores.
    Tiles(Fp8Tiles),
    /// Codes of e4m3, whose inputs are rounded.
    Codes(Codes),
}

impl Form {
    /// How a matrix of such parts, stored in these pieces, lies on the device: of one in fp8 all parts' inputs are rounded alike.
    fn of(role: WeightRole, parts: &[HostTensor], pieces: &[Piece<'_>]) -> Result<Form, CudaError> {
        let pairs = has_pairs(pieces);
        let tiles = match role {
            WeightRole::ExpertsGateUp(_) | WeightRole::ExpertsDown(_) => Fp8Tiles::Experts,
            _ => Fp8Tiles::Dense,
        };
        let mut forms = parts.iter().map(|part| match &part.data {
            TensorData::Fp8 { scales, .. } if scales.inputs == Inputs::Plain => Ok(Form::Tiles(tiles)),
            TensorData::Fp8 { scales, .. } => match Rounding::of(scales.inputs) {
                Some(rounding) => {
                    let by_rows = scales.block[1] >= part.cols;
                    let wide = if by_rows { Fp8Codes::SUMMED_COLS } else { scales.block[1] as u32 };
                    let summed = Codes::summed(rounding, wide);
                    Ok(Form::Codes(Codes { rounding, by_rows, pairs: by_rows || pairs, summed }))
                }
                None => Err(CudaError::Unsupported(format!(
                    "{part:?} has inputs that are rounded in groups of other than {} or 256 columns; use --plain-inputs",
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
}

/// What tells matrices of codes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Codes {
    /// How inputs are rounded.
    pub(crate) rounding: Rounding,
    /// Has each row one scale?
    pub(crate) by_rows: bool,
    /// Have groups of eight rows two scales in turn within each 128 rows ([`Fp8Codes::PAIRED`]), or ones?
    pub(crate) pairs: bool,
    /// Columns after which tensor cores' sums are taken out.
    pub(crate) summed: u32,
}

impl Codes {
    /// After how many columns sums are taken out where so many columns of w share their scales: a power of two within which neither
    /// operand's scales change.
    fn summed(rounding: Rounding, wide: u32) -> u32 {
        let of_inputs = match rounding {
            Rounding::Groups(width) => width,
            Rounding::Rows | Rounding::Fixed => Fp8Codes::SUMMED_COLS,
        };
        1 << (wide | of_inputs | Fp8Codes::SUMMED_COLS).trailing_zeros()
    }
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

    /// How it lies if its inputs are rounded.
    pub(crate) fn codes_layout(&self) -> Fp8Codes {
        Fp8Codes { rows: self.rows, cols: self.cols }
    }

    /// Words of 16 bits that kernels multiply of a row: its columns, or pairs of codes.
    pub(crate) fn words(&self) -> usize {
        if self.codes().is_some() { self.cols / 2 } else { self.cols }
    }
}

impl From<Weight> for Buffer {
    /// The matrix as a buffer of activations, to be downloaded.
    fn from(weight: Weight) -> Buffer {
        Buffer::new(weight.address, Element::Activation, weight.rows * weight.cols)
    }
}
