//! What the engine keeps on the device, beside the model's weights and KV pages, and how a batch gets there.
//!
//! ```text
//!   waiting     [2, layout.words]          packed batches of the step that runs and of the next one, which take turns at the halves
//!   turn        [2]                        whose turn it is
//!   batch       [layout.words]             the step's packed batch, which each step takes from there
//!   page table  [slots + 1, table_width]   kept up to date by the batches' updates
//!   token pool  [slots + 1]                the token each slot sampled last
//!   slots       [slots + 1] SlotState      how each slot's tokens are drawn, kept up to date likewise
//!   rules       [slots + 1, RULE_WORDS]    what each slot's request says of single tokens, likewise
//!   history     [pages + 1, page_size]     the token whose key and value lie at a location, beside the KV pages
//!   masks       [slots, mask words]        the tokens that constrained rows may draw, overwritten by each step's that has any
//!               [slots, mask words]        behind them, those that each slot's request allows at all, kept up to date likewise
//!   tokens      [2, slots]                 what the steps draw; steps take turns at the two halves
//!   logprobs    [2, slots] RowLogprobs     their log-probabilities
//!   scores      [2, prefill tokens] RowLogprobs     those of the prompts' tokens that the steps score
//! ```
//!
//! A batch is uploaded beside the step before its own, and waits: a copy between two steps would keep the device from both for as long as
//! a small step's whole layer takes. A step begins by taking its batch to where recorded steps look for it, one buffer for all, which
//! is overwritten only behind the step that read it. Halves are written again two steps later, when the step that took its batch from
//! there has been completed. Results leave on a queue of their own, so they have two halves too.
//!
//! Invariant: the page table's last row, the dummy slot's, names the dummy page from the start and is never updated.
//! Other entries name it too until they are set, so no table entry ever leads out of the KV memory.
//!
//! The history lies beside the pages so that it is right whenever keys and values are: for a prefix that another request
//! computed, after a preemption, and for drafts, of which those behind a wrong one are overwritten likewise.
//!
//! The page table has an entry for each page of as many sequences of full length as there are slots: 4 bytes each, a MiB for
//! 256 slots of 16,384 tokens, 256 MiB for 4,096 slots of 262,144.

use crate::backend::{Device, Element, Model, Purpose, Sampler, Step};
use crate::batch::{Batch, Dummy, HEADER_WORDS, Layout, ROW_WORDS, StepShape};
use crate::config::Limits;
use crate::constraint::mask_words;
use crate::rules::RULE_WORDS;
use crate::sampling::{LOGPROB_WORDS, SLOT_STATE_WORDS, SlotState};

/// See the module.
pub(crate) struct Resident<Buf> {
    /// Of the largest step.
    layout: Layout,
    plan_words: usize,
    /// Where padding rows point.
    dummy: Dummy,
    /// Rows of a half of the outputs: slots.
    slots: usize,
    table_width: u32,
    page_size: u32,
    waiting: Buf,
    turn: Buf,
    /// The half that the next batch goes to: as many have been sent as steps take theirs.
    next: usize,
    batch: Buf,
    page_table: Buf,
    token_pool: Buf,
    states: Buf,
    rules: Buf,
    /// Comes and goes with the pages.
    history: Option<Buf>,
    pub masks: Buf,
    pub tokens: Buf,
    pub logprobs: Buf,
    scores: Buf,
    /// Rows of a half of the scores.
    scored_max: usize,
    /// Rows that the model gives logits for at once.
    logit_rows: usize,
}

