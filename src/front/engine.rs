//! An engine's thread: it takes requests in, launches steps and hands events out, and nothing else.
//!
//! ```text
//!   loop { take the messages in ──> admit requests ──> step ──> one batch of events to the output thread }
//!            ^ sleeps here while there is nothing to run
//! ```
//!
//! It waits for the device and, when idle, for a message; never for a reader, a tokenizer or a lock that somebody holds
//! for long. A request waits in the intake rather than in the engine's own queue, and is handed on when a slot is free for
//! it, so that turns are taken as late as can be; only an engine that sorts its queue gets it filled. How many wait there
//! the engine is told, for its policy asks whether more prompts are to come.
//!
//! Where the engine says so, a step is launched only when the one in flight is about to end: who comes until then is in it.
//!
//! A step that fails, or panics, ends the engine's work, and so does an update of its weights: what is open gets lost, and the thread goes on answering questions
//! about the engine. What comes later goes to the other engines; where there is none, it is refused.
//!
//! Invariant: `live[entry]` is the request that has the engine's ticket of that entry, and `running` counts them; `tells[entry]` says
//! whether its tokens are told as they come, and false where there is none. That is all that a token is looked up for.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use minisgl_core::engine::StepReport;
use minisgl_core::request as core;
use minisgl_core::request::{SubmitError, Ticket};

use super::batch::{Batch, Drawn, Event, StepTimes};
use super::intake::Running;
use super::message::{Call, Message};
use super::output::Output;
use super::ready::Ready;
use super::shared::Shared;
use crate::error::Cause;
use crate::request::BesideWork;
use crate::runner::Runner;

/// The system wakes a sleeper so late, at most and usually: for so long the thread does not sleep before a step.
const WAKE_UP: Duration = Duration::from_micros(100);

/// A request in the engine.
struct Live {
    session: u64,
    tag: u64,
    ticket: Ticket,
    work: u64,
}

/// See the module.
pub struct EngineThread {
    /// Among the engines of the front.
    index: usize,
    runner: Box<dyn Runner>,
    shared: Arc<Shared>,
    messages: Receiver<Message>,
    /// By entry of the engine's table.
    live: Vec<Option<Live>>,
    tells: Vec<bool>,
    running: Running,
    /// The next step is not launched before.
    launch_at: Instant,
    /// Calls that wait for the engine to be idle.
    idle_calls: VecDeque<Call>,
    batch: Batch,
    batches: Sender<Batch>,
    spare: Receiver<Batch>,
    stopped: bool,
}

impl EngineThread {
    pub fn new(
        index: usize,
        runner: Box<dyn Runner>,
        shared: Arc<Shared>,
        messages: Receiver<Message>,
        (batches, spare): (Sender<Batch>, Receiver<Batch>),
    ) -> Self {
        EngineThread {
            index,
            runner,
            shared,
            messages,
            live: Vec::new(),
            tells: Vec::new(),
            running: Running::default(),
            launch_at: Instant::now(),
            idle_calls: VecDeque::new(),
            batch: Batch::default(),
            batches,
            spare,
            stopped: false,
        }
    }

    /// Works until it is told to end.
    pub fn run(mut self) {
        while self.take_messages() {
            self.admit();
            self.shared.wake(self.shared.intake.left_by());
            self.runner.set_backlog(self.shared.intake.backlog());
            if !self.stopped && !self.runner.is_idle() {
                self.step();
                self.launch_at = Instant::now() + self.runner.launch_after();
            }
            self.hand_out();
            self.call_when_idle();
        }
    }

    /// Takes in all that has come, and waits for something if there is nothing to run, or not yet. False when told to end.
    fn take_messages(&mut self) -> bool {
        if self.is_idle() {
            match self.messages.recv() {
                Ok(Message::Close) | Err(_) => return false,
                Ok(message) => self.take(message),
            }
        }
        loop {
            match self.next_message() {
                Some(Message::Close) => return false,
                Some(message) => self.take(message),
                None => return true,
            }
        }
    }

