//! One timed run: every request in at once, every event noted with its time.
//!
//! ```text
//!   requests ──> session ── Token, Token, …, Finished, Step ──> Recorder ──> Measurement
//! ```
//!
//! All requests enter together, so that the first step is a full one. A token's time is when the engine's thread had the
//! tokens of its step: how late they are heard of here, on another thread, does not count.

use std::time::Instant;

use minisgl_core::stats::Stats;

use super::BenchError;
use crate::front::{SessionEvent, SessionOptions};
use crate::llm::Llm;
use crate::request::{Completion, GenerateRequest, StepTiming};

/// What a run left behind.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// From before the first request was submitted to after the last one ended.
    pub seconds: f64,
    /// What the scheduler did.
    pub stats: Stats,
    /// Every step, in order.
    pub steps: Vec<StepTiming>,
    /// Milliseconds from the start of the run to each request's first token.
    pub first_token_ms: Vec<f64>,
    /// Milliseconds between each token and the one before it of the same request.
    pub between_tokens_ms: Vec<f64>,
    /// In the order of the requests.
    pub completions: Vec<Completion>,
}

/// Runs all requests and measures. The prefix cache is emptied and the counters are reset before; `on_step` is told
/// after each step how many tokens have come out.
///
/// # Errors
/// A failed step, or a request that can't run.
pub fn measure(
    llm: &mut Llm,
    requests: &[GenerateRequest],
    on_step: &mut dyn FnMut(u64),
) -> Result<Measurement, BenchError> {
    llm.clear_prefix_cache();
    llm.reset_stats();
    let requests: Vec<_> = (0..).zip(requests.iter().cloned()).collect();
    let options =
        SessionOptions { tokens: true, steps: true, capacity: Some(requests.len()), ..Default::default() };
    let mut recorder = Recorder::new(requests.len());
    let (mut submitter, mut events) = llm.handle().session(options);
    let started = Instant::now();
    submitter.submit_all(requests)?;
    drop(submitter);
    while let Some(event) = events.next() {
        let event = event?;
        let step = matches!(event, SessionEvent::Step(_));
        if !recorder.hear(event, started) {
            events.abort_all();
        }
        if step {
            on_step(recorder.tokens);
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    recorder.measurement(seconds, llm.stats())
}

/// Turns a session's events into a [`Measurement`].
struct Recorder {
    tokens: u64,
    last_token_ms: Vec<Option<f64>>,
    first_token_ms: Vec<f64>,
    between_tokens_ms: Vec<f64>,
    steps: Vec<StepTiming>,
    completions: Vec<Option<Completion>>,
}

impl Recorder {
    fn new(requests: usize) -> Self {
        Recorder {
            tokens: 0,
            last_token_ms: vec![None; requests],
            first_token_ms: Vec::with_capacity(requests),
            between_tokens_ms: Vec::new(),
            steps: Vec::new(),
            completions: vec![None; requests],
        }
    }

    /// Notes an event of the run that began at `started`. False if it makes the run worthless.
    fn hear(&mut self, event: SessionEvent, started: Instant) -> bool {
        match event {
            SessionEvent::Token { tag, at, .. } => {
                self.token(tag as usize, at.saturating_duration_since(started).as_secs_f64() * 1e3);
            }
            SessionEvent::Step(timing) => self.steps.push(timing),
            SessionEvent::Finished { tag, completion, .. } => {
                let rejected = completion.error.is_some();
                self.completions[tag as usize] = Some(*completion);
                return !rejected;
            }
        }
        true
    }

    fn token(&mut self, index: usize, at_ms: f64) {
        self.tokens += 1;
        match self.last_token_ms[index].replace(at_ms) {
            None => self.first_token_ms.push(at_ms),
            Some(before_ms) => self.between_tokens_ms.push(at_ms - before_ms),
        }
    }

    fn measurement(self, seconds: f64, stats: Stats) -> Result<Measurement, BenchError> {
        let error = |completion: &Option<Completion>| completion.as_ref()?.error.clone();
        let mut errors = self.completions.iter().map(error).enumerate();
        let rejected = errors.find_map(|(index, error)| Some(BenchError::Rejected { index, error: error? }));
        match rejected {
            Some(error) => Err(error),
            None => Ok(Measurement {
                seconds,
                stats,
                steps: self.steps,
                first_token_ms: self.first_token_ms,
                between_tokens_ms: self.between_tokens_ms,
                completions: self.completions.into_iter().flatten().collect(),
            }),
        }
    }
}

/// A fingerprint of all output tokens: FNV-1a (Fowler, Noll, Vo) with 64 bits over each request's length and tokens, in
/// the order of the requests.
pub fn output_hash(completions: &[Completion]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut feed = |word: u32| {
        for byte in word.to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for completion in completions {
        feed(completion.token_ids.len() as u32);
        completion.token_ids.iter().copied().for_each(&mut feed);
    }
    hash
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::request::{FinishReason, Phase, RequestError};

    fn completion(token_ids: &[u32], error: Option<RequestError>) -> Completion {
        Completion {
            token_ids: token_ids.to_vec(),
            text: None,
            finish_reason: FinishReason::Length,
            prompt_tokens: 1,
            cached_tokens: 0,
            max_tokens: 2,
            logprobs: None,
            warning: None,
            error,
        }
    }

    fn token(tag: u64, at: Instant) -> SessionEvent {
        SessionEvent::Token { tag, token: 1, text: String::new(), logprobs: None, at }
    }

    fn finished(tag: u64, completion: Completion) -> SessionEvent {
        SessionEvent::Finished { tag, text: String::new(), completion: Box::new(completion) }
    }

    fn step() -> SessionEvent {
        SessionEvent::Step(StepTiming {
            phase: Phase::Decode,
            rows: 2,
            tokens: 2,
            start_ms: 0.0,
            gpu_ms: 1.0,
            host_start: Duration::ZERO,
            host_time: Duration::from_millis(1),
            beside_work: None,
        })
    }

    #[test]
    fn tokens_of_one_step_share_a_time_and_latencies_are_each_requests_own() {
        let started = Instant::now();
        let [first, second, third] = [10, 13, 20].map(|ms| started + Duration::from_millis(ms));
        let mut recorder = Recorder::new(2);
        let events = [
            token(0, first),
            token(1, first),
            step(),
            token(1, second),
            step(),
            token(0, third),
            step(),
            finished(1, completion(&[5, 6], None)),
            finished(0, completion(&[7, 8], None)),
        ];
        assert!(events.into_iter().all(|event| recorder.hear(event, started)));
        let measurement = recorder.measurement(0.02, Stats::default()).unwrap();
        assert_eq!(measurement.first_token_ms, [10.0, 10.0]);
        assert_eq!(measurement.between_tokens_ms, [3.0, 10.0]);
        assert_eq!(measurement.steps.len(), 3);
        assert_eq!(measurement.completions[0].token_ids, [7, 8]);
    }

    #[test]
    fn a_request_that_cannot_run_ends_the_measurement_and_is_named() {
        let mut recorder = Recorder::new(3);
        let error = RequestError::EmptyStop;
        assert!(recorder.hear(finished(0, completion(&[1], None)), Instant::now()));
        assert!(!recorder.hear(finished(1, completion(&[], Some(error))), Instant::now()));
        let error = recorder.measurement(0.0, Stats::default()).unwrap_err();
        assert!(error.to_string().starts_with("request 1 of the workload can't run: a stop text is empty"));
    }

    #[test]
    fn the_hash_tells_any_other_token_order_or_split_apart() {
        let hash =
            |all: &[&[u32]]| output_hash(&all.iter().map(|ids| completion(ids, None)).collect::<Vec<_>>());
        let base = hash(&[&[1, 2], &[3]]);
        assert_eq!(base, hash(&[&[1, 2], &[3]]));
        for other in [&[&[1, 2][..], &[4][..]][..], &[&[3], &[1, 2]], &[&[1], &[2, 3]], &[&[1, 2, 3]]] {
            assert_ne!(base, hash(other), "{other:?}");
        }
    }
}
