//! The scheduler: requests and finished steps go in, batches and events come out.
//!
//! It never waits, reads a clock or touches a device. A step is scheduled before the tokens of the step before it are
//! known; they come in by [`Scheduler::complete`]. When a step is scheduled, at most one is in flight.
//!
//! ```text
//!              ┌──────────── retracted ────────────┐
//!              v                                   │
//!   submit ─> waiting ── admit ──> prefilling ──> decoding ──> finished
//!              └──────── abort ───────┴──────────────┴─────────────^
//! ```
//!
//! A [policy](crate::policy) says whether the next step has decode rows, and how many tokens of prompts. What is promised
//! whatever it says, and held against every step of random streams (`core/tests/promises.rs`) or a stream of its own
//! (`scheduler.rs`, `engine.rs` and `scoring.rs` beside it):
//! - Either all running requests decode, or none; but one with a [constraint](crate::constraint) has no row before its last token
//!   and the mask for its next one are known. Of several prompts in a step the last one may be cut (a chunk) and goes on
//!   in a later step; until it is through, no other one begins.
//! - Samples of one prompt are taken in as a group: all or none. They are admitted one behind the other, in one step if there is
//!   room, and each holds the pages that those before it have of the prompt, with a prefix cache or without; its own is what lies
//!   behind the last full page, a page at most of it, which each computes for itself.
//! - Requests are admitted in their order: retracted ones first, the oldest of them first; then those waiting, as submitted or
//!   as [`Order`] says. One for which there is no room lets none behind it pass.
//! - A request is admitted when the pool can hold all that it must prefill and a page for each running request
//!   besides, so that an admission is not undone at once.
//! - When a decode row finds no page, the youngest request is retracted: its pages go back, its tokens stay. Nobody is admitted
//!   in that step. The oldest one always goes on, and alone it fits (`submit` saw to that), so every request ends.
//! - Where every layer has a window, a running request's own pages behind it go back before its next step is scheduled; not
//!   those of one whose tokens the device reads there, for penalties or bad words.
//! - Of a prompt that is scored, no token before one whose score is still to come is taken from the prefix cache: its logits are
//!   needed. What a step was asked to score is not asked for again, whatever becomes of its pages.
//! - A request that ends by length is known to end when its last step is scheduled; one that ends by an
//!   end-of-sequence or stop token may run one step too far, and that token is dropped.

mod admission;
mod check;
mod completion;
mod constrained;
mod decode;
mod prefill;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::batch::{Batch, PageUpdate, Row, StepShape};
use crate::config::{Limits, LimitsError};
use crate::constraint::mask_words;
use crate::costs::StepCosts;
use crate::host::{listed, reserved};
use crate::pages::PagePool;
use crate::policy::{Mix, Policy, StepPolicy};
use crate::queue::Queue;
use crate::request::{Event, FinishReason, Request, SubmitError, Submitted, Ticket};
use crate::rules::{ENDINGS_MAX, NO_RULES};
use crate::sampling::SamplingError;
use crate::speculation::{Drafting, Speculation};
use crate::stats::{Load, Stats};
use crate::table::{Entry, Place, RequestTable, State};

pub use crate::queue::Order;

/// How the scheduler behaves, beside its capacities.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// What steps are made of.
    pub policy: Policy,
    /// Keep full pages of ended requests and reuse them for equal prefixes.
    pub prefix_cache: bool,
    /// Order of admission.
    pub order: Order,
    /// When tokens are drafted.
    pub speculation: Speculation,
    /// Token ids lie below it.
    pub vocab: u32,
}

/// See the module.
pub struct Scheduler {
    limits: Limits,
    settings: Settings,
    policy: Box<dyn StepPolicy>,
    drafting: Drafting,
    eos: Vec<u32>,
    table: RequestTable,
    pool: PagePool,
    waiting: Queue,
    /// Retracted requests, oldest first; they go before those waiting.
    retracted: VecDeque<u32>,
    /// Requests with a slot, in the order of their admission: the youngest is the last.
    running: Vec<u32>,
    /// The request that was refused admission last, and the pages there were above the watermark; see [`Scheduler::admit`].
    refused: Option<(Ticket, i64)>,
    /// A request that has no row in the step scheduled last for want of its mask.
    unmasked: Option<u32>,
    /// Of the tokens that are left to a request for which none was drawn.
    mask: Vec<u32>,
    /// Requests that wait elsewhere; see [`Scheduler::set_backlog`].
    backlog: u32,
    /// A request has come since the last step was scheduled.
    has_arrivals: bool,
    /// Some of the running, or of those waiting, have just ended and are still listed.
    ended_running: bool,
    ended_waiting: bool,
    stats: Stats,
}

