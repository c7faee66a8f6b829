//! What all handles and threads of the front share, and the ways between them.

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use minisgl_core::config::Limits;
use minisgl_core::scheduler::Order;

use super::batch::StepTimes;
use super::compile::Uncompiled;
use super::encode::{Encoder, ToEncode};
use super::intake::{Intake, Sleepers};
use super::message::Message;
use super::output::Output;
use super::permits::{Permit, Permits};
use super::ready::Ready;
use super::session::Session;
use super::stage::Stage;
use crate::compiler::{Compiler, Tokens};
use crate::error::{Cause, Error};
use crate::grammar::Grammar;
use crate::pooling::Pooling;
use crate::request::{
    GenerateRequest, Given, Prompt, RequestError, SAMPLES_MAX, STOP_BYTES_MAX, StepTiming, TokenRules,
};
use crate::tokenizer::Text;

/// What all handles and threads of an engine share.
pub struct Shared {
    pub encoder: Encoder,
    pub pooling: Pooling,
    pub encoders: Stage<ToEncode>,
    pub compilers: Stage<Uncompiled>,
    pub compiler: Compiler,
    pub intake: Intake,
    /// Each engine's inbox.
    pub messages: Vec<Sender<Message>>,
    /// As many requests as the engines run and queue.
    pub capacity: usize,
    /// Of requests that have no session of several.
    pub permits: Arc<Permits>,
    pub sessions: AtomicU64,
    /// Requests that have not ended.
    pub open: Arc<AtomicUsize>,
    started: Instant,
    pub step_observer: OnceLock<StepObserver>,
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
        let shortest = limits.iter().map(|limits| limits.sequence).min().unwrap_or(0);
        let capacity_of_all = limits.iter().map(capacity).sum();
        Shared {
            compiler: Compiler::new(text.clone(), tokens),
            encoder: Encoder { text, longest: shortest as usize },
            pooling,
            encoders: Stage::new(),
            compilers: Stage::new(),
            intake: Intake::new(limits.iter().map(depth), shortest),
            messages,
            capacity: capacity_of_all,
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

    /// A request, encoded and ready for the engine; `None` if it has ended, or goes on to be compiled.
    pub fn encode(&self, asked: ToEncode) -> Option<Ready> {
        let (grammar, ready) = asked.encode(&self.encoder)?;
        self.constrained(grammar, ready)
    }

    /// A request, ready for the engine; `None` if it has a grammar, and goes on to be compiled.
    fn constrained(&self, grammar: Option<Arc<Grammar>>, ready: Ready) -> Option<Ready> {
        let Some(grammar) = grammar else { return Some(ready) };
        self.compilers.post(Uncompiled { grammar, ready });
        None
    }

    /// Has it failed, or been closed?
    pub fn has_stopped(&self) -> bool {
        self.stopped.get().is_some()
    }

    /// Tells the observer of a step that completed.
    pub fn observe_step(&self, step: &StepTimes) {
        if let Some(observer) = self.step_observer.get() {
            observer(&step.timing(self.started));
        }
    }

    /// Sends a request on its way, or gives it back ready for the engine where nothing has to be encoded.
    pub fn prepare(
        &self,
        session: &Arc<Session>,
        tag: u64,
        mut request: GenerateRequest,
        permit: Permit,
    ) -> Option<Ready> {
        let text = &*self.encoder.text;
        let unfit = unfit(&request, text, &self.pooling);
        let grammar = request.grammar.take();
        let outputs = Output::of_samples(session, tag, &request, text, &self.open, &permit);
        let GenerateRequest { prompt, given, sampling: params, rules, .. } = request;
        let is_encoded = rules == TokenRules::default();
        match (unfit, prompt, given) {
            (Some(error), ..) => {
                outputs.into_iter().for_each(|output| output.reject(error.clone()));
                None
            }
            (None, Prompt::Tokens(prompt), None) if is_encoded => {
                self.constrained(grammar, Ready::new(prompt, None, params, outputs))
            }
            (None, Prompt::Tokens(prompt), Some(Given::Tokens(given)))
                if is_encoded && !prompt.is_empty() =>
            {
                self.constrained(grammar, Ready::new(prompt, Some(given), params, outputs))
            }
            // Without a tokenizer there are no threads for it, and nothing that takes time.
            (None, prompt, given) if !text.has_tokenizer() => {
                self.encode(ToEncode { prompt, given, params, rules, grammar, outputs })
            }
            (None, prompt, given) => {
                self.encoders.post(ToEncode { prompt, given, params, rules, grammar, outputs });
                None
            }
        }
    }

    /// Hands requests to the engines.
    pub fn post(&self, ready: Vec<Ready>) -> Result<(), Error> {
        self.check_running()?;
        if !ready.is_empty() {
            self.submit(ready);
        }
        Ok(())
    }

    /// Is the engine at work?
    ///
    /// # Errors
    /// It has failed or was closed.
    pub fn check_running(&self) -> Result<(), Error> {
        if self.has_stopped() { Err(self.refusal()) } else { Ok(()) }
    }

    /// Why no request is taken any more.
    pub fn refusal(&self) -> Error {
        match self.stopped.get() {
            Some(Stopped::Failed(_)) => Error::Failed,
            Some(Stopped::Closed) => Error::Closed,
            None => Error::Unread,
        }
    }

    /// Why open requests got lost.
    pub fn loss(&self) -> Error {
        let cause: Cause = match self.stopped.get() {
            Some(Stopped::Closed) => return Error::Closed,
            Some(Stopped::Failed(failure)) => Box::new(failure.clone()),
            None => "a thread of the engine has ended".into(),
        };
        Error::Step { cause, finished: Vec::new() }
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

/// What is wrong with a request's samples, stop texts or grammar, or with asking for an embedding, without looking into it.
fn unfit(request: &GenerateRequest, text: &Text, pooling: &Pooling) -> Option<RequestError> {
    if !(1..=SAMPLES_MAX).contains(&request.samples) {
        return Some(RequestError::Samples { samples: request.samples });
    }
    if let (Some(_), Some(reason)) = (request.sampling.embed, pooling.refusal()) {
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
        _ if text.has_tokenizer() => return None,
        GenerateRequest { grammar: Some(_), .. } => "constrained output",
        GenerateRequest { stop, .. } if !stop.is_empty() => "a stop text",
        _ => return None,
    };
    Some(RequestError::NoTokenizer { what })
}
