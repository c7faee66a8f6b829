//! What a rank passes to the others within a step: launches of `exchange.cu`.
//!
//! Sums of o and down (`sums.rs`) take turns in two parts of the inbox (`inbox.rs`); so do logits, of which a step that scores has
//! several. Between two exchanges in one part there is one in another that has words from all ranks to all, which is what
//! `exchange.cuh` asks for: a layer has o's and down's. Columns are brought together in parts of their own (`columns.rs`): of a
//! matrix that is cut by rows (experts' down; o and down of more ranks than slices, `shared_rows.rs`) what it gets, as wide as
//! attention or an MLP is within, passes in one, and what the residual stream becomes in the place of sums.
//!
//! The product before an exchange stores its sums where they are added up ([`RankSums`](crate::ops::gemm::RankSums)), so most of them have come when it ends.
//! Where NCCL carries words, a kernel leaves them in this rank's memory, all ranks' are gathered in each inbox, and then the same kernels
//! add up or take what is there: bits don't depend on the way.
//!
//! Invariant: which part an exchange has follows from its place in the step, the same on all ranks and in every replay.

mod columns;
pub(super) mod explained;
mod inbox;
mod sizes;
mod sums;
mod way;

use std::cell::Cell;

use minisgl_core::backend::{Element, Purpose, Queue, Step};
use minisgl_core::config::Limits;
use minisgl_core::shard::{RANKS_MAX, Rank};
use minisgl_core::spec::Dims;

pub(super) use columns::Joining;
pub use way::Way;

use inbox::{Inbox, Words};
use sizes::{BLOCKS_AN_SM, CHUNK, THREADS, padded, row_chunks, share_elements, shares};

use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Grid, Kernel, Launcher};
use crate::link::Link;
use crate::memory::{Address, Buffer};
use crate::param::plain_params;

/// What kernels know of the ranks, as `exchange.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Ranks {
    inbox: [u64; RANKS_MAX as usize],
    ended: Address,
    rank: u32,
    count: u32,
    patience_ms: u32,
    carried: u32,
}

plain_params!(Ranks);

/// The rows that an exchange adds to.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// `[tokens, hidden]` bf16.
    pub residual: Address,
    /// `[tokens, ceil(hidden / 64)]` f32.
    pub sumsq: Address,
    /// How many.
    pub tokens: u32,
}

/// The kernels, and what a rank has beside one device alone.
#[derive(Debug)]
pub struct Exchange {
    link: Link,
    one_shot: Kernel,
    two_shot: Kernel,
    embed: Kernel,
    gather: Kernel,
    own_columns: Kernel,
    join_columns: Kernel,
    inbox: Inbox,
    dims: Dims,
    blocks_max: u32,
    /// f32: what the rank adds up of a product's sums over its own columns; where they are carried, all of them.
    sums: Buffer,
    /// `[tokens, hidden]` bf16 in whole segments: embedded rows that are to be carried.
    embedded: Option<Address>,
    /// `[logit rows, the rank's columns]` f16, and up to a chunk's end.
    share: Buffer,
    /// Which part the next exchange of sums has, and the next of logits.
    sums_turn: Cell<usize>,
    logits_turn: Cell<usize>,
}

impl Exchange {
    /// Looks the kernels up and allocates what steps within `limits` need, for a rank of a model of these sizes, whose matrices that are
    /// cut by rows get `inner` elements of a token at most.
    pub fn new(
        cuda: &mut Gpu,
        link: &Link,
        dims: &Dims,
        limits: &Limits,
        inner: usize,
    ) -> Result<Exchange, CudaError> {
        let rank = link.rank();
        let kernel = |name| cuda.modules().kernel("exchange", name, 0);
        let [one_shot, two_shot] = [Way::OneShot, Way::TwoShot].map(|way| kernel(way.kernel(rank.count)));
        let (one_shot, two_shot) = (one_shot?, two_shot?);
        let (embed, gather) = (kernel("embed_share")?, kernel("gather_columns")?);
        let (own_columns, join_columns) = (kernel("own_columns")?, kernel("join_columns")?);
        let carried = link.is_carried();
        let new = if carried { Inbox::carried } else { Inbox::new };
        let inbox = new(rank, dims, limits, inner * limits.step_tokens());
        let share = share_elements(rank, [limits.logit_rows(), dims.vocab as usize]);
        let (tokens, row) = (limits.step_tokens(), padded(dims.hidden));
        let once = (Way::one_shot_bytes(rank.count) / (row * 4)).min(tokens);
        let sums = if carried { tokens } else { once } * row;
        let sums = sums.max(shares(rank, tokens, dims.hidden) * CHUNK as usize);
        let embedded = carried.then(|| cuda.allocate(Purpose::Scratch, tokens * row * 2)).transpose()?;
        let exchange = Exchange {
            link: link.clone(),
            one_shot,
            two_shot,
            embed,
            gather,
            own_columns,
            join_columns,
            inbox,
            dims: *dims,
            blocks_max: (cuda.properties().multiprocessors * BLOCKS_AN_SM / link.ranks_of_device()).max(1),
            sums: cuda.alloc(Purpose::Scratch, Element::Float, sums)?,
            embedded,
            share: cuda.alloc(Purpose::Scratch, Element::Logit, share)?,
            sums_turn: Cell::new(0),
            logits_turn: Cell::new(0),
        };
        link.reserve(inbox.bytes())?;
        Ok(exchange)
    }

