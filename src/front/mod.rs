//! The front: an engine on a thread of its own, and all that stands between it and its callers.
//!
//! ```text
//!  callers              encoders (n)        engine thread             output thread               callers
//!  Submitter ─ permit ─> render, encode ──> by turns, submit, step ─> detokenize, stop texts ──> Events
//!      ^     └── token prompts ───────────^      ^       │  a batch a step                        │
//!      │                                         └ abort ┘                                       │
//!      └────────────────────────────── the permit, with the request's end ───────────────────────┘
//! ```
//!
//! Who waits for whom:
//! - A submitter waits for a permit: for a reader to take an end, or for the engine to stop.
//! - An encoder waits for a job, the output thread for a batch, the engine's thread for the device and, when idle, for a
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

mod encode;
mod engine;
mod fair;
mod handle;
mod output;
mod permits;
mod session;
#[cfg(test)]
mod tests;

use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use minisgl_core::config::Limits;
use minisgl_core::scheduler::Order;

pub use handle::{EngineHandle, TrySubmitError};
pub use session::{Events, Next, RequestEvent, RequestStream, SessionEvent, SessionOptions, Submitter};

use crate::error::Error;
use crate::runner::Runner;
use crate::tokenizer::Text;
use engine::{EngineThread, panicked};
use handle::Shared;
use output::OutputThread;

/// A thread encodes 200 to 500 thousand tokens a second, and the fastest engine so far prefills half a million.
const ENCODERS_MAX: usize = 8;

/// An engine's threads. Dropping it ends them.
pub struct Front {
    handle: EngineHandle,
    threads: Vec<JoinHandle<()>>,
}

impl Front {
    /// Builds an engine on its thread, by `build`, and starts the others; gives what else `build` gives. `order` is that
    /// of the engine's queue.
    ///
    /// # Errors
    /// Those of `build`, and a thread that the system does not give.
    pub fn start<T: Send + 'static>(
        text: Arc<Text>,
        order: Order,
        build: impl FnOnce() -> Result<(Box<dyn Runner>, T), Error> + Send + 'static,
    ) -> Result<(Self, T), Error> {
        let (batches, outbox) = channel();
        let (used, spare) = channel();
        let (built, news) = sync_channel(1);
        let engine = spawn("engine", move || match build() {
            Err(error) => drop(built.send(Err(error))),
            Ok((runner, rest)) => {
                let Limits { running, queued, .. } = *runner.limits();
                let capacity = running as usize + queued as usize;
                let depth = if order.sorts() { capacity } else { running as usize };
                let (messages, inbox) = channel();
                let shared = Arc::new(Shared::new(text, messages, runner.limits()));
                if built.send(Ok((shared.clone(), rest))).is_ok() {
                    EngineThread::new(runner, depth, shared, inbox, (batches, spare)).run();
                }
            }
        })?;
        let Ok(news) = news.recv() else { return Err(died(engine)) };
        let (shared, rest) = news?;
        // From here on an error closes what has been started.
        let mut front = Front { handle: EngineHandle::new(shared.clone()), threads: vec![engine] };
        let output = OutputThread::new(shared.clone());
        front.threads.push(spawn("output", move || output.run(&outbox, &used))?);
        for _ in 0..encoders(&shared.text) {
            let shared = shared.clone();
            front.threads.push(spawn("encode", move || encode_all(&shared))?);
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

/// How many threads encode prompts: one processor is left to the engine.
fn encoders(text: &Text) -> usize {
    match text.has_tokenizer() {
        true => thread::available_parallelism().map_or(1, |cores| (cores.get() - 1).clamp(1, ENCODERS_MAX)),
        false => 0,
    }
}

fn encode_all(shared: &Arc<Shared>) {
    let handle = EngineHandle::new(shared.clone());
    while let Some(job) = shared.encoders.next() {
        if let Some(ready) = job.encode(shared) {
            // A request that is refused now is dropped, which tells its reader.
            let _ = handle.post(vec![ready]);
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
