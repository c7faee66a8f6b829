//! A step's batch: plain words, laid out once, sent to the device as one copy.
//!
//! ```text
//!   word 0        16            16 + plan        + 8 rows             + 4 tokens           + 2 updates      + 20 slot updates
//!   | Header      | plan words  | Row, Row, …    | Token, Token, …    | PageUpdate, …      | SlotUpdate, …  | rules …
//! ```
//!
//! Where a part begins ([`Layout`]) depends on the step's shape alone, so a recorded step finds it where it was. What is not
//! used lies behind the updates, and is not copied. Slot updates begin where the page updates of the step end, and the words
//! of their [rules](crate::rules) where those end.
//!
//! A step that scores prompts has a second part behind the room of the largest first one, copied on its own: what the head and
//! the sampler need to give the log-probabilities of given tokens. It looks to them like a step of rows of one token each.
//!
//! ```text
//!   word scored     + 16           + 8 scored tokens
//!   | Header      | Row, Row, …    | id, id, …
//! ```
//!
//! Decode rows come first and have one token each, so row i of them owns token i; a request has one, and behind it one for each
//! of its [drafts](crate::speculation). Prefill rows follow, their tokens packed back to back; the last one may be a chunk whose
//! prompt is not finished, and then that row is not sampled.
//!
//! ```text
//!   rows     decode, decode, …, decode │ prefill ········, prefill ·····, …, prefill, the last perhaps a chunk
//!   tokens   0       1          d - 1  │ d …               …                          … tokens - 1
//!   sampled  yes     yes        yes    │ yes               yes                        no, if it is a chunk
//! ```
//!
//! Invariant: `rows[i].first_token` is the sum of the counts before it, and the sampled rows come first: all but the last
//! one, or all.

mod layout;
mod packing;
mod words;

use alloc::vec::Vec;
use core::ops::Range;

use crate::config::Limits;
use crate::request::Ticket;
use crate::sampling::SlotState;

pub use layout::{Layout, StepShape};
pub use packing::{
    Dummy, packed_rows, packed_rules, packed_slot_updates, packed_tokens, packed_updates, zeroed_words,
};
pub use words::{
    HEADER_WORDS, Header, LAST_TOKEN, PageUpdate, ROW_WORDS, Row, SLOT_UPDATE_WORDS, SlotUpdate, TOKEN_WORDS,
    Token, UPDATE_WORDS,
};

/// A token of the step whose successor in its prompt is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scored {
    /// Its request.
    pub owner: Ticket,
    /// Its index among the step's tokens.
    pub token: u32,
    /// The successor's id.
    pub next: u32,
    /// As in [`Row::logprobs`].
    pub logprobs: u32,
}

/// A row whose prompt's embedding a step gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embedded {
    /// Its request.
    pub owner: Ticket,
    /// Its index among the step's rows.
    pub row: u32,
}

/// A batch being built on the host, with what only the host needs: whose row is whose.
#[derive(Debug)]
pub struct Batch {
    rows: Vec<Row>,
    /// How many of them are decode rows.
    decode_rows: u32,
    /// Is one of those a draft?
    has_drafts: bool,
    wants_logprobs: bool,
    updates: Vec<PageUpdate>,
    slot_updates: Vec<SlotUpdate>,
    rules: Vec<u32>,
    tokens: Vec<Token>,
    /// Requests' tokens lie together, in the order of their positions.
    scored: Vec<Scored>,
    /// In the order of their rows.
    embedded: Vec<Embedded>,
    /// The request of each row.
    owners: Vec<Ticket>,
    /// The request of each mask that is for this step alone.
    masks: Vec<Ticket>,
    /// The request of each mask that stays with its slot, and its index on the device.
    kept_masks: Vec<(Ticket, u32)>,
    samples: u32,
    capacity_updates: usize,
    capacity_rules: usize,
    capacity_tokens: usize,
    capacity_rows: usize,
    capacity_scored: usize,
    capacity_embedded: usize,
}

