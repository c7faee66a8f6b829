//! Log-probabilities of prompts' own tokens: each told once, from its own context, at no cost to steps without.

mod support;

use std::sync::Arc;

use minisgl_core::config::Limits;
use minisgl_core::constraint::Constraint;
use minisgl_core::engine::Engine;
use minisgl_core::request::{FinishReason, Request, SubmitError};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{PromptLogprobs, SamplingParams};

use support::expected::{self, Allowed, FAILING, VOCAB};
use support::hashing::Hashing;
use support::lazy::{Lazy, Pace};
use support::rule::Rule;
use support::trace::Trace;
use support::{Outcome, Outcomes, SMALL, engine, exactly, options, run_all, run_dry};

fn prompt(text: u32, len: u32) -> Vec<u32> {
    (0..len).map(|at| (at * at + text * (at / 3 + 1)) % VOCAB).collect()
}

/// A request for the log-probabilities of a prompt's tokens from a position on, and of nothing else.
fn scored(from: u32) -> SamplingParams {
    SamplingParams { prompt_logprobs: Some(PromptLogprobs { from, top: 0 }), ..exactly(0) }
}

fn expected_scores(prompt: &[u32], from: usize) -> Vec<f32> {
    expected::logprobs(prompt, 0, u32::MAX).split_off(from - 1)
}

fn assert_scored(outcome: &Outcome, scores: &[f32]) {
    assert_eq!(outcome.scores, scores);
    assert_eq!(outcome.tokens, []);
    assert!(matches!(outcome.finished, Some((FinishReason::Length, _))));
}

#[test]
fn a_prompt_is_scored_without_drawing_a_token() {
    let mut engine = engine(options(SMALL));
    let requests = [(prompt(1, 40), scored(0)), (prompt(2, 9), scored(4)), (prompt(3, 1), scored(1))];
    let outcomes = run_all(&mut engine, &requests);
    assert_scored(&outcomes[0], &expected_scores(&requests[0].0, 1));
    assert_scored(&outcomes[1], &expected_scores(&requests[1].0, 4));
    assert_scored(&outcomes[2], &[]);
    assert_eq!((engine.stats().output_tokens, engine.stats().finished), (0, 3));
}

#[test]
fn a_prompt_is_scored_whatever_its_rules_leave_to_be_drawn_behind_it() {
    let Allowed::Mask(mask) = expected::allowed(1, &[]) else { panic!("something may come first") };
    let others = (0..VOCAB).filter(|id| mask >> id & 1 == 0).collect();
    let rules = Arc::new(Rules::default().allowing(others).unwrap());
    let constraint: Arc<dyn Constraint> = Arc::new(Rule::new(1, 0));
    let (mut engine, text) = (engine(options(SMALL)), prompt(1, 40));
    let mut ends = |params| {
        let request =
            Request { rules: Some(&rules), constraint: Some(&constraint), ..Request::new(&text, params) };
        let ticket = engine.submit(request).expect("it can run").ticket;
        let mut outcomes = Outcomes::default();
        run_dry(&mut engine, &mut outcomes);
        outcomes.of(ticket)
    };
    assert_scored(&ends(scored(0)), &expected_scores(&text, 1));
    let drawn = ends(SamplingParams { max_tokens: 1, ..scored(0) });
    assert!(matches!(drawn.finished, Some((FinishReason::NoTokenLeft, _))), "nothing is left");
}

#[test]
fn scores_come_before_the_tokens_that_are_drawn_behind_the_prompt() {
    let params = SamplingParams { max_tokens: 6, logprobs: Some(0), ..scored(1) };
    let request = (prompt(1, 21), params);
    let outcome = run_all(&mut engine(options(SMALL)), std::slice::from_ref(&request)).remove(0);
    let whole = expected::logprobs(&[&request.0[..], &outcome.tokens].concat(), 0, u32::MAX);
    assert_eq!([outcome.scores, outcome.logprobs].concat(), whole);
    assert_eq!(outcome.tokens.len(), 6);
}

