//! The front: engines, each on a thread of its own, and all that stands between them and their callers.
//!
//! ```text
//!  callers              encoders (n)        intake      engine thread     output thread               callers
//!  Submitter ─ permit ─> render, encode ──> by turns ─┬> submit, step ──> detokenize, stop texts ─┬─> Events
//!      ^     └── token prompts ───────────^           │    ^       │  a batch a step              │     │
//!      │                                              │    └ abort ┘                              │     │
//!      │                                              └> the next engine ──> its output thread ───┘     │
//!      └────────────────────────────── the permit, with the request's end ──────────────────────────────┘
//! ```
//!
//! Engines know nothing of each other. Each takes its share out of the intake, so what they give is what one would give,
//! and when one fails, its requests end with an error each and the others go on.
//!
//! A request with a grammar goes from the encoders to two threads that compile it, and then to the intake.
//!
//! Who waits for whom:
//! - A submitter waits for a permit: for a reader to take an end, or for the engine to stop.
//! - An encoder or compiler waits for a job, an output thread for a batch, an engine's thread for the device and, when idle, for a
//!   message. None of them waits to hand something on: queues have no bound but the permits, since all that lies in
//!   them belongs to a request that has one. So memory is permits times prompt and output.
//! - A reader waits for an event. All of its requests are somewhere in the picture, and each part of it moves on by
//!   itself; a part that ends drops the requests that it has, which tells the reader ([`output::Output`]).
//! - Who closes the front waits for the threads, which wait for nobody once they are told.
//!
//! So the only circle is through a caller that submits beyond its session's capacity on the thread that should read the
//! session's events; [`Submitter::room`] is there for it. Locks are held for a few instructions, never two at once.
//!
//! Invariant: every request submitted gets exactly one end, or its session an error.

mod batch;
mod compile;
mod encode;
mod engine;
mod events;
mod fair;
mod handle;
mod intake;
mod message;
mod output;
mod output_thread;
mod permits;
mod ready;
mod session;
mod shared;
mod stage;
mod submitter;
#[cfg(test)]
mod tests;
mod wakes;

use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use minisgl_core::config::Limits;
use minisgl_core::scheduler::Order;

pub use events::{Aborter, Events, Next, RequestEvent, RequestStream};
pub use handle::{EngineHandle, TrySubmitError};
pub use session::{SessionEvent, SessionOptions};
pub use submitter::Submitter;

use crate::compiler::Tokens;
use crate::error::Error;
use crate::pooling::Pooling;
use crate::runner::Runner;
use crate::tokenizer::Text;
use batch::Batch;
use engine::{EngineThread, panicked};
use message::Message;
use output_thread::OutputThread;
use shared::Shared;

/// A thread encodes 200 to 500 thousand tokens a second, and the fastest engine so far prefills half a million.
const ENCODERS_MAX: usize = 8;

/// The threads of engines behind one queue. Dropping it ends them.
pub struct Front {
    handle: EngineHandle,
    threads: Vec<JoinHandle<()>>,
}

