//! How requests come and end.

use minisgl_core::config::Limits;
use minisgl_core::engine::Engine;
use minisgl_core::local::Local;
use minisgl_core::request::{FinishReason, Request, SubmitError};
use minisgl_core::sampling::{SamplingError, SamplingParams};
use minisgl_core::scheduler::Order;

use super::prompt;
use crate::support::expected::{VOCAB, alone};
use crate::support::hashing::Hashing;
use crate::support::lazy::Lazy;
use crate::support::{Outcomes, SMALL, engine, exactly, options, run_all, run_dry};

#[test]
fn an_aborted_request_ends_at_once_at_any_stage_and_its_neighbours_go_on() {
    // The first 30 tokens are prefilled in two chunks; with overlap there is always a step in flight.
    let limits = Limits { running: 2, pages: 20, ..SMALL };
    for steps_before in 0..12 {
        let mut engine = engine(options(limits));
        let submit = |engine: &mut Engine<Local<Lazy, Hashing>>, text, len| {
            engine.submit(Request::new(&prompt(text, len), exactly(6))).expect("it can run").ticket
        };
        let victim = submit(&mut engine, 1, 30);
        let neighbours = [submit(&mut engine, 2, 5), submit(&mut engine, 3, 5)];
        let mut outcomes = Outcomes::default();
        for _ in 0..steps_before {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
        }
        let ended = outcomes.of(victim).finished.is_some();
        assert_eq!(engine.abort(victim, &mut |event| outcomes.take_in(event)), !ended);
        assert!(!engine.abort(victim, &mut |_| ()), "a ticket is void after its request's end");
        engine.check();
        run_dry(&mut engine, &mut outcomes);
        let all = alone(&prompt(1, 30), &exactly(6), limits.sequence).0;
        assert!(all.starts_with(&outcomes.of(victim).tokens));
        for (neighbour, text) in neighbours.into_iter().zip([2, 3]) {
            let expected = alone(&prompt(text, 5), &exactly(6), limits.sequence).0;
            assert_eq!(outcomes.of(neighbour).tokens, expected, "aborted after {steps_before} steps");
        }
    }
}

#[test]
fn the_token_behind_an_end_of_sequence_token_is_dropped() {
    // A prompt and seed whose output ends by itself, in the middle.
    let params = |seed| SamplingParams { max_tokens: 30, seed, ..SamplingParams::default() };
    let ends = |seed: &u64| {
        let (tokens, reason) = alone(&prompt(3, 6), &params(*seed), SMALL.sequence);
        reason == FinishReason::Eos && (3..20).contains(&tokens.len())
    };
    let seed = (0..).find(ends).expect("some sequence ends early");
    let request = (prompt(3, 6), params(seed));
    for overlap in [true, false] {
        let mut options = options(SMALL);
        options.overlap = overlap;
        let mut engine = engine(options);
        let outcome = run_all(&mut engine, std::slice::from_ref(&request)).remove(0);
        assert_eq!(outcome.tokens, alone(&request.0, &request.1, SMALL.sequence).0);
        assert_eq!(outcome.finished, Some((FinishReason::Eos, 0)));
        let stats = engine.stats();
        let overrun = stats.decode_tokens + 1 - stats.output_tokens;
        assert_eq!(overrun, u64::from(overlap), "one step too far with overlap, none without");
    }
}

#[test]
fn the_longest_output_goes_first_if_that_is_wanted() {
    let limits = Limits { running: 1, ..SMALL };
    for (order, expected) in [(Order::Given, [0, 1, 2]), (Order::LongestOutputFirst, [1, 2, 0])] {
        let mut options = options(limits);
        options.scheduler.order = order;
        let mut engine = engine(options);
        let lengths = [3, 9, 6];
        let tickets = lengths.map(|len| {
            engine.submit(Request::new(&prompt(len, 4), exactly(len))).expect("it can run").ticket
        });
        let mut outcomes = Outcomes::default();
        run_dry(&mut engine, &mut outcomes);
        let started: Vec<_> = outcomes.list.iter().map(|(ticket, _)| *ticket).collect();
        assert_eq!(started, expected.map(|i: usize| tickets[i]));
    }
}

#[test]
fn a_request_that_can_never_run_is_refused_with_the_reason() {
    let limits = Limits { pages: 10, ..SMALL };
    let mut engine = engine(options(limits));
    let mut submit = |prompt: &[u32], params| engine.submit(Request::new(prompt, params));
    assert_eq!(submit(&[], exactly(1)), Err(SubmitError::EmptyPrompt));
    // Ten pages of four tokens are less than the sequence limit of 64.
    assert_eq!(submit(&[1; 40], exactly(1)), Err(SubmitError::PromptTooLong { tokens: 40, limit: 39 }));
    let outside = SubmitError::TokenOutsideVocabulary { id: VOCAB, position: 1, vocab: VOCAB };
    assert_eq!(submit(&[1, VOCAB], exactly(1)), Err(outside));
    assert_eq!(submit(&[1], exactly(0)), Err(SamplingError::MaxTokens.into()));
    let cold = SamplingParams { temperature: -1.0, ..exactly(1) };
    assert_eq!(submit(&[1], cold), Err(SamplingError::Temperature(-1.0).into()));
}

#[test]
fn more_tokens_than_fit_are_clamped_and_that_is_said() {
    let mut engine = engine(options(SMALL));
    let prompt_of_60 = prompt(1, 60);
    let request = Request::new(&prompt_of_60, exactly(100));
    assert_eq!(engine.submit(request).expect("it can run").max_tokens, 4);
    let mut outcomes = Outcomes::default();
    run_dry(&mut engine, &mut outcomes);
    assert_eq!(outcomes.list[0].1.tokens, alone(&prompt(1, 60), &exactly(100), 64).0);
}

#[test]
fn a_full_queue_refuses_and_takes_again_after_some_steps() {
    let limits = Limits { running: 1, queued: 2, ..SMALL };
    let mut engine = engine(options(limits));
    let prompt = prompt(1, 4);
    let request = Request::new(&prompt, exactly(3));
    assert!(engine.submit(request).is_ok() && engine.submit(request).is_ok());
    assert_eq!(engine.submit(request), Err(SubmitError::QueueFull { capacity: 2 }));
    engine.step(&mut |_| ()).expect("the device does not fail");
    assert!(engine.submit(request).is_ok(), "one of them runs");
    assert_eq!(engine.submit(request), Err(SubmitError::QueueFull { capacity: 2 }));
}
