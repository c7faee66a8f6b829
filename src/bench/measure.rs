//! One timed run: every request in at once, every event noted with its time.
//!
//! ```text
//!   requests ──> session ── Token, Token, …, Finished, Step ──> Recorder ──> Measurement
//! ```
//!
//! All requests enter together, so that the first step is a full one; but for late ones, which enter when half of the others'
//! output is there. A token's time is when the engine's thread had the
//! tokens of its step: how late they are heard of here, on another thread, does not count.

use std::time::Instant;

use minisgl_core::stats::{ExpertsRead, Stats};
use minisgl_core::tensor::fnv1a;

use super::error::BenchError;
use crate::front::{SessionEvent, SessionOptions};
use crate::llm::Llm;
use crate::progress::{Progress, Unit};
use crate::request::{Completion, GenerateRequest, Load, StepTiming};
use crate::telemetry::{Probe, Recorder, RunRecord, sample_while};

/// What a run left behind.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// What was seen of it, from before the first request was submitted to after the last one ended.
    pub record: RunRecord,
    /// What the scheduler did.
    pub stats: Stats,
    /// What its decode steps read of layers with experts.
    pub experts: ExpertsRead,
    /// Every step, in order.
    pub steps: Vec<StepTiming>,
    /// In the order of the requests, and of their samples.
    pub completions: Vec<Completion>,
}

/// Runs all requests, the last `late` of them late, and measures, the device's state by `probe`. The prefix cache is emptied and the counters are reset
/// before; `on_step` is told after each step how far the run has come.
///
/// # Errors
/// A failed step, or a request that can't run.
pub fn measure(
    llm: &mut Llm,
    requests: &[GenerateRequest],
    late: usize,
    probe: Option<&mut Probe>,
    on_step: &mut dyn FnMut(Progress),
) -> Result<Measurement, BenchError> {
    llm.clear_prefix_cache();
    llm.reset_stats();
    let before = llm.experts_read()?;
    let requests: Vec<_> = (0..).zip(requests.iter().cloned()).collect();
    let (run, device_state) = sample_while(probe, || drive(llm, requests, late, on_step));
    let run = run?;
    if let Some(rejected) = run.rejected() {
        return Err(rejected);
    }
    let after = llm.experts_read()?;
    Ok(Measurement {
        record: run.recorder.record(run.seconds, device_state),
        stats: llm.stats(),
        experts: ExpertsRead {
            layers: after.layers - before.layers,
            experts: after.experts - before.experts,
        },
        steps: run.steps,
        completions: run.completions.into_iter().flatten().collect(),
    })
}

/// A run that has ended.
struct Run {
    seconds: f64,
    recorder: Recorder,
    steps: Vec<StepTiming>,
    /// Of each request.
    completions: Vec<Vec<Completion>>,
}

fn drive(
    llm: &Llm,
    mut requests: Vec<(u64, GenerateRequest)>,
    late: usize,
    on_step: &mut dyn FnMut(Progress),
) -> Result<Run, BenchError> {
    let count = requests.len();
    let options = SessionOptions { tokens: true, steps: true, capacity: Some(count), ..Default::default() };
    let total: u64 = requests.iter().map(|(_, request)| request.output_tokens_max()).sum();
    let pages = llm.info().pages();
    let mut progress = Progress { total: Some(total), unit: Unit::Tokens, pages, ..Progress::default() };
    let (mut steps, mut completions) = (Vec::new(), vec![Vec::new(); count]);
    let (mut submitter, mut events) = llm.handle().session(options);
    let late = requests.split_off(count - late);
    let started = Instant::now();
    let mut recorder = Recorder::new();
    requests.iter().for_each(|(tag, request)| recorder.submitted(*tag, request.samples, started));
    submitter.submit_all(requests)?;
    // The session goes on until nobody can submit any more.
    let mut late = (!late.is_empty()).then_some((submitter, late));
    while let Some(event) = events.next() {
        let event = event?;
        recorder.hear(&event);
        match event {
            SessionEvent::Started { .. } | SessionEvent::Token { .. } => {}
            SessionEvent::Finished { tag, completion, .. } => {
                if completion.error.is_some() {
                    events.abort_all();
                }
                completions[tag as usize].push(*completion);
                progress.finished += 1;
            }
            SessionEvent::Step(timing) => {
                let Load { running, waiting, pages_used } = recorder.load();
                let tokens = recorder.total_tokens();
                progress = Progress {
                    done: tokens,
                    output_tokens: tokens,
                    running,
                    waiting,
                    pages_used,
                    ..progress
                };
                on_step(progress.clone());
                steps.push(timing);
                if let Some((mut submitter, requests)) = late.take_if(|_| tokens >= total / 2) {
                    let now = Instant::now();
                    requests.iter().for_each(|(tag, request)| recorder.submitted(*tag, request.samples, now));
                    submitter.submit_all(requests)?;
                }
            }
        }
    }
    completions.iter_mut().for_each(|samples| samples.sort_by_key(|one| one.sample));
    Ok(Run { seconds: started.elapsed().as_secs_f64(), recorder, steps, completions })
}

impl Run {
    /// The first request that could not run.
    fn rejected(&self) -> Option<BenchError> {
        let error = |samples: &Vec<Completion>| samples.iter().find_map(|one| one.error.clone());
        let mut errors = self.completions.iter().map(error).enumerate();
        errors.find_map(|(index, error)| Some(BenchError::Rejected { index, error: error? }))
    }
}

/// A fingerprint of all output tokens: [`fnv1a`] of each request's length and tokens, in the order of the requests.
pub fn output_hash(completions: &[Completion]) -> u64 {
    let words = completions.iter().flat_map(|completion| {
        std::iter::once(completion.token_ids.len() as u32).chain(completion.token_ids.iter().copied())
    });
    fnv1a(words.flat_map(u32::to_le_bytes))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::request::{FinishReason, RequestError};

    pub(in crate::bench) fn completion(token_ids: &[u32], error: Option<RequestError>) -> Completion {
        Completion {
            sample: 0,
            token_ids: token_ids.to_vec(),
            text: None,
            finish_reason: FinishReason::Length,
            prompt_tokens: 1,
            prompt_token_ids: None,
            stop_text: None,
            cached_tokens: 0,
            max_tokens: 2,
            logprobs: None,
            prompt_logprobs: None,
            embedding: None,
            warning: None,
            error,
        }
    }

    #[test]
    fn a_request_that_cannot_run_is_named() {
        let ends = [None, Some(RequestError::EmptyStop), None].map(|error| vec![completion(&[1], error)]);
        let recorder = Recorder::new();
        let run = Run { seconds: 1.0, recorder, steps: Vec::new(), completions: ends.to_vec() };
        let error = run.rejected().unwrap();
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