    /// The next message, if there is one before the next step is to be launched.
    fn next_message(&self) -> Option<Message> {
        loop {
            let left = self.launch_at.saturating_duration_since(Instant::now());
            let message = match left.checked_sub(WAKE_UP) {
                Some(asleep) => self.messages.recv_timeout(asleep),
                None => self.messages.try_recv().map_err(|error| match error {
                    TryRecvError::Empty => RecvTimeoutError::Timeout,
                    TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                }),
            };
            match message {
                Ok(message) => return Some(message),
                Err(RecvTimeoutError::Disconnected) => return Some(Message::Close),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return None,
                Err(RecvTimeoutError::Timeout) => std::hint::spin_loop(),
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.stopped || (self.runner.is_idle() && self.shared.intake.may_sleep(self.index))
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Abort { session, tag } => self.abort(session, tag),
            Message::StopTextFound(ticket) => self.abort_ticket(ticket),
            Message::Call(call) if call.when_idle => self.idle_calls.push_back(call),
            Message::Call(call) => self.call(call),
            Message::Work | Message::Close => {}
        }
    }

    fn call_when_idle(&mut self) {
        while self.stopped || self.runner.is_idle() {
            let Some(call) = self.idle_calls.pop_front() else { return };
            self.call(call);
        }
    }

    fn call(&mut self, call: Call) {
        let reply = (call.work)(&mut *self.runner);
        if !self.stopped && self.runner.has_stopped() {
            self.fail("an update of the weights failed".into());
        }
        reply();
    }

    /// Hands the engine as many requests as it may run.
    fn admit(&mut self) {
        while self.idle_calls.is_empty()
            && !self.stopped
            && let Some(ready) = self.shared.intake.take(self.index, self.running)
        {
            if ready.is_unwanted() {
                self.drop_all(ready);
                continue;
            }
            let mut taken = Vec::with_capacity(ready.outputs.len());
            match self.runner.submit_group(&ready.samples(), &mut |submitted| taken.push(submitted)) {
                Ok(()) => {
                    let work = self.shared.intake.work(&ready) / taken.len().max(1) as u64;
                    let started = ready.outputs.into_iter().zip(taken);
                    started.for_each(|(output, it)| self.start(output, it, work))
                }
                Err(SubmitError::QueueFull { .. }) => return self.shared.intake.give_back(self.index, ready),
                Err(error) => {
                    let refused =
                        |output| Event::Refused { output: Box::new(output), error: Box::new(error) };
                    self.batch.events.extend(ready.outputs.into_iter().map(refused));
                }
            }
        }
    }

    fn drop_all(&mut self, ready: Ready) {
        self.batch
            .events
            .extend(ready.outputs.into_iter().map(|output| Event::Dropped { output: Box::new(output) }));
    }

    fn start(&mut self, output: Output, submitted: core::Submitted, work: u64) {
        let core::Submitted { ticket, max_tokens } = submitted;
        let entry = ticket.entry as usize;
        if self.live.len() <= entry {
            self.live.resize_with(entry + 1, || None);
            self.tells.resize(entry + 1, false);
        }
        self.live[entry] = Some(Live { session: output.session().id, tag: output.tag(), ticket, work });
        self.tells[entry] = output.wants_tokens();
        (self.running.count, self.running.work) = (self.running.count + 1, self.running.work + work);
        let at = Instant::now();
        self.batch.events.push(Event::Started { ticket, max_tokens, output: Box::new(output), at });
    }

    fn abort(&mut self, session: u64, tag: Option<u64>) {
        for ready in self.shared.intake.remove(session, |ready| ready.has_tag(tag)) {
            self.drop_all(ready);
        }
        let meant = |live: &&Live| live.session == session && tag.is_none_or(|tag| tag == live.tag);
        let tickets: Vec<Ticket> = self.live.iter().flatten().filter(meant).map(|live| live.ticket).collect();
        tickets.into_iter().for_each(|ticket| self.abort_ticket(ticket));
    }

    fn abort_ticket(&mut self, ticket: Ticket) {
        let EngineThread { runner, live, tells, running, batch, .. } = self;
        let mut listener = Listener { live, tells, running, batch, output_tokens: 0 };
        // One that has ended meanwhile has told so.
        runner.abort(ticket, &mut |event| listener.hear(event));
    }

    fn step(&mut self) {
        let EngineThread { runner, live, tells, running, batch, .. } = self;
        let mut listener = Listener { live, tells, running, batch, output_tokens: 0 };
        let started = Instant::now();
        let before = runner.host_times();
        let step = catch_unwind(AssertUnwindSafe(|| runner.step(&mut |event| listener.hear(event))));
        let output_tokens = listener.output_tokens;
        let ended = Instant::now();
        let StepReport { completed, .. } = match step {
            Ok(Ok(report)) => report,
            Ok(Err(cause)) => return self.fail(cause),
            Err(panic) => return self.fail(panicked(&*panic).into()),
        };
        if let Some(step) = completed {
            let since = |after: Duration, before: Duration| after.saturating_sub(before);
            let beside_work = self.runner.host_times().zip(before).map(|(after, before)| BesideWork {
                waiting: since(after.waited, before.waited),
                driver: since(after.driver, before.driver),
            });
            let engine = self.index as u32;
            let load = self.shared.intake.load(self.index, self.runner.load());
            self.batch.step =
                Some(StepTimes { engine, step, load, output_tokens, started, ended, beside_work });
        }
    }

    /// Gives the output thread what has happened, in one piece.
    fn hand_out(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let next = self.spare.try_recv().unwrap_or_default();
        if self.batches.send(std::mem::replace(&mut self.batch, next)).is_err() {
            self.fail("the thread that turns tokens into text has ended".into());
        }
    }

    /// Takes no request any more and loses those that it has, after what has happened to them so far has been told.
    fn fail(&mut self, cause: Cause) {
        tracing::error!(engine = self.index, %cause, "the engine stops");
        let said = cause.to_string();
        let others_go_on = self.shared.fail(self.index, cause).then_some(said);
        self.stopped = true;
        self.live.clear();
        self.tells.clear();
        self.running = Running::default();
        self.batch.events.push(Event::Stopped { others_go_on });
        // If nobody takes the batch, its requests get lost by being dropped with it.
        let _ = self.batches.send(std::mem::take(&mut self.batch));
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        // Where it ends by a panic, what it has and what waits must not wait for it. One that has failed or was closed has said so.
        if !self.stopped && !self.shared.has_stopped() {
            self.fail("the engine's thread has ended".into());
        }
    }
}

/// Turns the engine's events into those of a batch.
struct Listener<'a> {
    live: &'a mut Vec<Option<Live>>,
    tells: &'a mut Vec<bool>,
    running: &'a mut Running,
    batch: &'a mut Batch,
    output_tokens: u32,
}

