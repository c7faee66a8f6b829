//! Engines without a model: one whose tokens a test foretells, and one whose steps take a real device's time ([`SimulatedDevice`]).
//!
//! The first is for tests of what is around an engine: which request draws which token is known, and steps take no time,
//! or as long as a test says.
//!
//! A request of prompt `[p, a, b, c]` draws `a, b, c, p + 3, p + 4, …`, and of `[p]` hence `p, p + 1, …`; where there is a
//! script, each draws that and ends. An empty prompt is refused. The embedding of a prompt that begins with `p` has the direction of
//! `p, p + 1, …, p + 7`.
//!
//! ```
//! use minisgl::simulated::{Control, request};
//! use minisgl::{Llm, Text};
//!
//! let (mut llm, control) = Llm::simulated(Control::default(), Text::default())?;
//! assert_eq!(llm.generate(&[request(7, 3)])?[0].token_ids, [7, 8, 9]);
//! assert_eq!(control.steps.load(std::sync::atomic::Ordering::Relaxed), 3);
//! # Ok::<(), minisgl::Error>(())
//! ```

mod device;
mod executor;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use minisgl_core::backend::Dims;
use minisgl_core::batch::StepShape;
use minisgl_core::config::Limits;
use minisgl_core::embedding::Embed;
use minisgl_core::engine::{CompletedStep, StepReport};
use minisgl_core::kv::KvFormat;
use minisgl_core::request::{self as core, Request, SubmitError, Submitted, Ticket};
use minisgl_core::scheduler::Order;
use minisgl_core::stats::{ExpertsRead, Load, Stats};
use minisgl_cuda::HostTimes;
use minisgl_decoder::Checkpoint;

use crate::diagnostics::Ceilings;
use crate::error::{Cause, Error};
use crate::front::Front;
use crate::info::Info;
use crate::pooling::Pooling;
use crate::request::{GenerateRequest, SamplingParams};
use crate::runner::{Runner, Sink};
use crate::telemetry::Probe;
use crate::tokenizer::Text;

pub use device::SimulatedDevice;
pub(crate) use executor::Simulated as SimulatedExecutor;

/// The capacities that one has if nothing else is said.
pub const LIMITS: Limits = Limits {
    running: 4,
    queued: 4,
    sequence: 100_000,
    prefill_tokens: 64,
    page_size: 16,
    pages: 16,
    graph_rows: 0,
};

/// What a simulated engine does, and what is seen of it.
#[derive(Debug)]
pub struct Control {
    /// Capacities.
    pub limits: Limits,
    /// How long a step takes.
    pub step_time: Duration,
    /// How long the engine lets requests come in before each step but the first.
    pub launch_after: Duration,
    /// No step begins while somebody has it locked.
    pub held: Mutex<()>,
    /// What every request draws, if anything is in it: then it ends as by an end-of-sequence token.
    pub script: Vec<u32>,
    /// The step that fails.
    pub fails_at: Option<u64>,
    /// Does an update of its weights fail?
    pub update_fails: bool,
    /// The step that panics.
    pub panics_at: Option<u64>,
    /// Steps so far.
    pub steps: AtomicU64,
    /// First prompt tokens in the order of admission.
    pub admitted: Mutex<Vec<u32>>,
    /// Requests in the engine now.
    pub running: AtomicU64,
    /// How often it was asked whether it is idle.
    pub polls: AtomicU64,
}

impl Default for Control {
    fn default() -> Self {
        Control {
            limits: LIMITS,
            step_time: Duration::ZERO,
            launch_after: Duration::ZERO,
            held: Mutex::default(),
            script: Vec::new(),
            fails_at: None,
            update_fails: false,
            panics_at: None,
            steps: AtomicU64::new(0),
            admitted: Mutex::default(),
            running: AtomicU64::new(0),
            polls: AtomicU64::new(0),
        }
    }
}

/// Tokens that it tells apart.
const VOCAB: u32 = 100;

/// Values of an embedding at most.
const HIDDEN: u32 = 8;

