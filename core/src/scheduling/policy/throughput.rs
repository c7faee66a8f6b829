//! Most tokens a second: prompts run in steps that are worth it.
//!
//! A step with prompts costs something beside its tokens (it is launched kernel by kernel, and reads all weights), so
//! prompts should run together. But until they run, rows that they could have had stay empty, and a decode step costs
//! something beside its rows too. So prompts are held back until that has cost as much as running them will:
//!
//! ```text
//!   prompts that wait   1  1  2  2  2  3  │           each, in each decode step, its share of what a step costs by itself
//!   held_ms             ▁  ▂  ▃  ▄  ▆  █  │ ──> run
//!                                      what a step with prompts costs by itself
//! ```
//!
//! This is the economic order quantity (Harris, 1913): where requests end, and so places become free, at a steady pace, the
//! sum of both costs is least when they are equal; where not, at most twice the least.
//!
//! Nobody is held back where that brings nothing: when a step is full, when nothing decodes, when all who wait have places and
//! nobody comes.
//!
//! Running requests decode beside prompts if that costs less than it spares: a decode step where places are short, as one less
//! is needed then; else only what rows cost in it, while the longest request needs as many steps as before.

use super::{Demand, Mix, StepPolicy};
use crate::costs::StepCosts;

/// Decode steps that prompts are held back for at most, whatever steps seem to cost.
const HELD_STEPS_MAX: u32 = 64;

/// See the module.
#[derive(Clone, Debug)]
pub struct Throughput {
    costs: StepCosts,
    running_max: u32,
    /// What rows that stayed empty have cost since prompts ran last.
    held_ms: f32,
    /// Steps since then that prompts could have run in.
    held_steps: u32,
}

impl Throughput {
    /// For steps that cost so much, and so many requests at once.
    pub fn new(costs: StepCosts, running_max: u32) -> Self {
        Throughput { costs, running_max, held_ms: 0.0, held_steps: 0 }
    }

    fn is_due(&self, demand: &Demand) -> bool {
        demand.decode_rows == 0
            || demand.prompt_tokens >= demand.prompt_tokens_max
            || !(demand.places_are_short || demand.has_arrivals)
            || self.held_ms >= self.costs.mixed.fixed_ms
            || self.held_steps >= HELD_STEPS_MAX
    }

    /// Should running requests decode beside prompts?
    fn decodes_beside(&self, demand: &Demand) -> bool {
        let StepCosts { decode, mixed, .. } = self.costs;
        let rows = demand.decode_rows as f32;
        let spared_ms = match demand.places_are_short {
            true => decode.at(demand.decode_rows),
            // A step of decode rows alone is the better one for its rows (recorded, and divided where that pays): what that
            // is worth is not measured, and taken to be what it costs by itself.
            false => decode.token_ms * rows - decode.fixed_ms,
        };
        mixed.token_ms * rows <= spared_ms
    }
}

impl StepPolicy for Throughput {
    fn next(&mut self, demand: &Demand) -> Mix {
        if demand.prompts == 0 {
            return Mix::DECODE;
        }
        if self.is_due(demand) {
            (self.held_ms, self.held_steps) = (0.0, 0);
            return Mix { decodes: self.decodes_beside(demand), prompt_tokens: demand.prompt_tokens_max };
        }
        let share_ms = self.costs.decode.fixed_ms / self.running_max as f32;
        self.held_ms += share_ms * demand.prompts as f32;
        self.held_steps += 1;
        Mix::DECODE
    }
}
