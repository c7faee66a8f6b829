//! Counts of a job.

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that ran to their end.
    pub finished: u64,
    /// Lines with an error.
    pub failed: u64,
    /// Lines whose good results the output had already.
    pub skipped: u64,
    /// Tokens drawn.
    pub output_tokens: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: Tally) {
        self.finished += other.finished;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.output_tokens += other.output_tokens;
    }
}
