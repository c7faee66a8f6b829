//! Speculation by prompt lookup: what a text says next is often what it said before (Saxena, "Prompt Lookup Decoding", 2023).
//!
//! ```text
//!   tokens    … the quick brown fox jumps over … the quick brown │ fox  jumps over
//!                 └── the longest match ──┘ └── its continuation ──> drafts
//!   rows      one more for each draft      position p      p + 1   p + 2   p + 3
//!                                  token   brown           fox     jumps   over
//!                                  draws   fox             jumps   on      …
//!                                  taken   yes             yes     yes     no: the draft before it was wrong
//! ```
//!
//! A draft is a decode row like any other, at the position behind the row before it. What a row draws depends on its request's
//! seed, its position and the tokens before it, so a row whose drafts before it were all right draws what it would have drawn
//! without them, to the bit; draws behind a wrong draft are thrown away. Keys and values of a wrong draft lie behind the sequence's
//! end, where the next step writes.
//!
//! The next drafts depend on what this step draws. So a step with drafts is completed before the next one is scheduled, and a
//! step in flight is waited for where drafts promise more than the device loses by waiting. Where the text repeats nothing, two
//! steps are in flight as ever.
//!
//! Invariant: no step has drafts and more than [`DRAFTED_ROWS_MAX`] rows of requests that decode.

use crate::costs::Line;

/// Decode rows of a step with drafts at most. Backends may run larger ones in parts that don't see each other's keys and values.
pub const DRAFTED_ROWS_MAX: u32 = 32;
/// Drafts of a request in a step at most. Backends may fetch keys and values of older positions before the step has written its
/// own.
pub const DRAFTS_MAX: u32 = 15;

/// Tokens that must have occurred before, in their order, for what followed them to be a draft.
pub(crate) const MATCH_MIN: u32 = 3;
/// A longer match says no more.
pub(crate) const MATCH_MAX: u32 = 16;
/// Tokens that are searched, the last ones: some microseconds' worth.
pub(crate) const SEARCHED_MAX: u32 = 16_384;

/// The share of right predictions that a request begins with, and how fast it follows.
pub(crate) const HITS_BEFORE: f32 = 0.5;
const HITS_PACE: f32 = 0.125;
/// How fast the cost of waiting follows.
const WAIT_PACE: f32 = 0.25;

/// When drafts are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Never.
    #[default]
    Never,
    /// Where few requests run, and what steps cost and how many drafts were right says that it is faster.
    WhereItPays,
    /// Where few requests run, whatever it costs.
    Always,
}

/// How many drafts a step gets. What it says changes when tokens come, never which.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drafting {
    speculation: Speculation,
    /// Of steps of decode rows alone.
    costs: Line,
    /// Rows of a step with drafts.
    rows_max: u32,
    /// How long the device idles where a step is waited for before the next is scheduled.
    wait_ms: f32,
}

impl Drafting {
    /// For steps that cost so much and have room for so many rows.
    pub fn new(speculation: Speculation, costs: Line, rows: u32) -> Drafting {
        Drafting { speculation, costs, rows_max: rows.min(DRAFTED_ROWS_MAX), wait_ms: 0.0 }
    }

    /// Is there room for drafts beside so many requests that decode?
    pub fn is_possible(&self, requests: u32) -> bool {
        self.speculation != Speculation::Never && requests > 0 && self.drafts_max(requests) > 0
    }

    /// Drafts that each of so many requests may have.
    fn drafts_max(&self, requests: u32) -> u32 {
        (self.rows_max / requests.max(1)).saturating_sub(1).min(DRAFTS_MAX)
    }

