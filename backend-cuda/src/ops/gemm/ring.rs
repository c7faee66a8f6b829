//! The ring of shared memory through which a block of a product of few tokens gets its operands, block of columns after block of
//! columns (`gemm_few.cuh`), and the blocks of which a cluster has all slices.
//!
//! ```text
//!   | stage 0: tokens, rows of w | stage 1 | … | what lies beside the stages | a scale a token |     and what aligns it to 1024 bytes
//!   | sums of a slice                      |     lie over the stages once all products are done
//! ```
//!
//! Invariant: a block's stages fit what it may take, and hold its sums.

use super::product::{Block, Explained};
use super::shape::{BLOCK_COLS, Shape};
use crate::launch::Grid;

/// A block's ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    pub(super) block: Block,
    /// Bytes of a stage.
    stage: u32,
    /// Bytes beside a stage: two barriers, and scales where blocks of columns have some.
    beside: u32,
}

impl Ring {
    const BARRIERS: u32 = 16;

    /// Of operands of 16 bits.
    pub(super) fn of(block: Block) -> Ring {
        Ring { block, stage: (block.rows + block.tokens) * BLOCK_COLS * 2, beside: Self::BARRIERS }
    }

    /// Where a stage has so many bytes of w.
    pub(super) fn with_w(block: Block, bytes: u32) -> Ring {
        Ring { stage: block.tokens * BLOCK_COLS * 2 + bytes, ..Self::of(block) }
    }

    /// With so many scales beside each stage.
    pub(super) fn with_scales(self, scales: u32) -> Ring {
        Ring { beside: self.beside + scales * 4, ..self }
    }

    /// Warpgroups that multiply, of 64 rows each, the warp that fetches and the one that computes scales.
    pub(super) fn threads(self) -> u32 {
        self.block.rows * 2 + 64
    }

    /// Bytes of shared memory with so many stages.
    pub(super) fn shared(self, stages: u32) -> u32 {
        stages * (self.stage + self.beside) + self.block.tokens * 4 + 1024
    }

    /// As many as are wanted, if they fit `bytes`; as many as the sums lie over, whose rows are padded by 4 floats.
    pub(super) fn stages(self, wanted: u32, bytes: u32) -> u32 {
        let fit = (bytes - self.shared(0)) / (self.stage + self.beside);
        wanted.min(fit).max(self.sum_bytes().div_ceil(self.stage))
    }

    fn sum_bytes(self) -> u32 {
        self.block.tokens * (self.block.rows + 4) * 4
    }

    /// Do so many stages fit `bytes`, and hold the sums?
    #[cfg(test)]
    pub(super) fn holds(self, stages: u32, bytes: u32) -> bool {
        self.shared(stages) <= bytes && self.sum_bytes() <= stages * self.stage
    }
}

/// A block that has a slice, whose cluster has all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sliced {
    pub(super) ring: Ring,
    /// Does it fill the registers of a multiprocessor? Else two fit.
    pub(super) alone: bool,
    /// Are all blocks of a product done at once by multiprocessors that have one each? Then it takes more than half of the shared memory:
    /// while the kernel before ends, multiprocessors that are free first would get two, and others none.
    pub(super) spread: bool,
}

impl Sliced {
    /// More than half of the shared memory of a multiprocessor.
    const SPREAD: u32 = 116 << 10;

    /// Bytes of shared memory that its ring may take.
    fn ring_max(self) -> u32 {
        if self.alone { 227 << 10 } else { 112 << 10 }
    }

    /// Bytes of shared memory that it may take.
    pub(super) fn shared_max(self) -> u32 {
        self.ring_max().max(Self::SPREAD)
    }

    /// Bytes of shared memory that it takes.
    fn shared(self, shape: &Shape) -> u32 {
        let ring = self.ring.shared(self.stages(shape));
        if self.spread { ring.max(Self::SPREAD) } else { ring }
    }

    /// As many as a slice has blocks of columns, if they fit.
    pub(super) fn stages(self, shape: &Shape) -> u32 {
        self.ring.stages(shape.cols.div_ceil(BLOCK_COLS).div_ceil(shape.slices), self.ring_max())
    }

    /// Clusters with the same rows of w are neighbours, so that w comes from memory once.
    pub(super) fn grid(self, shape: &Shape) -> Grid {
        let Block { rows, tokens } = self.ring.block;
        Grid::new(shape.tokens.div_ceil(tokens) * shape.slices, self.ring.threads())
            .rows(shape.rows.div_ceil(rows))
            .cluster(shape.slices)
            .shared(self.shared(shape))
            .dependent()
    }

    /// What a product in fp8 is launched as.
    pub(super) fn explained(self, kernel: &'static str, shape: &Shape) -> Explained {
        let (Block { rows, tokens }, slices, stages) = (self.ring.block, shape.slices, self.stages(shape));
        let work = format!(
            "a block: {rows} rows of w in fp8, {tokens} tokens, 1 of {slices} slices of the columns; {stages} stages"
        );
        Explained { kernel, grid: self.grid(shape), work }
    }
}
