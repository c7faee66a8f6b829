//! Steps: recorded, overlapped, timed.

use minisgl_core::batch::StepShape;
use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineError};
use minisgl_core::request::Request;
use minisgl_core::sampling::SamplingParams;

use super::{expected_tokens, prompt};
use crate::support::expected::{self};
use crate::support::hashing::Hashing;
use crate::support::lazy::{Lazy, Pace};
use crate::support::trace::Trace;
use crate::support::{Outcomes, SMALL, engine, exactly, options, run_all};

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