/// A request in the engine.
struct Running {
    ticket: Ticket,
    embed: Option<Embed>,
    prompt: Vec<u32>,
    max_tokens: u32,
    tokens: Vec<u32>,
}

/// See the module.
struct Simulated {
    control: Arc<Control>,
    requests: Vec<Option<Running>>,
    generation: u32,
    stopped: bool,
}

impl Simulated {
    fn end(&mut self, entry: usize, reason: core::FinishReason, sink: Sink<'_>) {
        let Some(Running { ticket, tokens, .. }) = self.requests[entry].take() else { return };
        self.control.running.fetch_sub(1, Ordering::Relaxed);
        sink(core::Event::Finished { ticket, reason, cached_tokens: 7, tokens: &tokens });
    }
}

impl Simulated {
    fn submit(&mut self, request: Request<'_>) -> Result<Submitted, SubmitError> {
        request.params.check()?;
        request.params.embed.map_or(Ok(()), |asked| asked.check(HIDDEN))?;
        let first = *request.prompt.first().ok_or(SubmitError::EmptyPrompt)?;
        let entry = self.requests.iter().position(Option::is_none);
        let entry = entry.ok_or(SubmitError::QueueFull { capacity: self.control.limits.queued })?;
        self.generation += 1;
        let ticket = Ticket { entry: entry as u32, generation: self.generation };
        let limit = self.control.limits.sequence - 1;
        if request.prompt.len() as u32 > limit {
            return Err(SubmitError::PromptTooLong { tokens: request.prompt.len(), limit });
        }
        let max_tokens = request.params.max_tokens.min(limit + 1 - request.prompt.len() as u32);
        self.requests[entry] = Some(Running {
            ticket,
            embed: request.params.embed,
            prompt: request.prompt.to_vec(),
            max_tokens,
            tokens: Vec::new(),
        });
        self.control.admitted.lock().unwrap_or_else(PoisonError::into_inner).push(first);
        self.control.running.fetch_add(1, Ordering::Relaxed);
        Ok(Submitted { ticket, max_tokens })
    }
}

impl Runner for Simulated {
    fn submit_group(
        &mut self,
        samples: &[Request<'_>],
        taken: &mut dyn FnMut(Submitted),
    ) -> Result<(), SubmitError> {
        let vacant = self.requests.iter().filter(|request| request.is_none()).count();
        if samples.len() > self.requests.len() {
            return Err(SubmitError::TooManySamples { samples: samples.len(), limit: self.requests.len() });
        }
        if samples.len() > vacant {
            return Err(SubmitError::QueueFull { capacity: self.control.limits.queued });
        }
        samples.iter().try_for_each(|sample| self.submit(*sample).map(&mut *taken))
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
        drop(self.control.held.lock());
        let step = self.control.steps.fetch_add(1, Ordering::Relaxed);
        thread::sleep(self.control.step_time);
        if self.control.fails_at == Some(step) {
            return Err("the kernel `down` failed".into());
        }
        assert!(self.control.panics_at != Some(step), "a bug in step {step}");
        let rows = self.requests.iter().flatten().count() as u32;
        for entry in 0..self.requests.len() {
            let Some(Running { ticket, embed, prompt, max_tokens, tokens }) = &mut self.requests[entry]
            else {
                continue;
            };
            if let Some(asked) = embed {
                let values = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| (prompt[0] + i) as f32);
                sink(core::Event::Embedding { ticket: *ticket, values: asked.of(&values) });
            }
            if *max_tokens == 0 {
                self.end(entry, core::FinishReason::Length, sink);
                continue;
            }
            let at = tokens.len();
            let script = &self.control.script;
            let token = match script.get(at) {
                Some(token) => *token,
                None => prompt.get(1 + at).copied().unwrap_or(prompt[0].wrapping_add(at as u32)),
            };
            tokens.push(token);
            let end = match tokens.len() {
                count if count == script.len() => Some(core::FinishReason::Eos),
                count if count as u32 == *max_tokens => Some(core::FinishReason::Length),
                _ => None,
            };
            sink(core::Event::Token { ticket: *ticket, token, logprobs: None });
            if let Some(reason) = end {
                self.end(entry, reason, sink);
            }
        }
        let shape = StepShape::decode(rows);
        Ok(StepReport {
            launched: Some(shape),
            completed: Some(CompletedStep { shape, start_ms: 0.0, gpu_ms: 0.0 }),
        })
    }

