//! The engine's handle: cheap to clone, usable from any thread. Everything that generates is its client.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use minisgl_core::config::Limits;
use minisgl_core::stats::{Load, Stats};
use thiserror::Error;

use super::encode::{Encoders, Job};
use super::engine::{Call, Message, Ready, StepTimes};
use super::output::Output;
use super::permits::{Permit, Permits};
use super::session::{Events, RequestStream, Session, SessionOptions, Submitter};
use crate::error::{Cause, Error};
use crate::request::{GenerateRequest, Given, Prompt, RequestError, StepTiming};
use crate::runner::Runner;
use crate::tokenizer::Text;

/// What all handles and threads of an engine share.
pub struct Shared {
    pub text: Arc<Text>,
    pub encoders: Encoders,
    messages: Sender<Message>,
    /// As many requests as the engine runs and queues.
    capacity: usize,
    /// Tokens of the longest sequence.
    longest: usize,
    /// Of requests that have no session of several.
    permits: Arc<Permits>,
    sessions: AtomicU64,
    /// Requests that have not ended.
    open: Arc<AtomicUsize>,
    started: Instant,
    step_observer: OnceLock<StepObserver>,
    stopped: OnceLock<Stopped>,
}

/// Hears of every step.
type StepObserver = Box<dyn Fn(&StepTiming) + Send + Sync>;

enum Stopped {
    Failed(Failure),
    Closed,
}

impl Shared {
    pub fn new(text: Arc<Text>, messages: Sender<Message>, limits: &Limits) -> Self {
        let capacity = limits.running as usize + limits.queued as usize;
        Shared {
            text,
            encoders: Encoders::new(),
            messages,
            capacity,
            longest: limits.sequence as usize,
            permits: Permits::new(capacity),
            sessions: AtomicU64::new(0),
            open: Arc::default(),
            started: Instant::now(),
            step_observer: OnceLock::new(),
            stopped: OnceLock::new(),
        }
    }

    /// Nothing runs from now on, because of a failure.
    pub fn fail(&self, cause: Cause) {
        let _ = self.stopped.set(Stopped::Failed(Failure(Arc::new(cause))));
        self.permits.close();
    }

    /// Nothing runs from now on, because the engine is not wanted any more.
    pub fn close(&self) {
        let _ = self.stopped.set(Stopped::Closed);
        self.permits.close();
        self.encoders.close();
        self.send(Message::Close);
    }

    /// Tells the engine's thread something. If that has ended, requests in the message are dropped, and so get lost.
    pub fn send(&self, message: Message) {
        let _ = self.messages.send(message);
    }

    /// The tokens of a prompt. One that is much too long to leave room for `room` tokens is refused without.
    pub fn encode(&self, prompt: Prompt, room: u32) -> Result<Vec<u32>, RequestError> {
        self.text.encode_within(prompt, self.longest.saturating_sub(room as usize))
    }

    /// Likewise of what is given behind a prompt.
    pub fn encode_given(&self, given: Given, room: u32) -> Result<Vec<u32>, RequestError> {
        self.text.encode_given(given, self.longest.saturating_sub(room as usize))
    }

    /// Has it failed, or been closed?
    pub fn has_stopped(&self) -> bool {
        self.stopped.get().is_some()
    }

    /// Counts a request as open until what it gives is dropped.
    pub fn count_open(&self) -> OpenRequest {
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenRequest(self.open.clone())
    }

    /// Tells the observer of a step that completed.
    pub fn observe_step(&self, step: &StepTimes) {
        if let Some(observer) = self.step_observer.get() {
            observer(&step.timing(self.started));
        }
    }
}

/// A request that has not ended.
pub struct OpenRequest(Arc<AtomicUsize>);

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The cause of a failure, which every open request is told.
#[derive(Clone)]
struct Failure(Arc<Cause>);

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// Why [`EngineHandle::try_submit`] did not take a request.
#[derive(Debug, Error)]
pub enum TrySubmitError {
    /// As many are on their way as the engine runs and queues; here it is back.
    #[error("the engine has as many requests as it runs and queues; try again when one has ended")]
    Full(Box<GenerateRequest>),
    /// No request will be taken any more.
    #[error(transparent)]
    Stopped(Error),
}

/// An engine from any thread: clones ask the same one. It refuses requests once its [`Llm`](crate::Llm) is gone.
#[derive(Clone)]
pub struct EngineHandle(Arc<Shared>);

