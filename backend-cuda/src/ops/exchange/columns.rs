//! Columns of which each rank has a share, brought together on all: of logits, of what a matrix that is cut by rows gets, and of the
//! residual stream that such a matrix gives.

use minisgl_core::shard::GATHERED;

use super::inbox::Words;
use super::sizes::{BLOCKS_AN_SM, CHUNK, THREADS, column_chunks, row_chunks, share_elements};
use super::{Exchange, Stream};
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::ops::experts::routing::{Ahead, Routing};
use crate::param::Param;

/// Blocks of `experts_combine_ranks` that every SM holds at once.
pub(super) const JOINING_BLOCKS_AN_SM: u32 = 3;

/// A launch of `experts_combine_ranks`: the kernel, and what it has besides ranks.
pub(in crate::ops) struct Joining<'a> {
    pub kernel: &'a Kernel,
    pub routing: &'a Routing,
    pub given: Address,
    pub residual: Address,
    pub sumsq: Address,
    pub ahead: Ahead,
}

impl Exchange {
    /// Where the head leaves logits of the rank's tokens.
    pub fn share(&self) -> Buffer {
        self.share
    }

    /// `out`, `[samples, vocab]` f16, becomes what all ranks have in [`Exchange::share`].
    pub fn gather_logits(&self, launcher: &Launcher, samples: u32, out: Address) -> Result<(), CudaError> {
        let turn = self.logits_turn.replace(1 - self.logits_turn.get());
        self.gather(launcher, Words::Logits(turn), [samples, self.dims.vocab], self.share.address(), out)
    }

    /// `out`, `[rows, inner]` bf16, becomes what all ranks have in `share`, `[rows, columns of the rank]`: what a matrix that is cut by rows
    /// gets.
    pub fn gather_inner(
        &self,
        launcher: &Launcher,
        shape: [u32; 2],
        share: Address,
        out: Address,
    ) -> Result<(), CudaError> {
        self.gather(launcher, Words::Inner, shape, share, out)
    }

    /// Rows of 16 bits an element, of which each rank has a share of the columns, by their part of the inbox.
    fn gather(
        &self,
        launcher: &Launcher,
        words: Words,
        [rows, columns]: [u32; 2],
        share: Address,
        out: Address,
    ) -> Result<(), CudaError> {
        let (rank, ranks) = (self.link.rank(), self.ranks(words)?);
        let chunks = column_chunks(rank, [rows, columns]);
        self.carry(launcher, words, share, share_elements(rank, [rows as usize, columns as usize]) * 2)?;
        launcher.launch(&self.gather, self.grid(chunks), [&share, &out, &rows, &columns, &ranks])
    }

    /// What `experts_combine_ranks` makes of the residual stream, each rank of its columns, is every rank's.
    pub(in crate::ops) fn join(
        &self,
        launcher: &Launcher,
        tokens: u32,
        join: &Joining<'_>,
    ) -> Result<(), CudaError> {
        let words = self.next_sums();
        let (ranks, sent) = (self.ranks(words)?, self.embedded.unwrap_or(Address::NULL));
        let elements = tokens as usize * self.dims.hidden as usize / ranks.count as usize;
        let most = self.blocks_max * JOINING_BLOCKS_AN_SM / BLOCKS_AN_SM;
        let blocks = (elements.div_ceil(GATHERED) as u32).div_ceil(THREADS).min(most.max(1));
        let grid = Grid::new(blocks, THREADS).dependent_if(self.link.ranks_of_device() == 1);
        let launch = |sends: bool, takes: bool| {
            let (sends, takes) = (u32::from(sends), u32::from(takes));
            let Joining { kernel, routing, given, residual, sumsq, ahead } = *join;
            launcher.launch(
                kernel,
                grid,
                [routing as &dyn Param, &given, &residual, &sumsq, &ahead, &sent, &sends, &takes, &ranks],
            )
        };
        if !self.link.is_carried() {
            return launch(true, true);
        }
        launch(true, false)?;
        self.carry(launcher, words, sent, elements * 2)?;
        launch(false, true)
    }

    /// `own`, `[tokens, hidden / ranks]` bf16, becomes this rank's columns of the residual stream.
    pub fn own_columns(&self, launcher: &Launcher, own: Address, stream: Stream) -> Result<(), CudaError> {
        let (Stream { residual, tokens, .. }, ranks) = (stream, self.ranks(Words::Sums(0))?);
        let grid = self.grid(row_chunks(tokens, self.dims.hidden).div_ceil(ranks.count));
        launcher.launch(&self.own_columns, grid, [&own, &residual, &tokens, &self.dims.hidden, &ranks])
    }

    /// The residual stream becomes what all ranks have in `own`, each its columns.
    pub fn join_columns(&self, launcher: &Launcher, own: Address, stream: Stream) -> Result<(), CudaError> {
        let Stream { residual, sumsq, tokens } = stream;
        let words = self.next_sums();
        let ranks = self.ranks(words)?;
        let elements = tokens as usize * self.dims.hidden as usize / ranks.count as usize;
        self.carry(launcher, words, own, elements * 2)?;
        let grid = self.grid((elements as u32).div_ceil(CHUNK));
        launcher.launch(
            &self.join_columns,
            grid,
            [&own, &residual, &sumsq, &tokens, &self.dims.hidden, &ranks],
        )
    }
}