impl Listener<'_> {
    fn hear(&mut self, event: core::Event<'_>) {
        match event {
            core::Event::PromptLogprobs { ticket, logprobs } => {
                self.batch.logprobs.extend_from_slice(logprobs);
                let (entry, count) = (ticket.entry, logprobs.len() as u32);
                self.batch.events.push(Event::PromptLogprobs { entry, count });
            }
            core::Event::Embedding { ticket, values } => {
                self.batch.embeddings.extend_from_slice(values);
                let (entry, count) = (ticket.entry, values.len() as u32);
                self.batch.events.push(Event::Embedding { entry, count });
            }
            core::Event::Token { ticket, token, logprobs } => {
                self.output_tokens += 1;
                let Ticket { entry, .. } = ticket;
                if self.tells.get(entry as usize).is_some_and(|tells| *tells) {
                    self.batch.push_token(Drawn { entry, token }, logprobs);
                }
            }
            core::Event::Finished { ticket, reason, cached_tokens, tokens } => {
                let Some(Some(Live { work, .. })) =
                    self.live.get_mut(ticket.entry as usize).map(Option::take)
                else {
                    return;
                };
                self.tells[ticket.entry as usize] = false;
                (self.running.count, self.running.work) = (self.running.count - 1, self.running.work - work);
                self.batch.tokens.extend_from_slice(tokens);
                let (entry, count) = (ticket.entry, tokens.len() as u32);
                self.batch.events.push(Event::Finished { entry, count, cached_tokens, reason });
            }
        }
    }
}

/// What a panic said.
pub fn panicked(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("the engine panicked: {}", text.as_deref().unwrap_or("no message"))
}