impl<Buf: Copy> Resident<Buf> {
    /// Allocates all of it; see [`Resident::clear`].
    pub fn new<B: Device<Buffer = Buf>>(
        backend: &mut B,
        limits: &Limits,
        plan_words: usize,
        vocab: u32,
    ) -> Result<Self, B::Error> {
        let slots = limits.running as usize;
        let layout = Layout::new(limits, plan_words);
        let mut words = |count| backend.alloc(Purpose::Scratch, Element::Word, count);
        Ok(Resident {
            layout,
            plan_words,
            dummy: Dummy::of(limits),
            slots,
            table_width: limits.table_width(),
            page_size: limits.page_size,
            waiting: words(2 * layout.words)?,
            turn: words(2)?,
            next: 0,
            batch: words(layout.words)?,
            page_table: words(table_words(limits))?,
            token_pool: words(slots + 1)?,
            states: words((slots + 1) * SLOT_STATE_WORDS)?,
            rules: words((slots + 1) * RULE_WORDS)?,
            history: None,
            masks: words(2 * slots * mask_words(vocab))?,
            tokens: words(2 * slots)?,
            logprobs: words(2 * slots * LOGPROB_WORDS)?,
            scores: words(2 * limits.prefill_tokens as usize * LOGPROB_WORDS)?,
            scored_max: limits.prefill_tokens as usize,
            logit_rows: limits.logit_rows(),
        })
    }

    /// Allocates the history of so many pages.
    pub fn alloc_history<B: Device<Buffer = Buf>>(
        &mut self,
        backend: &mut B,
        pages: u32,
    ) -> Result<(), B::Error> {
        let words = (pages as usize + 1) * self.page_size as usize;
        self.history = Some(backend.alloc(Purpose::KvCache, Element::Word, words)?);
        Ok(())
    }

    /// Frees it, to be allocated anew.
    pub fn free_history<B: Device<Buffer = Buf>>(&mut self, backend: &mut B) -> Result<(), B::Error> {
        self.history.take().map_or(Ok(()), |history| backend.free(history))
    }

    /// Lets every slot's pages be the dummy page, which lies behind the last one, every slot's token be 0, and every slot draw
    /// greedily.
    pub fn clear<B: Device<Buffer = Buf>>(
        &mut self,
        backend: &mut B,
        limits: &Limits,
    ) -> Result<(), B::Error> {
        (self.dummy, self.next) = (Dummy::of(limits), 0);
        fill(backend, self.turn, 2, &[0])?;
        fill(backend, self.page_table, table_words(limits), &[limits.pages])?;
        fill(backend, self.token_pool, self.slots + 1, &[0])?;
        let greedy = [SlotState::default()];
        fill(backend, self.states, (self.slots + 1) * SLOT_STATE_WORDS, bytemuck::cast_slice(&greedy))
    }

    /// Words of a packed batch at most.
    pub fn batch_words(&self) -> usize {
        self.layout.words
    }

    /// Where a half of `tokens` lies.
    pub fn tokens_of<B: Device<Buffer = Buf>>(&self, backend: &B, half: usize) -> Buf {
        backend.slice(self.tokens, half * self.slots..(half + 1) * self.slots)
    }

    /// Where a half of `logprobs` lies.
    pub fn logprobs_of<B: Device<Buffer = Buf>>(&self, backend: &B, half: usize) -> Buf {
        let words = self.slots * LOGPROB_WORDS;
        backend.slice(self.logprobs, half * words..(half + 1) * words)
    }

    /// Where a half of `scores` lies.
    pub fn scores_of<B: Device<Buffer = Buf>>(&self, backend: &B, half: usize) -> Buf {
        let words = self.scored_max * LOGPROB_WORDS;
        backend.slice(self.scores, half * words..(half + 1) * words)
    }

    /// Packs a batch, padded up to `shape`, with the model's plan for it, and enqueues its upload. One step is to be run behind each.
    pub fn send<B: Device<Buffer = Buf>, M: Model<B>>(
        &mut self,
        backend: &mut B,
        model: &M,
        batch: &Batch,
        shape: StepShape,
        half: usize,
        staging: &mut B::Pinned,
    ) -> Result<Step<Buf>, B::Error> {
        let layout = self.layout.of(shape);
        let words = backend.words_mut(staging)?;
        let used = batch.pack(&layout, shape, self.dummy, (half * self.slots) as u32, words);
        let (front, back) = words.split_at_mut(layout.rows);
        let rows = bytemuck::cast_slice(&back[..shape.rows() as usize * ROW_WORDS]);
        model.plan(backend, shape, rows, &mut front[layout.plan..][..self.plan_words]);
        let scored = batch.pack_scored(&layout, words);
        let place =
            backend.slice(self.waiting, self.next * self.layout.words..(self.next + 1) * self.layout.words);
        self.next = 1 - self.next;
        backend.upload_ahead(staging, 0..used, place)?;
        // Where it goes lies behind what the step takes, to a multiple of a row's words, so that takes none of it away.
        if let Some(scored) = scored {
            backend.upload(staging, scored, self.batch)?;
        }
        Ok(self.step(shape))
    }

