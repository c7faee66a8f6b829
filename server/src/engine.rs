//! The engine behind the service: built on a thread of its own, watched, and built anew when it fails.
//!
//! ```text
//!   Loading ── built ──> Ready ── a step fails ──> Failed ── old engine dropped ──> Loading …
//!      └── can't be built, or failed too often ──> Gone            Ready ── told to end ──> Ending
//! ```
//!
//! Handlers see the state through a watch and hold the engine's handle alone, never the `Llm`: so its memory is free before
//! the next one is loaded.
//!
//! Invariant: there is one `Llm` at most, owned by the supervisor's thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use minisgl::{EngineHandle, Error, Info, Llm, StepTiming, ToolFormat};
use tokio::sync::watch;

use crate::error::ApiError;

/// An engine that is at work.
#[derive(Clone)]
pub struct Engine {
    /// To submit requests.
    pub handle: EngineHandle,
    /// What it is made of.
    pub info: Arc<Info>,
    /// How its model writes calls of tools, where that is known.
    pub tool_format: Option<ToolFormat>,
    /// Tells it from those before and after.
    generation: u32,
}

/// Where the engine is in its life.
#[derive(Clone)]
pub enum EngineState {
    /// Weights are being loaded.
    Loading,
    /// Requests run.
    Ready(Engine),
    /// A step failed, and the next engine is not there yet.
    Failed(Arc<str>),
    /// There will be none any more.
    Gone(Arc<str>),
    /// The service ends: what runs goes on, nothing more is taken.
    Ending,
}

/// What the supervisor is told.
pub enum News {
    /// The engine of this generation lost requests.
    Lost { generation: u32, cause: String },
    /// The service ends.
    End,
}

/// The engine as the service's handlers see it.
#[derive(Clone)]
pub struct Engines {
    state: Arc<watch::Sender<EngineState>>,
    news: Sender<News>,
}

impl Engines {
    /// Nothing is built yet; the other half is for the supervisor.
    pub fn new() -> (Self, Receiver<News>) {
        let (news, inbox) = std::sync::mpsc::channel();
        (Engines { state: Arc::new(watch::Sender::new(EngineState::Loading)), news }, inbox)
    }

    /// The engine, where there is one.
    ///
    /// # Errors
    /// It is being loaded, has failed or ends.
    pub fn get(&self) -> Result<Engine, ApiError> {
        match &*self.state.borrow() {
            EngineState::Ready(engine) => Ok(engine.clone()),
            EngineState::Loading => Err(ApiError::unavailable("the model is being loaded; try again soon")),
            EngineState::Failed(cause) => {
                Err(ApiError::unavailable(format!("the engine failed and is built anew: {cause}")))
            }
            EngineState::Gone(cause) => {
                Err(ApiError::unavailable(format!("the engine failed and is not built anew: {cause}")))
            }
            EngineState::Ending => Err(ApiError::unavailable("the service ends and takes no more requests")),
        }
    }

    /// Where it is in its life.
    pub fn state(&self) -> EngineState {
        self.state.borrow().clone()
    }

    /// The engine, waited for; `None` if there will be none.
    pub async fn ready(&self) -> Option<Engine> {
        let mut states = self.state.subscribe();
        let settled = |state: &EngineState| !matches!(state, EngineState::Loading | EngineState::Failed(_));
        match &*states.wait_for(settled).await.ok()? {
            EngineState::Ready(engine) => Some(engine.clone()),
            _ => None,
        }
    }

    /// Says that an engine lost a request.
    pub fn lost(&self, engine: &Engine, cause: &Error) {
        // A supervisor that has ended needs no news.
        let _ = self.news.send(News::Lost { generation: engine.generation, cause: cause.to_string() });
    }

    /// From now on no request is taken.
    pub fn end_intake(&self) {
        self.state.send_replace(EngineState::Ending);
    }

    /// Ends the supervisor, and the engine with it.
    pub fn end(&self) {
        let _ = self.news.send(News::End);
    }

    fn gone(&self, cause: &str) {
        self.advance(EngineState::Gone(cause.into()));
    }

    /// A new state, unless the service ends.
    fn advance(&self, next: EngineState) {
        self.state.send_if_modified(|state| {
            let goes_on = !matches!(state, EngineState::Ending);
            if goes_on {
                *state = next;
            }
            goes_on
        });
    }
}

/// Builds engines by `build` until told to end, or until one has failed more than `rebuilds_max` times. `observe` hears of
/// every step.
///
/// # Errors
/// The engine can't be built, or failed too often.
pub fn supervise(
    engines: &Engines,
    news: &Receiver<News>,
    rebuilds_max: u32,
    mut build: impl FnMut() -> Result<(Llm, Option<ToolFormat>), Error>,
    observe: impl Fn(&StepTiming) + Clone + Send + Sync + 'static,
) -> Result<(), Error> {
    for generation in 0.. {
        let (llm, tool_format) = build().inspect_err(|error| engines.gone(&error.to_string()))?;
        llm.handle().observe_steps(observe.clone());
        let engine =
            Engine { handle: llm.handle(), info: Arc::new(llm.info().clone()), tool_format, generation };
        engines.advance(EngineState::Ready(engine));
        let cause = loop {
            match news.recv() {
                Ok(News::Lost { generation: lost, cause }) if lost == generation => break cause,
                Ok(News::Lost { .. }) => {}
                Ok(News::End) | Err(_) => return Ok(()),
            }
        };
        let last = generation == rebuilds_max;
        tracing::error!(%cause, last, "the engine failed");
        if last {
            engines.gone(&cause);
            let times = generation + 1;
            return Err(Error::Device(
                format!("the engine failed {times} times, the last time so: {cause}").into(),
            ));
        }
        engines.advance(EngineState::Failed(cause.into()));
        drop(llm);
    }
    Ok(())
}