impl EngineHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        EngineHandle(shared)
    }

    /// Submits a request on its own: its events come out of the stream, and dropping that aborts it. Waits while as many
    /// of the handle's requests are on their way as the engine runs and queues.
    ///
    /// # Errors
    /// The engine has stopped. A request that can't run is no error here: its completion says so.
    pub fn submit(&self, request: GenerateRequest) -> Result<RequestStream, Error> {
        let permit = self.0.permits.acquire().ok_or_else(|| self.refusal())?;
        self.stream(request, permit)
    }

    /// As [`EngineHandle::submit`], but gives the request back rather than wait.
    ///
    /// # Errors
    /// See [`TrySubmitError`].
    pub fn try_submit(&self, request: GenerateRequest) -> Result<RequestStream, TrySubmitError> {
        match self.0.permits.try_acquire() {
            Some(permit) => self.stream(request, permit).map_err(TrySubmitError::Stopped),
            None if self.0.has_stopped() => Err(TrySubmitError::Stopped(self.refusal())),
            None => Err(TrySubmitError::Full(Box::new(request))),
        }
    }

    /// A session: many requests, one queue of events.
    pub fn session(&self, options: SessionOptions) -> (Submitter, Events) {
        let session = self.open_session(options);
        let permits = Permits::new(options.capacity.unwrap_or(self.0.capacity));
        let submitter = Submitter::new(session.clone(), permits.clone(), self.clone());
        (submitter, Events::new(session, Some(permits), self.clone()))
    }

    fn open_session(&self, options: SessionOptions) -> Arc<Session> {
        Session::new(self.0.sessions.fetch_add(1, Ordering::Relaxed), options)
    }

    fn stream(&self, request: GenerateRequest, permit: Permit) -> Result<RequestStream, Error> {
        let options = SessionOptions { tokens: true, text: true, ..SessionOptions::default() };
        let session = self.open_session(options);
        let ready = self.prepare(&session, 0, request, permit);
        self.post(ready.into_iter().collect())?;
        session.no_more();
        Ok(RequestStream::new(Events::new(session, None, self.clone())))
    }

    /// Sends a request on its way, or gives it back ready for the engine where nothing has to be encoded.
    pub(super) fn prepare(
        &self,
        session: &Arc<Session>,
        tag: u64,
        mut request: GenerateRequest,
        permit: Permit,
    ) -> Option<Ready> {
        let text = &*self.0.text;
        let unfit = unfit_stop(&request, text);
        let output = Box::new(Output::new(session, tag, &mut request, &self.0, permit));
        let params = request.sampling;
        match (unfit, request.prompt, request.given) {
            (Some(error), ..) => {
                output.reject(error);
                None
            }
            (None, Prompt::Tokens(prompt), None) => Some(Ready::new(prompt, None, params, output)),
            (None, Prompt::Tokens(prompt), Some(Given::Tokens(given))) => {
                Some(Ready::new(prompt, Some(given), params, output))
            }
            // Without a tokenizer there are no threads for it, and nothing that takes time.
            (None, prompt, given) if !text.has_tokenizer() => {
                Job { prompt, given, params, output }.encode(&self.0)
            }
            (None, prompt, given) => {
                self.0.encoders.post(Job { prompt, given, params, output });
                None
            }
        }
    }

    /// Sends requests to the engine's thread.
    pub(super) fn post(&self, ready: Vec<Ready>) -> Result<(), Error> {
        self.check_running()?;
        if !ready.is_empty() {
            self.0.send(Message::Submit(ready));
        }
        Ok(())
    }

    /// The model's tokenizer and chat template.
    pub fn text(&self) -> &Text {
        &self.0.text
    }

    /// Requests submitted by anybody that have not ended, whether their readers have taken their ends or not.
    pub fn open_requests(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    /// What the engine did so far; waits for the step that runs.
    ///
    /// # Errors
    /// The engine's thread has ended.
    pub fn stats(&self) -> Result<Stats, Error> {
        self.call(false, |runner| runner.stats())
    }

    /// What the engine has on its hands; waits for the step that runs. Requests on their way to it are not counted.
    ///
    /// # Errors
    /// The engine's thread has ended.
    pub fn load(&self) -> Result<Load, Error> {
        self.call(false, |runner| runner.load())
    }

    /// Asserts that no KV page is lost or shared wrongly. Takes time linear in the pool.
    ///
    /// # Errors
    /// The engine's thread has ended.
    ///
    /// # Panics
    /// When the engine's books are wrong.
    pub fn check(&self) -> Result<(), Error> {
        self.call(false, |runner| runner.check())
    }

    /// From now on `observer` hears of every step that completes, on the thread that hands events out: it must not wait.
    /// An engine has one observer, the first.
    pub fn observe_steps(&self, observer: impl Fn(&StepTiming) + Send + Sync + 'static) {
        let _ = self.0.step_observer.set(Box::new(observer));
    }

    /// The bytes that a token stands for; `None` without a tokenizer, or where it has none.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.0.text.token_bytes(id)
    }

    /// Is the engine at work?
    ///
    /// # Errors
    /// It has failed or was closed.
    pub(crate) fn check_running(&self) -> Result<(), Error> {
        if self.0.has_stopped() { Err(self.refusal()) } else { Ok(()) }
    }

    /// Why no request is taken any more.
    pub(super) fn refusal(&self) -> Error {
        match self.0.stopped.get() {
            Some(Stopped::Failed(_)) => Error::Failed,
            Some(Stopped::Closed) => Error::Closed,
            None => Error::Unread,
        }
    }

    /// Why open requests got lost.
    pub(super) fn loss(&self) -> Error {
        let cause: Cause = match self.0.stopped.get() {
            Some(Stopped::Closed) => return Error::Closed,
            Some(Stopped::Failed(failure)) => Box::new(failure.clone()),
            None => "a thread of the engine has ended".into(),
        };
        Error::Step { cause, finished: Vec::new() }
    }

    /// Does something with the engine on its thread, between two steps or once it is idle, and waits for it.
    ///
    /// # Errors
    /// The thread has ended.
    ///
    /// # Panics
    /// When `work` does, with its panic.
    pub(crate) fn call<R: Send + 'static>(
        &self,
        when_idle: bool,
        work: impl FnOnce(&mut dyn Runner) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let (reply, answer) = channel();
        let work = Box::new(move |runner: &mut dyn Runner| {
            // Who asked may have gone.
            let _ = reply.send(catch_unwind(AssertUnwindSafe(|| work(runner))));
        });
        self.0.send(Message::Call(Call { when_idle, work }));
        match answer.recv() {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => Err(self.refusal()),
        }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

/// What is wrong with a request's stop texts.
fn unfit_stop(request: &GenerateRequest, text: &Text) -> Option<RequestError> {
    if request.stop.iter().any(String::is_empty) {
        return Some(RequestError::EmptyStop);
    }
    let unreadable = !request.stop.is_empty() && !text.has_tokenizer();
    unreadable.then_some(RequestError::NoTokenizer { what: "a stop text" })
}
