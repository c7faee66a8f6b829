//! What a rank passes to the others within a step: launches of `exchange.cu`.
//!
//! ```text
//!   inbox   | sums, first | sums, second | embedded rows | logits, first | logits, second | inner |
//! ```
//!
//! Sums of o and down take turns in two parts of the inbox; so do logits, of which a step that scores has several. Between two exchanges
//! in one part there is one in another that has words from all ranks to all, which is what `exchange.cuh` asks for: a layer has o's and
//! down's. Of a matrix that is cut by rows (experts' down; o and down of more ranks than slices, `shared_rows.rs`) what it gets, as wide as
//! attention or an MLP is within, passes in a part of its own, and what the residual stream becomes in the place of sums.
//!
//! The product before an exchange stores its sums where they are added up ([`RankSums`]), so most of them have come when it ends.
//! Where NCCL carries words, a kernel leaves them in this rank's memory, all ranks' are gathered in each inbox, and then the same kernels
//! add up or take what is there: bits don't depend on the way.
//!
//! Invariant: which part an exchange has follows from its place in the step, the same on all ranks and in every replay.

use std::cell::Cell;

use minisgl_core::backend::{Element, Purpose, Queue, Step};
use minisgl_core::config::Limits;
use minisgl_core::shard::{RANKS_MAX, Rank};
use minisgl_core::spec::Dims;

use super::experts::routing::Routing;
use super::gemm::RankSums;
use super::operands::SEGMENT;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Grid, Kernel, Launcher};
use crate::link::Link;
use crate::memory::{Address, Buffer};
use crate::param::{Param, plain_params};

const THREADS: u32 = 256;
/// Blocks that every SM holds at once, whatever their number of ranks.
const BLOCKS_AN_SM: u32 = 4;
/// The same of `experts_combine_ranks`.
const JOINING_BLOCKS_AN_SM: u32 = 3;
/// Elements of a chunk, which is a thread's.
const CHUNK: u32 = 4;
/// The same where columns are gathered, of 16 bits.
const COLUMNS: usize = 8;

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

/// How sums cross the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Every rank sends all of its own to all, and adds all up.
    OneShot,
    /// Every rank adds a share up, and sends that.
    TwoShot,
}

impl Way {
    /// The quicker one for so many bytes of f32.
    fn of(ranks: u32, bytes: usize) -> Way {
        if bytes <= Self::one_shot_bytes(ranks) { Way::OneShot } else { Way::TwoShot }
    }

    /// Up to so many bytes a rank sends all: the links have time for it while it would wait for another's share. Two ranks' is
    /// measured on H200s; the others' follow from what crosses the links and what a share's way takes.
    fn one_shot_bytes(ranks: u32) -> usize {
        match ranks {
            ..=2 => 1 << 20,
            3..=4 => 256 << 10,
            _ => 128 << 10,
        }
    }
}

/// Sizes of the parts of an inbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parts {
    sums: usize,
    embedded: usize,
    logits: usize,
    inner: usize,
    /// Parts for sums, and for logits, that take turns.
    turns: usize,
}

impl Parts {
    /// `inner`: elements of what a matrix that is cut by rows gets, at most.
    fn new(rank: Rank, dims: &Dims, limits: &Limits, inner: usize) -> Parts {
        let (count, tokens) = (rank.count as usize, limits.step_tokens());
        let row_bytes = padded(dims.hidden) * 4;
        let once = (Way::one_shot_bytes(rank.count) / row_bytes).min(tokens);
        let logits = count * share_elements(rank, [limits.logit_rows(), dims.vocab as usize]) * 2;
        let sums = (count * once * row_bytes).max(shared_bytes(rank, tokens, dims.hidden));
        Parts { sums, embedded: tokens * row_bytes / 2, logits, inner: inner * 2, turns: 2 }
    }

