//! The engines' handle: cheap to clone, usable from any thread. Everything that generates is its client.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use minisgl_core::stats::{Load, Stats};
use thiserror::Error;

use super::events::{Events, RequestStream};
use super::message::{Call, Message, Reply};
use super::permits::{Permit, Permits};
use super::session::{Session, SessionOptions};
use super::shared::Shared;
use super::submitter::Submitter;
use crate::error::Error;
use crate::request::{GenerateRequest, StepTiming};
use crate::runner::Runner;
use crate::tokenizer::Text;

/// Why [`EngineHandle::try_submit`] did not take a request.
#[derive(Debug, Error)]
pub enum TrySubmitError {
    /// As many are on their way as the engines run and queue; here it is back.
    #[error("the engine has as many requests as it runs and queues; try again when one has ended")]
    Full(Box<GenerateRequest>),
    /// No request will be taken any more.
    #[error(transparent)]
    Stopped(Error),
}

/// An engine, or several behind one queue, from any thread: clones ask the same. It refuses requests once its [`Llm`](crate::Llm) is gone.
#[derive(Clone)]
pub struct EngineHandle(Arc<Shared>);

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").finish_non_exhaustive()
    }
}

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
        let permit = self.0.permits.acquire().ok_or_else(|| self.0.refusal())?;
        self.stream(request, permit)
    }

    /// As [`EngineHandle::submit`], but gives the request back rather than wait.
    ///
    /// # Errors
    /// See [`TrySubmitError`].
    pub fn try_submit(&self, request: GenerateRequest) -> Result<RequestStream, TrySubmitError> {
        match self.0.permits.try_acquire() {
            Some(permit) => self.stream(request, permit).map_err(TrySubmitError::Stopped),
            None if self.0.has_stopped() => Err(TrySubmitError::Stopped(self.0.refusal())),
            None => Err(TrySubmitError::Full(Box::new(request))),
        }
    }

    /// A session: many requests, one queue of events.
    pub fn session(&self, options: SessionOptions) -> (Submitter, Events) {
        let session = self.open_session(options);
        let permits = Permits::new(options.capacity.unwrap_or(self.0.capacity));
        let submitter = Submitter::new(session.clone(), permits.clone(), self.0.clone());
        (submitter, Events::new(session, Some(permits), self.0.clone()))
    }

    fn open_session(&self, options: SessionOptions) -> Arc<Session> {
        Session::new(self.0.sessions.fetch_add(1, Ordering::Relaxed), options)
    }

    fn stream(&self, request: GenerateRequest, permit: Permit) -> Result<RequestStream, Error> {
        let options = SessionOptions { tokens: true, text: true, ..SessionOptions::default() };
        let session = self.open_session(options);
        let ready = self.0.prepare(&session, 0, request, permit);
        self.0.post(ready.into_iter().collect())?;
        session.no_more();
        Ok(RequestStream::new(Events::new(session, None, self.0.clone())))
    }

    /// The model's tokenizer and chat template, which need no engine and may outlive it.
    pub fn text(&self) -> &Arc<Text> {
        &self.0.encoder.text
    }

    /// Requests submitted by anybody that have not ended, whether their readers have taken their ends or not.
    pub fn open_requests(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    /// What the engines did so far, together; waits for the steps that run.
    ///
    /// # Errors
    /// An engine's thread has ended.
    pub fn stats(&self) -> Result<Stats, Error> {
        let each = self.call_each(false, |runner| runner.stats())?;
        Ok(each.into_iter().reduce(Stats::joined).unwrap_or_default())
    }

    /// What the engines have on their hands, together; waits for the steps that run. Requests on their way to them are not
    /// counted.
    ///
    /// # Errors
    /// An engine's thread has ended.
    pub fn load(&self) -> Result<Load, Error> {
        let each = self.call_each(false, |runner| runner.load())?;
        // What a failed engine was about it will never do.
        let working = (0..).zip(each).filter(|(engine, _)| self.0.intake.is_working(*engine));
        Ok(working.fold(Load::default(), |sum, (_, load)| sum + load))
    }

    /// Asserts that no KV page is lost or shared wrongly. Takes time linear in the pool.
    ///
    /// # Errors
    /// An engine's thread has ended.
    ///
    /// # Panics
    /// When an engine's books are wrong.
    pub fn check(&self) -> Result<(), Error> {
        self.call_each(false, |runner| runner.check()).map(drop)
    }

    /// From now on `observer` hears of every step that completes, on the threads that hand events out, one for each engine:
    /// it must not wait. There is one observer, the first.
    pub fn observe_steps(&self, observer: impl Fn(&StepTiming) + Send + Sync + 'static) {
        let _ = self.0.step_observer.set(Box::new(observer));
    }

    /// The bytes that a token stands for; `None` without a tokenizer, or where it has none.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.0.encoder.text.token_bytes(id)
    }

    /// Is the engine at work?
    ///
    /// # Errors
    /// It has failed or was closed.
    pub(crate) fn check_running(&self) -> Result<(), Error> {
        self.0.check_running()
    }

    /// Does something with the first engine on its thread, between two steps or once it is idle, and waits for it.
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
        self.ask(0, when_idle, work).wait(&self.0)
    }

    /// Does something with every engine, between two steps of each or once it is idle, and waits for it.
    ///
    /// # Errors
    /// A thread has ended.
    ///
    /// # Panics
    /// When `work` does, with its panic.
    pub(crate) fn call_each<R: Send + 'static>(
        &self,
        when_idle: bool,
        work: impl Fn(&mut dyn Runner) -> R + Clone + Send + 'static,
    ) -> Result<Vec<R>, Error> {
        self.call_those(0..self.0.messages.len(), when_idle, work)
    }

    /// As [`EngineHandle::call_each`], but for engines that have failed.
    pub(crate) fn call_working<R: Send + 'static>(
        &self,
        when_idle: bool,
        work: impl Fn(&mut dyn Runner) -> R + Clone + Send + 'static,
    ) -> Result<Vec<R>, Error> {
        let engines = (0..self.0.messages.len()).filter(|engine| self.0.intake.is_working(*engine));
        self.call_those(engines, when_idle, work)
    }

    fn call_those<R: Send + 'static>(
        &self,
        engines: impl Iterator<Item = usize>,
        when_idle: bool,
        work: impl Fn(&mut dyn Runner) -> R + Clone + Send + 'static,
    ) -> Result<Vec<R>, Error> {
        let asked: Vec<Answer<R>> = engines.map(|engine| self.ask(engine, when_idle, work.clone())).collect();
        asked.into_iter().map(|answer| answer.wait(&self.0)).collect()
    }

    fn ask<R: Send + 'static>(
        &self,
        engine: usize,
        when_idle: bool,
        work: impl FnOnce(&mut dyn Runner) -> R + Send + 'static,
    ) -> Answer<R> {
        let (reply, answer) = channel();
        let work = Box::new(move |runner: &mut dyn Runner| -> Reply {
            let result = catch_unwind(AssertUnwindSafe(|| work(runner)));
            // Who asked may have gone.
            Box::new(move || drop(reply.send(result)))
        });
        self.0.send(engine, Message::Call(Call { when_idle, work }));
        Answer(answer)
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

/// What an engine's thread is to say, or the panic that it met.
struct Answer<R>(Receiver<thread::Result<R>>);

impl<R> Answer<R> {
    fn wait(self, shared: &Shared) -> Result<R, Error> {
        match self.0.recv() {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(panic)) => resume_unwind(panic),
            // Others may go on.
            Err(_) if !shared.has_stopped() => Err(Error::Failed),
            Err(_) => Err(shared.refusal()),
        }
    }
}
