//! Every operation of the device may fail: the engine says where, stops, and what it gave out before was right.

mod support;

use minisgl_core::config::Limits;
use minisgl_core::embedding::Embed;
use minisgl_core::engine::{Engine, EngineError};
use minisgl_core::request::{Event, FinishReason, Request, SubmitError};
use minisgl_core::sampling::SamplingParams;

use support::expected::{alone, embedding};
use support::fault::{Fault, Faulty, FaultyError};
use support::hashing::Hashing;
use support::lazy::{Lazy, Pace};
use support::{Outcomes, exactly, options};

const LIMITS: Limits =
    Limits { running: 3, queued: 8, sequence: 32, prefill_tokens: 8, page_size: 4, pages: 16, graph_rows: 2 };

fn requests() -> Vec<(Vec<u32>, SamplingParams)> {
    let wanting = SamplingParams { logprobs: Some(1), ..exactly(2) };
    let embedded = SamplingParams { embed: Some(Embed::default()), ..exactly(0) };
    vec![
        (vec![1, 2, 3], wanting),
        (vec![2; 11], exactly(5)),
        (vec![3, 1], exactly(9)),
        (vec![4; 6], embedded),
    ]
}

/// A device of which the operation behind `healthy` others fails.
fn faulty(healthy: u64) -> Faulty<Lazy> {
    let device = Faulty::new(Lazy::new(Pace::Late));
    device.arm(healthy, Fault::Fails);
    device
}

/// Runs with the `healthy + 1`-th operation failing. False if there were not so many.
fn run(healthy: u64, overlap: bool) -> bool {
    let mut options = options(LIMITS);
    options.overlap = overlap;
    let device = faulty(healthy);
    let mut engine = match Engine::new(device, Hashing::default(), options) {
        Ok(engine) => engine,
        Err(error) => {
            assert!(matches!(
                error,
                EngineError::Setup(FaultyError::OnPurpose(_))
                    | EngineError::Capture { source: FaultyError::OnPurpose(_), .. }
            ));
            return true;
        }
    };
    let requests = requests();
    let mut tickets = Vec::new();
    for (prompt, params) in &requests {
        let submitted = engine.submit(Request::new(prompt, *params));
        tickets.push(submitted.expect("it can run").ticket);
    }
    let mut outcomes = Outcomes::default();
    let error = loop {
        if engine.is_idle() {
            return false;
        }
        if let Err(error) = engine.step(&mut |event| outcomes.take_in(event)) {
            break error;
        }
    };
    let operation = engine.backend().failed.get().expect("nothing else fails");
    let said = error.to_string();
    assert!(said.contains(operation) && said.contains("step of"), "{said}");
    let EngineError::Step { shape, .. } = error else { panic!("{error:?}") };
    assert!((1..=3).contains(&shape.rows()) && (1..=10).contains(&shape.tokens), "{shape:?}");
    for (ticket, (prompt, params)) in tickets.iter().zip(&requests) {
        let (outcome, (all, reason)) = (outcomes.of(*ticket), alone(prompt, params, LIMITS.sequence));
        assert!(all.starts_with(&outcome.tokens), "what came before the failure is right");
        let embedding = params.embed.map(|_| embedding(prompt, 0, u32::MAX).to_vec());
        let is_whole = outcome.tokens == all && outcome.embedding == embedding;
        let finished = is_whole.then_some((reason, 0));
        assert_eq!(outcome.finished, finished, "what had ended has ended");
    }
    engine.check();
    assert!(matches!(engine.step(&mut |_| ()), Err(EngineError::Stopped)));
    assert_eq!(engine.submit(Request::new(&[1], exactly(1))), Err(SubmitError::Stopped));
    true
}

#[test]
fn a_failed_operation_stops_the_engine_and_leaves_what_came_before() {
    for overlap in [true, false] {
        let failures = (0..).take_while(|healthy| run(*healthy, overlap)).count();
        assert!(failures > 100, "a run asks for more operations than {failures}");
    }
}

#[test]
fn a_request_can_be_aborted_after_the_engine_has_stopped() {
    // The operations of construction are counted first: of an engine that is built and asked for nothing.
    let build = |healthy| Engine::new(faulty(healthy), Hashing::default(), options(LIMITS));
    let healthy = (0..).find(|healthy| build(*healthy).is_ok()).expect("some number suffices");
    let mut engine = build(healthy).expect("as just tried");
    let request = Request::new(&[1, 2], exactly(4));
    let ticket = engine.submit(request).expect("it can run").ticket;
    assert!(engine.step(&mut |_| ()).is_err());
    let mut reasons = Vec::new();
    assert!(engine.abort(ticket, &mut |event| {
        if let Event::Finished { reason, .. } = event {
            reasons.push(reason);
        }
    }));
    assert_eq!(reasons, [FinishReason::Abort]);
    assert!(engine.is_idle());
}

#[test]
fn a_device_with_too_little_memory_is_an_error_that_says_so() {
    let mut device = Lazy::new(Pace::Late);
    device.memory_limit = 100;
    let Err(error) = Engine::new(device, Hashing::default(), options(LIMITS)) else {
        panic!("100 words are too few");
    };
    assert!(error.to_string().contains("can't allocate"), "{error}");
}