    fn launch_after(&self) -> Duration {
        self.control.launch_after
    }

    fn is_idle(&self) -> bool {
        self.control.polls.fetch_add(1, Ordering::Relaxed);
        self.requests.iter().all(Option::is_none)
    }

    fn stats(&self) -> Stats {
        Stats { decode_steps: self.control.steps.load(Ordering::Relaxed), ..Stats::default() }
    }

    fn load(&self) -> Load {
        Load { running: self.control.running.load(Ordering::Relaxed) as u32, ..Load::default() }
    }

    fn reset_stats(&mut self) {}

    fn clear_prefix_cache(&mut self) {}

    fn update_weights(&mut self, _: &Checkpoint, _: &HashSet<String>) -> Result<(), Cause> {
        assert!(self.requests.iter().all(Option::is_none), "an update while requests run");
        self.stopped = self.control.update_fails;
        if self.stopped { Err("the memory is gone".into()) } else { Ok(()) }
    }

    fn has_stopped(&self) -> bool {
        self.stopped
    }

    fn check(&self) {
        assert!(self.control.panics_at.is_none(), "the books are wrong");
    }

    fn vocab(&self) -> u32 {
        VOCAB
    }

    fn eos(&self) -> &[u32] {
        &[]
    }

    fn limits(&self) -> &Limits {
        &self.control.limits
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

    fn experts_read(&mut self) -> Result<ExpertsRead, Cause> {
        Ok(ExpertsRead::default())
    }
}

/// What such an engine says of itself.
pub(crate) fn info(limits: Limits) -> Info {
    let dims = Dims {
        layers: 1,
        hidden: HIDDEN,
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        intermediate: 8,
        vocab: VOCAB,
        norm_eps: 1e-6,
    };
    Info {
        model: "simulated".to_owned(),
        commit: None,
        backend: "simulated",
        choice: None,
        device: "no device".to_owned(),
        engines: 1,
        limits,
        vocab: dims.vocab,
        eos: Vec::new(),
        warnings: Vec::new(),
        dims,
        window: None,
        step_weight_bytes: 0,
        active_weights: 0,
        experts: None,
        kv: KvFormat::F32,
        page_bytes: 0,
        memory_total: 0,
        memory_free_loaded: 0,
        memory_free_before_recording: 0,
        memory_free_ready: 0,
        load_seconds: 0.0,
        capture_seconds: 0.0,
    }
}

/// A front before such an engine, and what is seen of the engine.
pub(crate) fn start_with(
    control: Control,
    text: Arc<Text>,
    order: Order,
) -> Result<(Front, Arc<Control>), Error> {
    let control = Arc::new(control);
    Ok((start_engines(vec![control.clone()], text, order)?, control))
}

/// A front before several such engines.
pub(crate) fn start_engines(
    controls: Vec<Arc<Control>>,
    text: Arc<Text>,
    order: Order,
) -> Result<Front, Error> {
    let build = |control: Arc<Control>| {
        let queued = if order.sorts() { control.limits.queued } else { 0 };
        let entries = (control.limits.running + queued) as usize;
        let mut runner = Simulated { control, requests: Vec::new(), generation: 0, stopped: false };
        runner.requests.resize_with(entries, || None);
        move || Ok((Box::new(runner) as Box<dyn Runner>, ()))
    };
    let (front, _) =
        Front::start(text, Pooling::default(), order, controls.into_iter().map(build).collect())?;
    Ok(front)
}

/// A request that draws `first` and the tokens behind it.
pub fn request(first: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest::tokens([first]).sampling(SamplingParams { max_tokens, ..SamplingParams::default() })
}

/// A front without a tokenizer.
#[cfg(test)]
pub(crate) fn start(control: Control) -> (Front, Arc<Control>) {
    start_with(control, Arc::default(), Order::Given).unwrap()
}
