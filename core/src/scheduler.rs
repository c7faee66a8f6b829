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
//! whatever it says:
//! - Either all running requests decode, or none; but one with a [constraint](crate::constraint) has no row before its last token
//!   and the mask for its next one are known. Of several prompts in a step the last one may be cut (a chunk) and goes on
//!   in a later step; until it is through, no other one begins.
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

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::batch::{Batch, LAST_TOKEN, PageUpdate, Row, StepShape, Token};
use crate::config::{Limits, LimitsError};
use crate::constraint::ConstraintState;
use crate::costs::StepCosts;
use crate::host::{listed, reserved};
use crate::pages::{NO_PAGE, PagePool};
use crate::policy::{Demand, Mix, Policy, StepPolicy};
use crate::queue::Queue;
use crate::request::{Event, FinishReason, Request, SubmitError, Submitted, Ticket};
use crate::rules::{ENDINGS_MAX, NO_RULES, Rules};
use crate::sampling::{NO_TOKEN, PromptLogprobs, RowLogprobs, SamplingError, SamplingParams};
use crate::speculation::{Drafting, Speculation};
use crate::stats::{Load, Stats};
use crate::table::{RequestTable, State};

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
        request.params.check()?;
        let len_max = self.longest_sequence();
        let tokens = request.prompt.len();
        if tokens == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        let limit = len_max - request.params.max_tokens.min(1);
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
        let max_tokens = request.params.max_tokens.min(len_max - tokens as u32);
        let full = SubmitError::QueueFull { capacity: self.limits.queued };
        if self.waiting.len() == self.limits.queued as usize {
            return Err(full);
        }
        let (oldest, len_max) = (self.oldest(), tokens as u32 + max_tokens);
        let entry = self.table.occupy(request, len_max, oldest).ok_or(full)?;
        self.waiting.insert(entry, &self.table);
        self.has_arrivals = true;
        Ok(Submitted { ticket: self.table.ticket(entry), max_tokens })
    }

    /// The tokens that must not be drawn while the output has fewer than `min_tokens`.
    fn endings<'a>(
        &'a self,
        params: &SamplingParams,
        rules: &'a Rules,
    ) -> impl Iterator<Item = u32> + use<'a> {
        let (eos, stop) = match params.min_tokens {
            0 => (&[][..], &[][..]),
            _ if params.ignore_eos => (&[][..], rules.stop()),
            _ => (&self.eos[..], rules.stop()),
        };
        eos.iter().chain(stop).copied()
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

    /// Is the step in flight, of this batch, to be completed before the next one is scheduled? Where it has drafts, nobody knows
    /// yet which positions are next; where others could be made when its tokens are known, waiting may pay.
    pub fn waits_for(&mut self, in_flight: &Batch) -> bool {
        if in_flight.has_drafts() {
            return true;
        }
        let requests = self.running.len() as u32;
        if !self.drafting.is_possible(requests) {
            return false;
        }
        let mut saved_ms = 0.0;
        for i in 0..self.running.len() {
            let entry = self.running[i];
            let request = self.table.get(entry);
            if request.can_decode() && !self.table.is_constrained(entry) && self.predict(entry).is_some() {
                saved_ms += self.drafting.drafts(requests, self.table.get(entry).hits).1;
            }
        }
        self.drafting.pays_to_wait(saved_ms)
    }

    /// A step began so many milliseconds after the end of the one before it, because that was waited for.
    pub fn has_waited(&mut self, ms: f32) {
        self.drafting.has_waited(ms);
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

    /// What could run now.
    fn demand(&mut self) -> Demand {
        let unfinished = self.running.last().map(|entry| self.table.get(*entry));
        let rest =
            unfinished.map_or(0, |request| request.prefill_len - request.computed.min(request.prefill_len));
        let has_chunk = u32::from(rest > 0);
        let mut context = unfinished.filter(|_| rest > 0).map(|request| request.computed);
        let (mut prompts, mut tokens, mut pages) = (0, rest, self.pages_above_watermark());
        let places = self.table.vacant_slots().min(self.waiting());
        for i in 0..places {
            let entry = match i.checked_sub(self.retracted.len()) {
                None => self.retracted[i],
                Some(i) => self.waiting.at(i),
            };
            if tokens >= self.limits.prefill_tokens {
                break;
            }
            let cached = self.expect_cached_pages(entry);
            let known = self.table.get(entry).known;
            pages -= i64::from(known.div_ceil(self.limits.page_size) - cached);
            if pages < 0 {
                break;
            }
            pages -= 1;
            prompts += 1;
            let cached_tokens = cached * self.limits.page_size;
            tokens += known - cached_tokens;
            context.get_or_insert(cached_tokens);
        }
        let all_fit = pages >= 0 && self.waiting() as u32 + self.backlog <= self.table.vacant_slots() as u32;
        Demand {
            decode_rows: self.running.len() as u32 - has_chunk,
            prompts: has_chunk + prompts,
            prompt_tokens: tokens,
            context: context.unwrap_or(0),
            prompt_tokens_max: self.limits.prefill_tokens,
            places_are_short: !all_fit,
            has_arrivals: core::mem::take(&mut self.has_arrivals),
        }
    }

    /// Full pages of a waiting request's prefix that the cache has, or had when they were first counted: each step would be
    /// too often.
    fn expect_cached_pages(&mut self, entry: u32) -> u32 {
        if let Some(pages) = self.table.get(entry).pages_expected {
            return pages;
        }
        let path = self.cached_prefix(entry, |_, _| ());
        self.table.get_mut(entry).pages_expected = Some(path.1);
        path.1
    }

    /// Ends the requests whose constraint allows nothing more, or can't tell what it allows.
    pub fn end_constrained(&mut self, sink: &mut impl FnMut(Event<'_>)) {
        if self.table.constrained() == 0 {
            return;
        }
        let reason = |table: &RequestTable, entry| match table.constraint(entry)?.state() {
            ConstraintState::Complete => Some(FinishReason::Complete),
            ConstraintState::Failed => Some(FinishReason::ConstraintFailed),
            ConstraintState::Computing | ConstraintState::Ready => None,
        };
        for i in 0..self.candidates() {
            let entry = self.candidate(i);
            if let Some(reason) = reason(&self.table, entry) {
                self.end(entry, reason, sink);
            }
        }
        self.forget_ended();
    }

    /// Waits for a mask for want of which a request had no row in the step scheduled last; false if there is none.
    pub fn wait_for_mask(&mut self) -> bool {
        let constraint = self.unmasked.take().and_then(|entry| self.table.constraint(entry));
        constraint.map(|constraint| constraint.wait()).is_some()
    }

    /// Writes the mask of a request's next token; of one that has ended meanwhile, one that allows everything.
    pub fn write_mask(&self, ticket: Ticket, mask: &mut [u32]) {
        match self.table.find(ticket).and_then(|entry| self.table.constraint(entry)) {
            Some(constraint) => constraint.write_mask(mask),
            None => mask.fill(u32::MAX),
        }
    }

    /// Requests that may have a row in the next step: those running, and who is to be admitted next.
    fn candidates(&self) -> usize {
        self.running.len() + self.retracted.len() + usize::from(self.waiting.next().is_some())
    }

    fn candidate(&self, i: usize) -> u32 {
        let retracted = i.wrapping_sub(self.running.len());
        let entry = self.running.get(i).or(self.retracted.get(retracted)).copied();
        entry.or(self.waiting.next()).unwrap_or_else(|| unreachable!("there are fewer candidates"))
    }

    /// Can the request's next token be drawn in this step? Without a constraint always.
    fn can_draw(&mut self, entry: u32) -> bool {
        let Some(constraint) = self.table.constraint(entry) else { return true };
        let request = self.table.get(entry);
        if request.planned > request.known {
            return false;
        }
        let is_ready = constraint.state() == ConstraintState::Ready;
        if !is_ready {
            self.unmasked = Some(entry);
        }
        is_ready
    }

    /// The mask of a row that draws the request's next token.
    fn push_mask(&self, entry: u32, batch: &mut Batch) -> u32 {
        match self.table.is_constrained(entry) {
            true => batch.push_mask(self.table.ticket(entry)),
            false => 0,
        }
    }

    fn schedule_prefill(&mut self, tokens: u32, batch: &mut Batch) {
        let left = |batch: &Batch| tokens.saturating_sub(batch.shape().prefill_tokens());
        // At most one request, the youngest, is between two chunks: a prompt that is cut leaves no room behind it.
        if let Some(&entry) = self.running.last()
            && self.table.get(entry).is_prefilling()
            && (left(batch) == 0 || !self.push_chunk(entry, left(batch), batch))
        {
            return;
        }
        while left(batch) > 0 && batch.has_room_for_row() {
            let Some(entry) = self.next_waiting() else { return };
            if !self.admit(entry, batch) || !self.push_chunk(entry, left(batch), batch) {
                return;
            }
        }
    }

    /// The request to be admitted next. If it was retracted, its last token has come in by now: the step that was in
    /// flight then has completed since.
    fn next_waiting(&self) -> Option<u32> {
        let entry = self.retracted.front().copied().or(self.waiting.next())?;
        let request = self.table.get(entry);
        assert_eq!(request.known, request.planned, "too many steps in flight");
        Some(entry)
    }

    /// Gives a waiting request a slot and the cached pages of its prefix, if the pool can hold the rest and a page for
    /// each running request.
    ///
    /// One that was refused is not looked at again before there are more pages: walking a long prefix in vain would cost
    /// every decode step. With nobody running there are more than ever before, so nobody is refused for good.
    fn admit(&mut self, entry: u32, batch: &mut Batch) -> bool {
        let (ticket, available) = (self.table.ticket(entry), self.pages_above_watermark());
        if self.table.vacant_slots() == 0
            || self.refused.is_some_and(|it| it.0 == ticket && available <= it.1)
            || self.rule_words(entry).count() > batch.room_for_rules()
            || !self.can_draw(entry)
            || !self.table.make_room(entry, self.oldest().unwrap_or(entry))
        {
            return false;
        }
        let (node, depth) = self.hold_cached_prefix(entry);
        let pages = self.table.get(entry).known.div_ceil(self.limits.page_size);
        let fits = i64::from(pages - depth) <= self.pages_above_watermark();
        if !fits || pages as usize > batch.room_for_updates() {
            self.pool.release_path(node);
            if !fits {
                self.refused = Some((ticket, available));
            }
            return false;
        }
        self.stats.cached_tokens += self.table.start(entry, node, depth);
        self.push_slot(entry, batch);
        let mut page = node;
        for i in (0..depth).rev() {
            self.set_page(entry, i, page, batch);
            page = self.pool.parent(page);
        }
        if self.retracted.pop_front().is_none() {
            self.waiting.pop(&self.table);
        }
        self.running.push(entry);
        true
    }

    /// Says how the tokens of a request that has just got its slot are drawn.
    fn push_slot(&self, entry: u32, batch: &mut Batch) {
        let (request, rules) = (self.table.get(entry), self.table.rules(entry));
        let mut state = request.params.slot_state(request.prompt_len);
        rules.apply(self.endings(&request.params, rules).count(), &mut state);
        batch.push_slot(request.slot, state, self.rule_words(entry));
    }

    /// The words of its slot's region of rules.
    fn rule_words(&self, entry: u32) -> impl Iterator<Item = u32> {
        let rules = self.table.rules(entry);
        rules.words(self.endings(&self.table.get(entry).params, rules))
    }

    /// Pages that a new request may have: those available, but for the watermark, a page for each running request, so that an
    /// admission is not undone at once.
    fn pages_above_watermark(&self) -> i64 {
        i64::from(self.pool.available()) - self.running.len() as i64
    }

    /// Holds the longest cached path that the request's tokens spell. Returns the path's end and length.
    fn hold_cached_prefix(&mut self, entry: u32) -> (u32, u32) {
        self.cached_prefix(entry, PagePool::hold)
    }

    /// The longest cached path that the request's tokens spell, but for those that must be run. Each node of it is passed to
    /// `visit`. Returns the path's end and length.
    fn cached_prefix(&mut self, entry: u32, visit: impl Fn(&mut PagePool, u32)) -> (u32, u32) {
        let (mut node, mut depth) = (NO_PAGE, 0);
        if self.settings.prefix_cache {
            let full_pages = self.table.get(entry).cacheable() / self.limits.page_size;
            while depth < full_pages
                && let Some(next) = self.pool.find(node, self.table.page_tokens(entry, depth))
            {
                visit(&mut self.pool, next);
                (node, depth) = (next, depth + 1);
            }
        }
        (node, depth)
    }

    /// Adds the request's next tokens, so many at most, as a prefill row; false if there is no page for them.
    fn push_chunk(&mut self, entry: u32, tokens: u32, batch: &mut Batch) -> bool {
        self.table.drop_behind_window(entry, &mut self.pool);
        let request = *self.table.get(entry);
        let count = tokens.min(request.prefill_len - request.computed);
        let end = request.computed + count;
        let missing = end.div_ceil(self.limits.page_size).saturating_sub(request.pages);
        if missing > self.pool.available() || missing as usize > batch.room_for_updates() {
            return false;
        }
        let last = end == request.prefill_len;
        if last && !self.can_draw(entry) {
            return false;
        }
        for _ in 0..missing {
            self.grow(entry, batch);
        }
        let mask = if last { self.push_mask(entry, batch) } else { 0 };
        let tokens = batch.tokens().len() as u32;
        let row = row(&request.params, request.slot, tokens, request.computed..end, last);
        batch.push_prefill_row(self.table.ticket(entry), Row { mask, ..row });
        for position in request.computed..end {
            let (id, location) = (self.table.token(entry, position), self.table.location(entry, position));
            batch.push_token(Token { id, slot: request.slot, position, location });
            self.push_scored(entry, position, batch);
        }
        let request = self.table.get_mut(entry);
        request.computed = end;
        // Where no token is wanted, the row is sampled for nothing, and has told that its logits are numbers.
        request.planned += u32::from(last && request.planned < request.len_max);
        if self.settings.prefix_cache {
            self.table.keep_prefix(entry, &mut self.pool, false);
        }
        true
    }

    /// Has the token behind `position`, whose own token was pushed last, scored, if its turn has come.
    fn push_scored(&mut self, entry: u32, position: u32, batch: &mut Batch) {
        let next = position + 1;
        let request = self.table.get(entry);
        if let Some(PromptLogprobs { top, .. }) = request.params.prompt_logprobs
            && request.unscored == next
        {
            batch.push_scored(self.table.ticket(entry), self.table.token(entry, next), top);
            self.table.get_mut(entry).score_from(next + 1);
        }
    }

    fn schedule_decode(&mut self, batch: &mut Batch) {
        let requests = self.running.len() as u32;
        let may_draft = self.drafting.is_possible(requests);
        let mut i = 0;
        while i < self.running.len() {
            let entry = self.running[i];
            i += 1;
            if !self.table.get(entry).can_decode()
                || !self.can_draw(entry)
                || !self.table.make_room(entry, self.running[0])
            {
                continue;
            }
            self.table.drop_behind_window(entry, &mut self.pool);
            while self.needs_page(entry) && self.pool.available() == 0 {
                self.retract_youngest();
            }
            if self.table.get(entry).state != State::Running {
                break; // It was the youngest itself.
            }
            if self.needs_page(entry) {
                self.grow(entry, batch);
            }
            let request = self.table.get(entry);
            let position = request.computed;
            let id = match request.known > position {
                true => self.table.token(entry, position),
                false => LAST_TOKEN,
            };
            self.push_decode_row(entry, id, batch);
            if may_draft {
                self.push_drafts(entry, requests, batch);
            }
        }
    }

    /// Where the known tokens of a request have an earlier continuation; the next one is predicted to be its first.
    fn predict(&mut self, entry: u32) -> Option<u32> {
        let continuation = self.table.find_continuation(entry);
        let predicted = continuation.map_or(NO_TOKEN, |at| self.table.token(entry, at));
        self.table.get_mut(entry).predicted = predicted;
        continuation
    }

    /// Adds rows for what the request, whose last token is known and has its row, is expected to draw. None of them makes others
    /// give pages back.
    fn push_drafts(&mut self, entry: u32, requests: u32, batch: &mut Batch) {
        let request = self.table.get(entry);
        if self.table.is_constrained(entry)
            || request.planned != request.known + 1
            || request.computed != request.known
        {
            return;
        }
        let (known, hits) = (request.known, request.hits);
        let Some(continuation) = self.predict(entry) else { return };
        let drafts = self.drafting.drafts(requests, hits).0.min(self.table.unplanned_tokens(entry));
        for draft in 0..drafts {
            // A continuation that reaches the end goes on with what it says itself.
            let at = continuation + draft % (known - continuation);
            if self.needs_page(entry) {
                if self.pages_above_watermark() <= 0 || batch.room_for_updates() == 0 {
                    return;
                }
                self.grow(entry, batch);
            }
            self.push_decode_row(entry, self.table.token(entry, at), batch);
            self.stats.drafted += 1;
        }
    }

    fn push_decode_row(&mut self, entry: u32, id: u32, batch: &mut Batch) {
        let request = *self.table.get(entry);
        let position = request.computed;
        let location = self.table.location(entry, position);
        let (mask, tokens) = (self.push_mask(entry, batch), batch.tokens().len() as u32);
        let row = row(&request.params, request.slot, tokens, position..position + 1, true);
        let token = Token { id, slot: request.slot, position, location };
        batch.push_decode_row(self.table.ticket(entry), Row { mask, ..row }, token);
        let request = self.table.get_mut(entry);
        request.computed += 1;
        request.planned += 1;
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

    fn retract_youngest(&mut self) {
        let Some(entry) = self.running.pop() else { return };
        self.table.stop(entry, &mut self.pool, self.settings.prefix_cache);
        self.retracted.push_front(entry);
        self.stats.retractions += 1;
    }

    /// Takes what has come of a step's scored tokens, before the step is completed.
    pub fn take_scores(&mut self, batch: &Batch, scores: &[RowLogprobs], sink: &mut impl FnMut(Event<'_>)) {
        let mut scores = scores;
        for tokens in batch.scored().chunk_by(|one, other| one.owner == other.owner) {
            let logprobs;
            (logprobs, scores) = scores.split_at(tokens.len());
            let ticket = tokens[0].owner;
            let Some(entry) = self.table.find(ticket) else { continue };
            if logprobs.iter().any(|row| row.token.is_nan()) {
                self.end(entry, FinishReason::NotNumbers, sink);
            } else {
                sink(Event::PromptLogprobs { ticket, logprobs });
            }
        }
        self.forget_ended();
    }

    /// Takes the tokens of a step: of its sampled rows, in order, but for those behind a wrong draft. Steps complete in the order
    /// they were scheduled.
    pub fn complete(
        &mut self,
        batch: &Batch,
        tokens: &[u32],
        logprobs: &[RowLogprobs],
        sink: &mut impl FnMut(Event<'_>),
    ) {
        let has_drafts = batch.has_drafts();
        // Up to this row, drafts were right.
        let mut is_right = true;
        let owners = batch.owners().iter().zip(tokens).enumerate();
        for (i, (&ticket, &token)) in owners.take(batch.samples() as usize) {
            let draft = if has_drafts { batch.draft(i) } else { None };
            is_right = draft.is_none_or(|draft| is_right && tokens[i - 1] == draft);
            if !is_right {
                continue;
            }
            let Some(entry) = self.table.find(ticket) else { continue };
            self.stats.accepted += u64::from(draft.is_some());
            if token == NO_TOKEN {
                self.end(entry, self.reason_of_no_token(entry), sink);
                continue;
            }
            let request = self.table.get(entry);
            if request.known == request.len_max {
                self.end(entry, FinishReason::Length, sink);
                continue;
            }
            self.table.push_token(entry, token);
            if self.settings.speculation != Speculation::Never {
                let predicted = batch.draft(i + 1).unwrap_or(self.table.get(entry).predicted);
                self.table.judge(entry, predicted, token);
            }
            if has_drafts {
                self.table.settle(entry);
            }
            self.stats.output_tokens += 1;
            // Without log-probabilities the rows are left alone: since they were packed they have gone cold.
            let logprobs = logprobs.get(i).filter(|_| batch.rows()[i].logprobs > 0);
            sink(Event::Token { ticket, token, logprobs });
            if let Some(reason) = self.end_of(entry, token) {
                self.end(entry, reason, sink);
            } else if let Some(constraint) = self.table.constraint(entry) {
                constraint.accept(token);
            }
        }
        self.forget_ended();
    }

    /// Why a request ends with the token that it has just drawn, if it does.
    fn end_of(&self, entry: u32, token: u32) -> Option<FinishReason> {
        let request = self.table.get(entry);
        if !request.params.ignore_eos && self.eos.contains(&token) {
            Some(FinishReason::Eos)
        } else if self.table.rules(entry).stop().contains(&token) {
            Some(FinishReason::Stop)
        } else {
            (request.known == request.len_max).then_some(FinishReason::Length)
        }
    }

    /// Why no token could be drawn: its logits are no numbers, or what its constraint allows is all forbidden otherwise.
    fn reason_of_no_token(&self, entry: u32) -> FinishReason {
        let (request, rules) = (self.table.get(entry), self.table.rules(entry));
        let least = request.prompt_len.saturating_add(request.params.min_tokens);
        match self.table.is_constrained(entry) && (request.known < least || rules.has_bad_words()) {
            true => FinishReason::ConstraintFailed,
            false => FinishReason::NotNumbers,
        }
    }

    /// Ends a request; it stays in its queue, or among the running, until [`Scheduler::forget_ended`].
    fn end(&mut self, entry: u32, reason: FinishReason, sink: &mut impl FnMut(Event<'_>)) {
        let ticket = self.table.ticket(entry);
        let request = self.table.get(entry);
        let cached_tokens = request.cached_tokens;
        if request.state == State::Running {
            self.table.stop(entry, &mut self.pool, self.settings.prefix_cache);
            self.ended_running = true;
        } else {
            self.ended_waiting = true;
        }
        self.stats.finished += 1;
        sink(Event::Finished { ticket, reason, cached_tokens, tokens: self.table.output(entry) });
        self.table.vacate(entry);
    }

    /// Removes the requests that have ended from their lists, all at once: many may end in one step.
    fn forget_ended(&mut self) {
        let in_state = |table: &RequestTable, entry: &u32, state| table.get(*entry).state == state;
        if core::mem::take(&mut self.ended_running) {
            self.running.retain(|entry| in_state(&self.table, entry, State::Running));
        }
        if core::mem::take(&mut self.ended_waiting) {
            self.retracted.retain(|entry| in_state(&self.table, entry, State::Waiting));
            self.waiting.retain(|entry| in_state(&self.table, &entry, State::Waiting));
        }
    }

    /// A step of decode rows alone has been padded with so many.
    pub(crate) fn count_padding(&mut self, rows: u32) {
        self.stats.padding_rows += u64::from(rows);
    }

    /// Asserts that no page is lost or shared wrongly and that every request is where it should be. Takes time linear
    /// in the pool: for tests and idle moments.
    ///
    /// # Panics
    /// When an invariant is broken.
    pub fn check(&self) {
        let mut holders = alloc::vec![0; self.pool.capacity() as usize];
        let mut owned = alloc::vec![false; self.pool.capacity() as usize];
        let mut private = 0;
        let in_state = |state| self.table.iter().filter(move |(_, request)| request.state == state);
        assert_eq!(in_state(State::Running).count(), self.running.len(), "running requests");
        assert_eq!(in_state(State::Waiting).count(), self.waiting(), "waiting requests");
        for (entry, request) in in_state(State::Running) {
            assert!(self.running.contains(&entry));
            assert!(request.computed <= request.pages * self.limits.page_size, "positions without a page");
            assert!(request.known <= request.planned && request.planned <= request.len_max);
            assert!(request.computed < request.unscored, "a token to be scored was passed over");
            let mut node = request.node;
            while node != NO_PAGE {
                holders[node as usize] += 1;
                node = self.pool.parent(node);
            }
            let mapped = (0..request.pages).filter(|i| !request.hole().contains(i));
            for page in mapped.map(|i| self.table.page(entry, i) as usize) {
                if self.pool.is_private(page as u32) {
                    assert!(!owned[page], "page {page} is private to two requests");
                    owned[page] = true;
                    private += 1;
                } else {
                    assert!(holders[page] > 0, "page {page} is mapped by a request that does not hold it");
                }
            }
        }
        self.pool.check(private, |page| holders[page as usize]);
        self.table.check(self.oldest());
    }
}

fn row(
    params: &SamplingParams,
    slot: u32,
    first_token: u32,
    positions: core::ops::Range<u32>,
    sampled: bool,
) -> Row {
    Row {
        slot,
        first_token,
        tokens: positions.len() as u32,
        position: positions.start,
        kv_len: positions.end,
        sampled: u32::from(sampled),
        logprobs: params.logprobs.map_or(0, |k| 1 + k),
        mask: 0,
    }
}
