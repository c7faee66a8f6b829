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
//! Where every layer has a window, a request's own pages behind it go back while it runs; what the prefix tree has of its
//! beginning, a window's worth at most, it holds to its end. Where the device reads its tokens there, for penalties or bad words,
//! all its pages stay.
//!
//! ```text
//!   pages   0 ....... node_depth ....... dropped ............ pages
//!           |<- held ->|<---- the hole ---->|<- its own, seen ->|
//! ```
//!
//! Tokens lie in blocks, taken as a sequence grows, so that the host's memory is for the tokens that there are, not for as
//! many sequences of full length as there can be. A block has its tokens' pages beside them. Tokens drawn go to a request's tail first,
//! and from there to its block, some at once.
//!
//! ```text
//!   entry 7   blocks 12, 3        block 3   tokens 1024 1025 1026 …   pages 88 17 …
//!             tail   1040 1041
//! ```
//!
//! In a step of thousands of rows it is memory that takes the time: of a row's entry and tail a line each, and each once. So tails lie
//! together, and so does what a row asks of its entry, in few of the host's pages: a processor that looks for where a page lies, as it
//! would in each row for a token among blocks, takes longer than the row.
//!
//! Invariant: the request that has run longest can always go on. Nobody else takes one of the blocks that it may still need
//! for a sequence of full length; when it ends, it leaves the next one as many.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cmp::Ordering;
use core::ops::Range;

use crate::config::{Limits, LimitsError};
use crate::constraint::Constraint;
use crate::host::{filled, listed};
use crate::pages::{NO_PAGE, PagePool};
use crate::request::{Request, Ticket};
use crate::rules::{NO_RULES, Rules};
use crate::sampling::{NO_TOKEN, PromptLogprobs, SamplingParams};
use crate::speculation::{HITS_BEFORE, MATCH_MAX, MATCH_MIN, SEARCHED_MAX, hits_after};

/// Words between two blocks that are not used. Else the same position of all requests lay in the same sets of a processor's caches,
/// which have room for some of them alone.
const GAP: u32 = 16;
/// Tokens of a tail at most: a line.
const TAIL: usize = 16;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The entry has no tenant.
    Vacant,
    /// In the queue, new or retracted.
    Waiting,
    /// Has a slot.
    Running,
}

/// Where a request stands among the samples of its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is the only one.
    Alone,
    First,
    /// Others come before it.
    Behind,
}

/// What a step asks of each of thousands of requests: a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Entry {
    pub state: State,
    /// There is nothing to its next token but the token: no rules, no constraint, no log-probabilities, and it is no embedding's.
    /// Who sees that looks up none of these.
    pub is_plain: bool,
    /// It is one of several samples of its prompt.
    pub is_grouped: bool,
    /// Its pages stay though they lie behind the window: the device reads all its tokens there.
    pub reads_history: bool,
    pub generation: u32,
    pub prompt_len: u32,
    pub known: u32,
    pub planned: u32,
    pub computed: u32,
    /// Tokens to run before the next is sampled, set at admission: all that were known.
    pub prefill_len: u32,
    /// Prompt and output tokens at most.
    pub len_max: u32,
    pub slot: u32,
    /// Pages in the slot's row of the page table.
    pub pages: u32,
    /// The page that was set last, and its index: of a request that decodes, the one that its next token goes to.
    last_page: u32,
    last_page_at: u32,
    /// Blocks that it has, and the last of them.
    pub blocks: u32,
    last_block: u32,
    /// The first prompt token whose score no step has been asked for; `u32::MAX`: there is none.
    pub unscored: u32,
}

const _: () = assert!(size_of::<Entry>() == 64, "what a row asks is in one line");

impl Entry {
    const VACANT: Entry = Entry {
        state: State::Vacant,
        is_plain: false,
        is_grouped: false,
        reads_history: false,
        generation: 0,
        prompt_len: 0,
        known: 0,
        planned: 0,
        computed: 0,
        prefill_len: 0,
        len_max: 0,
        slot: 0,
        pages: 0,
        last_page: NO_PAGE,
        last_page_at: u32::MAX,
        blocks: 0,
        last_block: 0,
        unscored: u32::MAX,
    };

    /// Is its prompt, or what it resumes from, not wholly enqueued yet?
    pub fn is_prefilling(&self) -> bool {
        self.computed < self.prefill_len
    }

