//! What the next step is made of: whether running requests decode in it, and how many tokens of prompts join them.
//!
//! ```text
//!   scheduler ── Demand: rows that can decode, prompts that could run ──> policy ── Mix ──> scheduler fills the batch
//!       ^                                                                    │
//!       └───────────── steps that have run, and how long they took ─────────>┘
//! ```
//!
//! A policy decides how much, never who: the order of admission and of preemption is the scheduler's, and so are pages. No
//! token depends on a policy, for no token depends on what runs beside it.
//!
//! What every policy promises: whoever waits is let in after a bounded number of steps, once there are a slot and pages; and
//! where nobody can decode, prompts run at once.

mod latency;
mod throughput;

use alloc::boxed::Box;

use crate::batch::StepShape;
use crate::costs::StepCosts;

pub use latency::Latency;
pub use throughput::Throughput;

/// What could run in the next step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Requests that can decode.
    pub decode_rows: u32,
    /// Requests that could be prefilled, for which there are slots and pages; as many as fill a step, at most.
    pub prompts: u32,
    /// Tokens of them to be run, as far as is known now.
    pub prompt_tokens: u32,
    /// Tokens that lie before the first of these, of the same prompt.
    pub context: u32,
    /// Tokens of prompts that a step takes at most.
    pub prompt_tokens_max: u32,
    /// Do more wait than there are places for?
    pub places_are_short: bool,
    /// Has a request come since the step before?
    pub has_arrivals: bool,
}

/// What the next step is to be made of. If none of it can run, the scheduler runs what can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// All requests that can decode do.
    pub decodes: bool,
    /// Tokens of prompts at most.
    pub prompt_tokens: u32,
}

impl Mix {
    /// Decode rows alone.
    pub const DECODE: Mix = Mix { decodes: true, prompt_tokens: 0 };
}

/// Decides what steps are made of.
pub trait StepPolicy {
    /// Of the next step.
    fn next(&mut self, demand: &Demand) -> Mix;

    /// A step has run, in so many milliseconds on the device.
    fn has_run(&mut self, shape: StepShape, ms: f32) {
        let _ = (shape, ms);
    }
}

/// The policies that there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Most tokens a second, over all requests.
    #[default]
    Throughput,
    /// No running request waits long for its next token.
    Latency,
}

impl Policy {
    /// The policy, for steps that cost so much, and so many requests at once.
    pub fn build(self, costs: StepCosts, running_max: u32) -> Box<dyn StepPolicy> {
        match self {
            Policy::Throughput => Box::new(Throughput::new(costs, running_max)),
            Policy::Latency => Box::new(Latency::new(costs)),
        }
    }
}