impl Scheduler {
    /// An idle scheduler. `limits` have been checked; `costs` are those of the device's steps; `window` is the model's
    /// ([`crate::backend::Model::window`]).
    ///
    /// # Errors
    /// Too little host memory for its tables.
    pub fn new(
        limits: Limits,
        settings: Settings,
        costs: StepCosts,
        eos: &[u32],
        window: Option<u32>,
    ) -> Result<Self, LimitsError> {
        Ok(Scheduler {
            limits,
            settings,
            policy: settings.policy.build(costs, limits.running),
            drafting: Drafting::new(settings.speculation, costs.decode, limits.running),
            eos: listed(eos.iter().copied())?,
            table: RequestTable::new(&limits, window)?,
            pool: PagePool::new(limits.pages, limits.page_size)?,
            waiting: Queue::new(settings.order, &limits)?,
            retracted: reserved(limits.running as usize)?.into(),
            running: reserved(limits.running as usize)?,
            refused: None,
            unmasked: None,
            mask: listed((0..mask_words(settings.vocab)).map(|_| 0))?,
            backlog: 0,
            has_arrivals: false,
            ended_running: false,
            ended_waiting: false,
            stats: Stats::default(),
        })
    }

    /// Counters so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Tokens that end a sequence.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Sets the counters to zero.
    pub fn reset_stats(&mut self) {
        self.stats = Stats::default();
    }

    /// Requests that wait for a slot.
    pub fn waiting(&self) -> usize {
        self.waiting.len() + self.retracted.len()
    }

    /// Requests that have a slot.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// What there is to do now.
    pub fn load(&self) -> Load {
        Load { running: self.running() as u32, waiting: self.waiting() as u32, pages_used: self.pages_used() }
    }

    /// Pages that running requests hold.
    fn pages_used(&self) -> u32 {
        self.pool.capacity() - self.pool.available()
    }

    /// Does nobody wait or run?
    pub fn is_idle(&self) -> bool {
        self.waiting() + self.running() == 0
    }

