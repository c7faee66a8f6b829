//! What ran before is not run again, and a retracted request goes on as if it had not been.

use std::panic::{AssertUnwindSafe, catch_unwind};

use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineError};
use minisgl_core::request::{FinishReason, Request, SubmitError};
use minisgl_core::scheduler::Order;

use super::{expected_tokens, prompt, tokens};
use crate::support::expected::VOCAB;
use crate::support::lazy::LazyError;
use crate::support::{SMALL, engine, exactly, options, run_all};

#[test]
fn a_retracted_request_resumes_with_the_same_tokens() {
    // Four sequences of up to 28 tokens, 7 pages each, and 12 pages for all.
    let limits = Limits { pages: 12, ..SMALL };
    let requests: Vec<_> = (0..4).map(|text| (prompt(text, 8), exactly(20))).collect();
    for overlap in [true, false] {
        for prefix_cache in [true, false] {
            let mut options = options(limits);
            (options.overlap, options.scheduler.prefix_cache) = (overlap, prefix_cache);
            let mut engine = engine(options);
            assert_eq!(tokens(run_all(&mut engine, &requests)), expected_tokens(&requests, &limits));
            assert!(engine.stats().retractions > 0, "the pool is too small for all of them");
        }
    }
}

#[test]
fn a_prefix_that_ran_before_is_not_run_again() {
    let mut engine = engine(options(SMALL));
    let shared = prompt(1, 12);
    let first = (shared.clone(), exactly(2));
    let second = ([shared, vec![1, 2, 3]].concat(), exactly(2));
    let run = |engine: &mut Engine<_>, request| run_all(engine, std::slice::from_ref(request)).remove(0);
    assert_eq!(run(&mut engine, &first).finished, Some((FinishReason::Length, 0)));
    let before = engine.stats();
    let outcome = run(&mut engine, &second);
    assert_eq!(outcome.finished, Some((FinishReason::Length, 12)), "three pages of four were there");
    assert_eq!(outcome.tokens, expected_tokens(std::slice::from_ref(&second), &SMALL)[0]);
    let after = engine.stats();
    assert_eq!(after.cached_tokens - before.cached_tokens, 12);
    assert_eq!(after.prefill_tokens - before.prefill_tokens, 3);
    engine.clear_prefix_cache();
    assert_eq!(run(&mut engine, &second).finished, Some((FinishReason::Length, 0)), "all is forgotten");
}

#[test]
fn a_model_is_changed_while_nobody_waits_or_runs_and_what_it_computed_before_is_forgotten() {
    let mut engine = engine(options(SMALL));
    let request = (prompt(1, 12), exactly(6));
    let busy = |outcome| matches!(outcome, Err(EngineError::Busy));
    let changed = |engine: &mut Engine<_>| engine.update_model(|_| panic!("requests depend on it"));
    engine.submit(Request::new(&request.0, request.1)).unwrap();
    while !engine.is_idle() {
        assert!(busy(changed(&mut engine)));
        engine.step(&mut |_| {}).unwrap();
    }
    let cached = |engine: &mut Engine<_>| {
        run_all(engine, std::slice::from_ref(&request)).remove(0).finished.map(|(_, cached)| cached)
    };
    assert_eq!(cached(&mut engine), Some(8));
    engine.update_model(|_| Ok(())).unwrap();
    assert_eq!(cached(&mut engine), Some(0));
    // One that may be changed in part runs nothing any more, also where a panic was caught on the way.
    assert!(!engine.has_stopped());
    let mut other = self::engine(options(SMALL));
    let panicked = catch_unwind(AssertUnwindSafe(|| other.update_model(|_| panic!("on purpose"))));
    assert!(panicked.is_err() && other.has_stopped());
    let failed = engine.update_model(|_| Err(LazyError("the memory is gone")));
    assert!(matches!(failed, Err(EngineError::Update(_))) && engine.has_stopped());
    let refused = engine.submit(Request::new(&request.0, request.1));
    assert!(matches!(refused, Err(SubmitError::Stopped)));
    assert!(matches!(engine.update_model(|_| Ok(())), Err(EngineError::Stopped)));
}

#[test]
fn a_prompt_that_is_wholly_cached_still_runs_its_last_page() {
    let mut engine = engine(options(SMALL));
    let request = (prompt(2, 12), exactly(3));
    let expected = expected_tokens(std::slice::from_ref(&request), &SMALL);
    for cached in [0, 8] {
        let outcome = run_all(&mut engine, std::slice::from_ref(&request)).remove(0);
        assert_eq!((&outcome.tokens, outcome.finished), (&expected[0], Some((FinishReason::Length, cached))));
    }
}

#[test]
fn without_a_prefix_cache_nothing_is_cached() {
    let mut options = options(SMALL);
    options.scheduler.prefix_cache = false;
    let mut engine = engine(options);
    let requests = vec![(prompt(1, 12), exactly(2)); 3];
    let outcomes = run_all(&mut engine, &requests);
    assert!(outcomes.iter().all(|outcome| outcome.finished == Some((FinishReason::Length, 0))));
    assert_eq!(engine.stats().cached_tokens, 0);
}

#[test]
fn by_prefix_more_of_the_prompts_is_found_and_every_request_has_its_own_tokens() {
    // Three beginnings of three pages each in turn, in a pool that keeps one besides what a request needs.
    let limits = Limits { running: 1, pages: 8, ..SMALL };
    let request = |i: u32| ([prompt(i % 3, 12), vec![i % VOCAB]].concat(), exactly(4));
    let requests: Vec<_> = (0..15).map(request).collect();
    let cached = [Order::Given, Order::Prefix].map(|order| {
        let mut options = options(limits);
        options.scheduler.order = order;
        let mut engine = engine(options);
        assert_eq!(tokens(run_all(&mut engine, &requests)), expected_tokens(&requests, &limits));
        engine.stats().cached_tokens
    });
    assert_eq!(cached, [0, 12 * 12], "all but the first of each");
}
