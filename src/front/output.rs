//! What becomes of a request: tokens to text, stop texts, and one end.
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
//!
//! An [`Output`] is a promise of exactly one end. It travels with its request, from the encoders through the engine's
//! intake to the output thread; whoever has it may fulfil it, and where it is dropped unfulfilled, because a thread ended
//! or a queue was thrown away, the reader is told that the request got lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use minisgl_core::request as core;
use minisgl_core::sampling::RowLogprobs;

use super::engine::{Message, StepTimes};
use super::handle::{OpenRequest, Shared};
use super::locked;
use super::permits::Permit;
use super::session::{Queued, Session, SessionEvent};
use crate::detokenize::{Detokenizer, Ending};
use crate::request::{Completion, FinishReason, GenerateRequest, RequestError, SAMPLES_MAX, TokenLogprobs};
use crate::tokenizer::Text;

/// What the engine's thread has to tell, in order. Both threads use its memory again and again.
#[derive(Default)]
pub struct Batch {
    pub events: Vec<Event>,
    /// Of the tokens that have any, drawn or given, in order.
    pub logprobs: Vec<RowLogprobs>,
    /// Embeddings, one behind the other.
    pub embeddings: Vec<f32>,
    /// Outputs of the requests that ended, one behind the other.
    pub tokens: Vec<u32>,
    /// The step that completed.
    pub step: Option<StepTimes>,
}

/// One thing that the engine's thread has to tell. `entry` is the request's in the engine's table; one at a time has it.
pub enum Event {
    /// The engine took a request in.
    Started { ticket: core::Ticket, max_tokens: u32, output: Box<Output>, at: Instant },
    /// It refuses one.
    Refused { output: Box<Output>, error: Box<core::SubmitError> },
    /// One was aborted before it reached the engine.
    Dropped { output: Box<Output> },
    /// More of a request's prompt is scored: the next `count` of the batch's log-probabilities.
    PromptLogprobs { entry: u32, count: u32 },
    /// A request has its prompt's embedding: the next `count` of the batch's values.
    Embedding { entry: u32, count: u32 },
    /// A request has another token.
    Token { entry: u32, token: u32, logprobs: bool },
    /// A request ended with the next `count` of the batch's tokens.
    Finished { entry: u32, count: u32, cached_tokens: u32, reason: core::FinishReason },
    /// The engine has stopped, and all its requests are lost; the cause is there if other engines go on.
    Stopped { others_go_on: Option<String> },
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.events.is_empty() && self.step.is_none()
    }

    fn clear(&mut self) {
        self.events.clear();
        self.logprobs.clear();
        self.embeddings.clear();
        self.tokens.clear();
        self.step = None;
    }
}

/// The end of a request that is to come; see the module.
pub struct Output {
    session: Arc<Session>,
    tag: u64,
    /// Which of the request's samples it is.
    sample: u32,
    aborted: Arc<AtomicBool>,
    /// Until the end.
    permit: Option<Permit>,
    /// When it was submitted, and when its prompt was token ids.
    asked: Instant,
    encoded: Instant,
    prompt_tokens: u32,
    /// Where they are wanted.
    prompt_token_ids: Option<Vec<u32>>,
    max_tokens: u32,
    asked_tokens: u32,
    logprobs: Option<Vec<TokenLogprobs>>,
    /// What all samples have: the engine scores the prompt with the first, before any of them has a token.
    prompt_logprobs: Option<Arc<Mutex<Arc<Vec<TokenLogprobs>>>>>,
    embedding: Option<Vec<f32>>,
    /// Where text is wanted token by token.
    detokenizer: Option<Detokenizer>,
    /// Stop tokens whose text is no part of the output's.
    hides: Vec<u32>,
    /// Tokens heard of.
    drawn: usize,
    /// A stop text came up.
    stopped: bool,
    _open: OpenRequest,
}

impl Output {
    /// One for each sample of a request; one alone where so many can't be had ([`SAMPLES_MAX`]), which says so.
    pub fn of_samples(
        session: &Arc<Session>,
        tag: u64,
        request: &GenerateRequest,
        shared: &Shared,
        permit: &Permit,
    ) -> Vec<Self> {
        let prompt_logprobs = request.sampling.prompt_logprobs.map(|_| Arc::default());
        let of_sample = |sample| {
            let mut output = Output::new(session, tag, request, shared, permit.clone());
            (output.sample, output.prompt_logprobs) = (sample, prompt_logprobs.clone());
            output
        };
        let count = if (1..=SAMPLES_MAX).contains(&request.samples) { request.samples } else { 1 };
        (0..count).map(of_sample).collect()
    }

