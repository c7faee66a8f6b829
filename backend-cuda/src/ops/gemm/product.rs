//! A product to be launched: its operands, what of an SM its kernel may take, and what it is launched as.

use super::epilogue::Epilogue;
use super::shape::Shape;
use crate::error::CudaError;
use crate::launch::Grid;
use crate::memory::Address;
use crate::tensor_map::TensorMap;

/// Rows of activations in memory, `[there, columns of w]` bf16, whose first ones a product takes. Of those behind them it reads
/// what its last tile has places for, and nothing comes of that: the copy engine is quicker to fetch a row that is there than to
/// make up zeros for one that is not.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Where the first begins.
    pub address: Address,
    /// How many there are.
    pub there: u32,
}

/// What a kernel may take of each SM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmShare {
    /// All of it.
    Whole,
    /// Half of it, because something runs beside the kernel.
    Half,
}

/// A product to be launched.
#[derive(Debug)]
pub(super) struct Product<'a, E> {
    pub(super) w: Address,
    /// The kernel before writes w.
    pub(super) is_fresh: bool,
    pub(super) x: Rows,
    pub(super) shape: Shape,
    pub(super) share: SmShare,
    pub(super) epilogue: &'a E,
}

impl<E: Epilogue> Product<'_, E> {
    /// How the copy engine fetches both operands' share of a block.
    pub(super) fn maps(&self, block: Block) -> Result<[TensorMap; 2], CudaError> {
        let (Shape { rows, cols, .. }, Rows { address, there }) = (self.shape, self.x);
        Ok([
            TensorMap::rows_of_bf16(self.w, rows as usize, cols as usize, block.rows)?,
            TensorMap::rows_of_bf16(address, there as usize, cols as usize, block.tokens)?,
        ])
    }
}

/// What a block of a Hopper kernel works on: rows of w by tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) rows: u32,
    pub(super) tokens: u32,
}

impl Block {
    pub(super) const fn new(rows: u32, tokens: u32) -> Block {
        Block { rows, tokens }
    }
}

/// What a product is launched as, and what of it a block does.
pub(in crate::ops) struct Explained {
    pub(in crate::ops) kernel: &'static str,
    pub(in crate::ops) grid: Grid,
    pub(in crate::ops) work: String,
}

/// What decides about a product's kernel beside its sizes.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Form {
    /// See [`Epilogue::is_normed`].
    pub(in crate::ops) normed: bool,
    /// Are keys and values kept in fp8?
    pub(in crate::ops) kv_fp8: bool,
    /// Is the matrix, and its inputs as they are?
    pub(in crate::ops) weights_fp8: bool,
    /// How many ranks have parts of it.
    pub(in crate::ops) ranks: u32,
}
