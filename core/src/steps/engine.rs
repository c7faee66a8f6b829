//! The engine: a scheduler's batches, run by an [`Executor`], two steps in flight.
//!
//! ```text
//!   host           |pack N+1| wait for N … |complete N|pack N+2| wait for N+1 … |complete N+1|
//!   compute queue  | step N ───────────────| step N+1 ─────────────────────────| step N+2 ──
//!   copy queue                             |tokens N|                           |tokens N+1|
//! ```
//!
//! With overlap, [`Engine::step`] launches step N+1 and then takes in the tokens of step N: while the device computes
//! one step, the host works on the next. A row of N+1 whose input is a token of N finds it in the token pool on the
//! device. Without overlap each step is waited for, and so is one whose tokens the next one's
//! [drafts](crate::speculation) depend on. All give the same tokens. Where latency counts, [`Engine::launch_after_ms`] tells the
//! caller to let requests come in until the step in flight is about to end ([`crate::late_launch`]).
//!
//! What may be reused, and when:
//! - Pages. A page that an ended, aborted or retracted request gave back may be another's in the next batch, while a
//!   step in flight still writes to it for its old owner (the row behind an end-of-sequence token, say). That is safe,
//!   since all steps run on one queue in the order of their launch: the old owner's write comes before everything that
//!   the new owner writes or reads there. The old owner has no row in a step scheduled after it gave the page back.
//! - An executor's two places. Step N+2 is launched after step N was completed ([`crate::local`] says what that frees).
//!
//! Invariant: at most one step is in flight between two calls of [`Engine::step`], and `flights[turn]` is not its own.
//! After construction nothing is allocated.

use alloc::vec::Vec;

use crate::backend::{DeviceInfo, Memory, Model, Sampler};
use crate::batch::{Batch, StepShape};
use crate::config::{Limits, LimitsError};
use crate::costs::{Bench, StepCosts};
pub use crate::engine_error::EngineError;
use crate::executor::{Executor, ModelInfo, Results};
use crate::fit::{Fit, fitted};
use crate::graphs::padded;
use crate::late_launch::LateLaunch;
use crate::local::Local;
use crate::policy::Policy;
use crate::request::{Event, Request, SubmitError, Submitted, Ticket};
use crate::sampling::SamplingParams;
use crate::scheduler::{Scheduler, Settings};
use crate::stats::{Load, Stats};

/// What an engine is built with, beside its executor.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Capacities.
    pub limits: Limits,
    /// How the pages are counted by the memory that there is; `None`: there are [`Limits::pages`].
    pub fit: Option<Fit>,
    /// How requests are scheduled.
    pub scheduler: Settings,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
    /// Launch a step before the tokens of the one before it are known.
    pub overlap: bool,
}

/// What one call of [`Engine::step`] did.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepReport {
    /// Counts, padding included, of the step launched; `None` if there was nothing to run.
    pub launched: Option<StepShape>,
    /// The step whose tokens came in; `None` if none was in flight.
    pub completed: Option<CompletedStep>,
}

/// A step that has run, and when.
#[derive(Clone, Copy, Debug)]
pub struct CompletedStep {
    /// Its counts, padding included.
    pub shape: StepShape,
    /// When it began, in milliseconds since the engine's first step, by the device's clock.
    pub start_ms: f64,
    /// How long it took on the device, in milliseconds.
    pub gpu_ms: f32,
}

/// A step from its launch to its completion. There are two.
struct Flight {
    batch: Batch,
    /// Counts as launched, padding included.
    shape: StepShape,
    /// Was it scheduled when the step before it had been completed, for the sake of drafts?
    has_waited: bool,
    /// Was it launched while the step before it was in flight?
    follows: bool,
}

impl Flight {
    fn new(limits: &Limits) -> Self {
        let batch = Batch::new(limits);
        Flight { batch, shape: StepShape::decode(0), has_waited: false, follows: false }
    }
}

