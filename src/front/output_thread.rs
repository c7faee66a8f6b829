//! The thread that makes text and events of what an engine tells.
//!
//! ```text
//!   engine thread ── a batch of events a step ──> output thread ── push ──> the sessions' queues
//!        ^                                          │   ^
//!        ├──── abort: a stop text came up ──────────┤   └── one Output a request, by entry of the engine's table
//!        └──── the batch, empty, to be used again ──┘
//! ```
//!
//! One thread does it for all requests, so their order is kept. It never waits for a reader, and wakes each one once a
//! batch.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use minisgl_core::request as core;
use minisgl_core::sampling::RowLogprobs;

use super::batch::{Batch, Drawn, Event, StepTimes};
use super::message::Message;
use super::output::Output;
use super::session::{Queued, Session, SessionEvent};
use super::shared::Shared;
use super::wakes::Wakes;
use crate::request::{FinishReason, RequestError};

/// A session that wants to hear of steps, and how many of its requests are in the engine.
struct Watcher {
    session: Arc<Session>,
    requests: usize,
}

/// What the output thread of an engine knows.
pub struct OutputThread {
    /// The engine.
    index: usize,
    shared: Arc<Shared>,
    /// By entry of the engine's table.
    running: Vec<Option<(core::Ticket, Box<Output>)>>,
    watchers: Vec<Watcher>,
    wakes: Wakes,
}

impl OutputThread {
    pub fn new(index: usize, shared: Arc<Shared>) -> Self {
        OutputThread { index, shared, running: Vec::new(), watchers: Vec::new(), wakes: Wakes::default() }
    }

    /// Delivers batches until the engine's thread ends.
    pub fn run(mut self, batches: &Receiver<Batch>, spare: &Sender<Batch>) {
        while let Ok(mut batch) = batches.recv() {
            self.deliver(&mut batch);
            batch.clear();
            // The engine's thread may have ended, and need it no more.
            let _ = spare.send(batch);
        }
    }

    fn deliver(&mut self, batch: &mut Batch) {
        let at = batch.step.as_ref().map_or_else(Instant::now, |step| step.ended);
        let (mut logprobs, mut tokens) = (batch.logprobs.as_slice(), batch.tokens.as_slice());
        let (mut drawn, mut embeddings) = (batch.drawn.as_slice(), batch.embeddings.as_slice());
        let mut ended = Vec::new();
        for event in batch.events.drain(..) {
            match event {
                Event::Started { ticket, max_tokens, mut output, at } => {
                    output.start(at, max_tokens, &mut self.wakes);
                    self.start(ticket, output);
                }
                Event::Refused { output, error } => output.reject((*error).into()),
                Event::Dropped { output } => self.finish(*output, &[], 0, core::FinishReason::Abort),
                Event::PromptLogprobs { entry, count } => {
                    let rows;
                    (rows, logprobs) = logprobs.split_at(count as usize);
                    if let Some((_, output)) = self.running.get(entry as usize).and_then(Option::as_ref) {
                        output.score(rows);
                    }
                }
                Event::Embedding { entry, count } => {
                    let values;
                    (values, embeddings) = embeddings.split_at(count as usize);
                    if let Some((_, output)) = self.running.get_mut(entry as usize).and_then(Option::as_mut) {
                        output.set_embedding(self.shared.pooling.embedding(values));
                    }
                }
                Event::Tokens { count, logprobs: have } => {
                    let told;
                    (told, drawn) = drawn.split_at(count as usize);
                    for token in told {
                        let row = if have { logprobs.split_off_first() } else { None };
                        self.token(*token, row, at);
                    }
                }
                Event::Finished { entry, count, cached_tokens, reason } => {
                    let (output, rest) = tokens.split_at(count as usize);
                    tokens = rest;
                    if let Some((_, request)) = self.running.get_mut(entry as usize).and_then(Option::take) {
                        self.unwatch(request.session());
                        ended.push((request, output, cached_tokens, reason));
                    }
                }
                Event::Stopped { others_go_on } => self.lose(others_go_on),
            }
        }
        if let Some(step) = &batch.step {
            self.tell_step(step);
            self.shared.observe_step(step);
        }
        for (request, output, cached_tokens, reason) in ended {
            self.finish(*request, output, cached_tokens, reason);
        }
        self.wakes.wake();
    }

    fn start(&mut self, ticket: core::Ticket, output: Box<Output>) {
        self.watch(output.session());
        let entry = ticket.entry as usize;
        if self.running.len() <= entry {
            self.running.resize_with(entry + 1, || None);
        }
        self.running[entry] = Some((ticket, output));
    }

    fn token(&mut self, Drawn { entry, token }: Drawn, row: Option<&RowLogprobs>, at: Instant) {
        let request = self.running.get_mut(entry as usize).and_then(Option::as_mut);
        let Some((ticket, output)) = request else { return };
        if output.token(token, row, at, &self.shared.encoder.text, &mut self.wakes) {
            self.shared.send(self.index, Message::StopTextFound(*ticket));
        }
    }

    /// Ends all requests: with the engine's failure as their own, if other engines go on, and else by the loss of all.
    fn lose(&mut self, others_go_on: Option<String>) {
        let lost = self.running.drain(..).flatten();
        match others_go_on {
            Some(cause) => {
                lost.for_each(|(_, output)| {
                    let error = RequestError::EngineFailed { cause: cause.clone() };
                    output.end_without_output(FinishReason::Failed, error);
                });
                self.watchers.clear();
            }
            None => drop(lost),
        }
    }

    fn finish(&mut self, output: Output, tokens: &[u32], cached: u32, reason: core::FinishReason) {
        let session = output.session().clone();
        if output.finish(tokens, cached, reason, &self.shared.encoder.text) {
            self.wakes.add(session);
        }
    }

    fn watch(&mut self, session: &Arc<Session>) {
        if !session.options.steps {
            return;
        }
        match self.watchers.iter_mut().find(|watcher| watcher.session.id == session.id) {
            Some(watcher) => watcher.requests += 1,
            None => self.watchers.push(Watcher { session: session.clone(), requests: 1 }),
        }
    }

    fn unwatch(&mut self, session: &Arc<Session>) {
        if let Some(watcher) = self.watchers.iter_mut().find(|watcher| watcher.session.id == session.id) {
            watcher.requests -= 1;
        }
    }

    /// Behind a step's tokens and before its ends: a reader who has taken the last end looks for nothing more. A session whose last
    /// request ends with the step hears of it too.
    fn tell_step(&mut self, step: &StepTimes) {
        for watcher in &self.watchers {
            let timing = step.timing(watcher.session.started);
            self.wakes.push(&watcher.session, Queued::Event(SessionEvent::Step(timing)));
        }
        self.watchers.retain(|watcher| watcher.requests > 0);
    }
}