#[test]
fn the_prefix_cache_saves_what_comes_before_the_first_scored_token_and_no_more() {
    let mut engine = engine(options(SMALL));
    let text = prompt(1, 40);
    let cold = run_all(&mut engine, &[(text.clone(), scored(21))]).remove(0);
    let warm = run_all(&mut engine, &[(text.clone(), scored(21))]).remove(0);
    assert_scored(&cold, &expected_scores(&text, 21));
    assert_eq!((warm.scores, warm.finished), (cold.scores, Some((FinishReason::Length, 20))));
    // The logits at position 19 are needed too.
    let warm = run_all(&mut engine, &[(text.clone(), scored(20))]).remove(0);
    assert_eq!(warm.finished, Some((FinishReason::Length, 16)));
    // What was scored is in the cache for others.
    let other = run_all(&mut engine, &[(text, exactly(1))]).remove(0);
    assert_eq!(other.finished, Some((FinishReason::Length, 36)));
}

#[test]
fn a_prompt_whose_last_pages_are_another_requests_too_is_scored_beside_it() {
    let mut engine = engine(options(SMALL));
    let text = prompt(1, 30);
    let requests = [(text.clone(), exactly(20)), (text.clone(), scored(1)), (text.clone(), scored(9))];
    let outcomes = run_all(&mut engine, &requests);
    assert_scored(&outcomes[1], &expected_scores(&text, 1));
    assert_scored(&outcomes[2], &expected_scores(&text, 9));
}

#[test]
fn a_request_that_loses_its_pages_half_way_is_scored_once() {
    // Three requests decode beside a prompt in chunks, until the pages are short.
    let limits = Limits { pages: 24, prefill_tokens: 6, ..SMALL };
    let mut requests: Vec<_> = (0..3).map(|i| (prompt(i, 8), exactly(40))).collect();
    requests.push((prompt(9, 44), SamplingParams { max_tokens: 3, ..scored(1) }));
    let mut engine = engine(options(limits));
    let outcomes = run_all(&mut engine, &requests);
    assert!(engine.stats().retractions > 0, "{:?}", engine.stats());
    assert_eq!(outcomes[3].scores, expected_scores(&requests[3].0, 1));
}

#[test]
fn a_step_scores_no_more_tokens_at_once_than_logits_has_rows() {
    let limits = Limits { prefill_tokens: 200, sequence: 256, pages: 128, ..SMALL };
    let device = Trace::new(Lazy::new(Pace::Late));
    let mut engine = Engine::new(device, Hashing::default(), options(limits)).expect("valid limits");
    let mut heads = |request: (Vec<u32>, SamplingParams)| {
        engine.backend().take();
        let text = request.0.clone();
        let outcome = run_all(&mut engine, &[request]).remove(0);
        let names = engine.backend().take();
        let count = |asked: &str| names.split(' ').filter(|name| *name == asked).count();
        // A step's own comes with its forward pass.
        let asked = count("head") - count("forward");
        assert!(outcome.scores.is_empty() || outcome.scores == expected_scores(&text, 1));
        asked
    };
    assert_eq!(heads((prompt(1, 150), exactly(4))), 0, "nothing is scored, and nothing is asked for");
    assert_eq!(heads((prompt(2, 65), scored(1))), 1);
    assert_eq!(heads((prompt(3, 150), scored(1))), 3);
}

#[test]
fn a_prompt_as_long_as_a_sequence_may_be_is_scored() {
    let mut engine = engine(options(SMALL));
    let text = prompt(1, SMALL.sequence);
    let outcome = run_all(&mut engine, &[(text.clone(), scored(1)), (prompt(2, 64), scored(60))]).remove(0);
    assert_scored(&outcome, &expected_scores(&text, 1));
    let one_more = SamplingParams { max_tokens: 1, ..scored(1) };
    let refused = engine.submit(Request::new(&text, one_more));
    assert_eq!(refused, Err(SubmitError::PromptTooLong { tokens: 64, limit: 63 }));
}

#[test]
fn logits_that_are_no_numbers_fail_the_request_they_belong_to_and_no_other() {
    let text = prompt(1, 60);
    let failing = SamplingParams { seed: FAILING, ..scored(1) };
    assert!(expected::logprobs(&text, FAILING, u32::MAX).iter().any(|score| score.is_nan()));
    let requests = [(text.clone(), failing), (text.clone(), scored(1))];
    let outcomes = run_all(&mut engine(options(SMALL)), &requests);
    assert!(matches!(outcomes[0].finished, Some((FinishReason::NotNumbers, _))));
    assert_scored(&outcomes[1], &expected_scores(&text, 1));
}
