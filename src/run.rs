//! A run: requests go in at any time, steps bring events out. Every way to generate goes through here.
//!
//! ```text
//!   submit ──> encode ──┬──> engine ── tokens ──> detokenize ──┬──> Token …            ┐
//!                       ├──> held: the engine's queue is full  └──> Finished           ├─ by `step`
//!                       └──> rejected ────────────────────────────> Finished with error┘
//! ```
//!
//! A caller submits while [`Run::wants_more`] and steps until [`Run::is_idle`]; so at most one request is held here.
//!
//! Invariant: a request is held, live or ended in `ended`, or its `Finished` has been delivered.

use std::collections::VecDeque;
use std::time::Instant;

use minisgl_core::request::{self as core, Event, Request, SubmitError, Submitted, Ticket};
use minisgl_core::sampling::{RowLogprobs, SamplingParams};

use crate::detokenize::Detokenizer;
use crate::error::Error;
use crate::request::{
    BesideWork, Completion, FinishReason, Flow, GenerateRequest, RequestError, StepTiming, StreamEvent,
    TokenLogprobs,
};
use crate::runner::Runner;
use crate::tokenizer::Text;

/// A run of an [`Llm`](crate::Llm). Dropping it aborts what has not ended.
pub struct Run<'a> {
    runner: &'a mut dyn Runner,
    text: &'a Text,
    failed: &'a mut bool,
    stream_text: bool,
    /// By entry of the engine's request table.
    live: Vec<Option<Live>>,
    held: Option<Held>,
    /// Ended without the engine, to be delivered by the next step.
    ended: VecDeque<(usize, Completion)>,
    /// To be aborted when the step at hand is over.
    doomed: Vec<Ticket>,
    closed: bool,
    submitted: usize,
    started: Instant,
}

/// A request ready for the engine.
struct Held {
    index: usize,
    prompt: Vec<u32>,
    params: SamplingParams,
    stop: Vec<String>,
}

/// A request in the engine.
struct Live {
    index: usize,
    ticket: Ticket,
    prompt_tokens: u32,
    max_tokens: u32,
    warning: Option<String>,
    logprobs: Option<Vec<TokenLogprobs>>,
    /// Where text is wanted token by token.
    detokenizer: Option<Detokenizer>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(runner: &'a mut dyn Runner, text: &'a Text, failed: &'a mut bool) -> Self {
        Run {
            runner,
            text,
            failed,
            stream_text: true,
            live: Vec::new(),
            held: None,
            ended: VecDeque::new(),
            doomed: Vec::new(),
            closed: false,
            submitted: 0,
            started: Instant::now(),
        }
    }

    /// Without text in token events, decoding waits for a request's end, which is cheaper. On by default.
    pub fn stream_text(mut self, on: bool) -> Self {
        self.stream_text = on;
        self
    }

    /// Is there room for another request? If not, step first.
    pub fn wants_more(&self) -> bool {
        self.held.is_none() && !self.closed
    }

    /// Has every request ended, and every event been delivered?
    pub fn is_idle(&self) -> bool {
        self.held.is_none() && self.ended.is_empty() && self.runner.is_idle()
    }