    /// A step of this shape, as operations see it.
    pub fn step(&self, shape: StepShape) -> Step<Buf> {
        Step {
            shape,
            batch: self.batch,
            layout: self.layout.of(shape),
            page_table: self.page_table,
            table_width: self.table_width,
            page_size: self.page_size,
            token_pool: self.token_pool,
            slots: self.states,
            rules: self.rules,
            history: self.history.expect("pages, and their history, are allocated before the first step"),
            masks: self.masks,
        }
    }

    /// Enqueues a step whose batch waits: it is taken, then the model's forward pass, then, where logits are wanted and can be made, the
    /// sampler, which fills `tokens`.
    pub fn run<B: Sampler<Buffer = Buf>, M: Model<B>>(
        &self,
        backend: &mut B,
        model: &mut M,
        step: &Step<Buf>,
        wants_logits: bool,
    ) -> Result<(), B::Error> {
        backend.take_batch(self.waiting, self.turn, self.batch)?;
        model.forward(backend, step)?;
        // A step that is one unfinished chunk of a prompt leaves keys and values, and no token.
        if step.shape.samples == 0 {
            return Ok(());
        }
        model.norm(backend, step)?;
        if !(wants_logits && model.has_head()) {
            return Ok(());
        }
        model.head(backend, step)?;
        backend.sample(step, model.logits(), self.tokens)
    }

    /// Enqueues, behind a step that was run, the scoring of `count` tokens of its prompts, as many at once as the model's logits
    /// have room for. The scores go to the half of the step.
    pub fn score<B: Sampler<Buffer = Buf>, M: Model<B>>(
        &self,
        backend: &mut B,
        model: &mut M,
        step: &Step<Buf>,
        count: usize,
        half: usize,
    ) -> Result<(), B::Error> {
        let ids_at = step.layout.scored + HEADER_WORDS + count * ROW_WORDS;
        let part = backend.slice(step.batch, step.layout.scored..ids_at);
        let ids = backend.slice(step.batch, ids_at..ids_at + count);
        let scores = self.scores_of(backend, half);
        for first in (0..count).step_by(self.logit_rows) {
            let range = first..count.min(first + self.logit_rows);
            let rows = HEADER_WORDS + first * ROW_WORDS;
            let of_range = Step {
                batch: part,
                layout: Layout { rows, ..step.layout },
                shape: StepShape { samples: range.len() as u32, ..step.shape },
                ..*step
            };
            model.norm(backend, &of_range)?;
            model.head(backend, &of_range)?;
            let out = backend.slice(scores, range.start * LOGPROB_WORDS..range.end * LOGPROB_WORDS);
            let ids = backend.slice(ids, range);
            backend.logprobs(&of_range, model.logits(), ids, out)?;
        }
        Ok(())
    }
}

/// A row of the page table for each slot, and the dummy slot's.
fn table_words(limits: &Limits) -> usize {
    (limits.running as usize + 1) * limits.table_width() as usize
}

/// Fills a buffer with a pattern, again and again, and waits until that is done.
fn fill<B: Device>(
    backend: &mut B,
    buffer: B::Buffer,
    words: usize,
    pattern: &[u32],
) -> Result<(), B::Error> {
    const AT_ONCE: usize = 64 << 10;
    let mut staging = backend.alloc_pinned(words.min(AT_ONCE))?;
    for (word, value) in backend.words_mut(&mut staging)?.iter_mut().zip(pattern.iter().cycle()) {
        *word = *value;
    }
    for first in (0..words).step_by(AT_ONCE) {
        let count = AT_ONCE.min(words - first);
        let part = backend.slice(buffer, first..first + count);
        backend.upload(&mut staging, 0..count, part)?;
    }
    backend.synchronize()
}