    /// Forgets all cached prefixes.
    pub fn clear_prefix_cache(&mut self) {
        self.pool.evict_all();
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// A full queue, or a request that can never run.
    pub fn submit(&mut self, request: Request<'_>) -> Result<Submitted, SubmitError> {
        self.check_request(&request)?;
        match self.has_room(1, request.prompt.len()) {
            true => Ok(self.take_in(request, Place::Alone)),
            false => Err(SubmitError::QueueFull { capacity: self.limits.queued }),
        }
    }

    /// Takes in samples of one prompt, requests that differ in how they are drawn, as a group: all of them, or none. Tells `taken`
    /// of each, in their order.
    ///
    /// # Errors
    /// As of [`Scheduler::submit`]; more samples than can wait together.
    pub fn submit_group(
        &mut self,
        samples: &[Request<'_>],
        taken: &mut impl FnMut(Submitted),
    ) -> Result<(), SubmitError> {
        let [first, others @ ..] = samples else { return Ok(()) };
        debug_assert!(others.iter().all(|other| other.prompt == first.prompt), "samples of one prompt");
        samples.iter().try_for_each(|sample| self.check_request(sample))?;
        let (count, tokens) = (samples.len(), first.prompt.len());
        let limit = self.table.samples_max(tokens as u32).min(self.limits.queued as usize);
        if count > limit {
            return Err(SubmitError::TooManySamples { samples: count, limit });
        }
        if !self.has_room(count, tokens) {
            return Err(SubmitError::QueueFull { capacity: self.limits.queued });
        }
        for (i, sample) in samples.iter().enumerate() {
            let place = match i {
                0 if others.is_empty() => Place::Alone,
                0 => Place::First,
                _ => Place::Behind,
            };
            taken(self.take_in(*sample, place));
        }
        Ok(())
    }

    /// Can the request ever run?
    fn check_request(&self, request: &Request<'_>) -> Result<(), SubmitError> {
        request.params.check()?;
        let tokens = request.prompt.len();
        if tokens == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        let limit = self.longest_sequence() - request.params.max_tokens.min(1);
        if tokens as u64 > u64::from(limit) {
            return Err(SubmitError::PromptTooLong { tokens, limit });
        }
        let vocab = self.settings.vocab;
        if let Some(position) = request.prompt.iter().position(|id| *id >= vocab) {
            return Err(SubmitError::TokenOutsideVocabulary {
                id: request.prompt[position],
                position,
                vocab,
            });
        }
        let rules = request.rules.map_or(&NO_RULES, |rules| &**rules);
        rules.check(vocab)?;
        let endings = self.endings(&request.params, rules).count();
        if endings > ENDINGS_MAX {
            return Err(SamplingError::StopTokens(endings).into());
        }
        Ok(())
    }

    /// Can so many requests of so many prompt tokens each wait?
    fn has_room(&self, requests: usize, tokens: usize) -> bool {
        self.waiting.len() + requests <= self.limits.queued as usize
            && self.table.has_room(requests, tokens as u32, self.oldest())
    }

    /// Has a request wait that can run, and for which there is room.
    fn take_in(&mut self, request: Request<'_>, place: Place) -> Submitted {
        let tokens = request.prompt.len() as u32;
        let max_tokens = request.params.max_tokens.min(self.longest_sequence() - tokens);
        let entry = self.table.occupy(request, tokens + max_tokens, place);
        self.waiting.insert(entry, &self.table);
        self.has_arrivals = true;
        Submitted { ticket: self.table.ticket(entry), max_tokens }
    }

    /// The longest sequence that can run alone; at least 1.
    fn longest_sequence(&self) -> u32 {
        let pool = u64::from(self.limits.pages) * u64::from(self.limits.page_size);
        pool.min(u64::from(self.limits.sequence)) as u32
    }

    /// The request that has run longest.
    fn oldest(&self) -> Option<u32> {
        self.running.first().copied()
    }

    /// Says how many requests are going to be submitted as soon as they may.
    pub fn set_backlog(&mut self, requests: u32) {
        self.backlog = requests;
    }

    /// A step has run, in so many milliseconds on the device.
    pub fn has_run(&mut self, shape: StepShape, ms: f32) {
        self.policy.has_run(shape, ms);
    }

    /// Ends a request at once, wherever it is. False if it has ended already.
    pub fn abort(&mut self, ticket: Ticket, sink: &mut impl FnMut(Event<'_>)) -> bool {
        let Some(entry) = self.table.find(ticket) else { return false };
        self.end(entry, FinishReason::Abort, sink);
        self.forget_ended();
        true
    }

    /// Fills a batch with the next step; false if there is nothing to run before a step in flight completes. At most
    /// one is: the step scheduled last.
    pub fn schedule(&mut self, batch: &mut Batch) -> bool {
        batch.clear();
        self.unmasked = None;
        let retractions = self.stats.retractions;
        let demand = self.demand();
        let all = Mix { decodes: true, prompt_tokens: self.limits.prefill_tokens };
        for mix in [self.policy.next(&demand), all] {
            if batch.is_empty() && mix.decodes {
                self.schedule_decode(batch);
            }
            // Who was retracted just now may have a token in flight, and pages are short.
            if self.stats.retractions == retractions {
                self.schedule_prefill(mix.prompt_tokens, batch);
            }
            if !batch.is_empty() {
                break;
            }
        }
        let window = self.table.window().unwrap_or(u32::MAX);
        self.stats.count(batch, window, self.pages_used());
        !batch.is_empty()
    }

    /// May the request hold prefixes that others have computed, and others its own?
    fn shares_prefixes(&self, entry: u32) -> bool {
        self.settings.prefix_cache || self.table.get(entry).is_grouped
    }

    /// Without a prefix cache, forgets what nobody holds any more, unless there are samples that are going to.
    fn forget_unshared(&mut self) {
        if !self.settings.prefix_cache && self.table.grouped_waiting() == 0 {
            self.pool.evict_all();
        }
    }

    /// Has the request no page for its next position?
    fn needs_page(&self, entry: u32) -> bool {
        let request = self.table.get(entry);
        request.state == State::Running && request.computed >= request.pages * self.limits.page_size
    }

    /// Gives a running request another page; the caller knows that one is available.
    fn grow(&mut self, entry: u32, batch: &mut Batch) {
        let page = self.pool.take().expect("a page is available");
        let request = self.table.get_mut(entry);
        let i = request.pages;
        request.pages += 1;
        self.set_page(entry, i, page, batch);
    }

    fn set_page(&mut self, entry: u32, i: u32, page: u32, batch: &mut Batch) {
        self.table.set_page(entry, i, page);
        batch.push_update(PageUpdate { index: self.table.page_index(self.table.get(entry).slot, i), page });
    }

    /// A step of decode rows alone has been padded with so many.
    pub(crate) fn count_padding(&mut self, rows: u32) {
        self.stats.padding_rows += u64::from(rows);
    }
}

/// A row of a request's at these positions, sampled, without a mask.
#[inline]
fn row(request: &Entry, first_token: u32, positions: core::ops::Range<u32>, logprobs: u32) -> Row {
    Row {
        slot: request.slot,
        first_token,
        tokens: positions.len() as u32,
        position: positions.start,
        kv_len: positions.end,
        sampled: 1,
        logprobs,
        mask: 0,
    }
}