    /// Where all ranks' words are carried to every inbox, in the order of what is enqueued.
    fn carried(rank: Rank, dims: &Dims, limits: &Limits, inner: usize) -> Parts {
        let all = rank.count as usize * limits.step_tokens() * padded(dims.hidden) * 4;
        Parts { sums: all, embedded: all / 2, turns: 1, ..Parts::new(rank, dims, limits, inner) }
    }

    /// Where the two parts for sums begin, that for embedded rows, the two for logits, that for inner widths; and where all end.
    fn starts(&self) -> [usize; 7] {
        let mut end = 0;
        let mut after = |bytes: usize| {
            let start = end;
            end += bytes.next_multiple_of(256);
            start
        };
        let second = |bytes: usize| if self.turns == 2 { bytes } else { 0 };
        [
            after(self.sums),
            after(second(self.sums)),
            after(self.embedded),
            after(self.logits),
            after(second(self.logits)),
            after(self.inner),
            after(0),
        ]
    }
}

/// Elements of a row of the residual stream, in whole segments.
fn padded(hidden: u32) -> usize {
    hidden.next_multiple_of(SEGMENT) as usize
}

/// Chunks of so many tokens' rows.
fn row_chunks(tokens: u32, hidden: u32) -> u32 {
    tokens * hidden.div_ceil(SEGMENT) * (SEGMENT / CHUNK)
}

/// Chunks of a rank's columns of so many rows.
fn column_chunks(rank: Rank, [rows, columns]: [u32; 2]) -> u32 {
    (rows as usize * rank.share(columns as usize).len()).div_ceil(COLUMNS) as u32
}

/// Chunks that a rank adds up of so many tokens where they are shared, in whole tiles.
fn shares(rank: Rank, tokens: usize, hidden: u32) -> usize {
    let chunks = tokens * padded(hidden) / CHUNK as usize;
    chunks.div_ceil(rank.count as usize * THREADS as usize) * THREADS as usize
}

/// What an inbox takes of them: the others' sums of a share, and what they add up.
fn shared_bytes(rank: Rank, tokens: usize, hidden: u32) -> usize {
    (rank.count as usize - 1) * shares(rank, tokens, hidden) * 16 + tokens * padded(hidden) * 2
}

/// Elements of so many rows and columns that a rank passes on, in whole chunks, as many on each.
fn share_elements(rank: Rank, [rows, columns]: [usize; 2]) -> usize {
    (rows * columns.div_ceil(rank.count as usize)).next_multiple_of(COLUMNS)
}

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

