//! One engine behind one door: the facade drives every backend through [`Runner`], so no device type shows outside.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, StepReport};
use minisgl_core::executor::Executor;
use minisgl_core::local::Local;
use minisgl_core::request::{Event, Request, SubmitError, Submitted, Ticket};
use minisgl_core::stats::{ExpertsRead, Load, Stats};
use minisgl_cuda::HostTimes;
use minisgl_decoder::{Checkpoint, Decoder};
use minisgl_ranks::Ranks;

use crate::diagnostics::{Ceilings, Diagnostics};
use crate::error::Cause;
use crate::telemetry::Probe;

/// What the engine tells about tokens and ends.
pub type Sink<'a> = &'a mut dyn FnMut(Event<'_>);

/// An engine of any backend.
pub trait Runner {
    /// Takes samples of a prompt in: all, or none.
    fn submit_group(
        &mut self,
        samples: &[Request<'_>],
        taken: &mut dyn FnMut(Submitted),
    ) -> Result<(), SubmitError>;
    /// See [`Engine::set_backlog`].
    fn set_backlog(&mut self, requests: u32);
    /// Ends a request; false if it has ended already.
    fn abort(&mut self, ticket: Ticket, sink: Sink<'_>) -> bool;
    /// Launches a step, completes one.
    fn step(&mut self, sink: Sink<'_>) -> Result<StepReport, Cause>;
    /// How long after the beginning of the step in flight a step is best launched; see [`Engine::launch_after_ms`].
    fn launch_after(&self) -> Duration;
    /// Does nobody wait, run or fly?
    fn is_idle(&self) -> bool;
    /// Counters so far.
    fn stats(&self) -> Stats;
    /// What there is to do now.
    fn load(&self) -> Load;
    /// Sets the counters to zero.
    fn reset_stats(&mut self);
    /// Forgets cached prefixes.
    fn clear_prefix_cache(&mut self);
    /// Makes the weights those of a checkpoint, of which the named tensors are new; see [`Engine::update_model`].
    fn update_weights(&mut self, checkpoint: &Checkpoint, changed: &HashSet<String>) -> Result<(), Cause>;
    /// Has it failed, so that it takes no step any more?
    fn has_stopped(&self) -> bool;
    /// Asserts the engine's invariants.
    fn check(&self);
    /// Tokens that the model tells apart.
    fn vocab(&self) -> u32;
    /// Tokens that end a sequence.
    fn eos(&self) -> &[u32];
    /// Capacities.
    fn limits(&self) -> &Limits;
    /// Measures what the device reaches at best.
    fn ceilings(&mut self) -> Result<Option<Ceilings>, Cause>;
    /// Where the device's state can be asked for; `None` where it can't.
    fn probe(&self) -> Option<Probe>;
    /// What the host's time went to so far, beside work of its own; `None` where the host is the device.
    fn host_times(&self) -> Option<HostTimes>;
    /// What decode steps read of layers with experts so far; waits for those in flight.
    fn experts_read(&mut self) -> Result<ExpertsRead, Cause>;
}

/// What the facade asks of an executor, beside what the engine does.
pub trait RunnerExecutor: Executor {
    /// See [`Runner::update_weights`].
    fn update(&mut self, checkpoint: &Checkpoint, changed: &HashSet<String>) -> Result<(), Self::Error>;
    /// See [`Runner::ceilings`].
    fn ceilings(&mut self) -> Result<Option<Ceilings>, Self::Error>;
    /// See [`Runner::probe`].
    fn probe(&self) -> Option<Probe>;
    /// See [`Runner::host_times`].
    fn host_times(&self) -> Option<HostTimes>;
    /// See [`Runner::experts_read`].
    fn experts_read(&mut self) -> Result<ExpertsRead, Self::Error>;
}

impl<B: Diagnostics> RunnerExecutor for Local<B, Decoder<B>> {
    fn update(&mut self, checkpoint: &Checkpoint, changed: &HashSet<String>) -> Result<(), B::Error> {
        let (model, backend) = self.parts_mut();
        model.update(backend, checkpoint.tensors(), changed)
    }

    fn ceilings(&mut self) -> Result<Option<Ceilings>, B::Error> {
        self.backend_mut().ceilings()
    }

    fn probe(&self) -> Option<Probe> {
        self.backend().probe()
    }

    fn host_times(&self) -> Option<HostTimes> {
        self.backend().host_times()
    }

    fn experts_read(&mut self) -> Result<ExpertsRead, B::Error> {
        self.backend_mut().experts_read()
    }
}

impl<X: RunnerExecutor + 'static> RunnerExecutor for Ranks<X> {
    fn update(&mut self, checkpoint: &Checkpoint, changed: &HashSet<String>) -> Result<(), Self::Error> {
        let given = Arc::new((checkpoint.clone(), changed.clone()));
        self.each(move |rank| rank.update(&given.0, &given.1)).map(|_| ())
    }

    /// Of all devices together.
    fn ceilings(&mut self) -> Result<Option<Ceilings>, Self::Error> {
        Ok(self.each(|rank| rank.ceilings())?.into_iter().flatten().reduce(Ceilings::joined))
    }

    /// Of the first device.
    fn probe(&self) -> Option<Probe> {
        self.each(|rank| Ok(rank.probe())).ok()?.into_iter().next()?
    }

    /// Several threads are the host.
    fn host_times(&self) -> Option<HostTimes> {
        None
    }

    /// The first rank's: all read parts of the same experts.
    fn experts_read(&mut self) -> Result<ExpertsRead, Self::Error> {
        Ok(self.each(|rank| rank.experts_read())?.into_iter().next().unwrap_or_default())
    }
}

impl<X: RunnerExecutor> Runner for Engine<X> {
    fn submit_group(
        &mut self,
        samples: &[Request<'_>],
        taken: &mut dyn FnMut(Submitted),
    ) -> Result<(), SubmitError> {
        Engine::submit_group(self, samples, &mut |submitted| taken(submitted))
    }

    fn set_backlog(&mut self, requests: u32) {
        Engine::set_backlog(self, requests);
    }

    fn abort(&mut self, ticket: Ticket, sink: Sink<'_>) -> bool {
        Engine::abort(self, ticket, &mut |event| sink(event))
    }

    fn step(&mut self, sink: Sink<'_>) -> Result<StepReport, Cause> {
        Ok(Engine::step(self, &mut |event| sink(event))?)
    }

    fn launch_after(&self) -> Duration {
        // Not a number, or beyond any time: at once.
        Duration::try_from_secs_f32(Engine::launch_after_ms(self) / 1e3).unwrap_or_default()
    }

    fn is_idle(&self) -> bool {
        Engine::is_idle(self)
    }

    fn stats(&self) -> Stats {
        Engine::stats(self)
    }

    fn load(&self) -> Load {
        Engine::load(self)
    }

    fn reset_stats(&mut self) {
        Engine::reset_stats(self);
    }

    fn clear_prefix_cache(&mut self) {
        Engine::clear_prefix_cache(self);
    }

    fn update_weights(&mut self, checkpoint: &Checkpoint, changed: &HashSet<String>) -> Result<(), Cause> {
        Ok(self.update_model(|executor| executor.update(checkpoint, changed))?)
    }

    fn has_stopped(&self) -> bool {
        Engine::has_stopped(self)
    }

    fn check(&self) {
        Engine::check(self);
    }

    fn vocab(&self) -> u32 {
        self.executor().model().vocab
    }

    fn eos(&self) -> &[u32] {
        Engine::eos(self)
    }

    fn limits(&self) -> &Limits {
        Engine::limits(self)
    }

    fn ceilings(&mut self) -> Result<Option<Ceilings>, Cause> {
        Ok(self.executor_mut().ceilings()?)
    }

    fn probe(&self) -> Option<Probe> {
        self.executor().probe()
    }

    fn host_times(&self) -> Option<HostTimes> {
        self.executor().host_times()
    }

    fn experts_read(&mut self) -> Result<ExpertsRead, Cause> {
        Ok(self.executor_mut().experts_read()?)
    }
}