    /// How many drafts a request gets beside others, of whose predictions the share `hits` was right, and the milliseconds that
    /// they are expected to save.
    ///
    /// The j-th of them is taken with the probability `hits^j`, and then saves a token's share of a step without drafts; each
    /// costs a row.
    pub fn drafts(&self, requests: u32, hits: f32) -> (u32, f32) {
        let most = self.drafts_max(requests);
        if self.speculation == Speculation::Always {
            return (most, f32::INFINITY);
        }
        let token_ms = self.costs.at(requests) / requests as f32;
        let (mut drafts, mut saved_ms, mut probability) = (0, 0.0, hits);
        while drafts < most && probability * token_ms > self.costs.token_ms {
            saved_ms += probability * token_ms - self.costs.token_ms;
            probability *= hits;
            drafts += 1;
        }
        (drafts, saved_ms)
    }

    /// Is it worth waiting for the step in flight, for drafts that save so much?
    pub fn pays_to_wait(&self, saved_ms: f32) -> bool {
        saved_ms > self.wait_ms
    }

    /// The device idled so long before a step because the one before it was waited for.
    pub fn has_waited(&mut self, ms: f32) {
        self.wait_ms += (ms.max(0.0) - self.wait_ms) * WAIT_PACE;
    }
}

/// A share of right predictions after another one.
pub(crate) fn hits_after(hits: f32, is_right: bool) -> f32 {
    hits + (f32::from(u8::from(is_right)) - hits) * HITS_PACE
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Line = Line { fixed_ms: 0.5, token_ms: 0.004 };

    #[test]
    fn one_request_gets_all_drafts_and_many_get_none() {
        let drafting = Drafting::new(Speculation::WhereItPays, DEVICE, 256);
        assert_eq!(drafting.drafts(1, 0.95).0, DRAFTS_MAX);
        assert_eq!(drafting.drafts(8, 0.95).0, 3);
        assert!(drafting.is_possible(16) && !drafting.is_possible(17) && !drafting.is_possible(0));
        assert!(!Drafting::new(Speculation::Never, DEVICE, 256).is_possible(1));
        assert!(!Drafting::new(Speculation::Always, DEVICE, 1).is_possible(1), "one row has no room");
    }

    #[test]
    fn drafts_are_as_many_as_save_more_than_they_cost() {
        let drafting = Drafting::new(Speculation::WhereItPays, DEVICE, 256);
        let (few, little) = drafting.drafts(1, 0.3);
        let (many, much) = drafting.drafts(1, 0.8);
        assert!(few < many && little < much, "{few} {little} {many} {much}");
        assert_eq!(drafting.drafts(1, 0.0), (0, 0.0));
        // Of steps of 1.25 ms a half and a quarter, less a row each; an eighth would save less than that.
        let quarters = Line { fixed_ms: 1.0, token_ms: 0.25 };
        let saved = (0.625 - 0.25) + (0.3125 - 0.25);
        assert_eq!(Drafting::new(Speculation::WhereItPays, quarters, 256).drafts(1, 0.5), (2, saved));
        // A device that takes as long for two rows as for one twice.
        let linear = Line { fixed_ms: 0.0, token_ms: 1.0 };
        assert_eq!(Drafting::new(Speculation::WhereItPays, linear, 256).drafts(1, 0.9).0, 0);
        assert_eq!(Drafting::new(Speculation::Always, linear, 256).drafts(1, 0.0).0, DRAFTS_MAX);
    }

    #[test]
    fn waiting_must_cost_less_than_drafts_save() {
        let mut drafting = Drafting::new(Speculation::WhereItPays, DEVICE, 256);
        assert!(drafting.pays_to_wait(0.01) && !drafting.pays_to_wait(0.0));
        drafting.has_waited(-1.0);
        assert!(!drafting.pays_to_wait(0.0), "a clock that goes backwards gives no time");
        (0..50).for_each(|_| drafting.has_waited(0.1));
        assert!(drafting.pays_to_wait(0.2) && !drafting.pays_to_wait(0.05));
    }

    #[test]
    fn hits_follow_what_was_right() {
        let after = |is_right, times| (0..times).fold(HITS_BEFORE, |hits, _| hits_after(hits, is_right));
        assert!(after(true, 20) > 0.9 && after(false, 20) < 0.1);
    }
}
