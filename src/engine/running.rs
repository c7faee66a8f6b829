//! How many requests run at once where nobody says: as many as decoding gains from, if memory holds them.
//!
//! ```text
//!   a row's part of a decode step   (weights + overhead) / rows   its keys and values   its multiplications
//!                                    read once for all rows         its own               its own
//! ```
//!
//! More rows share what comes once a step, until that is little beside what is each one's own. All of it is counted in bytes:
//! what a step costs besides, launches above all, as those that memory could bring meanwhile, and a row's multiplications as
//! the share of the weights whose reading takes as long. What steps take is measured when an engine is built
//! (`core/src/steps/costs.rs`), which is too late for this: its buffers and recorded steps are for so many rows.

/// As many requests as ran before anybody counted: fewer are not worth the trouble.
const LEAST: u64 = 256;
/// More rows than that save nothing any more, and recording steps of them takes long.
const MOST: u64 = 4096;
/// A step's cost besides its bytes: half a millisecond, in which memory brings 2 GiB (of an H200; 1 GiB of an A100).
const OVERHEAD_BYTES: u64 = 2 << 30;
/// Rows for which multiplying takes as long as reading the weights does.
const BALANCED_ROWS: u64 = 256;
/// What comes once a step is little if it is this part of it.
const LITTLE: u64 = 8;

/// What the number of requests depends on.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// Of all weights that a step of many rows reads.
    pub step_weight_bytes: u64,
    /// Of these, those that a row is multiplied with: all but the experts that it does not get.
    pub active_weight_bytes: u64,
    /// Of a token's keys and values, over all layers.
    pub kv_bytes_per_token: u64,
    /// Tokens of a usual sequence.
    pub tokens: u64,
    /// That the KV cache may take.
    pub cache_bytes: u64,
}

impl Costs {
    /// Requests to run at once on a GPU.
    pub fn running(&self) -> u32 {
        let row_bytes =
            self.kv_bytes_per_token * self.tokens.max(1) + self.active_weight_bytes / BALANCED_ROWS;
        let gained = LITTLE * (self.step_weight_bytes + OVERHEAD_BYTES) / row_bytes.max(1);
        let held = self.cache_bytes / (self.kv_bytes_per_token * self.tokens).max(1);
        gained.min(held).clamp(LEAST, MOST).next_multiple_of(64) as u32
    }
}

/// On the CPU, which is bound by arithmetic from few rows on.
pub const ON_CPU: u32 = LEAST as u32;

#[cfg(test)]
mod tests {
    use super::*;

    /// Qwen3-0.6B on 130 GB.
    const SMALL: Costs = Costs {
        step_weight_bytes: 1_192_000_000,
        active_weight_bytes: 1_192_000_000,
        kv_bytes_per_token: 114_688,
        tokens: 1124,
        cache_bytes: 117_000_000_000,
    };

    #[test]
    fn short_sequences_run_by_the_thousand_and_long_ones_by_the_hundred() {
        let of = |tokens| Costs { tokens, ..SMALL }.running();
        assert_eq!(of(1124), 256, "their keys and values are the most of a step");
        assert!((1024..=2048).contains(&of(120)), "{}", of(120));
        assert_eq!(of(1), 4096);
    }

    #[test]
    fn no_more_run_than_memory_holds_but_for_those_that_always_may() {
        let of = |cache_bytes| Costs { tokens: 120, cache_bytes, ..SMALL }.running();
        assert_eq!(of(800 * 120 * 114_688), 832);
        assert_eq!(of(0), 256);
    }
}