/// A launch of `experts_combine_ranks`: the kernel, and what it has besides ranks.
pub(super) struct Joining<'a> {
    pub kernel: &'a Kernel,
    pub routing: &'a Routing,
    pub given: Address,
    pub residual: Address,
    pub sumsq: Address,
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
    parts: Parts,
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
    /// Of what adds up sums in one shot, and in two.
    fn reduce_names(ranks: u32) -> [&'static str; 2] {
        match ranks {
            ..=2 => ["reduce_one_shot_2", "reduce_two_shot_2"],
            3..=4 => ["reduce_one_shot_4", "reduce_two_shot_4"],
            _ => ["reduce_one_shot_8", "reduce_two_shot_8"],
        }
    }

    /// What adds up so many tokens' sums, on GPUs that reach each other's memory.
    pub(super) fn explained(
        ranks: u32,
        multiprocessors: u32,
        [tokens, hidden]: [u32; 2],
    ) -> (&'static str, Grid, String) {
        let [one_shot, two_shot] = Self::reduce_names(ranks);
        let (kernel, shares, work) = match Way::of(ranks, tokens as usize * padded(hidden) * 4) {
            Way::OneShot => (one_shot, 1, "all sums, from all ranks".to_owned()),
            Way::TwoShot => {
                (two_shot, ranks, format!("of each {ranks} tiles one, whose results go to all ranks"))
            }
        };
        let chunks = row_chunks(tokens, hidden).div_ceil(shares);
        (
            kernel,
            Self::explained_grid(chunks, multiprocessors),
            format!("a thread: {CHUNK} elements at a time; {work}"),
        )
    }

    /// What passes embedded rows on, of so many tokens, and logits, of so many samples.
    pub(super) fn explained_ends(
        rank: Rank,
        multiprocessors: u32,
        dims: &Dims,
        [tokens, samples]: [u32; 2],
    ) -> [Grid; 2] {
        [row_chunks(tokens, dims.hidden), column_chunks(rank, [samples, dims.vocab])]
            .map(|chunks| Self::explained_grid(chunks, multiprocessors))
    }

    /// What passes inputs of a matrix that is cut by rows on, of so many columns, and what its outputs become.
    pub(super) fn explained_rows(
        rank: Rank,
        multiprocessors: u32,
        [tokens, columns, hidden]: [u32; 3],
    ) -> [Grid; 2] {
        let joined = row_chunks(tokens, hidden) / rank.count;
        [column_chunks(rank, [tokens, columns]), joined]
            .map(|chunks| Self::explained_grid(chunks, multiprocessors))
    }

    fn explained_grid(chunks: u32, multiprocessors: u32) -> Grid {
        Grid::new(chunks.div_ceil(THREADS).min(multiprocessors * BLOCKS_AN_SM), THREADS).dependent()
    }

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
        let names = Self::reduce_names(rank.count);
        let kernel = |name| cuda.modules().kernel("exchange", name, 0);
        let (one_shot, two_shot) = (kernel(names[0])?, kernel(names[1])?);
        let (embed, gather) = (kernel("embed_share")?, kernel("gather_columns")?);
        let (own_columns, join_columns) = (kernel("own_columns")?, kernel("join_columns")?);
        let carried = link.is_carried();
        let parts = if carried { Parts::carried } else { Parts::new }(
            rank,
            dims,
            limits,
            inner * limits.step_tokens(),
        );
        let [.., bytes] = parts.starts();
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
            parts,
            dims: *dims,
            blocks_max: (cuda.properties().multiprocessors * BLOCKS_AN_SM / link.ranks_of_device()).max(1),
            sums: cuda.alloc(Purpose::Scratch, Element::Float, sums)?,
            embedded,
            share: cuda.alloc(Purpose::Scratch, Element::Logit, share)?,
            sums_turn: Cell::new(0),
            logits_turn: Cell::new(0),
        };
        link.reserve(bytes)?;
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
        let Ranks { inbox, .. } = self.ranks(self.sums_turn.get())?;
        let mut to = inbox.map(Address);
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

    /// Where the head leaves logits of the rank's tokens.
    pub fn share(&self) -> Buffer {
        self.share
    }

    /// Adds what all ranks have left in [`Exchange::sums`] to the residual stream.
    pub fn reduce(&self, launcher: &Launcher, stream: Stream) -> Result<(), CudaError> {
        self.reduce_by(launcher, stream, self.way(stream.tokens))
    }

    /// Does the next step's first exchange of sums follow one in the other place? Between two steps there may be none that all ranks
    /// have words of, for embedded rows come from who has them, so a step has an even number.
    pub fn is_even(&self) -> bool {
        self.sums_turn.get() == 0
    }

    /// The same in the way that they were left in. Those that are carried have one way.
    pub fn reduce_by(&self, launcher: &Launcher, stream: Stream, way: Way) -> Result<(), CudaError> {
        let Stream { residual, sumsq, tokens } = stream;
        let way = if self.link.is_carried() { Way::OneShot } else { way };
        self.carry(launcher, 0, self.sums.address(), tokens as usize * padded(self.dims.hidden) * 4)?;
        let turn = self.sums_turn.replace(1 - self.sums_turn.get());
        let (kernel, shares) = match way {
            Way::OneShot => (&self.one_shot, 1),
            Way::TwoShot => (&self.two_shot, self.link.rank().count),
        };
        let chunks = row_chunks(tokens, self.dims.hidden);
        let (grid, ranks) = (self.grid(chunks.div_ceil(shares)), self.ranks(turn)?);
        launcher.launch(kernel, grid, [&self.sums, &residual, &sumsq, &tokens, &self.dims.hidden, &ranks])
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
        let mut ranks = self.ranks(2)?;
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
            self.carry(launcher, 2, embedded, stream.tokens as usize * padded(hidden) * 2)?;
        }
        launch(&ranks)
    }

    /// `out`, `[samples, vocab]` f16, becomes what all ranks have in [`Exchange::share`].
    pub fn gather_logits(&self, launcher: &Launcher, samples: u32, out: Address) -> Result<(), CudaError> {
        let turn = self.logits_turn.replace(1 - self.logits_turn.get());
        self.gather(launcher, 3 + turn, [samples, self.dims.vocab], self.share.address(), out)
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
        self.gather(launcher, 5, shape, share, out)
    }

    /// Rows of 16 bits an element, of which each rank has a share of the columns, by a part of the inbox.
    fn gather(
        &self,
        launcher: &Launcher,
        part: usize,
        [rows, columns]: [u32; 2],
        share: Address,
        out: Address,
    ) -> Result<(), CudaError> {
        let (rank, ranks) = (self.link.rank(), self.ranks(part)?);
        let chunks = column_chunks(rank, [rows, columns]);
        self.carry(launcher, part, share, share_elements(rank, [rows as usize, columns as usize]) * 2)?;
        launcher.launch(&self.gather, self.grid(chunks), [&share, &out, &rows, &columns, &ranks])
    }

    /// What `experts_combine_ranks` makes of the residual stream, each rank of its columns, is every rank's.
    pub(super) fn join(&self, launcher: &Launcher, tokens: u32, join: &Joining<'_>) -> Result<(), CudaError> {
        let turn = self.sums_turn.replace(1 - self.sums_turn.get());
        let (ranks, sent) = (self.ranks(turn)?, self.embedded.unwrap_or(Address::NULL));
        let elements = tokens as usize * self.dims.hidden as usize / ranks.count as usize;
        let most = self.blocks_max * JOINING_BLOCKS_AN_SM / BLOCKS_AN_SM;
        let blocks = (elements.div_ceil(COLUMNS) as u32).div_ceil(THREADS).min(most.max(1));
        let grid = Grid::new(blocks, THREADS).dependent_if(self.link.ranks_of_device() == 1);
        let launch = |sends: bool, takes: bool| {
            let (sends, takes) = (u32::from(sends), u32::from(takes));
            let Joining { kernel, routing, given, residual, sumsq } = *join;
            launcher.launch(
                kernel,
                grid,
                [routing as &dyn Param, &given, &residual, &sumsq, &sent, &sends, &takes, &ranks],
            )
        };
        if !self.link.is_carried() {
            return launch(true, true);
        }
        launch(true, false)?;
        self.carry(launcher, turn, sent, elements * 2)?;
        launch(false, true)
    }

    /// `own`, `[tokens, hidden / ranks]` bf16, becomes this rank's columns of the residual stream.
    pub fn own_columns(&self, launcher: &Launcher, own: Address, stream: Stream) -> Result<(), CudaError> {
        let (Stream { residual, tokens, .. }, ranks) = (stream, self.ranks(0)?);
        let grid = self.grid(row_chunks(tokens, self.dims.hidden).div_ceil(ranks.count));
        launcher.launch(&self.own_columns, grid, [&own, &residual, &tokens, &self.dims.hidden, &ranks])
    }

    /// The residual stream becomes what all ranks have in `own`, each its columns.
    pub fn join_columns(&self, launcher: &Launcher, own: Address, stream: Stream) -> Result<(), CudaError> {
        let Stream { residual, sumsq, tokens } = stream;
        let turn = self.sums_turn.replace(1 - self.sums_turn.get());
        let ranks = self.ranks(turn)?;
        let elements = tokens as usize * self.dims.hidden as usize / ranks.count as usize;
        self.carry(launcher, turn, own, elements * 2)?;
        let grid = self.grid((elements as u32).div_ceil(CHUNK));
        launcher.launch(
            &self.join_columns,
            grid,
            [&own, &residual, &sumsq, &tokens, &self.dims.hidden, &ranks],
        )
    }

    /// A thread a chunk, as far as the device holds so many at once. Of ranks that share a device one's exchanges would else take the
    /// places of another's by beginning before their turn.
    fn grid(&self, chunks: u32) -> Grid {
        let grid = Grid::new(chunks.div_ceil(THREADS).min(self.blocks_max), THREADS);
        grid.dependent_if(self.link.ranks_of_device() == 1)
    }

    /// Fills a part of the inbox with so many bytes of every rank, those at `from` of this one, where words are carried.
    fn carry(&self, launcher: &Launcher, part: usize, from: Address, bytes: usize) -> Result<(), CudaError> {
        if !self.link.is_carried() {
            return Ok(());
        }
        let Ranks { inbox, rank, .. } = self.ranks(part)?;
        self.link.carry(launcher.stream(Queue::Compute), from, Address(inbox[rank as usize]), bytes)
    }

    /// Of an exchange in this part of the inboxes.
    fn ranks(&self, part: usize) -> Result<Ranks, CudaError> {
        let Rank { index: rank, count } = self.link.rank();
        // Of two parts that take turns there may be one alone.
        let part = if self.parts.turns == 1 && matches!(part, 1 | 4) { part - 1 } else { part };
        let start = self.parts.starts()[part];
        let inbox = self.link.inboxes()?.map(|inbox| inbox.offset(start).number());
        let (ended, patience_ms) = (self.link.ended(), self.link.patience_ms());
        Ok(Ranks { inbox, ended, rank, count, patience_ms, carried: self.link.is_carried().into() })
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::{HOPPER, PORTABLE};

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
            &["exchange.cuh"],
            "Ranks",
            Ranks { inbox, ended, rank, count, patience_ms, carried }
        );
        assert_eq!(constant("exchange.cu", "BLOCKS_AN_SM"), BLOCKS_AN_SM);
        assert_eq!(constant("experts.cu", "BLOCKS_AN_SM"), JOINING_BLOCKS_AN_SM);
        assert_eq!(constant("inbox.cuh", "EMPTY"), u32::from_ne_bytes([EMPTY_BYTE; 4]));
        assert_eq!(constant("exchange.cuh", "ENDED"), ENDED);
        for set in [HOPPER, PORTABLE] {
            assert!(KERNELS.iter().all(|name| threads_of(set, name) == THREADS));
        }
    }

    #[test]
    fn parts_of_an_inbox_hold_the_largest_exchange_and_lie_one_behind_the_other() {
        let dims = Dims {
            layers: 1,
            hidden: 1000,
            heads: 8,
            kv_heads: 8,
            head_dim: 128,
            intermediate: 1024,
            vocab: 50_001,
            norm_eps: 1e-6,
        };
        let limits = Limits {
            running: 33,
            queued: 1,
            sequence: 64,
            prefill_tokens: 20_000,
            page_size: 16,
            pages: 8,
            graph_rows: 8,
        };
        for count in [2, 4, 8] {
            let rank = Rank { index: 0, count };
            let parts = Parts::new(rank, &dims, &limits, 20_033 * 7);
            let of_all = 20_033 * 1024 * 4;
            assert!(parts.sums >= count as usize * (Way::one_shot_bytes(count) - 4096), "one shot");
            assert!(parts.sums >= of_all - of_all / count as usize + of_all / 2, "two shots");
            assert!(parts.embedded >= 20_033 * 1024 * 2 && parts.logits >= 33 * 50_001 * 2);
            let starts = parts.starts();
            let sizes = [parts.sums, parts.sums, parts.embedded, parts.logits, parts.logits, 20_033 * 14];
            for (pair, size) in starts.windows(2).zip(sizes) {
                assert!(pair[1] - pair[0] >= size && pair[1] % 256 == 0);
            }
        }
    }
}
