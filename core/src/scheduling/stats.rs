//! What the scheduler did, as numbers. Times come from whoever drives the engine: it has a clock, core has none.

use crate::batch::{Batch, Token};

/// What a scheduler has on its hands at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests that have a slot.
    pub running: u32,
    /// Requests that wait for one.
    pub waiting: u32,
    /// KV pages that requests hold; those that are only cached are not counted.
    pub pages_used: u32,
}

/// What steps of decode rows alone read of layers with experts; a layer counts once a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertsRead {
    /// Layers with experts that ran.
    pub layers: u64,
    /// Experts that a row chose, each counted once a layer and step.
    pub experts: u64,
}

impl core::ops::Add for ExpertsRead {
    type Output = ExpertsRead;

    /// Of two models together.
    fn add(self, other: ExpertsRead) -> ExpertsRead {
        ExpertsRead { layers: self.layers + other.layers, experts: self.experts + other.experts }
    }
}

impl core::ops::Add for Load {
    type Output = Load;

    /// Of two schedulers together.
    fn add(self, other: Load) -> Load {
        Load {
            running: self.running + other.running,
            waiting: self.waiting + other.waiting,
            pages_used: self.pages_used + other.pages_used,
        }
    }
}

/// Counters since construction or [`Stats::default`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Steps of prefill rows alone.
    pub prefill_steps: u64,
    /// Steps of decode rows alone.
    pub decode_steps: u64,
    /// Steps of both.
    pub mixed_steps: u64,
    /// Tokens of prefill rows, those of resumed requests included.
    pub prefill_tokens: u64,
    /// Of these, in mixed steps.
    pub mixed_prefill_tokens: u64,
    /// Decode rows, each one token; those dropped behind an end-of-sequence token included.
    pub decode_tokens: u64,
    /// Of these, in mixed steps.
    pub mixed_decode_tokens: u64,
    /// Padding rows of steps of decode rows alone.
    pub padding_rows: u64,
    /// Of the decode rows, those whose token was a draft.
    pub drafted: u64,
    /// Drafts that were right, each of which gave a token more.
    pub accepted: u64,
    /// Tokens given out.
    pub output_tokens: u64,
    /// Embeddings given out.
    pub embeddings: u64,
    /// Prompt tokens that the prefix cache held.
    pub cached_tokens: u64,
    /// Sum over decode rows of the tokens attended to: what decode attention reads.
    pub decode_context: u64,
    /// Sum over prefill tokens of the tokens attended to.
    pub prefill_context: u64,
    /// Most decode rows of a step.
    pub rows_peak: u32,
    /// Most pages held by requests at once.
    pub pages_peak: u32,
    /// Requests that gave their pages back and ran again later.
    pub retractions: u64,
    /// Requests that ended.
    pub finished: u64,
}

impl Stats {
    /// Of two schedulers: the sums of their counts, the greater of their peaks.
    pub fn joined(self, other: Stats) -> Stats {
        // Each field by name, so that a new one is not forgotten.
        let Stats {
            prefill_steps,
            decode_steps,
            mixed_steps,
            prefill_tokens,
            mixed_prefill_tokens,
            decode_tokens,
            mixed_decode_tokens,
            padding_rows,
            drafted,
            accepted,
            output_tokens,
            embeddings,
            cached_tokens,
            decode_context,
            prefill_context,
            rows_peak,
            pages_peak,
            retractions,
            finished,
        } = other;
        Stats {
            prefill_steps: self.prefill_steps + prefill_steps,
            decode_steps: self.decode_steps + decode_steps,
            mixed_steps: self.mixed_steps + mixed_steps,
            prefill_tokens: self.prefill_tokens + prefill_tokens,
            mixed_prefill_tokens: self.mixed_prefill_tokens + mixed_prefill_tokens,
            decode_tokens: self.decode_tokens + decode_tokens,
            mixed_decode_tokens: self.mixed_decode_tokens + mixed_decode_tokens,
            padding_rows: self.padding_rows + padding_rows,
            drafted: self.drafted + drafted,
            accepted: self.accepted + accepted,
            output_tokens: self.output_tokens + output_tokens,
            embeddings: self.embeddings + embeddings,
            cached_tokens: self.cached_tokens + cached_tokens,
            decode_context: self.decode_context + decode_context,
            prefill_context: self.prefill_context + prefill_context,
            rows_peak: self.rows_peak.max(rows_peak),
            pages_peak: self.pages_peak.max(pages_peak),
            retractions: self.retractions + retractions,
            finished: self.finished + finished,
        }
    }

    /// A step has been scheduled, whose tokens attend to `window` positions at most, and requests hold so many pages.
    pub(crate) fn count(&mut self, batch: &Batch, window: u32, pages_used: u32) {
        let shape = batch.shape();
        let context = |token: &Token| u64::from((token.position + 1).min(window));
        let (decoded, prefilled) = batch.tokens().split_at(shape.decode_rows as usize);
        let (decode_tokens, prefill_tokens) = (decoded.len() as u64, prefilled.len() as u64);
        self.decode_tokens += decode_tokens;
        self.prefill_tokens += prefill_tokens;
        self.decode_context += decoded.iter().map(context).sum::<u64>();
        self.prefill_context += prefilled.iter().map(context).sum::<u64>();
        match (shape.decode_rows, shape.prefill_rows) {
            (0, 0) => {}
            (0, _) => self.prefill_steps += 1,
            (_, 0) => self.decode_steps += 1,
            _ => {
                self.mixed_steps += 1;
                self.mixed_decode_tokens += decode_tokens;
                self.mixed_prefill_tokens += prefill_tokens;
            }
        }
        self.rows_peak = self.rows_peak.max(shape.decode_rows);
        self.pages_peak = self.pages_peak.max(pages_used);
    }

    /// All steps scheduled.
    pub fn steps(&self) -> u64 {
        self.prefill_steps + self.decode_steps + self.mixed_steps
    }
}