    fn new(
        session: &Arc<Session>,
        tag: u64,
        request: &GenerateRequest,
        shared: &Shared,
        permit: Permit,
    ) -> Self {
        let stop = request.stop.clone();
        let (include_stop, min_tokens) = (request.include_stop, request.sampling.min_tokens);
        let (options, now) = (&session.options, Instant::now());
        let as_it_comes =
            shared.text.has_tokenizer() && ((options.tokens && options.text) || !stop.is_empty());
        Output {
            session: session.clone(),
            tag,
            sample: 0,
            aborted: session.open(tag),
            permit: Some(permit),
            asked: now,
            encoded: now,
            prompt_tokens: 0,
            prompt_token_ids: None,
            max_tokens: request.sampling.max_tokens,
            asked_tokens: request.sampling.max_tokens,
            logprobs: request.sampling.logprobs.map(|_| Vec::new()),
            prompt_logprobs: None,
            embedding: None,
            detokenizer: as_it_comes
                .then(|| Detokenizer::new(Ending { stop, include: include_stop, min_tokens })),
            hides: if include_stop { Vec::new() } else { request.rules.stop_token_ids.clone() },
            drawn: 0,
            stopped: false,
            _open: shared.count_open(),
        }
    }

    pub fn session(&self) -> u64 {
        self.session.id
    }

    pub fn tag(&self) -> u64 {
        self.tag
    }

    /// Need the request not run any more?
    pub fn is_unwanted(&self) -> bool {
        self.aborted.load(Ordering::Acquire) || self.session.is_unread()
    }

    /// Must each token be told as it comes?
    pub fn wants_tokens(&self) -> bool {
        self.session.options.tokens || self.detokenizer.is_some() || self.logprobs.is_some()
    }

    pub fn set_prompt(&mut self, prompt: &[u32]) {
        self.encoded = Instant::now();
        self.prompt_tokens = prompt.len() as u32;
        let wanted = self.session.options.prompt_ids || self.prompt_logprobs.is_some();
        self.prompt_token_ids = wanted.then(|| prompt.to_vec());
    }

    /// Ends the request, which never ran, and wakes the reader.
    pub fn reject(self, error: RequestError) {
        self.end_without_output(FinishReason::Rejected, error);
    }

    fn end_without_output(self, finish_reason: FinishReason, error: RequestError) {
        tracing::debug!(tag = self.tag, ?finish_reason, %error, "a request has no output");
        let rejected = Completion::rejected(error);
        let (sample, prompt_tokens) = (self.sample, self.prompt_tokens);
        let completion = Completion { sample, finish_reason, prompt_tokens, ..rejected };
        let session = self.session.clone();
        if self.end(completion, String::new()) {
            session.wake();
        }
    }

    /// Takes what is known of the prompt's next tokens.
    fn score(&self, rows: &[RowLogprobs]) {
        if let Some(logprobs) = &self.prompt_logprobs {
            // A sample that was aborted may have what there was until now.
            Arc::make_mut(&mut locked(logprobs)).extend(rows.iter().map(TokenLogprobs::of));
        }
    }

    /// The engine took the request in.
    fn start(&self, at: Instant, wakes: &mut Wakes) {
        if self.session.options.starts {
            let encoding = self.encoded.saturating_duration_since(self.asked);
            let queueing = at.saturating_duration_since(self.encoded);
            let event = SessionEvent::Started { tag: self.tag, sample: self.sample, encoding, queueing, at };
            wakes.push(&self.session, Queued::Event(event));
        }
    }

    /// Takes the next token. True if a stop text has just come up.
    fn token(
        &mut self,
        token: u32,
        row: Option<&RowLogprobs>,
        at: Instant,
        text: &Text,
        wakes: &mut Wakes,
    ) -> bool {
        if self.stopped {
            return false; // Drawn before the engine heard of it.
        }
        self.drawn += 1;
        if let (Some(logprobs), Some(row)) = (&mut self.logprobs, row) {
            logprobs.push(TokenLogprobs::of(row));
        }
        let piece = match &mut self.detokenizer {
            Some(detokenizer) if !self.hides.contains(&token) => detokenizer.push(token, text),
            _ => "",
        };
        let options = &self.session.options;
        if options.tokens {
            let logprobs = self.logprobs.as_ref().and_then(|all| all.last().cloned());
            let text = if options.text { piece.to_owned() } else { String::new() };
            let (tag, sample) = (self.tag, self.sample);
            let event = SessionEvent::Token { tag, sample, token, text, logprobs, at };
            wakes.push(&self.session, Queued::Event(event));
        }
        self.stopped = self.detokenizer.as_ref().is_some_and(Detokenizer::stopped);
        self.stopped
    }

