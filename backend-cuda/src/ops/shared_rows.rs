//! o and down where ranks share their rows, for there are more ranks than slices of their columns (`minisgl_core::shard`).
//!
//! ```text
//!   x, the rank's columns ── all ranks' ──> gathered ── += w @ gathered ──> own ── all ranks' ──> residual, sumsq
//! ```
//!
//! `own` are the rank's columns of the residual stream, a matrix by themselves, so that the product is that of one GPU: all of a row's
//! slices, added in the same tree, and the residual added and rounded by the same epilogue.
//!
//! Invariant: `own` has what the residual stream has, unless something else than these products has changed that since.

use std::cell::Cell;

use minisgl_core::backend::{Element, Purpose};
use minisgl_core::shard::{By, Cut, Rank};
use minisgl_core::spec::Dims;

use super::exchange::{Exchange, Stream};
use super::gemm::{Gemm, Residual, Rows, SmShare};
use super::operands::{SEGMENT, rows_from};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::Launcher;
use crate::memory::{Address, Buffer};
use crate::weight::{SLICING, Weight};

/// What such products have beside others.
#[derive(Debug)]
pub struct SharedRows {
    /// `[tokens, widest input of all ranks]` bf16.
    gathered: Buffer,
    /// `[tokens, hidden / ranks]` bf16.
    own: Buffer,
    /// `[tokens, ceil(hidden / ranks / 64)]` f32: the squares that the epilogue sums, which those of the joined stream replace.
    squares: Address,
    is_current: Cell<bool>,
}

impl SharedRows {
    /// How wide the inputs of such matrices are, in the whole model, at most; 0 where ranks share columns. `dims` are a rank's, without an
    /// inner width where all layers have experts.
    pub fn width(dims: &Dims, rank: Rank) -> usize {
        let inputs = [dims.q_width(), dims.intermediate as usize];
        inputs.into_iter().filter(|width| Self::takes(*width, rank)).max().unwrap_or(0) * rank.count as usize
    }

    /// Do ranks share rows of a matrix of which each has so many columns' inputs?
    pub fn takes(width: usize, rank: Rank) -> bool {
        matches!(SLICING.cut(By::Hidden, width * rank.count as usize, rank.count), Cut::Rows(_))
    }

    /// Allocates what steps of so many tokens need; nothing where ranks share columns.
    pub fn new(gpu: &mut Gpu, dims: &Dims, tokens: usize) -> Result<Option<SharedRows>, CudaError> {
        let rank = gpu.rank();
        let width = Self::width(dims, rank);
        if width == 0 {
            return Ok(None);
        }
        let own = dims.hidden as usize / rank.count as usize;
        let segments = own.div_ceil(SEGMENT as usize);
        Ok(Some(SharedRows {
            gathered: gpu.alloc(Purpose::Scratch, Element::Activation, tokens * width)?,
            own: gpu.alloc(Purpose::Scratch, Element::Activation, tokens * own)?,
            squares: gpu.allocate(Purpose::Scratch, tokens * segments * 4)?,
            is_current: Cell::new(false),
        }))
    }

    /// Something else has changed the residual stream.
    pub fn forget(&self) {
        self.is_current.set(false);
    }

    /// `residual += w @ x` on all ranks; `x` are this one's columns of what `w` gets, which has all.
    pub fn add(
        &self,
        launcher: &Launcher,
        (gemm, exchange): (&Gemm, &Exchange),
        w: Weight,
        x: Rows,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let SharedRows { gathered, own, squares, .. } = *self;
        if !self.is_current.replace(true) {
            exchange.own_columns(launcher, own.address(), stream)?;
        }
        exchange.gather_inner(launcher, [stream.tokens, w.cols() as u32], x.address, gathered.address())?;
        let inputs = rows_from(gathered, w.cols(), 0);
        let added = Residual { residual: own.address(), sumsq: squares };
        gemm.launch(launcher, w, inputs, stream.tokens, SmShare::Whole, &added)?;
        exchange.join_columns(launcher, own.address(), stream)
    }
}
