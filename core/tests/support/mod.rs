//! What core's tests run the engine on: a device that is as late as it may be, a model that hashes, and middleware.
//!
//! ```text
//!   Engine<Local<B, Hashing>>      B = Lazy, Trace<Lazy> or Faulty<Lazy>
//! ```
#![allow(dead_code, reason = "each test binary uses a part of this")]

pub mod expected;
pub mod fault;
pub mod hashing;
pub mod lazy;
pub mod rule;
pub mod trace;

use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::local::Local;
use minisgl_core::policy::Policy;
use minisgl_core::request::{Event, FinishReason, Request, Ticket};
use minisgl_core::sampling::SamplingParams;
use minisgl_core::scheduler::{Order, Settings};
use minisgl_core::speculation::Speculation;

use expected::VOCAB;
use hashing::{Hashing, Runs};
use lazy::{Lazy, Pace};

/// Streams that a property test draws: as many as the variable says that proptest knows, or so many.
pub fn cases(usual: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(usual)
}

/// A small engine's capacities.
pub const SMALL: Limits = Limits {
    running: 4,
    queued: 16,
    sequence: 64,
    prefill_tokens: 16,
    page_size: 4,
    pages: 64,
    graph_rows: 4,
};

/// Most tokens a second, the prefix cache on.
pub const SETTINGS: Settings = Settings {
    policy: Policy::Throughput,
    prefix_cache: true,
    order: Order::Given,
    speculation: Speculation::Never,
    vocab: VOCAB,
};

/// Everything by default, the prefix cache and overlap on.
pub fn options(limits: Limits) -> EngineOptions {
    EngineOptions { limits, fit: None, scheduler: SETTINGS, eos: vec![expected::EOS], overlap: true }
}

/// An engine on the lazy device.
pub fn engine(options: EngineOptions) -> Engine<Local<Lazy, Hashing>> {
    Engine::new(Lazy::new(Pace::Late), Hashing::default(), options).expect("the capacities make an engine")
}

/// A request for so many tokens, going on past end-of-sequence tokens.
pub fn exactly(max_tokens: u32) -> SamplingParams {
    SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() }
}

/// What came out for one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
    /// Of the prompt's tokens.
    pub scores: Vec<f32>,
    pub embedding: Option<Vec<f32>>,
    pub finished: Option<(FinishReason, u32)>,
}

/// What came out, by ticket, in the order of first events.
#[derive(Default)]
pub struct Outcomes {
    pub list: Vec<(Ticket, Outcome)>,
}

impl Outcomes {
    pub fn take_in(&mut self, event: Event<'_>) {
        match event {
            Event::PromptLogprobs { ticket, logprobs } => {
                let outcome = self.of_mut(ticket);
                assert!(outcome.finished.is_none(), "{ticket:?} has a score after its end");
                outcome.scores.extend(logprobs.iter().map(|row| row.token));
            }
            Event::Embedding { ticket, values } => {
                let outcome = self.of_mut(ticket);
                assert!(outcome.finished.is_none(), "{ticket:?} has an embedding after its end");
                assert_eq!(outcome.embedding.replace(values.to_vec()), None, "{ticket:?} has two embeddings");
            }
            Event::Token { ticket, token, logprobs } => {
                let outcome = self.of_mut(ticket);
                assert!(outcome.finished.is_none(), "{ticket:?} has a token after its end");
                outcome.tokens.push(token);
                outcome.logprobs.extend(logprobs.map(|row| row.token));
            }
            Event::Finished { ticket, reason, cached_tokens, tokens } => {
                let outcome = self.of_mut(ticket);
                assert!(outcome.finished.is_none(), "{ticket:?} ends twice");
                assert_eq!(outcome.tokens, tokens, "{ticket:?} ends with other tokens than it had");
                outcome.finished = Some((reason, cached_tokens));
            }
        }
    }

    pub fn of(&self, ticket: Ticket) -> Outcome {
        self.list.iter().find(|(other, _)| *other == ticket).map(|(_, it)| it.clone()).unwrap_or_default()
    }

    fn of_mut(&mut self, ticket: Ticket) -> &mut Outcome {
        let at = self.list.iter().position(|(other, _)| *other == ticket).unwrap_or_else(|| {
            self.list.push((ticket, Outcome::default()));
            self.list.len() - 1
        });
        &mut self.list[at].1
    }
}

/// Steps until nothing is left, checking the invariants after each.
pub fn run_dry<B: Runs>(engine: &mut Engine<Local<B, Hashing>>, outcomes: &mut Outcomes) {
    let mut steps = 0;
    while !engine.is_idle() {
        let mut moved = false;
        let mut hear = |event: Event<'_>| {
            moved = true;
            outcomes.take_in(event);
        };
        let report = engine.step(&mut hear).expect("the device does not fail");
        moved |= report.launched.is_some() || report.completed.is_some();
        assert!(moved, "requests wait, and nothing moves");
        engine.check();
        steps += 1;
        assert!(steps < 100_000, "requests run for ever");
    }
}

/// Submits all, steps until they have ended, and returns what came out, in their order.
pub fn run_all<B: Runs>(
    engine: &mut Engine<Local<B, Hashing>>,
    requests: &[(Vec<u32>, SamplingParams)],
) -> Vec<Outcome> {
    let mut submit = |(prompt, params): &(Vec<u32>, SamplingParams)| {
        engine.submit(Request::new(prompt, *params)).expect("the request can run").ticket
    };
    let tickets: Vec<Ticket> = requests.iter().map(&mut submit).collect();
    let mut outcomes = Outcomes::default();
    run_dry(engine, &mut outcomes);
    tickets.into_iter().map(|ticket| outcomes.of(ticket)).collect()
}