    /// Whose it is.
    pub fn rank(&self) -> Rank {
        self.link.rank()
    }

    /// The beginning of every step.
    pub fn begin_step(&self) {
        self.sums_turn.set(0);
        self.logits_turn.set(0);
    }

    /// Does the next step's first exchange of sums follow one in the other place? Between two steps there may be none that all ranks
    /// have words of, for embedded rows come from who has them, so a step has an even number.
    pub fn is_even(&self) -> bool {
        self.sums_turn.get() == 0
    }

    /// As `Ends::embed`, of a table of which each rank has a share.
    pub fn embed(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        table: Address,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let (tokens_offset, Dims { hidden, vocab, .. }) = (step.layout.tokens as u32, self.dims);
        let chunks = row_chunks(stream.tokens, hidden);
        let mut ranks = self.ranks(Words::Embedded)?;
        let launch = |ranks: &Ranks| {
            launcher.launch(
                &self.embed,
                self.grid(chunks),
                [
                    &step.batch,
                    &tokens_offset,
                    &step.token_pool,
                    &table,
                    &vocab,
                    &stream.residual,
                    &stream.sumsq,
                    &stream.tokens,
                    &hidden,
                    &step.history,
                    ranks,
                ],
            )
        };
        if let Some(embedded) = self.embedded {
            // What it pushes to the others is carried to them, and what it takes it takes the second time.
            let others = (0..).zip(&mut ranks.inbox).filter(|(rank, _)| *rank != self.link.rank().index);
            others.for_each(|(_, inbox)| *inbox = embedded.number());
            launch(&ranks)?;
            self.carry(launcher, Words::Embedded, embedded, stream.tokens as usize * padded(hidden) * 2)?;
        }
        launch(&ranks)
    }

    /// A thread a chunk, as far as the device holds so many at once. Of ranks that share a device one's exchanges would else take the
    /// places of another's by beginning before their turn.
    fn grid(&self, chunks: u32) -> Grid {
        let grid = Grid::new(chunks.div_ceil(THREADS).min(self.blocks_max), THREADS);
        grid.dependent_if(self.link.ranks_of_device() == 1)
    }

    /// Fills the words' part of the inbox with so many bytes of every rank, those at `from` of this one, where words are carried.
    fn carry(&self, launcher: &Launcher, words: Words, from: Address, bytes: usize) -> Result<(), CudaError> {
        if !self.link.is_carried() {
            return Ok(());
        }
        let Ranks { inbox, rank, .. } = self.ranks(words)?;
        self.link.carry(launcher.stream(Queue::Compute), from, Address(inbox[rank as usize]), bytes)
    }

    /// The part of the inboxes that the next exchange of sums, or of what takes their place, has.
    fn next_sums(&self) -> Words {
        Words::Sums(self.sums_turn.replace(1 - self.sums_turn.get()))
    }

    /// Of an exchange of such words.
    fn ranks(&self, words: Words) -> Result<Ranks, CudaError> {
        let Rank { index: rank, count } = self.link.rank();
        let start = self.inbox.start(words);
        let inbox = self.link.inboxes()?.map(|inbox| inbox.offset(start).number());
        let (ended, patience_ms) = (self.link.ended(), self.link.patience_ms());
        Ok(Ranks { inbox, ended, rank, count, patience_ms, carried: self.link.is_carried().into() })
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::{HOPPER, PORTABLE};

    use super::columns::JOINING_BLOCKS_AN_SM;
    use super::*;
    use crate::declared::{assert_declared, constant, threads_of};
    use crate::link::{EMPTY_BYTE, ENDED};

    const KERNELS: [&str; 11] = [
        "reduce_one_shot_2",
        "reduce_one_shot_4",
        "reduce_one_shot_8",
        "reduce_two_shot_2",
        "reduce_two_shot_4",
        "reduce_two_shot_8",
        "embed_share",
        "gather_columns",
        "own_columns",
        "join_columns",
        "experts_combine_ranks",
    ];

    #[test]
    fn both_sides_declare_the_same() {
        assert_declared!(
            &["exchange/exchange.cuh"],
            "Ranks",
            Ranks { inbox, ended, rank, count, patience_ms, carried }
        );
        assert_eq!(constant("exchange/exchange.cu", "BLOCKS_AN_SM"), BLOCKS_AN_SM);
        assert_eq!(constant("experts/experts.cu", "BLOCKS_AN_SM"), JOINING_BLOCKS_AN_SM);
        assert_eq!(constant("exchange/inbox.cuh", "EMPTY"), u32::from_ne_bytes([EMPTY_BYTE; 4]));
        assert_eq!(constant("exchange/exchange.cuh", "ENDED"), ENDED);
        for set in [HOPPER, PORTABLE] {
            assert!(KERNELS.iter().all(|name| threads_of(set, name) == THREADS));
        }
    }
}