impl Batch {
    /// An empty batch with room for the largest step.
    pub fn new(limits: &Limits) -> Self {
        let rows = limits.running as usize;
        Batch {
            rows: Vec::with_capacity(rows),
            decode_rows: 0,
            has_drafts: false,
            wants_logprobs: false,
            updates: Vec::with_capacity(limits.page_updates()),
            slot_updates: Vec::with_capacity(rows),
            rules: Vec::with_capacity(limits.rule_words()),
            tokens: Vec::with_capacity(limits.step_tokens()),
            scored: Vec::with_capacity(limits.prefill_tokens as usize),
            embedded: Vec::with_capacity(limits.embedded_rows()),
            owners: Vec::with_capacity(rows),
            masks: Vec::with_capacity(rows),
            kept_masks: Vec::with_capacity(rows),
            samples: 0,
            capacity_updates: limits.page_updates(),
            capacity_rules: limits.rule_words(),
            capacity_tokens: limits.step_tokens(),
            capacity_rows: rows,
            capacity_scored: limits.prefill_tokens as usize,
            capacity_embedded: limits.embedded_rows(),
        }
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.decode_rows = 0;
        self.has_drafts = false;
        self.wants_logprobs = false;
        self.rows.clear();
        self.updates.clear();
        self.slot_updates.clear();
        self.rules.clear();
        self.tokens.clear();
        self.scored.clear();
        self.embedded.clear();
        self.owners.clear();
        self.masks.clear();
        self.kept_masks.clear();
        self.samples = 0;
    }

    /// Becomes what `other` is, which has as much room.
    pub fn copy_from(&mut self, other: &Batch) {
        // Every field is named, so that one that is added is not left out.
        let Batch {
            rows,
            decode_rows,
            has_drafts,
            wants_logprobs,
            updates,
            slot_updates,
            rules,
            tokens,
            scored,
            embedded,
            owners,
            masks,
            kept_masks,
            samples,
            capacity_updates: _,
            capacity_rules: _,
            capacity_tokens: _,
            capacity_rows: _,
            capacity_scored: _,
            capacity_embedded: _,
        } = other;
        (self.decode_rows, self.has_drafts) = (*decode_rows, *has_drafts);
        (self.wants_logprobs, self.samples) = (*wants_logprobs, *samples);
        self.rows.clone_from(rows);
        self.updates.clone_from(updates);
        self.slot_updates.clone_from(slot_updates);
        self.rules.clone_from(rules);
        self.tokens.clone_from(tokens);
        self.scored.clone_from(scored);
        self.embedded.clone_from(embedded);
        self.owners.clone_from(owners);
        self.masks.clone_from(masks);
        self.kept_masks.clone_from(kept_masks);
    }

    /// Nothing to run?
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows, padding not included.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The tokens, padding not included.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// The page-table entries that changed.
    pub fn updates(&self) -> &[PageUpdate] {
        &self.updates
    }

    /// The slots that were taken.
    pub fn slot_updates(&self) -> &[SlotUpdate] {
        &self.slot_updates
    }

    /// The tokens whose successors are scored.
    pub fn scored(&self) -> &[Scored] {
        &self.scored
    }

    /// The rows whose prompts' embeddings it gives.
    pub fn embedded(&self) -> &[Embedded] {
        &self.embedded
    }

    /// Those rows and what lies between them; `None` where there is none.
    pub fn embedded_rows(&self) -> Option<Range<usize>> {
        let (first, last) = (self.embedded.first()?, self.embedded.last()?);
        Some(first.row as usize..last.row as usize + 1)
    }

    /// Is there a sampled row whose logits are wanted?
    pub fn wants_logits(&self) -> bool {
        self.embedded.len() < self.samples as usize
    }

    /// The request of each row.
    pub fn owners(&self) -> &[Ticket] {
        &self.owners
    }

    /// The masks that come with the step, as many as slots at most: each one's request, and its [index](crate::constraint) on the
    /// device. Those for this step alone are first, as 0, 1, …
    pub fn masks(&self) -> impl Iterator<Item = (Ticket, u32)> {
        self.masks.iter().copied().zip(0..).chain(self.kept_masks.iter().copied())
    }

    /// How many of them are for this step alone.
    pub fn step_masks(&self) -> usize {
        self.masks.len()
    }

    /// The token that row i takes to follow the row before it, of the same request and not drawn yet; `None` if it is no draft.
    pub fn draft(&self, i: usize) -> Option<u32> {
        let is_draft = 0 < i && i < self.decode_rows as usize && self.owners[i - 1] == self.owners[i];
        is_draft.then(|| self.tokens[i].id)
    }

    /// Is any row a draft?
    pub fn has_drafts(&self) -> bool {
        self.has_drafts
    }

    /// Rows that are sampled.
    pub fn samples(&self) -> u32 {
        self.samples
    }

    /// Does any row ask for log-probabilities?
    pub fn wants_logprobs(&self) -> bool {
        self.wants_logprobs
    }

    /// The step's counts without padding.
    pub fn shape(&self) -> StepShape {
        StepShape {
            decode_rows: self.decode_rows,
            prefill_rows: self.rows.len() as u32 - self.decode_rows,
            tokens: self.tokens.len() as u32,
            samples: self.samples,
        }
    }

