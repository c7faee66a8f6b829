//! What an engine's thread tells of a step, in one piece.

use std::time::Instant;

use minisgl_core::engine::CompletedStep;
use minisgl_core::request as core;
use minisgl_core::sampling::RowLogprobs;
use minisgl_core::stats::Load;

use super::output::Output;
use crate::request::{BesideWork, StepTiming};

/// What the engine's thread has to tell, in order. Both threads use its memory again and again.
#[derive(Default)]
pub struct Batch {
    pub events: Vec<Event>,
    /// Tokens drawn, in order.
    pub drawn: Vec<Drawn>,
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
    /// Requests have another token each: the next `count` of those drawn, all with log-probabilities or none. Of thousands that
    /// are told in each step there is one event, and of each token eight bytes.
    Tokens { count: u32, logprobs: bool },
    /// A request ended with the next `count` of the batch's tokens.
    Finished { entry: u32, count: u32, cached_tokens: u32, reason: core::FinishReason },
    /// The engine has stopped, and all its requests are lost; the cause is there if other engines go on.
    Stopped { others_go_on: Option<String> },
}

/// A request's next token.
#[derive(Clone, Copy)]
pub struct Drawn {
    pub entry: u32,
    pub token: u32,
}

impl Batch {
    /// Notes a token, and its log-probabilities where they are wanted.
    pub fn push_token(&mut self, drawn: Drawn, row: Option<&RowLogprobs>) {
        self.drawn.push(drawn);
        self.logprobs.extend(row);
        match self.events.last_mut() {
            Some(Event::Tokens { count, logprobs }) if *logprobs == row.is_some() => *count += 1,
            _ => self.events.push(Event::Tokens { count: 1, logprobs: row.is_some() }),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.events.is_empty() && self.step.is_none()
    }

    pub fn clear(&mut self) {
        self.events.clear();
        self.drawn.clear();
        self.logprobs.clear();
        self.embeddings.clear();
        self.tokens.clear();
        self.step = None;
    }
}

/// When a step ran.
pub struct StepTimes {
    pub engine: u32,
    pub step: CompletedStep,
    pub load: Load,
    pub output_tokens: u32,
    pub started: Instant,
    /// When the host had its tokens.
    pub ended: Instant,
    pub beside_work: Option<BesideWork>,
}

impl StepTimes {
    /// As seen by a session that began at `session`.
    pub fn timing(&self, session: Instant) -> StepTiming {
        StepTiming {
            engine: self.engine,
            shape: self.step.shape,
            load: self.load,
            output_tokens: self.output_tokens,
            start_ms: self.step.start_ms,
            gpu_ms: self.step.gpu_ms,
            host_start: self.started.saturating_duration_since(session),
            host_time: self.ended.saturating_duration_since(self.started),
            beside_work: self.beside_work,
        }
    }
}