/// See the module.
pub struct Engine<X: Executor> {
    scheduler: Scheduler,
    limits: Limits,
    overlap: bool,
    flights: [Flight; 2],
    /// Which of the two the next step takes.
    turn: usize,
    /// The other one has been launched and not completed.
    in_flight: bool,
    /// When the step completed last began, since the first step's beginning.
    before_ms: Option<f64>,
    /// When that step ended.
    ended_ms: f64,
    /// When the next step is launched, if not as soon as can be.
    late: Option<LateLaunch>,
    stopped: bool,
    costs: StepCosts,
    /// All but the recorded steps allocated.
    before_recording: Memory,
    executor: X,
}

impl<B: Sampler, M: Model<B>> Engine<Local<B, M>> {
    /// An engine of a model on one device; see [`Engine::of`].
    ///
    /// # Errors
    /// Those of [`Engine::of`].
    pub fn new(backend: B, model: M, options: EngineOptions) -> Result<Self, EngineError<B::Error>> {
        Engine::of(Local::new(backend, model), options)
    }

    /// The device.
    pub fn backend(&self) -> &B {
        self.executor.backend()
    }

    /// The device, to be used between two steps.
    pub fn backend_mut(&mut self) -> &mut B {
        self.executor.backend_mut()
    }

    /// The model.
    pub fn model(&self) -> &M {
        self.executor.loaded()
    }
}

