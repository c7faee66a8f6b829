//! What the table has of a request: the line that a step of thousands of rows reads of each, and what such a step does not ask.

use core::ops::Range;

use crate::pages::NO_PAGE;
use crate::sampling::{NO_TOKEN, SamplingParams};
use crate::speculation::HITS_BEFORE;

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
    pub(super) last_page: u32,
    pub(super) last_page_at: u32,
    /// Blocks that it has, and the last of them.
    pub blocks: u32,
    pub(super) last_block: u32,
    /// The first prompt token whose score no step has been asked for; `u32::MAX`: there is none.
    pub unscored: u32,
}

const _: () = assert!(size_of::<Entry>() == 64, "what a row asks is in one line");

impl Entry {
    pub(super) const VACANT: Entry = Entry {
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
    pub(super) dropped: u32,
    /// What the next token was predicted to be, or [`NO_TOKEN`]; and the share of predictions that were right.
    pub predicted: u32,
    pub hits: f32,
    pub params: SamplingParams,
    /// Prompt tokens found in the prefix cache at the first admission.
    pub cached_tokens: u32,
    /// Full pages of its prefix that the cache held when it was first looked at, or that samples before it are going to have;
    /// `None` before.
    pub pages_expected: Option<u32>,
    pub(super) admitted_before: bool,
}

impl Details {
    pub(super) const VACANT: Details = Details {
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
