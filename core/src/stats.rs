//! What the scheduler did, as numbers. Times come from whoever drives the engine: it has a clock, core has none.

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
    /// All steps scheduled.
    pub fn steps(&self) -> u64 {
        self.prefill_steps + self.decode_steps + self.mixed_steps
    }
}