    /// Is there room for a row with at least one token?
    pub fn has_room_for_row(&self) -> bool {
        self.rows.len() < self.capacity_rows && self.tokens.len() < self.capacity_tokens
    }

    /// May the next row give an embedding?
    pub fn has_room_for_embedded(&self) -> bool {
        let first = self.embedded.first().map_or(self.rows.len(), |first| first.row as usize);
        self.rows.len() - first < self.capacity_embedded
    }

    /// Page-table updates that still fit.
    pub fn room_for_updates(&self) -> usize {
        self.capacity_updates - self.updates.len()
    }

    /// Words of rules that still fit: all of a slot's region, where there are none yet.
    pub fn room_for_rules(&self) -> usize {
        self.capacity_rules - self.rules.len()
    }

    /// Adds a page-table update.
    pub fn push_update(&mut self, update: PageUpdate) {
        assert!(self.updates.len() < self.capacity_updates, "page updates fit the batch");
        self.updates.push(update);
    }

    /// Says how a slot's tokens are drawn from this step on, with the words of its region of rules.
    pub fn push_slot(&mut self, slot: u32, state: SlotState, rules: impl Iterator<Item = u32>) {
        assert!(self.slot_updates.len() < self.capacity_rows, "a slot is taken once a step");
        let first = self.rules.len();
        for word in rules {
            assert!(self.rules.len() < self.capacity_rules, "rules fit the batch");
            self.rules.push(word);
        }
        let rule_words = (self.rules.len() - first) as u32;
        self.slot_updates.push(SlotUpdate { slot, rules: first as u32, rule_words, reserved: 0, state });
    }

    /// Adds a mask, which a request's row is going to have; gives what [`Row::mask`] says then.
    pub fn push_mask(&mut self, owner: Ticket) -> u32 {
        assert!(self.masks.len() + self.kept_masks.len() < self.capacity_rows, "a request has one mask");
        self.masks.push(owner);
        self.masks.len() as u32
    }

    /// Adds a mask that stays with a slot, which has just been taken.
    pub fn push_kept_mask(&mut self, owner: Ticket, slot: u32) {
        assert!(self.masks.len() + self.kept_masks.len() < self.capacity_rows, "a request has one mask");
        self.kept_masks.push((owner, self.capacity_rows as u32 + slot));
    }

    /// What [`Row::mask`] says in rows of a slot that keeps its mask.
    pub fn kept_mask(&self, slot: u32) -> u32 {
        1 + self.capacity_rows as u32 + slot
    }

    /// Adds a token of the prefill row pushed last.
    pub fn push_token(&mut self, token: Token) {
        assert!(self.tokens.len() < self.capacity_tokens, "tokens fit the batch");
        self.tokens.push(token);
    }

    /// Has the successor of the token pushed last scored, which is `next`.
    pub fn push_scored(&mut self, owner: Ticket, next: u32, top: u32) {
        assert!(self.scored.len() < self.capacity_scored, "scored tokens fit the batch");
        let token = self.tokens.len() as u32 - 1;
        self.scored.push(Scored { owner, token, next, logprobs: 1 + top });
    }

    /// Has the row pushed last, which is a prompt's last, give its embedding.
    pub fn push_embedded(&mut self, owner: Ticket) {
        assert!(self.embedded.len() < self.capacity_embedded, "embedded rows fit the batch");
        self.embedded.push(Embedded { owner, row: self.rows.len() as u32 - 1 });
    }

    /// Adds a decode row and its token. No prefill row has been added yet.
    #[inline]
    pub fn push_decode_row(&mut self, owner: Ticket, row: Row, token: Token) {
        assert!(row.tokens == 1 && row.sampled == 1, "a decode row has one token, and samples the next");
        assert!(self.decode_rows as usize == self.rows.len(), "decode rows come first");
        self.decode_rows += 1;
        self.has_drafts |= self.owners.last() == Some(&owner);
        self.push_row(owner, row);
        self.push_token(token);
    }

    /// Adds a prefill row whose tokens are going to be pushed next.
    pub fn push_prefill_row(&mut self, owner: Ticket, row: Row) {
        assert!(self.samples as usize == self.rows.len(), "an unsampled row is the last one");
        self.push_row(owner, row);
    }

    // In its caller a row is written where it goes; else first to the stack, and read back in other pieces than it was written in.
    #[inline(always)]
    fn push_row(&mut self, owner: Ticket, row: Row) {
        assert!(self.rows.len() < self.capacity_rows, "rows fit the batch");
        assert!(row.first_token as usize == self.tokens.len(), "tokens lie back to back");
        self.samples += row.sampled;
        self.wants_logprobs |= row.logprobs > 0;
        self.rows.push(row);
        self.owners.push(owner);
    }
}