impl<X: Executor> Engine<X> {
    /// Reserves the model's buffers and the engine's own, then the pages, records the decode steps, and measures what steps
    /// cost.
    ///
    /// # Errors
    /// Capacities that don't fit together, the model or the device; memory that the device or the host does not have.
    pub fn of(mut executor: X, options: EngineOptions) -> Result<Self, EngineError<X::Error>> {
        let EngineOptions { limits, fit, scheduler: settings, eos, overlap } = options;
        let model = executor.model();
        // Before pages are counted, there may be the fewest that do.
        let fewest = Limits { pages: fit.map_or(limits.pages, |fit| fit.least.max(1)), ..limits };
        check(&executor, &model, &fewest, &settings)?;
        executor.reserve(&limits).map_err(EngineError::Setup)?;
        let (limits, memory) = fitted(&mut executor, limits, fit)?;
        limits.check()?;
        let costs = Bench { executor: &mut executor }.measure(&limits).map_err(EngineError::Setup)?;
        Ok(Engine {
            scheduler: Scheduler::new(limits, settings, costs, &eos, model.window)?,
            costs,
            limits,
            overlap,
            flights: [Flight::new(&limits), Flight::new(&limits)],
            turn: 0,
            in_flight: false,
            before_ms: None,
            ended_ms: 0.0,
            late: (overlap && settings.policy == Policy::Latency).then(|| LateLaunch::new(costs)),
            stopped: false,
            before_recording: memory,
            executor,
        })
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// A full queue, a request that can never run, or an engine that has stopped.
    pub fn submit(&mut self, request: Request<'_>) -> Result<Submitted, SubmitError> {
        if self.stopped {
            return Err(SubmitError::Stopped);
        }
        self.check_model(&request.params)?;
        self.scheduler.submit(request)
    }

    /// Takes in samples of one prompt as a group; see [`Scheduler::submit_group`].
    ///
    /// # Errors
    /// As of [`Engine::submit`]; more samples than can wait together.
    pub fn submit_group(
        &mut self,
        samples: &[Request<'_>],
        taken: &mut impl FnMut(Submitted),
    ) -> Result<(), SubmitError> {
        if self.stopped {
            return Err(SubmitError::Stopped);
        }
        samples.iter().try_for_each(|sample| self.check_model(&sample.params))?;
        self.scheduler.submit_group(samples, taken)
    }

    /// Can the model give what is asked for?
    fn check_model(&self, params: &SamplingParams) -> Result<(), SubmitError> {
        let model = self.executor.model();
        match params.embed {
            Some(asked) => Ok(asked.check(model.hidden)?),
            None if !model.has_head => Err(SubmitError::NoHead),
            None => Ok(()),
        }
    }

    /// Says how many requests are ready to be submitted and wait only for a place: whether more prompts are to come is for
    /// the policy to know.
    pub fn set_backlog(&mut self, requests: u32) {
        self.scheduler.set_backlog(requests);
    }

    /// Ends a request at once, wherever it is; what a step in flight computes for it is dropped. False if it has ended
    /// already.
    pub fn abort(&mut self, ticket: Ticket, sink: &mut impl FnMut(Event<'_>)) -> bool {
        self.scheduler.abort(ticket, sink)
    }

    /// Launches the next step and completes the one before (overlap), or launches a step and waits for it (no overlap).
    ///
    /// # Errors
    /// A step that failed; from then on every call fails.
    pub fn step(&mut self, sink: &mut impl FnMut(Event<'_>)) -> Result<StepReport, EngineError<X::Error>> {
        if self.stopped {
            return Err(EngineError::Stopped);
        }
        let (this, other) = (self.turn, 1 - self.turn);
        let mut before = core::mem::take(&mut self.in_flight).then_some(other);
        let (mut launched, mut completed) = (None, None);
        let waits = before.is_some() && self.scheduler.waits_for(&self.flights[other].batch);
        if waits && let Some(at) = before.take() {
            completed = Some(self.complete(at, sink).map_err(|cause| self.stop(at, cause))?);
        }
        self.flights[this].has_waited = waits;
        self.flights[this].follows = before.is_some();
        if self.schedule(this, before.is_none(), sink) {
            launched = Some(self.launch(this).map_err(|cause| self.stop(this, cause))?);
        }
        let due = match self.overlap {
            true => before,
            false => launched.map(|_| this),
        };
        if self.overlap && launched.is_some() {
            (self.turn, self.in_flight) = (other, true);
        }
        if let Some(at) = due {
            completed = Some(self.complete(at, sink).map_err(|cause| self.stop(at, cause))?);
        }
        Ok(StepReport { launched, completed })
    }

    /// How many milliseconds after the beginning of the step in flight [`Engine::step`] is best called: so late that requests
    /// which come meanwhile are in the next one, so early that the device need not wait for it. 0: now.
    pub fn launch_after_ms(&self) -> f32 {
        let in_flight = &self.flights[1 - self.turn];
        match &self.late {
            Some(late) if self.in_flight && !self.executor.has_ended(1 - self.turn) => {
                late.after_ms(in_flight.shape)
            }
            _ => 0.0,
        }
    }

    /// Fills a flight's batch with the next step; false if there is nothing to run. If no step is in flight, that is not so for
    /// want of a mask: then it is waited for.
    fn schedule(&mut self, at: usize, nothing_in_flight: bool, sink: &mut impl FnMut(Event<'_>)) -> bool {
        let Engine { scheduler, flights, .. } = self;
        loop {
            scheduler.end_constrained(sink);
            if scheduler.schedule(&mut flights[at].batch) {
                return true;
            }
            if !nothing_in_flight || !scheduler.wait_for_mask() {
                return false;
            }
        }
    }

    /// Has a step enqueued.
    fn launch(&mut self, at: usize) -> Result<StepShape, X::Error> {
        let Engine { executor, scheduler, flights, limits, .. } = self;
        let Flight { batch, shape, .. } = &mut flights[at];
        *shape = padded(batch.shape(), limits);
        scheduler.count_padding(shape.decode_rows - batch.shape().decode_rows);
        executor.launch(at, batch, *shape, &mut |owner, mask| scheduler.write_mask(owner, mask))?;
        Ok(*shape)
    }

    /// Waits for a step's results and takes them in.
    fn complete(&mut self, at: usize, sink: &mut impl FnMut(Event<'_>)) -> Result<CompletedStep, X::Error> {
        let Engine { executor, scheduler, flights, late, .. } = self;
        let flight = &flights[at];
        let Results { tokens, logprobs, scores, since_ms, took_ms: gpu_ms } = executor.complete(at)?;
        let start_ms = self.before_ms.map_or(0.0, |before| before + f64::from(since_ms));
        let idle_ms = (start_ms - self.ended_ms) as f32;
        if flight.has_waited {
            scheduler.has_waited(idle_ms);
        }
        if let Some(late) = late {
            if flight.follows {
                late.has_idled(idle_ms);
            }
            late.has_run(flight.shape, gpu_ms);
        }
        (self.before_ms, self.ended_ms) = (Some(start_ms), start_ms + f64::from(gpu_ms));
        let completed = CompletedStep { shape: flight.shape, start_ms, gpu_ms };
        scheduler.take_scores(&flight.batch, scores, sink);
        scheduler.complete(&flight.batch, tokens, logprobs, sink);
        for embedded in flight.batch.embedded() {
            scheduler.take_embedding(*embedded, executor.hidden(at, embedded.row)?, sink);
        }
        scheduler.forget_ended();
        scheduler.has_run(completed.shape, completed.gpu_ms);
        Ok(completed)
    }

    /// Changes what the executor's model computes, though not its sizes, and forgets what it computed before: cached prefixes.
    ///
    /// # Errors
    /// Requests that wait or run, before anything is changed; a failed change, after which every call fails.
    pub fn update_model(
        &mut self,
        change: impl FnOnce(&mut X) -> Result<(), X::Error>,
    ) -> Result<(), EngineError<X::Error>> {
        match () {
            () if self.stopped => return Err(EngineError::Stopped),
            () if !self.is_idle() => return Err(EngineError::Busy),
            () => {}
        }
        self.scheduler.clear_prefix_cache();
        // Until it is whole: a change that panics on its way leaves some of the old and some of the new.
        self.stopped = true;
        change(&mut self.executor).map_err(EngineError::Update)?;
        self.stopped = false;
        Ok(())
    }

    /// Has a step or an update failed, so that it takes no further step?
    pub fn has_stopped(&self) -> bool {
        self.stopped
    }

    /// Refuses all further work, because of the step in flight at `at`.
    fn stop(&mut self, at: usize, source: X::Error) -> EngineError<X::Error> {
        self.stopped = true;
        EngineError::Step { shape: self.flights[at].batch.shape(), source }
    }

    /// Does nobody wait or run, and is no step in flight?
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && !self.in_flight
    }

    /// Counters so far.
    pub fn stats(&self) -> Stats {
        *self.scheduler.stats()
    }

    /// What there is to do now.
    pub fn load(&self) -> Load {
        self.scheduler.load()
    }

    /// Sets the counters to zero.
    pub fn reset_stats(&mut self) {
        self.scheduler.reset_stats();
    }

    /// Forgets all cached prefixes that no running request holds.
    pub fn clear_prefix_cache(&mut self) {
        self.scheduler.clear_prefix_cache();
    }

    /// Asserts the scheduler's invariants; see [`Scheduler::check`]. For tests and idle moments.
    ///
    /// # Panics
    /// When an invariant is broken.
    pub fn check(&self) {
        self.scheduler.check();
    }

    /// The device's name and sizes.
    pub fn info(&self) -> DeviceInfo {
        self.executor.info()
    }

    /// The device's memory just before the decode steps were recorded, which takes memory of its own.
    pub fn memory_before_recording(&self) -> Memory {
        self.before_recording
    }

    /// What steps cost, as measured when it was built.
    pub fn costs(&self) -> StepCosts {
        self.costs
    }

    /// Tokens that end a sequence.
    pub fn eos(&self) -> &[u32] {
        self.scheduler.eos()
    }

    /// The capacities it was built with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What runs its steps.
    pub fn executor(&self) -> &X {
        &self.executor
    }

    /// What runs its steps, to be used between two of them.
    pub fn executor_mut(&mut self) -> &mut X {
        &mut self.executor
    }
}

fn check<X: Executor>(
    executor: &X,
    model: &ModelInfo,
    limits: &Limits,
    settings: &Settings,
) -> Result<(), EngineError<X::Error>> {
    limits.check()?;
    let (page_size, min) = (limits.page_size, executor.info().page_size_min);
    if page_size < min {
        return Err(LimitsError::PageSizeBelowMin { page_size, min }.into());
    }
    let (sequence, max_positions) = (limits.sequence, model.max_positions);
    if sequence > max_positions {
        return Err(EngineError::Sequence { sequence, max_positions });
    }
    let (prompts, model) = (settings.vocab, model.vocab);
    if prompts > model {
        return Err(EngineError::Vocabulary { prompts, model });
    }
    Ok(())
}
