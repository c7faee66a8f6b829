//! The engines' handle: cheap to clone, usable from any thread. Everything that generates is its client.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

use minisgl_core::config::Limits;
use minisgl_core::scheduler::Order;
use minisgl_core::stats::{Load, Stats};
use thiserror::Error;

use super::compile::Uncompiled;
use super::encode::Job;
use super::engine::{Call, Message, Ready, StepTimes};
use super::intake::{Intake, Sleepers};
use super::output::Output;
use super::permits::{Permit, Permits};
use super::session::{Events, RequestStream, Session, SessionOptions, Submitter};
use super::stage::Stage;
use crate::compiler::{Compiler, Tokens};
use crate::error::{Cause, Error};
use crate::grammar::Grammar;
use crate::pooling::Pooling;
use crate::request::{
    GenerateRequest, Given, Prompt, RequestError, SAMPLES_MAX, STOP_BYTES_MAX, StepTiming, TokenRules,
};
use crate::runner::Runner;
use crate::tokenizer::Text;

/// What all handles and threads of an engine share.
pub struct Shared {
    pub text: Arc<Text>,
    pub pooling: Pooling,
    pub encoders: Stage<Job>,
    pub compilers: Stage<Uncompiled>,
    pub compiler: Compiler,
    pub intake: Intake,
    /// Each engine's inbox.
    messages: Vec<Sender<Message>>,
    /// As many requests as the engines run and queue.
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
    /// For engines of these capacities and one model's tokens; `order` is that of their queues.
    pub fn new(
        text: Arc<Text>,
        pooling: Pooling,
        order: Order,
        messages: Vec<Sender<Message>>,
        limits: &[Limits],
        tokens: Tokens,
    ) -> Self {
        let capacity = |limits: &Limits| limits.running as usize + limits.queued as usize;
        let depth = |limits: &Limits| if order.sorts() { capacity(limits) } else { limits.running as usize };
        let shortest = limits.iter().map(|limits| limits.sequence).min();
        let capacity_of_all = limits.iter().map(capacity).sum();
        Shared {
            compiler: Compiler::new(text.clone(), tokens),
            text,
            pooling,
            encoders: Stage::new(),
            compilers: Stage::new(),
            intake: Intake::new(limits.iter().map(depth)),
            messages,
            capacity: capacity_of_all,
            longest: shortest.unwrap_or(0) as usize,
            permits: Permits::new(capacity_of_all),
            sessions: AtomicU64::new(0),
            open: Arc::default(),
            started: Instant::now(),
            step_observer: OnceLock::new(),
            stopped: OnceLock::new(),
        }
    }

    /// Nothing runs on an engine from now on, because of a failure. Do others go on?
    pub fn fail(&self, engine: usize, cause: Cause) -> bool {
        match self.intake.stop(engine) {
            Ok(sleepers) => {
                self.wake(sleepers);
                true
            }
            Err(waiting) => {
                let _ = self.stopped.set(Stopped::Failed(Failure(Arc::new(cause))));
                self.permits.close();
                drop(waiting); // Which tells their readers.
                false
            }
        }
    }

    /// Nothing runs from now on, because the engines are not wanted any more.
    pub fn close(&self) {
        let _ = self.stopped.set(Stopped::Closed);
        self.permits.close();
        self.encoders.close();
        self.compilers.close();
        drop(self.intake.close());
        (0..self.messages.len()).for_each(|engine| self.send(engine, Message::Close));
    }

    /// Tells an engine's thread something.
    pub fn send(&self, engine: usize, message: Message) {
        // One that has ended has nothing to do with it.
        let _ = self.messages[engine].send(message);
    }

    /// Has the requests of a tag, or all, of a session aborted, wherever they are.
    pub fn abort(&self, session: u64, tag: Option<u64>) {
        (0..self.messages.len()).for_each(|engine| self.send(engine, Message::Abort { session, tag }));
    }

    /// Has engines look at the intake.
    pub fn wake(&self, sleepers: Sleepers) {
        sleepers.into_iter().for_each(|engine| self.send(engine, Message::Work));
    }

    /// Hands requests to the engines. If those have stopped they are dropped, and so get lost.
    fn submit(&self, ready: Vec<Ready>) {
        match self.intake.push(ready) {
            Ok(sleepers) => self.wake(sleepers),
            Err(ready) => drop(ready),
        }
    }

