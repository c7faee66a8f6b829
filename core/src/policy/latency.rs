//! No running request waits long for its next token: all of them decode in every step, and prompts join in small portions.
//!
//! ```text
//!   decode step      ├── rows ──┤
//!   mixed step       ├── rows ──┼─ prompts ─┤        at most twice as long as the last step of decode rows alone
//! ```
//!
//! How many tokens fit in there follows from what steps cost. What the prompts' attention takes is not counted: it grows with
//! the context before a portion, and can't be cut by making the portion smaller.

use super::{Demand, Mix, StepPolicy};
use crate::batch::StepShape;
use crate::costs::StepCosts;

/// Tokens of prompts that a step takes at least, so that every prompt comes to its end.
const PORTION_MIN: u32 = 64;

/// See the module.
#[derive(Clone, Debug)]
pub struct Latency {
    costs: StepCosts,
    /// How long the last step of decode rows alone took; 0 before the first one.
    decode_ms: f32,
}

impl Latency {
    /// For steps that cost so much.
    pub fn new(costs: StepCosts) -> Self {
        Latency { costs, decode_ms: 0.0 }
    }

    /// Tokens that take as long as a step of these decode rows alone.
    fn portion(&self, decode_rows: u32) -> u32 {
        let StepCosts { decode, mixed } = self.costs;
        let rows_ms = decode.at(decode_rows);
        let left_ms = self.decode_ms.max(rows_ms) - (mixed.at(decode_rows) - rows_ms);
        // Saturates: where tokens cost nothing, all fit.
        ((left_ms / mixed.token_ms) as u32).max(PORTION_MIN)
    }
}

impl StepPolicy for Latency {
    fn next(&mut self, demand: &Demand) -> Mix {
        let prompt_tokens = match demand.decode_rows {
            0 => demand.prompt_tokens_max,
            rows => self.portion(rows).min(demand.prompt_tokens_max),
        };
        Mix { decodes: true, prompt_tokens }
    }

    fn has_run(&mut self, shape: StepShape, ms: f32) {
        if shape.is_decode() {
            self.decode_ms = ms;
        }
    }
}
