//! A simulated engine, for tests of what is around one: which request draws which token is known, and steps take no time,
//! or as long as a test says.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use minisgl_core::batch::StepShape;
use minisgl_core::config::Limits;
use minisgl_core::engine::{CompletedStep, StepReport};
use minisgl_core::request::{self as core, Request, SubmitError, Submitted, Ticket};
use minisgl_core::scheduler::Order;
use minisgl_core::stats::{Load, Stats};
use minisgl_cuda::HostTimes;

use super::Front;
use crate::diagnostics::Ceilings;
use crate::error::Cause;
use crate::request::{GenerateRequest, SamplingParams};
use crate::runner::{LogitsError, Runner, Sink};
use crate::telemetry::Probe;
use crate::tokenizer::Text;

/// Its capacities.
pub const LIMITS: Limits = Limits {
    running: 4,
    queued: 4,
    sequence: 100_000,
    prefill_tokens: 64,
    page_size: 16,
    pages: 16,
    graph_rows: 0,
};

/// What a simulated engine shares with its test.
#[derive(Default)]
pub struct Control {
    pub steps: AtomicU64,
    /// The step that fails, or panics.
    pub fails_at: Option<u64>,
    pub panics_at: Option<u64>,
    /// How long a step takes.
    pub step_time: Duration,
    /// First prompt tokens in the order of admission.
    pub admitted: Mutex<Vec<u32>>,
    /// Requests in the engine now.
    pub running: AtomicU64,
    /// How often it was asked whether it is idle.
    pub polls: AtomicU64,
}

/// A request in the engine.
struct Running {
    ticket: Ticket,
    prompt: Vec<u32>,
    max_tokens: u32,
    tokens: Vec<u32>,
}

/// An engine whose request of prompt `[p, a, b, c]` draws `a, b, c, p + 3, p + 4, …`, and of `[p]` hence `p, p + 1, …`. An
/// empty prompt is refused.
struct Simulated {
    control: Arc<Control>,
    requests: Vec<Option<Running>>,
    generation: u32,
}

impl Simulated {
    fn end(&mut self, entry: usize, reason: core::FinishReason, sink: Sink<'_>) {
        let Some(Running { ticket, tokens, .. }) = self.requests[entry].take() else { return };
        self.control.running.fetch_sub(1, Ordering::Relaxed);
        sink(core::Event::Finished { ticket, reason, cached_tokens: 7, tokens: &tokens });
    }
}

impl Runner for Simulated {
    fn submit(&mut self, request: Request<'_>) -> Result<Submitted, SubmitError> {
        request.params.check()?;
        let first = *request.prompt.first().ok_or(SubmitError::EmptyPrompt)?;
        let entry = self.requests.iter().position(Option::is_none);
        let entry = entry.ok_or(SubmitError::QueueFull { capacity: LIMITS.queued })?;
        self.generation += 1;
        let ticket = Ticket { entry: entry as u32, generation: self.generation };
        let max_tokens = request.params.max_tokens.min(LIMITS.sequence - request.prompt.len() as u32);
        self.requests[entry] =
            Some(Running { ticket, prompt: request.prompt.to_vec(), max_tokens, tokens: Vec::new() });
        self.control.admitted.lock().unwrap().push(first);
        self.control.running.fetch_add(1, Ordering::Relaxed);
        Ok(Submitted { ticket, max_tokens })
    }

    fn set_backlog(&mut self, _: u32) {}

    fn abort(&mut self, ticket: Ticket, sink: Sink<'_>) -> bool {
        let entry = ticket.entry as usize;
        let live = self.requests[entry].as_ref().is_some_and(|request| request.ticket == ticket);
        if live {
            self.end(entry, core::FinishReason::Abort, sink);
        }
        live
    }

    fn step(&mut self, sink: Sink<'_>) -> Result<StepReport, Cause> {
        let step = self.control.steps.fetch_add(1, Ordering::Relaxed);
        thread::sleep(self.control.step_time);
        if self.control.fails_at == Some(step) {
            return Err("the kernel `down` failed".into());
        }
        assert!(self.control.panics_at != Some(step), "a bug in step {step}");
        let rows = self.requests.iter().flatten().count() as u32;
        for entry in 0..self.requests.len() {
            let Some(Running { ticket, prompt, max_tokens, tokens }) = &mut self.requests[entry] else {
                continue;
            };
            let at = tokens.len();
            let token = prompt.get(1 + at).copied().unwrap_or(prompt[0] + at as u32);
            tokens.push(token);
            let over = tokens.len() as u32 == *max_tokens;
            sink(core::Event::Token { ticket: *ticket, token, logprobs: None });
            if over {
                self.end(entry, core::FinishReason::Length, sink);
            }
        }
        let shape = StepShape::decode(rows);
        Ok(StepReport {
            launched: Some(shape),
            completed: Some(CompletedStep { shape, start_ms: 0.0, gpu_ms: 0.0 }),
        })
    }

    fn is_idle(&self) -> bool {
        self.control.polls.fetch_add(1, Ordering::Relaxed);
        self.requests.iter().all(Option::is_none)
    }

    fn stats(&self) -> Stats {
        Stats { decode_steps: self.control.steps.load(Ordering::Relaxed), ..Stats::default() }
    }

    fn load(&self) -> Load {
        Load::default()
    }

    fn reset_stats(&mut self) {}

    fn clear_prefix_cache(&mut self) {}

    fn check(&self) {
        assert!(self.control.panics_at.is_none(), "the books are wrong");
    }

    fn limits(&self) -> &Limits {
        &LIMITS
    }

    fn logits_after(&mut self, _: &[u32]) -> Result<Vec<f32>, LogitsError> {
        assert!(self.is_idle(), "logits are asked of an idle engine");
        Ok(Vec::new())
    }

    fn ceilings(&mut self) -> Result<Option<Ceilings>, Cause> {
        Ok(None)
    }

    fn probe(&self) -> Option<Probe> {
        None
    }

    fn host_times(&self) -> Option<HostTimes> {
        None
    }
}

/// A front before it, and what the test sees of it.
pub fn start_with(control: Control, text: Text, order: Order) -> (Front, Arc<Control>) {
    let control = Arc::new(control);
    let runner = Simulated { control: control.clone(), requests: Vec::new(), generation: 0 };
    let entries = LIMITS.running + if order == Order::Given { 0 } else { LIMITS.queued };
    let build = move || {
        let mut runner = runner;
        runner.requests.resize_with(entries as usize, || None);
        Ok((Box::new(runner) as Box<dyn Runner>, ()))
    };
    let (front, ()) = Front::start(Arc::new(text), order, build).unwrap();
    (front, control)
}

/// Without a tokenizer.
pub fn start(control: Control) -> (Front, Arc<Control>) {
    start_with(control, Text::default(), Order::Given)
}

/// A request that draws `first` and the tokens behind it.
pub fn request(first: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest::tokens([first]).sampling(SamplingParams { max_tokens, ..SamplingParams::default() })
}