    /// The tokens of a prompt. One that is much too long to leave room for `room` tokens is refused without.
    pub fn encode(&self, prompt: Prompt, room: u32) -> Result<Vec<u32>, RequestError> {
        self.text.encode_within(prompt, self.longest.saturating_sub(room as usize))
    }

    /// Likewise of what is given behind a prompt.
    pub fn encode_given(&self, given: Given, room: u32) -> Result<Vec<u32>, RequestError> {
        self.text.encode_given(given, self.longest.saturating_sub(room as usize))
    }

    /// A request, ready for the engine; `None` if it has a grammar, and goes on to be compiled.
    pub fn constrained(&self, grammar: Option<Arc<Grammar>>, ready: Ready) -> Option<Ready> {
        let Some(grammar) = grammar else { return Some(ready) };
        self.compilers.post(Uncompiled { grammar, ready });
        None
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
        let unfit = unfit(&request, &self.0);
        let grammar = request.grammar.take();
        let outputs = Output::of_samples(session, tag, &request, &self.0, &permit);
        let GenerateRequest { prompt, given, sampling: params, rules, .. } = request;
        let is_encoded = rules == TokenRules::default();
        match (unfit, prompt, given) {
            (Some(error), ..) => {
                outputs.into_iter().for_each(|output| output.reject(error.clone()));
                None
            }
            (None, Prompt::Tokens(prompt), None) if is_encoded => {
                self.0.constrained(grammar, Ready::new(prompt, None, params, outputs))
            }
            (None, Prompt::Tokens(prompt), Some(Given::Tokens(given)))
                if is_encoded && !prompt.is_empty() =>
            {
                self.0.constrained(grammar, Ready::new(prompt, Some(given), params, outputs))
            }
            // Without a tokenizer there are no threads for it, and nothing that takes time.
            (None, prompt, given) if !text.has_tokenizer() => {
                Job { prompt, given, params, rules, grammar, outputs }.encode(&self.0)
            }
            (None, prompt, given) => {
                self.0.encoders.post(Job { prompt, given, params, rules, grammar, outputs });
                None
            }
        }
    }

    /// Hands requests to the engines.
    pub(super) fn post(&self, ready: Vec<Ready>) -> Result<(), Error> {
        self.check_running()?;
        if !ready.is_empty() {
            self.0.submit(ready);
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
        self.ask(0, when_idle, work).wait(self)
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
        asked.into_iter().map(|answer| answer.wait(self)).collect()
    }

    fn ask<R: Send + 'static>(
        &self,
        engine: usize,
        when_idle: bool,
        work: impl FnOnce(&mut dyn Runner) -> R + Send + 'static,
    ) -> Answer<R> {
        let (reply, answer) = channel();
        let work = Box::new(move |runner: &mut dyn Runner| {
            // Who asked may have gone.
            let _ = reply.send(catch_unwind(AssertUnwindSafe(|| work(runner))));
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
    fn wait(self, handle: &EngineHandle) -> Result<R, Error> {
        match self.0.recv() {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(panic)) => resume_unwind(panic),
            // Others may go on.
            Err(_) if !handle.0.has_stopped() => Err(Error::Failed),
            Err(_) => Err(handle.refusal()),
        }
    }
}

/// What is wrong with a request's samples, stop texts or grammar, or with asking for an embedding, without looking into it.
fn unfit(request: &GenerateRequest, shared: &Shared) -> Option<RequestError> {
    if !(1..=SAMPLES_MAX).contains(&request.samples) {
        return Some(RequestError::Samples { samples: request.samples });
    }
    if let (Some(_), Some(reason)) = (request.sampling.embed, shared.pooling.refusal()) {
        return Some(RequestError::Pooling(reason.to_owned()));
    }
    if request.stop.iter().any(String::is_empty) {
        return Some(RequestError::EmptyStop);
    }
    let bytes = request.stop.iter().map(String::len).sum();
    if bytes > STOP_BYTES_MAX {
        return Some(RequestError::StopTexts { bytes });
    }
    let what = match request {
        _ if shared.text.has_tokenizer() => return None,
        GenerateRequest { grammar: Some(_), .. } => "constrained output",
        GenerateRequest { stop, .. } if !stop.is_empty() => "a stop text",
        _ => return None,
    };
    Some(RequestError::NoTokenizer { what })
}
