//! What becomes of a request: tokens to text, stop texts, and one end.
//!
//! An [`Output`] is a promise of exactly one end. It travels with its request, from the encoders through the engine's
//! intake to the output thread; whoever has it may fulfil it, and where it is dropped unfulfilled, because a thread ended
//! or a queue was thrown away, the reader is told that the request got lost.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use minisgl_core::request as core;
use minisgl_core::sampling::RowLogprobs;

use super::locked;
use super::permits::Permit;
use super::session::{Queued, Session, SessionEvent};
use super::wakes::Wakes;
use crate::detokenize::{Detokenizer, Ending};
use crate::request::{Completion, FinishReason, GenerateRequest, RequestError, SAMPLES_MAX, TokenLogprobs};
use crate::tokenizer::Text;

/// The end of a request that is to come; see the module.
pub struct Output {
    session: Arc<Session>,
    tag: u64,
    /// Which of the request's samples it is.
    sample: u32,
    aborted: Arc<AtomicBool>,
    /// What the request has until its end.
    has: Option<(Permit, OpenRequest)>,
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
}

impl Output {
    /// One for each sample of a request; one alone where so many can't be had ([`SAMPLES_MAX`]), which says so.
    pub fn of_samples(
        session: &Arc<Session>,
        tag: u64,
        request: &GenerateRequest,
        text: &Text,
        open: &Arc<AtomicUsize>,
        permit: &Permit,
    ) -> Vec<Self> {
        let prompt_logprobs = request.sampling.prompt_logprobs.map(|_| Arc::default());
        let of_sample = |sample| {
            let mut output = Output::new(session, tag, request, text, open, permit.clone());
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
        text: &Text,
        open: &Arc<AtomicUsize>,
        permit: Permit,
    ) -> Self {
        let stop = request.stop.clone();
        let (include_stop, min_tokens) = (request.include_stop, request.sampling.min_tokens);
        let (options, now) = (&session.options, Instant::now());
        let as_it_comes = text.has_tokenizer() && ((options.tokens && options.text) || !stop.is_empty());
        Output {
            session: session.clone(),
            tag,
            sample: 0,
            aborted: session.open(tag),
            has: Some((permit, OpenRequest::count(open))),
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
        }
    }

    /// The session that the request is of.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
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

    pub fn end_without_output(self, finish_reason: FinishReason, error: RequestError) {
        tracing::debug!(tag = self.tag, ?finish_reason, %error, "a request has no output");
        let rejected = Completion::rejected(error);
        let (sample, prompt_tokens) = (self.sample, self.prompt_tokens);
        let completion = Completion { sample, finish_reason, prompt_tokens, ..rejected };
        let session = self.session.clone();
        if self.end(completion, String::new()) {
            session.wake();
        }
    }

    /// Takes the prompt's embedding.
    pub fn set_embedding(&mut self, embedding: Vec<f32>) {
        self.embedding = Some(embedding);
    }

    /// Takes what is known of the prompt's next tokens.
    pub fn score(&self, rows: &[RowLogprobs]) {
        if let Some(logprobs) = &self.prompt_logprobs {
            // A sample that was aborted may have what there was until now.
            Arc::make_mut(&mut locked(logprobs)).extend(rows.iter().map(TokenLogprobs::of));
        }
    }

    /// The engine took the request in, which may have so many tokens.
    pub fn start(&mut self, at: Instant, max_tokens: u32, wakes: &mut Wakes) {
        self.max_tokens = max_tokens;
        if self.session.options.starts {
            let encoding = self.encoded.saturating_duration_since(self.asked);
            let queueing = at.saturating_duration_since(self.encoded);
            let event = SessionEvent::Started { tag: self.tag, sample: self.sample, encoding, queueing, at };
            wakes.push(&self.session, Queued::Event(event));
        }
    }

    /// Takes the next token. True if a stop text has just come up.
    pub fn token(
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
    pub fn finish(mut self, tokens: &[u32], cached: u32, reason: core::FinishReason, text: &Text) -> bool {
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
        let Some((permit, open)) = self.has.take() else { return false };
        drop(open); // First: whoever has heard of the end finds one less that is open.
        let event = SessionEvent::Finished { tag: self.tag, text, completion: Box::new(completion) };
        self.session.push(Queued::End(event, permit))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some((permit, open)) = self.has.take() {
            drop(open);
            permit.close_pool();
            if self.session.push(Queued::Lost(self.tag, permit)) {
                self.session.wake();
            }
        }
    }
}

/// A request that has not ended: one of those that are counted, until it is dropped.
struct OpenRequest(Arc<AtomicUsize>);

impl OpenRequest {
    fn count(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        OpenRequest(open.clone())
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
