//! The request table: what is known of each request, its tokens, and the pages of those that run.
//!
//! An entry lasts as long as its request; a slot (a row of the page table, here and on the device) only while the
//! request runs. Three numbers say how far a request is:
//!
//! ```text
//!   tokens    0 ........ prompt_len ........ known ...... planned
//!             |<---- prompt ---->|<- received ->|<- in flight ->|
//!   keys and values   0 ............. computed                     (computed or enqueued, in this order)
//! ```
//!
//! - `known` tokens have been received by the host; `planned` counts those still in flight as well.
//! - `computed` positions have their keys and values in pages, or will have when the steps now enqueued have run.
//!
//! Tokens lie in blocks ([`blocks`]), taken as a sequence grows, so that the host's memory is for the tokens that there are, not for as
//! many sequences of full length as there can be. A block has its tokens' pages beside them. Tokens drawn go to a request's tail
//! ([`tails`]) first, and from there to its block, some at once.
//!
//! ```text
//!   entry 7   blocks 12, 3        block 3   tokens 1024 1025 1026 …   pages 88 17 …
//!             tail   1040 1041
//! ```
//!
//! In a step of thousands of rows it is memory that takes the time: of a row's entry and tail a line each, and each once. So tails lie
//! together, and so does what a row asks of its entry ([`entry`]), in few of the host's pages: a processor that looks for where a page
//! lies, as it would in each row for a token among blocks, takes longer than the row.
//!
//! Invariant: an entry that is not vacant is one request's, from [`occupy`](RequestTable::occupy) to
//! [`vacate`](RequestTable::vacate), and only while it runs, from [`start`](RequestTable::start) to [`stop`](RequestTable::stop), has it
//! a slot and pages.

mod blocks;
mod continuation;
mod entry;
mod pages;
mod tails;
mod tokens;

pub(crate) use entry::{Details, Entry, Place, State};

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::config::{Limits, LimitsError};
use crate::constraint::Constraint;
use crate::host::{filled, listed};
use crate::pages::{NO_PAGE, PagePool};
use crate::request::{Request, Ticket};
use crate::rules::{NO_RULES, Rules};
use crate::sampling::{NO_TOKEN, PromptLogprobs};
use crate::speculation::hits_after;

use tails::Tails;

/// Words between two blocks that are not used. Else the same position of all requests lay in the same sets of a processor's caches,
/// which have room for some of them alone.
const GAP: u32 = 16;

/// See the module. All arrays have their final size from the start.
pub(crate) struct RequestTable {
    entries: Vec<Entry>,
    /// `[entries]`
    details: Vec<Details>,
    tails: Tails,
    /// `[entries]`: what each request says of single tokens.
    rules: Vec<Option<Arc<Rules>>>,
    /// `[entries]`: what each request's output must obey.
    constraints: Vec<Option<Arc<dyn Constraint>>>,
    /// How many of them there are.
    constrained: u32,
    /// Requests that wait and are one of several samples.
    grouped_waiting: u32,
    /// `[entries, sequence_blocks]`: each request's blocks.
    blocks: Vec<u32>,
    /// `[blocks, block_tokens + GAP]` token ids.
    tokens: Vec<u32>,
    /// `[blocks, block_pages + GAP]` pages.
    pages: Vec<u32>,
    free_blocks: Vec<u32>,
    vacant: Vec<u32>,
    slots: Vec<u32>,
    /// An output in one piece, for whoever hears of its end.
    output: Vec<u32>,
    /// Powers of two.
    block_tokens: u32,
    block_pages: u32,
    /// Of the longest sequence.
    sequence_blocks: u32,
    /// Entries of a slot in the device's page table.
    width: u32,
    page_size: u32,
    window: Option<u32>,
}