    /// Says that its prompt is scored from this position on, or from here on no more.
    pub fn score_from(&mut self, position: u32) {
        self.unscored = if position < self.prompt_len { position } else { u32::MAX };
    }

    /// How many of its first tokens need not be run where the cache has them: one must be, to have something to sample from, and
    /// so must whatever comes before a token that is to be scored.
    pub fn cacheable(&self) -> u32 {
        self.known.min(self.unscored) - 1
    }

    /// Can it have a row in a decode step?
    pub fn can_decode(&self) -> bool {
        !self.is_prefilling() && self.planned < self.len_max
    }
}

/// What else is known of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Details {
    /// Deepest node of the prefix tree that it holds, and how many full pages lead there.
    pub node: u32,
    pub node_depth: u32,
    /// Pages below it that are the request's own have gone back: they lie behind the window.
    dropped: u32,
    /// What the next token was predicted to be, or [`NO_TOKEN`]; and the share of predictions that were right.
    pub predicted: u32,
    pub hits: f32,
    pub params: SamplingParams,
    /// Prompt tokens found in the prefix cache at the first admission.
    pub cached_tokens: u32,
    /// Full pages of its prefix that the cache held when it was first looked at, or that samples before it are going to have;
    /// `None` before.
    pub pages_expected: Option<u32>,
    admitted_before: bool,
}

impl Details {
    const VACANT: Details = Details {
        node: NO_PAGE,
        node_depth: 0,
        dropped: 0,
        predicted: NO_TOKEN,
        hits: HITS_BEFORE,
        params: SamplingParams { max_tokens: 0, ..SamplingParams::DEFAULT },
        cached_tokens: 0,
        pages_expected: None,
        admitted_before: false,
    };

    /// The pages that have gone back.
    pub fn hole(&self) -> Range<u32> {
        self.node_depth..self.dropped.max(self.node_depth)
    }
}

/// The last tokens of a request.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Tail([u32; TAIL]);

