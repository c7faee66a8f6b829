//! The engine's promises, one by one, through its public API.

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use minisgl_core::backend::Device;
use minisgl_core::batch::StepShape;
use minisgl_core::config::{Limits, LimitsError};
use minisgl_core::constraint::{Constraint, ConstraintState};
use minisgl_core::engine::{Engine, EngineError, EngineOptions};
use minisgl_core::executor::Executor;
use minisgl_core::fit::Fit;
use minisgl_core::local::Local;
use minisgl_core::policy::Policy;
use minisgl_core::request::{FinishReason, Request, SubmitError, Ticket};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{PromptLogprobs, SamplingError, SamplingParams};
use minisgl_core::scheduler::{Order, Settings};
use minisgl_core::speculation::Speculation;

use support::expected::{self, VOCAB, alone, alone_within};
use support::hashing::Hashing;
use support::lazy::{Lazy, LazyError, Pace};
use support::rule::Rule;
use support::trace::Trace;
use support::{Outcomes, SETTINGS, SMALL, engine, exactly, options, run_all, run_dry};

/// A prompt of so many tokens that no other `text` begins with.
fn prompt(text: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| if i == 0 { text } else { (i * 5 + text) % VOCAB }).collect()
}

/// What requests give alone under these limits.
fn expected_tokens(requests: &[(Vec<u32>, SamplingParams)], limits: &Limits) -> Vec<Vec<u32>> {
    requests.iter().map(|(prompt, params)| alone(prompt, params, limits.sequence).0).collect()
}