impl RequestTable {
    /// # Errors
    /// Too little host memory.
    pub fn new(limits: &Limits, window: Option<u32>) -> Result<Self, LimitsError> {
        let entries = limits.running + limits.queued;
        let (blocks, block_tokens) = (limits.token_blocks(), limits.block_tokens());
        let sequence_blocks = limits.sequence.div_ceil(block_tokens);
        let block_pages = block_tokens / limits.page_size;
        Ok(RequestTable {
            entries: filled(entries as usize, Entry::VACANT)?,
            details: filled(entries as usize, Details::VACANT)?,
            tails: Tails::new(entries, limits.page_size)?,
            rules: filled(entries as usize, None)?,
            constraints: filled(entries as usize, None)?,
            constrained: 0,
            grouped_waiting: 0,
            blocks: filled(entries as usize * sequence_blocks as usize, 0)?,
            tokens: filled(blocks as usize * (block_tokens + GAP) as usize, 0)?,
            pages: filled(blocks as usize * (block_pages + GAP) as usize, 0)?,
            free_blocks: listed((0..blocks).rev())?,
            vacant: listed((0..entries).rev())?,
            slots: listed((0..limits.running).rev())?,
            output: filled(limits.sequence as usize, 0)?,
            block_tokens,
            block_pages,
            sequence_blocks,
            width: limits.table_width(),
            page_size: limits.page_size,
            window,
        })
    }

    /// Positions that a token sees at most.
    pub fn window(&self) -> Option<u32> {
        self.window
    }

    #[inline]
    pub fn get(&self, entry: u32) -> &Entry {
        &self.entries[entry as usize]
    }

    #[inline]
    pub fn get_mut(&mut self, entry: u32) -> &mut Entry {
        &mut self.entries[entry as usize]
    }

    /// What no row of a plain request asks.
    pub fn details(&self, entry: u32) -> &Details {
        &self.details[entry as usize]
    }

    pub fn details_mut(&mut self, entry: u32) -> &mut Details {
        &mut self.details[entry as usize]
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Entry)> {
        self.entries.iter().enumerate().map(|(i, entry)| (i as u32, entry))
    }

    /// Requests that wait and are one of several samples of their prompts.
    pub fn grouped_waiting(&self) -> u32 {
        self.grouped_waiting
    }

    /// What [`Row::logprobs`](crate::batch::Row::logprobs) says in a request's rows.
    #[inline]
    pub fn row_logprobs(&self, entry: u32) -> u32 {
        match self.get(entry).is_plain {
            true => 0,
            false => self.details(entry).params.logprobs.map_or(0, |k| 1 + k),
        }
    }

    /// What a request says of single tokens.
    #[inline]
    pub fn rules(&self, entry: u32) -> &Rules {
        match self.get(entry).is_plain {
            true => &NO_RULES,
            false => self.rules[entry as usize].as_deref().unwrap_or(&NO_RULES),
        }
    }

    /// What a request's output must obey.
    #[inline]
    pub fn constraint(&self, entry: u32) -> Option<&dyn Constraint> {
        match self.get(entry).is_plain {
            true => None,
            false => self.constraints[entry as usize].as_deref(),
        }
    }

    #[inline]
    pub fn is_constrained(&self, entry: u32) -> bool {
        self.constraint(entry).is_some()
    }

    /// Requests that have a constraint.
    pub fn constrained(&self) -> u32 {
        self.constrained
    }

    #[inline]
    pub fn ticket(&self, entry: u32) -> Ticket {
        Ticket { entry, generation: self.get(entry).generation }
    }

    /// The ticket's entry, if its request has not ended.
    #[inline]
    pub fn find(&self, ticket: Ticket) -> Option<u32> {
        let entry = self.entries.get(ticket.entry as usize)?;
        (entry.generation == ticket.generation && entry.state != State::Vacant).then_some(ticket.entry)
    }

    /// Moves a request in, for which there is room.
    pub fn occupy(&mut self, request: Request<'_>, len_max: u32, place: Place) -> u32 {
        let Request { prompt, params, rules, constraint } = request;
        let len = prompt.len() as u32;
        let Some(entry) = self.vacant.pop() else { unreachable!("the caller saw room") };
        let generation = self.get(entry).generation;
        *self.get_mut(entry) = Entry {
            state: State::Waiting,
            is_plain: rules.is_none()
                && constraint.is_none()
                && params.logprobs.is_none()
                && params.embed.is_none(),
            generation,
            prompt_len: len,
            len_max,
            known: len,
            planned: len,
            reads_history: params.slot_state(len).penalizes()
                || rules.is_some_and(|rules| rules.reads_history()),
            is_grouped: place != Place::Alone,
            ..Entry::VACANT
        };
        *self.details_mut(entry) = Details { params, ..Details::VACANT };
        self.grouped_waiting += u32::from(place != Place::Alone);
        self.rules[entry as usize] = rules.cloned();
        self.constraints[entry as usize] = constraint.cloned();
        self.constrained += u32::from(constraint.is_some());
        if let Some(PromptLogprobs { from, .. }) = params.prompt_logprobs {
            self.get_mut(entry).score_from(from.max(1));
        }
        self.write_prompt(entry, prompt);
        if place == Place::Behind {
            let kept = self.pages_kept();
            let expected = (self.get(entry).cacheable() / self.page_size).min(kept);
            self.details_mut(entry).pages_expected = Some(expected);
        }
        entry
    }

