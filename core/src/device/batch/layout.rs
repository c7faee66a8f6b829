//! How large a step is, and where its parts lie in the packed words.

use super::words::{HEADER_WORDS, ROW_WORDS, SLOT_UPDATE_WORDS, TOKEN_WORDS, UPDATE_WORDS};
use crate::config::Limits;

/// The counts that fix grid sizes; padding included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepShape {
    /// Rows of one token each, of requests that run: the step's first rows, and its first tokens.
    pub decode_rows: u32,
    /// Rows of one token or more behind them: prompts, chunks of prompts, resumed requests.
    pub prefill_rows: u32,
    /// Tokens of all rows.
    pub tokens: u32,
    /// Sampled rows.
    pub samples: u32,
}

impl StepShape {
    /// A step of `rows` decode rows alone.
    pub fn decode(rows: u32) -> Self {
        StepShape { decode_rows: rows, prefill_rows: 0, tokens: rows, samples: rows }
    }

    /// All rows.
    pub fn rows(self) -> u32 {
        self.decode_rows + self.prefill_rows
    }

    /// Tokens of the prefill rows.
    pub fn prefill_tokens(self) -> u32 {
        self.tokens - self.decode_rows
    }

    /// Does it have no prefill row? Such steps are padded and recorded.
    pub fn is_decode(self) -> bool {
        self.prefill_rows == 0
    }
}

/// Word offsets of a packed batch's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// First plan word.
    pub plan: usize,
    /// First row.
    pub rows: usize,
    /// First token.
    pub tokens: usize,
    /// First page update.
    pub updates: usize,
    /// First word of the part for scored tokens.
    pub scored: usize,
    /// Words of the whole, for the largest step.
    pub words: usize,
}

impl Layout {
    /// The layout of the largest step within these capacities, with a backend's plan words.
    pub fn new(limits: &Limits, plan_words: usize) -> Self {
        let plan = HEADER_WORDS;
        let rows = plan + plan_words.next_multiple_of(ROW_WORDS);
        let tokens = rows + limits.running as usize * ROW_WORDS;
        let updates = tokens + limits.step_tokens() * TOKEN_WORDS;
        let slot_updates = updates + limits.page_updates() * UPDATE_WORDS;
        let rules = slot_updates + limits.running as usize * SLOT_UPDATE_WORDS;
        let scored = (rules + limits.rule_words()).next_multiple_of(ROW_WORDS);
        let words = scored + HEADER_WORDS + limits.prefill_tokens as usize * (ROW_WORDS + 1);
        let words = words.next_multiple_of(ROW_WORDS);
        Layout { plan, rows, tokens, updates, scored, words }
    }

    /// The layout of a step of this shape.
    pub fn of(self, shape: StepShape) -> Self {
        let tokens = self.rows + shape.rows() as usize * ROW_WORDS;
        Layout { tokens, updates: tokens + shape.tokens as usize * TOKEN_WORDS, ..self }
    }
}
