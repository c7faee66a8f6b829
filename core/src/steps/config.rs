//! Capacities of an engine: fixed when it is built, so that nothing grows afterwards.

use thiserror::Error;

use crate::constraint::mask_words;
use crate::rules::RULE_WORDS;
use crate::sampling::LOGPROB_WORDS;

/// How many of each thing there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that run at once: slots, and the rows of the largest decode step.
    pub running: u32,
    /// Requests that wait; a further one is refused with `QueueFull`.
    pub queued: u32,
    /// Tokens of a sequence, prompt and output together.
    pub sequence: u32,
    /// Tokens of prompts in a step.
    pub prefill_tokens: u32,
    /// Tokens of a KV page, a power of two.
    pub page_size: u32,
    /// KV pages, without the dummy page.
    pub pages: u32,
    /// Rows of the largest recorded decode step; 0 records none.
    pub graph_rows: u32,
}

/// Capacities that make no engine.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum LimitsError {
    /// A capacity is zero.
    #[error("{0} is 0; it must be at least 1")]
    Zero(&'static str),
    /// The page size is no power of two.
    #[error("page size {0} is not a power of two; use 16, 32 or 64")]
    PageSize(u32),
    /// The page size is below what the backend's attention takes.
    #[error("page size {page_size} is below this device's minimum of {min}")]
    PageSizeBelowMin {
        /// As asked for.
        page_size: u32,
        /// What the device takes.
        min: u32,
    },
    /// Numbers no longer fit 32 bits.
    #[error("{0} is too large: token locations and page-table indices must fit 32 bits")]
    TooLarge(&'static str),
    /// The host does not give the memory for an engine's tables.
    #[error("the host has no {bytes} bytes for an engine's tables; lower --max-running or --max-seq-len")]
    HostMemory {
        /// Bytes of the table that it was refused for.
        bytes: u64,
    },
}

/// Tokens that the host keeps in a block, of sequences that are longer.
const BLOCK_TOKENS: u32 = 1024;
/// Blocks for each request, beside those that go by the pages.
const BLOCKS_A_REQUEST: u64 = 4;
/// How many times the pages' tokens the host keeps: requests that share a page have its tokens each, and one that was
/// preempted keeps its tokens while others have its pages.
const TOKENS_OF_PAGES: u64 = 4;

/// Tokens that are scored at once where fewer requests run: fewer would read the head's matrix too often.
const SCORED_AT_ONCE: usize = 64;

/// Rows whose hidden states may come back at once: of prompts of 64 tokens, 16,384 tokens.
const EMBEDDED_AT_ONCE: u32 = 256;

impl Limits {
    /// Checks that an engine can be built with these.
    pub fn check(&self) -> Result<(), LimitsError> {
        let fields = [
            (self.running, "max running requests"),
            (self.queued, "queue capacity"),
            (self.sequence, "max sequence length"),
            (self.prefill_tokens, "max prefill tokens"),
            (self.pages, "number of pages"),
        ];
        if let Some((_, name)) = fields.into_iter().find(|(value, _)| *value == 0) {
            return Err(LimitsError::Zero(name));
        }
        if !self.page_size.is_power_of_two() {
            return Err(LimitsError::PageSize(self.page_size));
        }
        let fits = |product: u64| product < u64::from(u32::MAX);
        if !fits((u64::from(self.pages) + 1) * u64::from(self.page_size)) {
            return Err(LimitsError::TooLarge("number of pages"));
        }
        if !fits((u64::from(self.running) + 1) * u64::from(self.table_width())) {
            return Err(LimitsError::TooLarge("max sequence length"));
        }
        if !fits(u64::from(self.token_blocks()) * u64::from(self.block_tokens()))
            || !fits(self.requests() * u64::from(self.sequence.div_ceil(self.block_tokens())))
        {
            return Err(LimitsError::TooLarge("queue capacity"));
        }
        Ok(())
    }

    /// Bytes, about, that an engine whose steps so many ranks compute together keeps on the host for a model of so many tokens and
    /// hidden states of so many values: tokens of all requests, the batches and masks of two steps with what comes back of them, and
    /// the pages' tree. Each of several ranks has two steps of its own, beside those that all read and what each of them brought back.
    pub fn host_bytes(&self, vocab: u32, hidden: u32, ranks: u32) -> u64 {
        let (block, page) = (u64::from(self.block_tokens()), u64::from(self.page_size));
        let blocks = u64::from(self.token_blocks()) * 4 * (block + block / page + 32);
        let requests = self.requests() * (160 + 4 * u64::from(self.sequence).div_ceil(block));
        let logprobs = 4 * LOGPROB_WORDS as u64;
        let results = self.step_tokens() as u64 * (4 + logprobs);
        let scored = u64::from(self.prefill_tokens) * 56;
        let rows = u64::from(self.running) * (156 + 4 * mask_words(vocab) as u64);
        let embedded = self.embedded_rows() as u64 * 4 * u64::from(hidden);
        let of_step = self.step_tokens() as u64 * 32
            + rows
            + 8 * self.rule_words() as u64
            + scored
            + results
            + embedded;
        let steps = match u64::from(ranks) {
            0 | 1 => 2 * of_step,
            ranks => 2 * (ranks + 1) * of_step + (2 * ranks + 1) * results,
        };
        blocks + requests + steps + u64::from(self.pages) * (page * 4 + 64)
    }

    fn requests(&self) -> u64 {
        u64::from(self.running) + u64::from(self.queued)
    }

    /// Tokens of a block in the host's memory, a power of two: whole pages, and of short sequences all.
    pub fn block_tokens(&self) -> u32 {
        self.sequence
            .checked_next_power_of_two()
            .map_or(BLOCK_TOKENS, |len| len.min(BLOCK_TOKENS))
            .max(self.page_size)
    }

    /// Blocks that the host has for the tokens of all requests, waiting and running: for full sequences of all where that is
    /// little, else for what they come to, and one full sequence. Where they run short, the queue takes no request in, and all
    /// requests but the oldest pause when they need another.
    pub fn token_blocks(&self) -> u32 {
        let block = u64::from(self.block_tokens());
        let sequence = u64::from(self.sequence).div_ceil(block);
        let pages = u64::from(self.pages) * u64::from(self.page_size);
        let all = (self.requests() + 1) * sequence;
        let usual = BLOCKS_A_REQUEST * self.requests() + TOKENS_OF_PAGES * pages / block + sequence;
        all.min(usual).min(u64::from(u32::MAX)) as u32
    }

    /// Pages of the longest sequence: the width of the page table.
    pub fn table_width(&self) -> u32 {
        self.sequence.div_ceil(self.page_size)
    }

    /// Rows that the head gives logits for at once: of a step's sampled rows all, of its scored tokens some after others, by the
    /// same buffer.
    pub fn logit_rows(&self) -> usize {
        (self.running as usize).max(SCORED_AT_ONCE.min(self.prefill_tokens as usize))
    }

    /// Rows of a step from the first to the last whose prompts are embedded, at most: their hidden states come back in one piece.
    pub fn embedded_rows(&self) -> usize {
        EMBEDDED_AT_ONCE.min(self.running).min(self.prefill_tokens) as usize
    }

    /// Tokens of the largest step: prompts, and a token of each request that decodes beside them.
    pub fn step_tokens(&self) -> usize {
        self.prefill_tokens as usize + self.running as usize
    }

    /// Words of rules that one step may bring: a slot's region at least, and where many requests run, 64 for each.
    pub fn rule_words(&self) -> usize {
        RULE_WORDS.max(self.running as usize * 64)
    }

    /// Page-table entries that one step may change: the new pages of a full step and one request's whole prefix at least, so that
    /// admissions alone ask whether there is room; 4 Ki of them where there are so many. So some tens of requests that share a
    /// long prefix enter together; and not all of them, for then they would also end together, and others' prompts would have no
    /// decode rows to run beside.
    pub fn page_updates(&self) -> usize {
        let pages = self.step_tokens().div_ceil(self.page_size as usize);
        let least = pages + (self.running + self.table_width()) as usize;
        let all = self.running as usize * self.table_width() as usize;
        all.min(least.max(1 << 12))
    }
}