    /// Moves a request out; its tickets open nothing from here on.
    pub fn vacate(&mut self, entry: u32) {
        if self.constraints[entry as usize].take().is_some() {
            self.constrained -= 1;
        }
        let Entry { generation, state, is_grouped, .. } = *self.get(entry);
        self.grouped_waiting -= u32::from(is_grouped && state == State::Waiting);
        self.free_blocks_of(entry);
        let generation = generation.wrapping_add(1);
        *self.get_mut(entry) = Entry { generation, ..Entry::VACANT };
        *self.details_mut(entry) = Details::VACANT;
        self.rules[entry as usize] = None;
        self.vacant.push(entry);
    }

    /// Slots that nobody has.
    pub fn vacant_slots(&self) -> usize {
        self.slots.len()
    }

    /// Gives a waiting request a slot (there is one), to run its known tokens; it holds `depth` pages of the path to
    /// `node`. Returns how many prompt tokens the prefix cache saved it, 0 if it ran before.
    pub fn start(&mut self, entry: u32, node: u32, depth: u32) -> u64 {
        let Some(slot) = self.slots.pop() else { unreachable!("the caller saw a slot") };
        let cached_tokens = depth * self.page_size;
        self.grouped_waiting -= u32::from(self.get(entry).is_grouped);
        let request = self.get_mut(entry);
        (request.state, request.slot, request.pages) = (State::Running, slot, depth);
        (request.computed, request.prefill_len) = (cached_tokens, request.known);
        let details = self.details_mut(entry);
        (details.node, details.node_depth, details.dropped) = (node, depth, 0);
        if core::mem::replace(&mut details.admitted_before, true) {
            return 0;
        }
        details.cached_tokens = cached_tokens;
        u64::from(cached_tokens)
    }

    /// Takes a running request's slot and pages away. What its pages hold stays as a prefix, if that is wanted.
    pub fn stop(&mut self, entry: u32, pool: &mut PagePool, keep_prefix: bool) {
        if keep_prefix {
            self.keep_prefix(entry, pool, true);
        }
        self.give_pages(entry, pool);
        let request = *self.get(entry);
        self.slots.push(request.slot);
        self.grouped_waiting += u32::from(request.is_grouped);
        let request = self.get_mut(entry);
        (request.state, request.pages, request.computed) = (State::Waiting, 0, 0);
        let details = self.details_mut(entry);
        (details.node, details.node_depth) = (NO_PAGE, 0);
    }

    /// Can a request decode, with a mask, a page and a block for what it runs and draws next that need not be looked for? Says
    /// so of plain ones alone, by their lines.
    #[inline]
    pub fn has_place(&self, entry: u32) -> bool {
        let request = self.get(entry);
        request.is_plain
            && self.window.is_none()
            && request.can_decode()
            && request.planned < request.blocks * self.block_tokens
            && request.last_page_at == request.computed >> self.page_size.trailing_zeros()
    }

    /// Forgets what was planned beyond the known tokens. The last of them has not been run, or as another one.
    pub fn settle(&mut self, entry: u32) {
        let request = self.get_mut(entry);
        (request.planned, request.computed) = (request.known, request.known - 1);
    }

    /// Takes note of whether a prediction was right.
    pub fn judge(&mut self, entry: u32, predicted: u32, drawn: u32) {
        let details = self.details_mut(entry);
        details.predicted = NO_TOKEN;
        if predicted != NO_TOKEN {
            details.hits = hits_after(details.hits, predicted == drawn);
        }
    }
}