impl Front {
    /// Builds engines, each on its thread by one of `builds` and all at the same time, and starts the other threads; gives
    /// what else `builds` give. `order` is that of the engines' queues.
    ///
    /// # Errors
    /// The first of those of `builds`, and a thread that the system does not give.
    pub fn start<T: Send + 'static>(
        text: Arc<Text>,
        pooling: Pooling,
        order: Order,
        builds: Vec<impl FnOnce() -> Built<T> + Send + 'static>,
    ) -> Result<(Self, Vec<T>), Error> {
        let starting = builds.into_iter().enumerate().map(|(index, build)| Starting::spawn(index, build));
        let starting: Vec<Starting<T>> = starting.collect::<Result<_, _>>()?;
        // All are waited for, so that none is at work on a device any more when an error is told.
        let built: Vec<_> = starting.into_iter().map(Starting::built).collect();
        let (mut engines, mut limits, mut rest, mut errors) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut tokens = Tokens::default();
        for one in built {
            match one {
                Ok((engine, its_limits, its_tokens, its_rest)) => {
                    engines.push(engine);
                    limits.push(its_limits);
                    tokens = its_tokens;
                    rest.push(its_rest);
                }
                Err(error) => errors.push(error),
            }
        }
        if let Some(error) = errors.into_iter().next() {
            engines.into_iter().for_each(BuiltEngine::end);
            return Err(error);
        }
        let messages = engines.iter().map(|engine| engine.messages.clone()).collect();
        let shared = Arc::new(Shared::new(text, pooling, order, messages, &limits, tokens));
        // From here on an error closes what has been started.
        let mut front = Front { handle: EngineHandle::new(shared.clone()), threads: Vec::new() };
        for (index, engine) in engines.into_iter().enumerate() {
            let (batches, outbox) = channel();
            let (used, spare) = channel();
            // An engine's thread that has ended is found out when it is asked.
            let _ = engine.go.send((shared.clone(), (batches, spare)));
            front.threads.push(engine.thread);
            let output = OutputThread::new(index, shared.clone());
            front.threads.push(spawn("output", move || output.run(&outbox, &used))?);
        }
        for _ in 0..encoders(&shared.encoder.text) {
            let shared = shared.clone();
            front.threads.push(spawn("encode", move || encode_all(&shared))?);
        }
        for _ in 0..compilers(&shared.encoder.text) {
            let shared = shared.clone();
            front.threads.push(spawn("compile", move || compile_all(&shared))?);
        }
        Ok((front, rest))
    }

    /// The engine's handle.
    pub fn handle(&self) -> &EngineHandle {
        &self.handle
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.handle.shared().close();
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// An engine, and what else there is to know of it.
pub type Built<T> = Result<(Box<dyn Runner>, T), Error>;

/// The way to the output thread, and used batches back.
type Outbox = (Sender<Batch>, Receiver<Batch>);

/// A thread that builds an engine.
struct Starting<T> {
    engine: BuiltEngine,
    built: Receiver<Result<(Limits, Tokens, T), Error>>,
}

/// A thread that has built an engine and waits for the word to begin.
struct BuiltEngine {
    thread: JoinHandle<()>,
    messages: Sender<Message>,
    go: Sender<(Arc<Shared>, Outbox)>,
}

impl BuiltEngine {
    /// Ends it without a word.
    fn end(self) {
        drop(self.go);
        // One that panicked has said so.
        let _ = self.thread.join();
    }
}

impl<T: Send + 'static> Starting<T> {
    fn spawn(index: usize, build: impl FnOnce() -> Built<T> + Send + 'static) -> Result<Self, Error> {
        let (news, built) = sync_channel(1);
        let (messages, inbox) = channel();
        let (go, begin) = channel();
        let thread = spawn("engine", move || match build() {
            Err(error) => drop(news.send(Err(error))),
            Ok((runner, rest)) => {
                let tokens = Tokens { vocab: runner.vocab(), eos: runner.eos().to_vec() };
                let told = news.send(Ok((*runner.limits(), tokens, rest)));
                // Without a word another engine could not be built.
                if let (Ok(()), Ok((shared, outbox))) = (told, begin.recv()) {
                    EngineThread::new(index, runner, shared, inbox, outbox).run();
                }
            }
        })?;
        Ok(Starting { engine: BuiltEngine { thread, messages, go }, built })
    }

    /// Waits for the engine; if it can't be built, for the thread's end.
    fn built(self) -> Result<(BuiltEngine, Limits, Tokens, T), Error> {
        match self.built.recv() {
            Ok(Ok((limits, tokens, rest))) => Ok((self.engine, limits, tokens, rest)),
            Ok(Err(error)) => {
                // It has nothing more to do, and a panic of its drops is no news.
                let _ = self.engine.thread.join();
                Err(error)
            }
            Err(_) => Err(died(self.engine.thread)),
        }
    }
}

/// How many threads encode prompts: one processor is left to the engine.
fn encoders(text: &Text) -> usize {
    match text.has_tokenizer() {
        true => thread::available_parallelism().map_or(1, |cores| (cores.get() - 1).clamp(1, ENCODERS_MAX)),
        false => 0,
    }
}

/// How many threads compile grammars: one that takes long does not hold up all others.
fn compilers(text: &Text) -> usize {
    if text.has_tokenizer() { 2 } else { 0 }
}

fn compile_all(shared: &Shared) {
    while let Some(uncompiled) = shared.compilers.next() {
        if let Some(ready) = uncompiled.compile(&shared.compiler) {
            // A request that is refused now is dropped, which tells its reader.
            let _ = shared.post(vec![ready]);
        }
    }
}

fn encode_all(shared: &Shared) {
    while let Some(job) = shared.encoders.next() {
        if let Some(ready) = shared.encode(job) {
            // A request that is refused now is dropped, which tells its reader.
            let _ = shared.post(vec![ready]);
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    thread::Builder::new().name(format!("minisgl-{name}")).spawn(work).map_err(Error::Thread)
}

/// A thread that ended while the engine was built.
fn died(engine: JoinHandle<()>) -> Error {
    let cause = match engine.join() {
        Ok(()) => "the engine's thread ended".to_owned(),
        Err(panic) => panicked(&*panic),
    };
    Error::Device(cause.into())
}

/// Locks a mutex. What it guards is sound even if somebody panicked while holding it: nothing is changed in two steps
/// that may fail in between.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