fn tokens(outcomes: Vec<support::Outcome>) -> Vec<Vec<u32>> {
    outcomes.into_iter().map(|outcome| outcome.tokens).collect()
}

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
fn an_engine_whose_last_step_is_in_flight_is_not_idle() {
    let mut engine = engine(options(SMALL));
    let ticket = engine.submit(Request::new(&[1, 2, 3], exactly(9))).unwrap().ticket;
    engine.step(&mut |_| {}).unwrap();
    assert!(engine.abort(ticket, &mut |_| {}));
    assert!(!engine.is_idle());
    let changed = engine.update_model(|_| panic!("a step runs"));
    assert!(matches!(changed, Err(EngineError::Busy)));
    let report = engine.step(&mut |_| {}).unwrap();
    assert!(report.launched.is_none() && report.completed.is_some() && engine.is_idle());
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

/// Submits `samples` of a prompt as a group, runs them dry, and gives their outcomes in their order.
fn run_group(
    engine: &mut Engine<Local<Lazy, Hashing>>,
    prompt: &[u32],
    params: SamplingParams,
    samples: u32,
) -> Vec<support::Outcome> {
    let of_sample = |sample| Request::new(prompt, params.of_sample(sample));
    let group: Vec<_> = (0..samples).map(of_sample).collect();
    let (mut tickets, mut outcomes) = (Vec::new(), Outcomes::default());
    engine.submit_group(&group, &mut |taken| tickets.push(taken.ticket)).expect("the group can run");
    run_dry(engine, &mut outcomes);
    tickets.into_iter().map(|ticket| outcomes.of(ticket)).collect()
}

/// What the samples of a prompt give alone.
fn samples_alone(prompt: &[u32], params: SamplingParams, samples: u32, limits: &Limits) -> Vec<Vec<u32>> {
    (0..samples).map(|sample| alone(prompt, &params.of_sample(sample), limits.sequence).0).collect()
}

#[test]
fn eight_samples_of_a_long_prompt_compute_it_once_and_hold_its_pages_once() {
    let limits = Limits {
        running: 8,
        queued: 8,
        sequence: 2048,
        prefill_tokens: 4096,
        page_size: 16,
        pages: 160,
        graph_rows: 8,
    };
    // The last page is not full, or is: then its last token is still drawn from.
    for (len, own) in [(2005, 5), (2000, 16)] {
        let (prompt, params) = (prompt(1, len), exactly(20));
        for (prefix_cache, policy, speculation) in [
            (true, Policy::Throughput, Speculation::Never),
            (false, Policy::Throughput, Speculation::Never),
            (false, Policy::Latency, Speculation::Never),
            (false, Policy::Throughput, Speculation::Always),
        ] {
            let mut options = options(limits);
            options.scheduler = Settings { prefix_cache, policy, speculation, ..options.scheduler };
            let mut engine = engine(options);
            let outcomes = run_group(&mut engine, &prompt, params, 8);
            let stats = engine.stats();
            assert_eq!(stats.prefill_tokens, u64::from(len + 7 * own), "the prompt once, and 7 last pages");
            let (shared, each) = ((len - own) / 16, (own + 20).div_ceil(16));
            assert_eq!(stats.pages_peak, shared + 8 * each, "the prompt's full pages are held once");
            assert_eq!(stats.retractions, 0);
            assert_eq!(tokens(outcomes), samples_alone(&prompt, params, 8, &limits));
        }
    }
}

#[test]
fn samples_that_find_no_place_together_enter_one_behind_the_other_and_still_compute_the_prompt_once() {
    // Two run at once, the prompt goes in chunks, and nobody is left of the group when the last ones enter.
    let limits = Limits { running: 2, ..SMALL };
    let (prompt, params) = (prompt(3, 34), exactly(4));
    for prefix_cache in [true, false] {
        let mut options = options(limits);
        options.scheduler.prefix_cache = prefix_cache;
        let mut engine = engine(options);
        let outcomes = run_group(&mut engine, &prompt, params, 7);
        assert_eq!(tokens(outcomes), samples_alone(&prompt, params, 7, &limits));
        assert_eq!(engine.stats().prefill_tokens, 34 + 6 * 2);
        // Without a prefix cache nothing is kept beyond the group.
        let again = run_group(&mut engine, &prompt, params, 2);
        let cached = if prefix_cache { 32 } else { 0 };
        assert_eq!(again[0].finished.map(|(_, cached)| cached), Some(cached));
        assert_eq!(again[1].finished.map(|(_, cached)| cached), Some(32));
    }
}

#[test]
fn retracted_samples_give_the_same_tokens_and_their_prompt_is_scored_once() {
    // Six of 7 pages each, and of 3 their own; 17 pages for all.
    let limits = Limits { running: 6, pages: 17, ..SMALL };
    let prompt_logprobs = Some(PromptLogprobs { from: 0, top: 0 });
    let (prompt, params) = (prompt(2, 16), SamplingParams { prompt_logprobs, ..exactly(12) });
    for (overlap, prefix_cache) in [(true, true), (true, false), (false, false)] {
        let mut options = options(limits);
        (options.overlap, options.scheduler.prefix_cache) = (overlap, prefix_cache);
        let mut engine = engine(options);
        let outcomes = run_group(&mut engine, &prompt, params, 6);
        let scores: Vec<usize> = outcomes.iter().map(|outcome| outcome.scores.len()).collect();
        assert_eq!(scores, [15, 0, 0, 0, 0, 0]);
        assert_eq!(tokens(outcomes), samples_alone(&prompt, params, 6, &limits));
        assert!(engine.stats().retractions > 0, "the pool is too small for all of them");
    }
}

#[test]
fn a_group_is_taken_in_wholly_or_not_at_all() {
    let mut engine = engine(options(SMALL));
    let (prompt, mut taken) = (prompt(1, 8), 0);
    let mut group: Vec<_> =
        (0..16).map(|sample| Request::new(&prompt, exactly(2).of_sample(sample))).collect();
    engine.submit_group(&group[..9], &mut |_| taken += 1).unwrap();
    let full = Err(SubmitError::QueueFull { capacity: 16 });
    assert_eq!(engine.submit_group(&group[..8], &mut |_| taken += 1), full);
    let too_many = SubmitError::TooManySamples { samples: 17, limit: 16 };
    let more = [&group[..], &group[..1]].concat();
    assert_eq!(engine.submit_group(&more, &mut |_| taken += 1), Err(too_many));
    group[6].params.top_p = f32::NAN;
    let refused = engine.submit_group(&group[..7], &mut |_| taken += 1);
    assert!(matches!(refused, Err(SubmitError::Sampling(SamplingError::TopP(_)))));
    assert_eq!(taken, 9);
    run_dry(&mut engine, &mut Outcomes::default());
    assert_eq!(engine.stats().finished, 9);
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

#[test]
fn decode_steps_are_padded_to_the_next_recorded_size_and_replayed() {
    let limits = Limits { running: 10, graph_rows: 8, pages: 200, prefill_tokens: 64, ..SMALL };
    for (requests, rows) in [(1, 1), (3, 4), (5, 8), (8, 8), (9, 9)] {
        let mut engine = engine(options(limits));
        let requests: Vec<_> = (0..requests).map(|text| (prompt(text, 4), exactly(5))).collect();
        for (prompt, params) in &requests {
            engine.submit(Request::new(prompt, *params)).expect("it can run");
        }
        let (mut decodes, mut outcomes) = (0, Outcomes::default());
        let before = engine.backend().replays;
        while !engine.is_idle() {
            let report = engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            if let Some(shape) = report.launched.filter(|shape| shape.is_decode()) {
                assert_eq!(shape, StepShape::decode(rows));
                decodes += 1;
            }
        }
        let replayed = if rows <= 8 { decodes } else { 0 };
        assert_eq!(engine.backend().replays - before, replayed, "{rows} rows");
        let padding = u64::from(rows) - requests.len() as u64;
        assert_eq!(engine.stats().padding_rows, decodes * padding);
        let came = outcomes.list.into_iter().map(|(_, outcome)| outcome.tokens).collect::<Vec<_>>();
        assert_eq!(came, expected_tokens(&requests, &limits));
    }
}

#[test]
fn with_overlap_a_step_is_enqueued_before_the_tokens_of_the_one_before_are_waited_for() {
    let limits = Limits { graph_rows: 0, ..SMALL };
    let request = Request::new(&[1, 2, 3], exactly(2));
    let (sent, run) =
        ("write upload_ahead", "take_batch forward norm head sample record wait record download");
    for overlap in [true, false] {
        let mut options = options(limits);
        options.overlap = overlap;
        let device = Trace::new(Lazy::new(Pace::Late));
        let mut engine = Engine::new(device, Hashing::default(), options).expect("valid limits");
        engine.submit(request).expect("it can run");
        engine.backend().take();
        let mut token_count = 0;
        let mut count = |_: minisgl_core::request::Event<'_>| token_count += 1;
        engine.step(&mut count).expect("the device does not fail");
        let alone = format!("{sent} record {run}");
        let first = if overlap { alone } else { format!("{alone} read") };
        assert_eq!(engine.backend().take(), first);
        engine.step(&mut count).expect("the device does not fail");
        // Its beginning is the other's end, if that is not known to have come.
        let second = if overlap { format!("{sent} {run} read") } else { first };
        assert_eq!(engine.backend().take(), second, "whose tokens, only their number tells");
        engine.step(&mut count).expect("the device does not fail");
        assert_eq!(engine.backend().take(), if overlap { "read" } else { "" });
        assert_eq!(token_count, 3, "two tokens and the end");
    }
}

#[test]
fn log_probabilities_come_back_only_in_steps_that_want_them() {
    let limits = Limits { graph_rows: 0, ..SMALL };
    let device = Trace::new(Lazy::new(Pace::Late));
    let mut engine = Engine::new(device, Hashing::default(), options(limits)).expect("valid limits");
    let wanting = SamplingParams { logprobs: Some(2), ..exactly(4) };
    let requests = [(prompt(1, 3), exactly(4)), (prompt(2, 3), wanting)];
    let outcomes = run_all(&mut engine, &requests);
    assert_eq!(outcomes[0].logprobs, []);
    let expected: Vec<f32> =
        expected::logprobs(&[&requests[1].0[..], &outcomes[1].tokens].concat(), 0, u32::MAX).split_off(2);
    assert_eq!(outcomes[1].logprobs, expected);
    assert!(engine.backend().take().contains("logprobs"));
    run_all(&mut engine, &requests[..1]);
    assert!(!engine.backend().take().contains("logprobs"));
}

#[test]
fn steps_are_timed_by_the_devices_clock() {
    for overlap in [true, false] {
        let mut options = options(SMALL);
        options.overlap = overlap;
        let mut engine = engine(options);
        engine.submit(Request::new(&prompt(1, 40), exactly(5))).expect("it can run");
        let (mut launched, mut completed, mut end_ms) = (Vec::new(), Vec::new(), 0.0);
        while !engine.is_idle() {
            let report = engine.step(&mut |_| ()).expect("the device does not fail");
            launched.extend(report.launched);
            if let Some(step) = report.completed {
                assert!(step.start_ms >= end_ms && step.gpu_ms > 0.0, "{step:?} after {end_ms}");
                end_ms = step.start_ms + f64::from(step.gpu_ms);
                completed.push(step.shape);
            }
        }
        assert_eq!(launched, completed);
    }
}

/// A device of so many words whose recorded steps take 7 words each, and pages as many as it holds, 6 at least.
fn fitted(words: usize) -> Result<Engine<Local<Lazy, Hashing>>, EngineError<LazyError>> {
    let mut device = Lazy::new(Pace::AtOnce);
    (device.memory_limit, device.graph_words) = (words, 7);
    let fit = Some(Fit { share: 0.95, least: 6 });
    Engine::new(device, Hashing::default(), EngineOptions { fit, ..options(SMALL) })
}

#[test]
fn pages_are_as_many_as_memory_holds_beside_everything_else_however_little_there_is() {
    let enough = (0..).find(|words| fitted(*words).is_ok()).expect("some number suffices");
    let roomy = fitted(enough + 10_000).expect("that is more");
    assert_eq!(roomy.limits().pages, SMALL.pages, "no more than are asked for");
    let mut most = 0;
    for words in enough..enough + 400 {
        let mut engine =
            fitted(words).unwrap_or_else(|error| panic!("of {words} words, {enough} do: {error}"));
        let (pages, free) = (engine.limits().pages, engine.backend().memory().expect("it has").free / 4);
        assert!(
            pages >= 6 && free < 4 * 7 * 3 + u64::from(pages) / 2,
            "{pages} pages, {free} words to spare"
        );
        most = most.max(pages);
        let requests: Vec<_> = (0..3).map(|text| (prompt(text, 8), exactly(10))).collect();
        assert_eq!(tokens(run_all(&mut engine, &requests)), expected_tokens(&requests, &SMALL));
    }
    assert!(most > 50, "{most} pages");
    match fitted(enough - 1).map(|_| ()) {
        Err(EngineError::Pages { least: 6, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn pages_take_their_share_of_the_memory_though_more_could_be_addressed() {
    let pages = |share| {
        let mut device = Lazy::new(Pace::AtOnce);
        device.memory_limit = 50_000;
        let (fit, limits) =
            (Some(Fit { share, least: 1 }), Limits { pages: u32::MAX / SMALL.page_size - 1, ..SMALL });
        let engine = Engine::new(device, Hashing::default(), EngineOptions { fit, ..options(limits) });
        engine.expect("memory suffices").limits().pages
    };
    let (all, half) = (pages(1.0), pages(0.5));
    assert!(all > 1000 && all.abs_diff(2 * half) <= 3, "{all} pages, and of half the memory {half}");
}

#[test]
fn pages_go_with_the_steps_that_were_recorded_on_them() {
    let mut device = Lazy::new(Pace::AtOnce);
    (device.memory_limit, device.graph_words) = (1 << 20, 7);
    let mut executor = Local::new(device, Hashing::default());
    executor.reserve(&SMALL).expect("memory suffices");
    let free = |executor: &Local<Lazy, Hashing>| executor.memory().expect("it has").free;
    let before = free(&executor);
    for _ in 0..2 {
        executor.alloc_pages(&SMALL).expect("memory suffices");
        let with_pages = free(&executor);
        executor.record(&SMALL).map_err(|error| error.source).expect("memory suffices");
        assert_eq!(free(&executor), with_pages - 4 * 7 * 3, "steps of 1, 2 and 4 rows");
        executor.free_pages().expect("the device does not fail");
        assert_eq!(free(&executor), before);
    }
}

#[test]
fn capacities_that_make_no_engine_are_refused_with_the_reason() {
    let build = |change: fn(&mut Limits)| {
        let mut limits = SMALL;
        change(&mut limits);
        Engine::new(Lazy::new(Pace::Late), Hashing::default(), options(limits)).map(|_| ())
    };
    assert!(build(|_| ()).is_ok() && build(|limits| limits.sequence = 4096).is_ok());
    let pages = build(|limits| limits.pages = 0);
    assert!(matches!(pages, Err(EngineError::Limits(LimitsError::Zero("number of pages")))));
    let size = build(|limits| limits.page_size = 12);
    assert!(matches!(size, Err(EngineError::Limits(LimitsError::PageSize(12)))));
    let sequence = build(|limits| limits.sequence = 5000);
    assert!(matches!(sequence, Err(EngineError::Sequence { sequence: 5000, max_positions: 4096 })));
    let mut wide = options(SMALL);
    wide.scheduler.vocab = VOCAB + 1;
    let wide = Engine::new(Lazy::new(Pace::Late), Hashing::default(), wide).map(|_| ());
    assert!(matches!(wide, Err(EngineError::Vocabulary { .. })));
}

/// Requests that repeat themselves, with and without log-probabilities, some of which end early.
fn repeating_requests() -> Vec<(Vec<u32>, SamplingParams)> {
    let request = |i: u32| {
        let prompt = (0..5 + 3 * i).map(|at| at % (2 + i)).collect();
        let seed = if i % 4 == 3 { i.into() } else { expected::REPEATING };
        (prompt, SamplingParams { seed, logprobs: i.is_multiple_of(2).then_some(1), ..exactly(20 + 2 * i) })
    };
    (0..6).map(request).collect()
}

#[test]
fn drafts_change_no_token_and_give_several_in_a_step() {
    for (overlap, pages, running) in
        [(true, 64, 4), (false, 64, 4), (true, 18, 4), (true, 64, 1), (true, 64, 2)]
    {
        let run = |speculation| {
            let limits = Limits { running, pages, ..SMALL };
            let scheduler = Settings { speculation, ..SETTINGS };
            let mut engine = engine(EngineOptions { overlap, scheduler, ..options(limits) });
            let outcomes = run_all(&mut engine, &repeating_requests());
            (outcomes, engine.stats())
        };
        let (expected, without) = run(Speculation::Never);
        let (outcomes, with) = run(Speculation::Always);
        assert_eq!(outcomes, expected);
        assert_eq!((without.drafted, without.accepted), (0, 0));
        match running {
            1 => assert_eq!(with.drafted, 0, "a step of one row has no room"),
            _ => assert!(0 < with.accepted && with.accepted < with.drafted, "{with:?}"),
        }
        if running == 2 {
            assert!(with.decode_steps < without.decode_steps, "{with:?} {without:?}");
        }
    }
}

#[test]
fn a_wrong_drafts_keys_do_not_reach_the_prefix_cache() {
    let scheduler = Settings { speculation: Speculation::Always, ..SETTINGS };
    let mut engine =
        engine(EngineOptions { scheduler, ..options(Limits { running: 4, page_size: 1, ..SMALL }) });
    for max_tokens in 1..24 {
        let params = SamplingParams { seed: expected::REPEATING, ..exactly(max_tokens) };
        let prompt = vec![0, 1, 0, 1, 0, 1];
        let first = run_all(&mut engine, &[(prompt.clone(), params)]).remove(0);
        // A prompt that the first one's output is part of finds its pages.
        let longer = [prompt, first.tokens, vec![5]].concat();
        let params = exactly(4);
        let outcome = run_all(&mut engine, &[(longer.clone(), params)]).remove(0);
        assert_eq!(outcome.tokens, expected::alone(&longer, &params, 64).0);
        assert!(outcome.finished.is_some_and(|(_, cached)| cached > 0));
    }
    assert!(engine.stats().accepted > 0 && engine.stats().drafted > engine.stats().accepted);
}

/// A constraint as a request takes it.
fn rule(seed: u32, late: u32) -> Arc<dyn Constraint> {
    Arc::new(Rule::new(seed, late))
}

/// A rule's seed whose output goes on for so many tokens at least.
fn seed_of_long_rule(request: &(Vec<u32>, SamplingParams), least: usize) -> u32 {
    let len =
        |seed: u32| alone_within(&request.0, &request.1, &[], SMALL.sequence, u32::MAX, Some(seed)).0.len();
    (0..).find(|seed| len(*seed) >= least).expect("some rule allows much")
}

#[test]
fn rows_without_a_constraint_wait_for_nobodys_mask_and_masks_are_waited_for_when_nothing_else_runs() {
    let (free, bound) = ((prompt(1, 5), exactly(20)), (prompt(2, 5), exactly(12)));
    let seed = seed_of_long_rule(&bound, 12);
    for overlap in [true, false] {
        let mut options = options(SMALL);
        options.overlap = overlap;
        let mut engine = engine(options);
        let constraint = rule(seed, u32::MAX);
        let free_ticket = engine.submit(Request::new(&free.0, free.1)).expect("it can run").ticket;
        let request = Request { constraint: Some(&constraint), ..Request::new(&bound.0, bound.1) };
        let bound_ticket = engine.submit(request).expect("it can run").ticket;
        let (mut outcomes, mut steps) = (Outcomes::default(), 0);
        while outcomes.of(free_ticket).finished.is_none() {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            steps += 1;
        }
        assert_eq!(steps, 20 + u32::from(overlap), "a token in every step");
        assert_eq!(outcomes.of(bound_ticket).tokens, [], "its mask comes only when it is waited for");
        run_dry(&mut engine, &mut outcomes);
        let expected = alone_within(&bound.0, &bound.1, &[], SMALL.sequence, u32::MAX, Some(seed));
        assert_eq!(outcomes.of(bound_ticket).tokens, expected.0);
    }
}

/// A constraint whose state never changes.
#[derive(Debug)]
struct Stuck(ConstraintState);

impl Constraint for Stuck {
    fn accept(&self, token: u32) {
        panic!("token {token} was drawn");
    }

    fn state(&self) -> ConstraintState {
        self.0
    }

    fn wait(&self) {}

    fn write_mask(&self, _: &mut [u32]) {
        panic!("there is no mask");
    }
}

#[test]
fn a_request_whose_constraint_allows_nothing_from_the_beginning_ends_and_those_behind_it_run() {
    for (state, reason) in [
        (ConstraintState::Complete, FinishReason::Complete),
        (ConstraintState::Failed, FinishReason::ConstraintFailed),
    ] {
        let mut engine = engine(options(Limits { running: 1, ..SMALL }));
        let constraint: Arc<dyn Constraint> = Arc::new(Stuck(state));
        let request = Request { constraint: Some(&constraint), ..Request::new(&[1, 2], exactly(3)) };
        let (mut outcomes, free) = (Outcomes::default(), (prompt(1, 5), exactly(4)));
        let first = engine.submit(Request::new(&free.0, free.1)).expect("it can run").ticket;
        let stuck = [(); 2].map(|()| engine.submit(request).expect("it can run").ticket);
        let last = engine.submit(Request::new(&free.0, free.1)).expect("it can run").ticket;
        for _ in 0..20 {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
        }
        assert!(engine.is_idle());
        for ticket in stuck {
            assert_eq!(outcomes.of(ticket).finished, Some((reason, 0)));
        }
        for ticket in [first, last] {
            assert_eq!(outcomes.of(ticket).tokens, alone(&free.0, &free.1, SMALL.sequence).0);
        }
    }
}

#[test]
fn a_request_with_allowed_tokens_has_a_token_in_every_step_drafts_among_them() {
    let ids = [2, 5, 11];
    let rules = Arc::new(Rules::default().allowing(ids.to_vec()).expect("a token at least"));
    let params = SamplingParams { seed: expected::REPEATING, ..exactly(20) };
    let repeating = vec![2, 5, 2, 5, 2, 5];
    let expected = expected::alone_allowing(&repeating, &params, &[], SMALL.sequence, u32::MAX, None, &ids);
    assert!(expected.0.iter().all(|token| ids.contains(token)));
    for (overlap, speculation) in
        [(true, Speculation::Never), (false, Speculation::Never), (true, Speculation::Always)]
    {
        let mut options = options(SMALL);
        (options.overlap, options.scheduler.speculation) = (overlap, speculation);
        let mut engine = engine(options);
        let request = Request { rules: Some(&rules), ..Request::new(&repeating, params) };
        let ticket = engine.submit(request).expect("it can run").ticket;
        let (mut outcomes, mut steps) = (Outcomes::default(), 0);
        while outcomes.of(ticket).finished.is_none() {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            steps += 1;
        }
        assert_eq!(outcomes.of(ticket).tokens, expected.0);
        match speculation {
            Speculation::Never => assert_eq!(steps, 20 + u32::from(overlap), "a token in every step"),
            _ => assert!(engine.stats().accepted > 0 && steps < 20, "{steps}, {:?}", engine.stats()),
        }
    }
}

#[test]
fn constrained_requests_advance_together_however_many_they_are() {
    let running = 300;
    let (prompt, params) = (prompt(4, 5), exactly(9));
    let limits = Limits {
        running,
        queued: running,
        prefill_tokens: 5 * running,
        pages: 8 * running,
        graph_rows: 0,
        ..SMALL
    };
    for overlap in [true, false] {
        let mut options = options(limits);
        (options.overlap, options.scheduler.prefix_cache) = (overlap, false);
        let mut engine = engine(options);
        let mut submit = |seed| {
            let constraint = Some(&rule(seed, 0));
            let request = Request { constraint, ..Request::new(&prompt, params) };
            engine.submit(request).expect("it can run").ticket
        };
        let tickets: Vec<Ticket> = (0..running).map(&mut submit).collect();
        let mut outcomes = Outcomes::default();
        while !engine.is_idle() {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            let going_on = outcomes.list.iter().filter(|(_, outcome)| outcome.finished.is_none());
            let mut tokens = going_on.map(|(_, outcome)| outcome.tokens.len());
            let first = tokens.next();
            assert!(tokens.all(|other| Some(other) == first), "somebody is behind");
        }
        for (seed, ticket) in (0..).zip(tickets) {
            let (tokens, reason) = alone_within(&prompt, &params, &[], limits.sequence, u32::MAX, Some(seed));
            let outcome = outcomes.of(ticket);
            assert_eq!((outcome.tokens, outcome.finished), (tokens, Some((reason, 0))), "rule {seed}");
        }
    }
}