/// See the module. All arrays have their final size from the start.
pub(crate) struct RequestTable {
    entries: Vec<Entry>,
    /// `[entries]`
    details: Vec<Details>,
    /// `[entries]`: the tokens behind a multiple of `tail_tokens`, at their positions' remainders. Of a prompt they are in its block, too.
    tails: Vec<Tail>,
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
    tail_tokens: u32,
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
            tails: filled(entries as usize, Tail([0; TAIL]))?,
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
            // A full page has all its tokens in a block.
            tail_tokens: limits.page_size.min(TAIL as u32),
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

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Entry)> {
        self.entries.iter().enumerate().map(|(i, entry)| (i as u32, entry))
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

    /// Is there room for so many requests of so many prompt tokens each, beside what `oldest`, who has run longest, may need?
    pub fn has_room(&self, requests: usize, tokens: u32, oldest: Option<u32>) -> bool {
        let spare = (self.free_blocks.len() as u32).saturating_sub(self.promised(oldest)) as usize;
        requests <= self.vacant.len() && requests * tokens.div_ceil(self.block_tokens) as usize <= spare
    }

    /// Samples of a prompt of so many tokens that there is room for where nobody else is.
    pub fn samples_max(&self, tokens: u32) -> usize {
        let blocks = self.tokens.len() / (self.block_tokens + GAP) as usize;
        blocks.saturating_sub(self.sequence_blocks as usize)
            / tokens.div_ceil(self.block_tokens).max(1) as usize
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
        for tokens in prompt.chunks(self.block_tokens as usize) {
            let Some(block) = self.take_block(entry) else { unreachable!("the caller saw room") };
            let first = block as usize * (self.block_tokens + GAP) as usize;
            self.tokens[first..first + tokens.len()].copy_from_slice(tokens);
        }
        let of_tail = &prompt[(len - len % self.tail_tokens) as usize..];
        self.tails[entry as usize].0[..of_tail.len()].copy_from_slice(of_tail);
        if place == Place::Behind {
            let kept = self.pages_kept();
            let expected = (self.get(entry).cacheable() / self.page_size).min(kept);
            self.details_mut(entry).pages_expected = Some(expected);
        }
        entry
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

    /// Sees to a place for the token that a request draws next; false if it has to wait for others to end, which `oldest`, who
    /// has run longest, never does.
    #[inline]
    pub fn make_room(&mut self, entry: u32, oldest: u32) -> bool {
        let request = self.get(entry);
        if request.planned < request.blocks * self.block_tokens || request.planned == request.len_max {
            return true;
        }
        let promised = if oldest == entry { 0 } else { self.promised(Some(oldest)) };
        self.free_blocks.len() as u32 > promised && self.take_block(entry).is_some()
    }

    /// Blocks that the request which has run longest may still need.
    fn promised(&self, oldest: Option<u32>) -> u32 {
        self.sequence_blocks - oldest.map_or(0, |entry| self.get(entry).blocks)
    }

    fn take_block(&mut self, entry: u32) -> Option<u32> {
        let block = self.free_blocks.pop()?;
        let i = self.get(entry).blocks;
        self.blocks[(entry * self.sequence_blocks + i) as usize] = block;
        let request = self.get_mut(entry);
        (request.blocks, request.last_block) = (i + 1, block);
        Some(block)
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

    /// Moves a request out; its tickets open nothing from here on.
    pub fn vacate(&mut self, entry: u32) {
        if self.constraints[entry as usize].take().is_some() {
            self.constrained -= 1;
        }
        let Entry { generation, blocks, state, is_grouped, .. } = *self.get(entry);
        self.grouped_waiting -= u32::from(is_grouped && state == State::Waiting);
        let first = (entry * self.sequence_blocks) as usize;
        self.free_blocks.extend_from_slice(&self.blocks[first..first + blocks as usize]);
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
        let (request, details) = (*self.get(entry), *self.details(entry));
        for i in (0..request.pages).rev().filter(|i| !details.hole().contains(i)) {
            let page = self.page(entry, i);
            if pool.is_private(page) {
                pool.give(page);
            }
        }
        pool.release_path(details.node);
        self.slots.push(request.slot);
        self.grouped_waiting += u32::from(request.is_grouped);
        let request = self.get_mut(entry);
        (request.state, request.pages, request.computed) = (State::Waiting, 0, 0);
        let details = self.details_mut(entry);
        (details.node, details.node_depth) = (NO_PAGE, 0);
    }

    /// Puts the request's full pages of known tokens into the prefix tree.
    ///
    /// Where another request's page already spells the same prefix, a request that goes on (`ending` is false) stops
    /// there: to hold that page beside its own would cost a page more than its sequence needs, and alone it might not
    /// fit any more. One that is ending goes on along the other's path, and its own page is given back.
    pub fn keep_prefix(&mut self, entry: u32, pool: &mut PagePool, ending: bool) {
        let (request, mut details) = (self.get(entry), *self.details(entry));
        let full_pages = request.computed.min(request.known) / self.page_size;
        while details.node_depth < full_pages.min(self.pages_kept()) && details.hole().is_empty() {
            let tokens = self.page_tokens(entry, details.node_depth);
            let page = self.page(entry, details.node_depth);
            details.node = match pool.find(details.node, tokens) {
                Some(_) if !ending => break,
                Some(same) => {
                    pool.hold(same);
                    same
                }
                None => {
                    pool.insert(details.node, page, tokens);
                    page
                }
            };
            details.node_depth += 1;
        }
        *self.details_mut(entry) = details;
    }

    /// Pages of a sequence that the prefix tree has at most.
    fn pages_kept(&self) -> u32 {
        self.window.map_or(u32::MAX, |window| window.div_ceil(self.page_size))
    }

    /// Gives back the request's own pages that none of its tokens to come sees. The step that is scheduled next may take them:
    /// steps in flight run before it.
    #[inline]
    pub fn drop_behind_window(&mut self, entry: u32, pool: &mut PagePool) {
        let Some(window) = self.window else { return };
        let request = self.get(entry);
        if request.reads_history {
            return;
        }
        let behind = (request.computed + 1).saturating_sub(window) / self.page_size;
        for i in self.details(entry).hole().end..behind {
            pool.give(self.page(entry, i));
        }
        self.details_mut(entry).dropped = behind;
    }

    /// The block of a request's `i`-th run of `block_tokens` tokens.
    #[inline]
    fn block(&self, entry: u32, i: u32) -> u32 {
        let request = self.get(entry);
        match i + 1 == request.blocks {
            true => request.last_block,
            false => self.blocks[(entry * self.sequence_blocks + i) as usize],
        }
    }

    /// Where a position's token lies.
    #[inline]
    fn place(&self, entry: u32, position: u32) -> usize {
        let block = self.block(entry, position >> self.block_tokens.trailing_zeros()) as usize;
        block * (self.block_tokens + GAP) as usize + (position & (self.block_tokens - 1)) as usize
    }

    /// How many of a request's known tokens its blocks have. The others are in its tail.
    #[inline]
    fn in_blocks(&self, entry: u32) -> u32 {
        let request = self.get(entry);
        request.prompt_len.max(request.known & !(self.tail_tokens - 1))
    }

    /// Known tokens of the tail from a position on, before another one.
    fn of_tail(&self, entry: u32, positions: Range<u32>) -> &[u32] {
        let first = positions.start & (self.tail_tokens - 1);
        &self.tails[entry as usize].0[first as usize..][..positions.len()]
    }

    /// The token at a position; it is known.
    pub fn token(&self, entry: u32, position: u32) -> u32 {
        match position < self.in_blocks(entry) {
            true => self.tokens[self.place(entry, position)],
            false => self.of_tail(entry, position..position + 1)[0],
        }
    }

    /// The tokens of its i-th page; all are known.
    pub fn page_tokens(&self, entry: u32, i: u32) -> &[u32] {
        &self.tokens[self.place(entry, i * self.page_size)..][..self.page_size as usize]
    }

    /// The known tokens from a position on, in runs.
    fn runs(&self, entry: u32, mut position: u32) -> impl Iterator<Item = &[u32]> {
        let (known, in_blocks) = (self.get(entry).known, self.in_blocks(entry));
        core::iter::from_fn(move || {
            let end = match position < in_blocks {
                true => in_blocks.min((position / self.block_tokens + 1) * self.block_tokens),
                false => known,
            };
            let run = (position < end).then(|| match position < in_blocks {
                true => &self.tokens[self.place(entry, position)..][..(end - position) as usize],
                false => self.of_tail(entry, position..end),
            });
            position = end;
            run
        })
    }

    /// The tokens of a prompt.
    pub fn prompt(&self, entry: u32) -> impl Iterator<Item = u32> {
        self.runs(entry, 0).flatten().copied().take(self.get(entry).prompt_len as usize)
    }

    /// Which of two prompts comes first, token by token. Neither request has drawn any.
    pub fn compare_prompts(&self, one: u32, other: u32) -> Ordering {
        let runs = self.runs(one, 0).zip(self.runs(other, 0));
        let differ = runs.map(|(one, other)| one.cmp(other)).find(|order| order.is_ne());
        differ.unwrap_or_else(|| self.get(one).known.cmp(&self.get(other).known))
    }

    /// Are these the last tokens of what was drawn?
    pub fn output_ends_with(&self, entry: u32, tokens: &[u32]) -> bool {
        let Entry { known, prompt_len, .. } = *self.get(entry);
        let first = known.checked_sub(tokens.len() as u32).filter(|first| *first >= prompt_len);
        first.is_some_and(|first| (first..).zip(tokens).all(|(at, token)| self.token(entry, at) == *token))
    }

    /// The tokens that were drawn.
    pub fn output(&mut self, entry: u32) -> &[u32] {
        let mut output = core::mem::take(&mut self.output);
        let mut len = 0;
        for run in self.runs(entry, self.get(entry).prompt_len) {
            output[len..len + run.len()].copy_from_slice(run);
            len += run.len();
        }
        self.output = output;
        &self.output[..len]
    }

    /// The place behind the longest match of the known tokens' end with what stands before it; of equals the last. `None` where
    /// less than a few tokens match.
    pub fn find_continuation(&self, entry: u32) -> Option<u32> {
        let known = self.get(entry).known;
        let last = self.token(entry, known.checked_sub(1)?);
        let (mut longest, mut continuation) = (MATCH_MIN - 1, None);
        let searched = known.saturating_sub(SEARCHED_MAX);
        let mut end = known - 1;
        while end > searched {
            let run = self.run_before(entry, end);
            let begin = end - run.len() as u32;
            for i in (0..run.len()).rev().filter(|i| run[*i] == last) {
                let at = begin + i as u32;
                let len = self.matching(entry, at, known - 1);
                if len > longest {
                    (longest, continuation) = (len, Some(at + 1));
                }
                if len == MATCH_MAX {
                    return continuation;
                }
            }
            end = begin;
        }
        continuation
    }

    /// How many tokens up to both positions are the same; no more than are of use.
    fn matching(&self, entry: u32, one: u32, other: u32) -> u32 {
        let same = |i: &u32| self.token(entry, one - i) == self.token(entry, other - i);
        (0..MATCH_MAX.min(one + 1)).take_while(same).count() as u32
    }

    /// The tokens before a position that lie in one piece with the one before it.
    fn run_before(&self, entry: u32, end: u32) -> &[u32] {
        let in_blocks = self.in_blocks(entry);
        if end > in_blocks {
            return self.of_tail(entry, in_blocks..end);
        }
        let begin = (end - 1) & !(self.block_tokens - 1);
        &self.tokens[self.place(entry, begin)..][..(end - begin) as usize]
    }

    /// Tokens that a request may draw beyond those planned, without another block.
    pub fn unplanned_tokens(&self, entry: u32) -> u32 {
        let request = self.get(entry);
        (request.blocks * self.block_tokens).min(request.len_max).saturating_sub(request.planned)
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

    /// Appends a token that came back from the device; there is room for it since its step was scheduled.
    #[inline]
    pub fn push_token(&mut self, entry: u32, token: u32) {
        let known = &mut self.entries[entry as usize].known;
        let at = *known & (self.tail_tokens - 1);
        *known += 1;
        let end = *known;
        self.tails[entry as usize].0[at as usize] = token;
        if at + 1 == self.tail_tokens {
            self.move_tail(entry, end);
        }
    }

    /// Writes a full tail, which ends at a position, to the block.
    fn move_tail(&mut self, entry: u32, end: u32) {
        let first = self.place(entry, end - self.tail_tokens);
        let tail = &self.tails[entry as usize].0[..self.tail_tokens as usize];
        self.tokens[first..first + tail.len()].copy_from_slice(tail);
    }

    fn page_place(&self, entry: u32, i: u32) -> usize {
        let block = self.block(entry, i >> self.block_pages.trailing_zeros()) as usize;
        block * (self.block_pages + GAP) as usize + (i & (self.block_pages - 1)) as usize
    }

    /// A running request's i-th page.
    #[inline]
    pub fn page(&self, entry: u32, i: u32) -> u32 {
        let request = self.get(entry);
        match i == request.last_page_at {
            true => request.last_page,
            false => self.pages[self.page_place(entry, i)],
        }
    }

    /// Sets it.
    pub fn set_page(&mut self, entry: u32, i: u32, page: u32) {
        let place = self.page_place(entry, i);
        self.pages[place] = page;
        let request = self.get_mut(entry);
        (request.last_page, request.last_page_at) = (page, i);
    }

    /// Index of a slot's i-th page in the device's page table.
    #[inline]
    pub fn page_index(&self, slot: u32, i: u32) -> u32 {
        slot * self.width + i
    }

    /// Where the keys and values of a running request's position go.
    #[inline]
    pub fn location(&self, entry: u32, position: u32) -> u32 {
        let i = position >> self.page_size.trailing_zeros();
        self.page(entry, i) * self.page_size + (position & (self.page_size - 1))
    }

    /// Asserts that each block is one request's or free, and that the oldest request can have those it may need.
    ///
    /// # Panics
    /// When it isn't so.
    pub fn check(&self, oldest: Option<u32>) {
        let mut seen = alloc::vec![false; self.tokens.len() / (self.block_tokens + GAP) as usize];
        let held = self.iter().flat_map(|(entry, it)| (0..it.blocks).map(move |i| (entry, i)));
        let held = held.map(|(entry, i)| self.block(entry, i));
        for block in held.chain(self.free_blocks.iter().copied()) {
            assert!(!core::mem::replace(&mut seen[block as usize], true), "block {block} has two owners");
        }
        assert!(seen.into_iter().all(|seen| seen), "a block is lost");
        assert!(self.free_blocks.len() as u32 >= self.promised(oldest), "the oldest request may get stuck");
    }
}