    pub(crate) fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.text.token_bytes(id)
    }

    /// Takes a request in and numbers it: 0, 1, 2, … One that can't run ends as rejected in the next step. The
    /// caller has asked [`Run::wants_more`]; a request that there is no room for is rejected too.
    pub fn submit(&mut self, request: GenerateRequest) -> usize {
        let index = self.submitted;
        self.submitted += 1;
        match self.prepare(index, request) {
            Ok(held) => self.enter(held),
            Err(error) => self.ended.push_back((index, Completion::rejected(error))),
        }
        index
    }

    /// Submits requests as there is room, and steps until all have ended.
    pub(crate) fn drive(
        mut self,
        requests: impl IntoIterator<Item = GenerateRequest>,
        on_event: &mut dyn FnMut(StreamEvent<'_>) -> Flow,
    ) -> Result<(), Error> {
        let mut requests = requests.into_iter().fuse();
        loop {
            while self.wants_more()
                && let Some(request) = requests.next()
            {
                self.submit(request);
            }
            if self.is_idle() {
                return Ok(());
            }
            self.step(on_event)?;
        }
    }

    fn prepare(&self, index: usize, request: GenerateRequest) -> Result<Held, RequestError> {
        if !self.wants_more() {
            let capacity = self.runner.limits().queued;
            return Err(SubmitError::QueueFull { capacity }.into());
        }
        if request.stop.iter().any(String::is_empty) {
            return Err(RequestError::EmptyStop);
        }
        if !request.stop.is_empty() && !self.text.has_tokenizer() {
            return Err(RequestError::NoTokenizer { what: "a stop text" });
        }
        let prompt = self.text.encode(request.prompt)?;
        Ok(Held { index, prompt, params: request.sampling, stop: request.stop })
    }

    /// Hands a request to the engine, or holds it where the queue is full.
    fn enter(&mut self, held: Held) {
        match self.runner.submit(Request { prompt: &held.prompt, params: held.params }) {
            Ok(submitted) => self.admit(held, submitted),
            Err(SubmitError::QueueFull { .. }) => self.held = Some(held),
            Err(error) => {
                let completion = Completion::rejected(error.into());
                let prompt_tokens = held.prompt.len() as u32;
                self.ended.push_back((held.index, Completion { prompt_tokens, ..completion }));
            }
        }
    }

    fn admit(&mut self, held: Held, submitted: Submitted) {
        let Submitted { ticket, max_tokens } = submitted;
        let prompt_tokens = held.prompt.len() as u32;
        let asked = held.params.max_tokens;
        let warning = (max_tokens < asked).then(|| {
            let limit = prompt_tokens + max_tokens;
            format!(
                "max_tokens was lowered from {asked} to {max_tokens}: prompt and output together are limited to \
                 {limit} tokens (--max-seq-len, --num-pages)"
            )
        });
        let as_it_comes = self.text.has_tokenizer() && (self.stream_text || !held.stop.is_empty());
        let entry = ticket.entry as usize;
        if self.live.len() <= entry {
            self.live.resize_with(entry + 1, || None);
        }
        self.live[entry] = Some(Live {
            index: held.index,
            ticket,
            prompt_tokens,
            max_tokens,
            warning,
            logprobs: held.params.logprobs.map(|_| Vec::new()),
            detokenizer: as_it_comes.then(|| Detokenizer::new(held.stop)),
        });
    }

    /// Aborts a request: what it has so far is delivered as its completion. False if it has ended already.
    pub fn abort(&mut self, index: usize, on_event: &mut dyn FnMut(StreamEvent<'_>) -> Flow) -> bool {
        if self.held.as_ref().is_some_and(|held| held.index == index) {
            self.drop_held();
            return true;
        }
        let ticket = self.live.iter().flatten().find(|live| live.index == index).map(|live| live.ticket);
        self.doomed.extend(ticket);
        self.carry_out(on_event);
        ticket.is_some()
    }

    /// Launches the next step and delivers what the step before brought about.
    ///
    /// # Errors
    /// The device failed; the requests that have not ended are lost.
    pub fn step(&mut self, on_event: &mut dyn FnMut(StreamEvent<'_>) -> Flow) -> Result<(), Error> {
        if *self.failed {
            return Err(Error::Failed);
        }
        self.deliver_ended(on_event);
        if let Some(held) = self.held.take() {
            self.enter(held);
        }
        if !self.runner.is_idle() {
            self.step_engine(on_event)?;
        }
        self.carry_out(on_event);
        Ok(())
    }

    fn step_engine(&mut self, on_event: &mut dyn FnMut(StreamEvent<'_>) -> Flow) -> Result<(), Error> {
        let Run { runner, text, live, doomed, closed, .. } = self;
        let mut listener = Listener { text, live, doomed, closed, on_event };
        let host_start = self.started.elapsed();
        let before = runner.host_times();
        let report = runner.step(&mut |event| listener.hear(event)).map_err(|cause| {
            *self.failed = true;
            Error::Step { cause, finished: Vec::new() }
        })?;
        if let Some(step) = report.completed {
            let timing = StepTiming {
                phase: step.shape.phase,
                rows: step.shape.rows,
                tokens: step.shape.tokens,
                start_ms: step.start_ms,
                gpu_ms: step.gpu_ms,
                host_start,
                host_time: self.started.elapsed() - host_start,
                beside_work: runner.host_times().zip(before).map(|(after, before)| BesideWork {
                    waiting: after.waited - before.waited,
                    driver: after.driver - before.driver,
                }),
            };
            self.closed |= on_event(StreamEvent::Step(timing)) == Flow::AbortAll;
        }
        Ok(())
    }

    /// Delivers the requests that ended without the engine.
    fn deliver_ended(&mut self, on_event: &mut dyn FnMut(StreamEvent<'_>) -> Flow) {
        while let Some((index, completion)) = self.ended.pop_front() {
            let flow = on_event(StreamEvent::Finished { index, text: "", completion });
            self.closed |= flow == Flow::AbortAll;
        }
    }

    /// Carries out the aborts that were asked for. The callback may ask for more meanwhile.
    fn carry_out(&mut self, on_event: &mut dyn FnMut(StreamEvent<'_>) -> Flow) {
        if self.closed {
            self.drop_held();
            self.doomed.extend(self.live.iter().flatten().map(|live| live.ticket));
        }
        while let Some(ticket) = self.doomed.pop() {
            let Run { runner, text, live, doomed, closed, .. } = self;
            let mut listener = Listener { text, live, doomed, closed, on_event };
            runner.abort(ticket, &mut |event| listener.hear(event));
        }
    }

    /// Ends the held request as aborted.
    fn drop_held(&mut self) {
        if let Some(held) = self.held.take() {
            let completion = Completion {
                token_ids: Vec::new(),
                text: self.text.has_tokenizer().then(String::new),
                finish_reason: FinishReason::Abort,
                prompt_tokens: held.prompt.len() as u32,
                cached_tokens: 0,
                max_tokens: held.params.max_tokens,
                logprobs: held.params.logprobs.map(|_| Vec::new()),
                warning: None,
                error: None,
            };
            self.ended.push_back((held.index, completion));
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.doomed.extend(self.live.iter().flatten().map(|live| live.ticket));
        for ticket in self.doomed.drain(..) {
            self.runner.abort(ticket, &mut |_| {});
        }
        while !*self.failed && !self.runner.is_idle() {
            *self.failed = self.runner.step(&mut |_| {}).is_err();
        }
    }
}

/// Turns the engine's events into the caller's.
struct Listener<'r, 'c> {
    text: &'r Text,
    live: &'r mut Vec<Option<Live>>,
    doomed: &'r mut Vec<Ticket>,
    closed: &'r mut bool,
    on_event: &'c mut dyn FnMut(StreamEvent<'_>) -> Flow,
}

impl Listener<'_, '_> {
    fn hear(&mut self, event: Event<'_>) {
        match event {
            Event::Token { ticket, token, logprobs } => self.token(ticket, token, logprobs),
            Event::Finished { ticket, reason, cached_tokens, tokens } => {
                self.finished(ticket, reason, cached_tokens, tokens);
            }
        }
    }

    fn token(&mut self, ticket: Ticket, token: u32, row: Option<&RowLogprobs>) {
        let Some(live) = self.live.get_mut(ticket.entry as usize).and_then(Option::as_mut) else { return };
        if let (Some(logprobs), Some(row)) = (&mut live.logprobs, row) {
            logprobs.push(TokenLogprobs { logprob: row.token, top: row.top().collect() });
        }
        let text = match &mut live.detokenizer {
            Some(detokenizer) => detokenizer.push(token, self.text),
            None => "",
        };
        let logprobs = live.logprobs.as_ref().and_then(|all| all.last());
        let flow = (self.on_event)(StreamEvent::Token { index: live.index, token, text, logprobs });
        let stopped = live.detokenizer.as_ref().is_some_and(Detokenizer::stopped);
        if stopped || flow == Flow::AbortRequest {
            self.doomed.push(ticket);
        }
        *self.closed |= flow == Flow::AbortAll;
    }

    fn finished(&mut self, ticket: Ticket, reason: core::FinishReason, cached_tokens: u32, tokens: &[u32]) {
        let Some(live) = self.live.get_mut(ticket.entry as usize).and_then(Option::take) else { return };
        let stopped = live.detokenizer.as_ref().is_some_and(Detokenizer::stopped);
        let finish_reason = match reason {
            _ if stopped => FinishReason::Stop,
            core::FinishReason::Length => FinishReason::Length,
            core::FinishReason::Eos => FinishReason::Eos,
            core::FinishReason::Abort => FinishReason::Abort,
        };
        let mut rest = String::new();
        let text = match live.detokenizer {
            Some(mut detokenizer) => {
                rest.push_str(detokenizer.finish(self.text));
                Some(detokenizer.into_text())
            }
            None => self.text.decode(tokens),
        };
        let completion = Completion {
            token_ids: tokens.to_vec(),
            text,
            finish_reason,
            prompt_tokens: live.prompt_tokens,
            cached_tokens,
            max_tokens: live.max_tokens,
            logprobs: live.logprobs,
            warning: live.warning,
            error: None,
        };
        let flow = (self.on_event)(StreamEvent::Finished { index: live.index, text: &rest, completion });
        *self.closed |= flow == Flow::AbortAll;
    }
}