    /// Ends the request with the tokens that the engine drew.
    fn finish(mut self, tokens: &[u32], cached: u32, reason: core::FinishReason, text: &Text) -> bool {
        let tokens = if self.stopped { &tokens[..self.drawn.min(tokens.len())] } else { tokens };
        let (mut rest, mut stop_text) = (String::new(), None);
        let whole = match self.detokenizer.take() {
            Some(mut detokenizer) => {
                rest.push_str(detokenizer.finish(text));
                self.stopped |= detokenizer.stopped();
                stop_text = detokenizer.stop_text().map(str::to_owned);
                Some(detokenizer.into_text())
            }
            None => text.decode(match tokens.split_last() {
                Some((last, before)) if self.hides.contains(last) => before,
                _ => tokens,
            }),
        };
        if !(self.session.options.tokens && self.session.options.text) {
            rest.clear();
        }
        let finish_reason = match reason {
            _ if self.stopped => FinishReason::Stop,
            core::FinishReason::Length => FinishReason::Length,
            core::FinishReason::Eos => FinishReason::Eos,
            core::FinishReason::Stop => FinishReason::Stop,
            core::FinishReason::Abort => FinishReason::Abort,
            core::FinishReason::Complete => FinishReason::Stop,
            core::FinishReason::NotNumbers
            | core::FinishReason::ConstraintFailed
            | core::FinishReason::NoTokenLeft => FinishReason::Failed,
        };
        let error = match reason {
            core::FinishReason::NotNumbers => Some(RequestError::NotNumbers),
            core::FinishReason::ConstraintFailed => Some(RequestError::GrammarFailed),
            core::FinishReason::NoTokenLeft => Some(RequestError::NoTokenLeft),
            _ => None,
        };
        let completion = Completion {
            sample: self.sample,
            token_ids: tokens.to_vec(),
            text: whole,
            finish_reason,
            stop_text,
            prompt_tokens: self.prompt_tokens,
            prompt_token_ids: self.prompt_token_ids.take(),
            cached_tokens: cached,
            max_tokens: self.max_tokens,
            logprobs: self.logprobs.take(),
            prompt_logprobs: self.prompt_logprobs.take().map(|shared| locked(&shared).clone()),
            embedding: self.embedding.take(),
            warning: self.warning(),
            error: error.filter(|_| finish_reason == FinishReason::Failed),
        };
        self.end(completion, rest)
    }

    /// That `max_tokens` was clamped.
    fn warning(&self) -> Option<String> {
        let Output { prompt_tokens, max_tokens, asked_tokens, .. } = *self;
        (max_tokens < asked_tokens).then(|| {
            let limit = prompt_tokens + max_tokens;
            format!(
                "max_tokens was lowered from {asked_tokens} to {max_tokens}: prompt and output together are limited to \
                 {limit} tokens (--max-seq-len, --num-pages)"
            )
        })
    }

    /// Queues the one end. True if the reader must be woken.
    fn end(mut self, completion: Completion, text: String) -> bool {
        let Some(permit) = self.permit.take() else { return false };
        let event = SessionEvent::Finished { tag: self.tag, text, completion: Box::new(completion) };
        self.session.push(Queued::End(event, permit))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            permit.close_pool();
            if self.session.push(Queued::Lost(self.tag, permit)) {
                self.session.wake();
            }
        }
    }
}

/// Readers to be woken when a batch is done, or when the thread ends in the middle of one.
#[derive(Default)]
struct Wakes(Vec<Arc<Session>>);

impl Wakes {
    fn push(&mut self, session: &Arc<Session>, event: Queued) {
        if session.push(event) {
            self.0.push(session.clone());
        }
    }

    fn wake(&mut self) {
        self.0.drain(..).for_each(|session| session.wake());
    }
}

impl Drop for Wakes {
    fn drop(&mut self) {
        self.wake();
    }
}

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
        let mut embeddings = batch.embeddings.as_slice();
        let mut ended = Vec::new();
        for event in batch.events.drain(..) {
            match event {
                Event::Started { ticket, max_tokens, mut output, at } => {
                    output.max_tokens = max_tokens;
                    output.start(at, &mut self.wakes);
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
                        output.embedding = Some(self.shared.pooling.embedding(values));
                    }
                }
                Event::Token { entry, token, logprobs: has } => {
                    let row = if has { logprobs.split_off_first() } else { None };
                    self.token(entry as usize, token, row, at);
                }
                Event::Finished { entry, count, cached_tokens, reason } => {
                    let (output, rest) = tokens.split_at(count as usize);
                    tokens = rest;
                    if let Some((_, request)) = self.running.get_mut(entry as usize).and_then(Option::take) {
                        self.unwatch(&request.session);
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
        self.watch(&output.session);
        let entry = ticket.entry as usize;
        if self.running.len() <= entry {
            self.running.resize_with(entry + 1, || None);
        }
        self.running[entry] = Some((ticket, output));
    }

    fn token(&mut self, entry: usize, token: u32, row: Option<&RowLogprobs>, at: Instant) {
        let Some((ticket, output)) = self.running.get_mut(entry).and_then(Option::as_mut) else { return };
        if output.token(token, row, at, &self.shared.text, &mut self.wakes) {
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
        let session = output.session.clone();
        if output.finish(tokens, cached, reason, &self.shared.text) {
            self.wakes.0.push(session);
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
