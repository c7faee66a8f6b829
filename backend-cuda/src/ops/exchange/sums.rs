//! Sums of o and down, added up on all ranks.

use super::inbox::Words;
use super::sizes::{padded, row_chunks, shares};
use super::way::Way;
use super::{Exchange, Stream};
use crate::error::CudaError;
use crate::launch::Launcher;
use crate::memory::Address;
use crate::ops::gemm::RankSums;

impl Exchange {
    /// Where a product of so many tokens leaves its sums over the rank's columns, to be added up by [`Exchange::reduce`] behind it.
    pub fn sums(&self, tokens: u32) -> Result<RankSums, CudaError> {
        self.sums_by(tokens, self.way(tokens))
    }

    /// The same in a way of the caller's choice.
    pub fn sums_by(&self, tokens: u32, way: Way) -> Result<RankSums, CudaError> {
        if self.link.is_carried() {
            return Ok(RankSums::here(self.sums.address()));
        }
        let (rank, hidden) = (self.link.rank(), self.dims.hidden);
        let mut to = self.ranks(Words::Sums(self.sums_turn.get()))?.inbox.map(Address);
        for (index, to) in (0..rank.count).zip(&mut to) {
            // Of what a rank gets, the place of what this one sends.
            let bytes = match way {
                Way::OneShot => rank.index as usize * tokens as usize * padded(hidden) * 4,
                Way::TwoShot => {
                    let place = (rank.index + rank.count - index - 1) % rank.count;
                    place as usize * shares(rank, tokens as usize, hidden) * 16
                }
            };
            *to = if index == rank.index { self.sums.address() } else { to.offset(bytes) };
        }
        Ok(RankSums::new(to, rank.count, way == Way::TwoShot))
    }

    fn way(&self, tokens: u32) -> Way {
        if self.link.is_carried() {
            return Way::OneShot;
        }
        Way::of(self.link.rank().count, tokens as usize * padded(self.dims.hidden) * 4)
    }

    /// Adds what all ranks have left in [`Exchange::sums`] to the residual stream.
    pub fn reduce(&self, launcher: &Launcher, stream: Stream) -> Result<(), CudaError> {
        self.reduce_by(launcher, stream, self.way(stream.tokens))
    }

    /// The same in the way that they were left in. Those that are carried have one way.
    pub fn reduce_by(&self, launcher: &Launcher, stream: Stream, way: Way) -> Result<(), CudaError> {
        let Stream { residual, sumsq, tokens } = stream;
        let way = if self.link.is_carried() { Way::OneShot } else { way };
        let words = self.next_sums();
        self.carry(launcher, words, self.sums.address(), tokens as usize * padded(self.dims.hidden) * 4)?;
        let (kernel, shares) = match way {
            Way::OneShot => (&self.one_shot, 1),
            Way::TwoShot => (&self.two_shot, self.link.rank().count),
        };
        let chunks = row_chunks(tokens, self.dims.hidden);
        let (grid, ranks) = (self.grid(chunks.div_ceil(shares)), self.ranks(words)?);
        launcher.launch(kernel, grid, [&self.sums, &residual, &sumsq, &tokens, &self.dims.hidden, &ranks])
    }
}
