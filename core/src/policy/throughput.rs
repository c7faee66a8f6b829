//! Most tokens a second: prompts run in steps that are worth it.
//!
//! A step with prompts costs something beside its tokens (it is launched kernel by kernel, and reads all weights), so
//! prompts should run together. But until they run, rows that they could have had stay empty, and a decode step costs
//! something beside its rows too. So prompts are held back until that has cost as much as running them will:
//!
//! ```text
//!   prompts that wait   1  1  2  2  2  3  │           each, in each decode step, its share of what a step costs by itself
//!   held_ms             ▁  ▂  ▃  ▄  ▆  █  │ ──> run
//!                                      setup: what a step with prompts costs beside their tokens
//! ```
//!
//! This is the economic order quantity (Harris, 1913): where requests end, and so rows become free, at a steady pace, the sum
//! of both costs is least when they are equal; where not, at most twice the least.
//!
//! Nobody is held back where that brings nothing: when a step is full, when nothing decodes, when no more is to come.
//! Running requests decode in the same step if that costs less than a step of their own.

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

    /// What running prompts costs beside their tokens, in a step of their own and with decode rows beside them.
    fn setup_ms(&self, decode_rows: u32) -> [f32; 2] {
        let StepCosts { decode, mixed } = self.costs;
        [mixed.fixed_ms, mixed.at(decode_rows) - decode.at(decode_rows)]
    }

    fn is_due(&self, demand: &Demand, setup_ms: f32) -> bool {
        demand.decode_rows == 0
            || demand.prompt_tokens >= demand.prompt_tokens_max
            || !demand.more_to_come
            || self.held_ms >= setup_ms
            || self.held_steps >= HELD_STEPS_MAX
    }
}

impl StepPolicy for Throughput {
    fn next(&mut self, demand: &Demand) -> Mix {
        if demand.prompts == 0 {
            return Mix::DECODE;
        }
        let [alone_ms, mixed_ms] = self.setup_ms(demand.decode_rows);
        if self.is_due(demand, alone_ms.min(mixed_ms)) {
            (self.held_ms, self.held_steps) = (0.0, 0);
            return Mix { decodes: mixed_ms <= alone_ms, prompt_tokens: demand.prompt_tokens_max };
        }
        let share_ms = self.costs.decode.fixed_ms / self.running_max as f32;
        self.held_ms += share_ms * demand.prompts as f32;
        self.held_steps += 1;
        Mix::DECODE
    }
}
