//! A request's outputs on their way to the client: the engine's events as answers, whole or as a stream.
//!
//! ```text
//!   Events ── poll ──> Outputs: times, parts ──> whole: completions, at the end
//!                                          └──> stream: chunks, as they come        (stream.rs)
//! ```
//!
//! A session of the engine's is opened for each request, with a place for each of its outputs, so that submitting never
//! waits. Dropping [`Outputs`] aborts what has not ended: a client that goes away drops its answer, and the engine hears of
//! it before its next step.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use minisgl::{Completion, Events, FinishReason, GenerateRequest, SessionEvent, SessionOptions};

use crate::app::App;
use crate::asked::Asked;
use crate::engine::Engine;
use crate::error::{About, ApiError};
use crate::metrics::Clock;
use crate::stages::{SharedStages, Stages};

/// The outputs of a request that was submitted.
pub struct Outputs {
    app: Arc<App>,
    engine: Engine,
    about: About,
    events: Events,
    /// Outputs of each request.
    outputs: usize,
    /// One for each output.
    clocks: Vec<Clock>,
    /// Of the first output.
    stages: SharedStages,
    streams: bool,
    /// An event that was looked at and is to be taken.
    next: Option<SessionEvent>,
    lost: bool,
}

impl Outputs {
    /// Submits a request.
    ///
    /// # Errors
    /// There is no engine, or as many requests wait as may.
    pub fn submit(app: &Arc<App>, engine: Engine, asked: &Asked) -> Result<Self, ApiError> {
        let about = About::of(&asked.body);
        Self::of(app, engine, about, asked.requests(), asked.outputs(), asked.stream.is_some())
    }

    /// Submits the requests of one of the API's, of so many outputs each, which are told token by token where it is a stream.
    ///
    /// # Errors
    /// As [`Outputs::submit`].
    pub fn of(
        app: &Arc<App>,
        engine: Engine,
        about: About,
        requests: impl ExactSizeIterator<Item = GenerateRequest>,
        outputs: usize,
        streams: bool,
    ) -> Result<Self, ApiError> {
        let choices = requests.len() * outputs;
        let capacity = engine.info.running() + app.settings.queued_max;
        let open = engine.handle.open_requests();
        if choices > capacity {
            let message = format!(
                "the request has {choices} outputs, and {capacity} may run and wait at once; ask for fewer"
            );
            return Err(ApiError::invalid(message).about(if outputs > 1 { "n" } else { about.prompt }));
        }
        if open + choices > capacity {
            return Err(ApiError::queue_full(open));
        }
        let options = SessionOptions {
            tokens: true,
            text: streams,
            starts: true,
            capacity: Some(choices),
            ..SessionOptions::default()
        };
        let (mut submitter, events) = engine.handle.session(options);
        let clocks = (0..choices).map(|_| Clock::start()).collect();
        let outputs = Outputs {
            app: app.clone(),
            engine,
            about,
            events,
            outputs,
            clocks,
            stages: Arc::new(Mutex::new(Stages::default())),
            streams,
            next: None,
            lost: false,
        };
        submitter.submit_all((0..).zip(requests)).map_err(|error| outputs.lose(&error))?;
        Ok(outputs)
    }

    /// Which output a sample of a request is: all of the first prompt come first.
    fn choice(&self, request: u64, sample: u32) -> usize {
        request as usize * self.outputs + sample as usize
    }

    /// The engine that makes them.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Where the time of the first output goes.
    pub fn stages(&self) -> SharedStages {
        self.stages.clone()
    }

    /// Waits for the first event, so that what can't run is refused before anything is answered.
    ///
    /// # Errors
    /// The first output to end can't run; or the engine failed.
    pub async fn begun(&mut self) -> Result<(), ApiError> {
        if let Some(event) = poll_fn(|task| self.poll_next(task)).await {
            self.next = Some(event?);
        }
        Ok(())
    }

    /// The next event; an output that could not run or go on is an error.
    pub fn poll_next(&mut self, task: &mut Context<'_>) -> Poll<Option<Result<SessionEvent, ApiError>>> {
        if let Some(event) = self.next.take() {
            return Poll::Ready(Some(Ok(event)));
        }
        let event = loop {
            match ready!(self.events.poll_next(task)) {
                None => return Poll::Ready(None),
                Some(Ok(SessionEvent::Started { tag, sample, encoding, queueing, at })) => {
                    let choice = self.choice(tag, sample);
                    self.clocks[choice].started(encoding, queueing, at, &self.app.metrics);
                }
                Some(Ok(event)) => break event,
                Some(Err(error)) => {
                    self.lost = true;
                    return Poll::Ready(Some(Err(self.lose(&error))));
                }
            }
        };
        match &event {
            SessionEvent::Token { tag, sample, at, .. } => {
                let choice = self.choice(*tag, *sample);
                let stages = self.clocks[choice].token(*at, self.streams, &self.app.metrics);
                if let Some(stages) = stages.filter(|_| choice == 0) {
                    *self.stages.lock().unwrap_or_else(PoisonError::into_inner) = stages;
                }
            }
            SessionEvent::Finished { tag, completion, .. } => {
                let choice = self.choice(*tag, completion.sample);
                self.clocks[choice].finished(completion, &self.app.metrics);
                if let Some(error) = failure(completion, self.about) {
                    return Poll::Ready(Some(Err(error)));
                }
            }
            SessionEvent::Started { .. } | SessionEvent::Step(_) => {}
        }
        Poll::Ready(Some(Ok(event)))
    }

    /// All of them, when they have ended.
    ///
    /// # Errors
    /// One could not run or go on.
    pub async fn whole(mut self) -> Result<Vec<Completion>, ApiError> {
        let mut completions = vec![None; self.clocks.len()];
        while let Some(event) = poll_fn(|task| self.poll_next(task)).await {
            if let SessionEvent::Finished { tag, completion, .. } = event? {
                let choice = self.choice(tag, completion.sample);
                completions[choice] = Some(*completion);
            }
        }
        Ok(completions.into_iter().flatten().collect())
    }

    /// The supervisor hears of a failure.
    fn lose(&self, error: &minisgl::Error) -> ApiError {
        self.app.engines.lost(&self.engine, error);
        ApiError::lost(error)
    }
}

/// Why there is no answer to be made of an output.
fn failure(completion: &Completion, about: About) -> Option<ApiError> {
    match (&completion.error, completion.finish_reason) {
        (Some(error), _) => Some(ApiError::of_request(error, about)),
        (None, FinishReason::Abort) => Some(ApiError::unavailable("the request was aborted")),
        (None, _) => None,
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        for clock in &mut self.clocks {
            clock.abandoned(self.lost, &self.app.metrics);
        }
    }
}
