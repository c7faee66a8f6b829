//! The scheduler by itself, driven closer than the engine drives it.

mod admission;
mod by_prefix;
mod capacities;
mod ends;
mod masks;
mod prompts;
#[path = "../support/mod.rs"]
mod support;
mod window;

use minisgl_core::batch::Batch;
use minisgl_core::config::Limits;
use minisgl_core::costs::{Line, StepCosts};
use minisgl_core::request::{Event, FinishReason, Request, Ticket};
use minisgl_core::scheduler::Scheduler;

use support::{SETTINGS, SMALL, exactly};

/// Steps cost nothing, so no prompt is held back, and running requests decode beside prompts.
fn scheduler_within(limits: Limits) -> Scheduler {
    Scheduler::new(limits, SETTINGS, StepCosts::default(), &[], None).expect("host memory")
}

/// With these prompts had better run together.
const DEAR_PROMPTS: StepCosts = StepCosts {
    decode: Line { fixed_ms: 10.0, token_ms: 0.0 },
    mixed: Line { fixed_ms: 80.0, token_ms: 0.0 },
    attention: Line { fixed_ms: 0.0, token_ms: 0.0 },
};

fn scheduler() -> Scheduler {
    scheduler_within(SMALL)
}

fn submit(scheduler: &mut Scheduler, prompt: &[u32], max_tokens: u32) -> Ticket {
    let request = Request::new(prompt, exactly(max_tokens));
    scheduler.submit(request).expect("it can run").ticket
}

/// The reasons in a list of events.
fn ends(events: &mut Vec<FinishReason>) -> impl FnMut(Event<'_>) {
    |event| {
        if let Event::Finished { reason, .. } = event {
            events.push(reason);
        }
    }
}

/// A step, as those see it who wait and run.
#[derive(Debug, PartialEq)]
struct Seen {
    decoding: Vec<Ticket>,
    prefilling: Vec<Ticket>,
    retractions: u64,
}

/// Runs to the end, each step completed before the next; every request draws the same token.
fn run_dry(scheduler: &mut Scheduler, limits: &Limits) -> Vec<Seen> {
    let (mut batch, mut seen) = (Batch::new(limits), Vec::new());
    while !scheduler.is_idle() {
        assert!(scheduler.schedule(&mut batch), "requests wait, and nothing moves");
        let (decoding, prefilling) = batch.owners().split_at(batch.shape().decode_rows as usize);
        let retractions = scheduler.stats().retractions;
        seen.push(Seen { decoding: decoding.to_vec(), prefilling: prefilling.to_vec(), retractions });
        let tokens = vec![5; batch.samples() as usize];
        scheduler.complete(&batch, &tokens, &[], &mut |_| ());
        scheduler.check();
    }
    seen
}

/// Capacities under which the host keeps far fewer tokens than all requests may have: a window lets them run in few pages.
const LONG: Limits = Limits {
    running: 40,
    queued: 8,
    sequence: 16_384,
    prefill_tokens: 16_384,
    page_size: 16,
    pages: 1200,
    graph_rows: 0,
};
