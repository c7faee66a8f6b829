//! No running request waits long for its next token: all of them decode in every step, and prompts join in portions.
//!
//! ```text
//!   decode step   ├── rows ──┤
//!   mixed step    ├── rows ──┼─ prompts ─┤                      at most twice as long
//!   long step     ├── rows ──┼──────────── prompts ────────┤    at most six times, and seldom
//! ```
//!
//! How many tokens make such a step follows from what steps cost; a portion behind a long context has fewer, for attention goes
//! by that.
//!
//! Each portion costs a prompt what a step takes by itself, and what its decode rows take. So a prompt's first token comes sooner
//! from one long step, if running requests can spare it. They can as far as a percentile goes: of a hundred gaps between
//! tokens one may be longer. An account says how many more: each gap puts a part of one in, a long step takes out one for each
//! row that decodes in it.
//!
//! ```text
//!   account   ▁▂▂▃▃▄▄▅▅▆▁▁▂▂▃         a long step with as many rows as the account had
//! ```
//!
//! It is spent where prompts end with the step alone: a portion of a longer one would be none the less.
//!
//! Where a crowd waits, and has waited for many steps, portions do not keep up with who comes. Then what each costs besides its tokens
//! is what everybody waits for, those who decode too, and steps are long until the crowd is gone.

use super::{Demand, Mix, StepPolicy};
use crate::batch::StepShape;
use crate::costs::StepCosts;

/// Tokens of prompts that a step takes at least, so that every prompt comes to its end.
const PORTION_MIN: u32 = 64;
/// How many times as long as a decode step one with prompts takes; what is not reckoned with (drawing tokens, rows that join,
/// attention that a step of decode rows alone hides behind products) makes it twice.
const USUAL: f32 = 1.81;
/// A long one: a prompt of a thousand tokens takes four to five, where few rows decode.
const LONG: f32 = 6.0;
/// Of how many gaps between tokens one may be long: somewhat less than one in a hundred.
const GAPS: f32 = 112.0;
/// Steps of Newton's method: from ten times too many tokens four lead to within a few percent.
const NEWTON_STEPS: u32 = 4;
/// So many prompts that wait are a crowd, if they are a part of those who decode as large as this.
const CROWD: u32 = 8;
const CROWD_OF: u32 = 16;
/// Steps on end that one is there before steps are long. A few dozen requests that come at once are through by then.
const CROWDED_STEPS: u32 = 64;
/// Long gaps that are saved up at most: no more requests than that wait at once.
const SAVED_MAX: f32 = 16.0;

/// See the module.
#[derive(Clone, Debug)]
pub struct Latency {
    costs: StepCosts,
    /// How long the last step of decode rows alone took; 0 before the first one.
    decode_ms: f32,
    /// Gaps between tokens that may be long now.
    account: f32,
    /// Steps on end before which a crowd waited.
    crowded: u32,
}

impl Latency {
    /// For steps that cost so much.
    pub fn new(costs: StepCosts) -> Self {
        Latency { costs, decode_ms: 0.0, account: 0.0, crowded: 0 }
    }

    /// Tokens of prompts beside which a step takes so many times as long as one of its decode rows alone.
    fn portion(&self, demand: &Demand, times: f32) -> u32 {
        let StepCosts { decode, mixed, attention } = self.costs;
        let rows_ms = decode.at(demand.decode_rows);
        let beside_ms = mixed.at(demand.decode_rows) - rows_ms + attention.fixed_ms;
        // Nothing is left where steps with prompts cost more by themselves.
        let left_ms = ((times - 1.0) * self.decode_ms.max(rows_ms) - beside_ms).max(0.0);
        let token_ms = mixed.token_ms + attention.token_ms * demand.context as f32;
        // A token also attends to those of the portion before it: half of them. So n tokens take n token_ms + n^2 pair_ms, and
        // Newton's method finds how many take what is left, from above, in a few steps.
        let pair_ms = attention.token_ms / 2.0;
        let most = (left_ms / token_ms).min(demand.prompt_tokens_max as f32);
        let nearer = |n: f32| (left_ms + pair_ms * n * n) / (token_ms + 2.0 * pair_ms * n);
        let tokens = (0..NEWTON_STEPS).fold(most, |n, _| nearer(n));
        // Saturates: where tokens cost nothing, all fit.
        (tokens as u32).max(PORTION_MIN)
    }

    /// Takes long gaps of so many rows out of the account, if it has them.
    fn spend(&mut self, rows: u32) -> bool {
        let spent = self.account >= rows as f32;
        if spent {
            self.account -= rows as f32;
        }
        spent
    }

    /// Has a crowd waited for long?
    fn is_crowded(&mut self, demand: &Demand) -> bool {
        let waits = demand.prompts >= CROWD.max(demand.decode_rows / CROWD_OF);
        self.crowded = if waits { self.crowded.saturating_add(1) } else { 0 };
        self.crowded > CROWDED_STEPS
    }

    /// Tokens of prompts that the next step takes beside decode rows.
    fn prompt_tokens(&mut self, demand: &Demand) -> u32 {
        let (usual, long) = (self.portion(demand, USUAL), self.portion(demand, LONG));
        if self.is_crowded(demand) {
            return long;
        }
        let ends_with_it = usual < demand.prompt_tokens && demand.prompt_tokens <= long;
        if ends_with_it && self.spend(demand.decode_rows) { long } else { usual }
    }
}

impl StepPolicy for Latency {
    fn next(&mut self, demand: &Demand) -> Mix {
        let prompt_tokens = match demand.decode_rows {
            0 => demand.prompt_tokens_max,
            _ => self.prompt_tokens(demand).min(demand.prompt_tokens_max),
        };
        self.account = (self.account + demand.decode_rows as f32 / GAPS).min(SAVED_MAX);
        Mix { decodes: true, prompt_tokens }
    }

    fn has_run(&mut self, shape: StepShape, ms: f32) {
        if shape.is_decode() {
            self.decode_ms = ms;
        }
    }
}
