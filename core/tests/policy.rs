//! What policies promise, by themselves and with an engine around them.

mod support;

use minisgl_core::batch::StepShape;
use minisgl_core::config::Limits;
use minisgl_core::costs::{Line, StepCosts};
use minisgl_core::engine::Engine;
use minisgl_core::local::Local;
use minisgl_core::policy::{Demand, Mix, Policy, StepPolicy};
use minisgl_core::request::Request;
use proptest::prelude::*;

use support::hashing::Hashing;
use support::lazy::{Lazy, Pace};
use support::{Outcomes, SMALL, exactly, options, run_dry};

/// About those of a small model on a large GPU.
const GPU: StepCosts = StepCosts {
    decode: Line { fixed_ms: 0.5, token_ms: 0.0025 },
    mixed: Line { fixed_ms: 1.5, token_ms: 0.002 },
    attention: Line { fixed_ms: 0.1, token_ms: 1e-6 },
};
/// Of nothing.
const NOTHING: Line = Line { fixed_ms: 0.0, token_ms: 0.0 };
/// Of a device on which prompts had better run together.
const DEAR_PROMPTS: StepCosts = StepCosts {
    decode: Line { fixed_ms: 10.0, token_ms: 0.0 },
    mixed: Line { fixed_ms: 80.0, token_ms: 0.1 },
    attention: NOTHING,
};

/// 250 requests decode, a prompt waits for which there is a place, others for places.
const DEMAND: Demand = Demand {
    decode_rows: 250,
    prompts: 1,
    prompt_tokens: 100,
    context: 0,
    prompt_tokens_max: 8000,
    places_are_short: true,
    has_arrivals: false,
};

fn throughput(costs: StepCosts) -> Box<dyn StepPolicy> {
    Policy::Throughput.build(costs, 256)
}

/// Decode steps before the prompts run.
fn held(policy: &mut dyn StepPolicy, demand: &Demand) -> usize {
    (0..1000).take_while(|_| policy.next(demand).prompt_tokens == 0).count()
}

#[test]
fn prompts_are_held_back_until_that_has_cost_as_much_as_running_them() {
    // Running them costs 1.5 ms beside their tokens; a row that stays empty, 0.5 / 256 ms a step.
    let steps = (1.5_f64 / (0.5 / 256.0)).ceil() as usize;
    for prompts in [16, 40, 100] {
        let demand = Demand { prompts, ..DEMAND };
        let mut policy = throughput(GPU);
        for _ in 0..2 {
            assert_eq!(held(&mut *policy, &demand), steps.div_ceil(prompts as usize));
        }
    }
}

#[test]
fn nobody_is_held_back_where_that_brings_nothing() {
    let full = Demand { prompt_tokens: 8000, ..DEMAND };
    let nothing_decodes = Demand { decode_rows: 0, ..DEMAND };
    let all_have_places = Demand { places_are_short: false, ..DEMAND };
    for demand in [full, nothing_decodes, all_have_places] {
        assert_eq!(held(&mut *throughput(GPU), &demand), 0, "{demand:?}");
    }
    assert!(held(&mut *throughput(GPU), &Demand { has_arrivals: true, ..all_have_places }) > 0);
}

#[test]
fn running_requests_decode_beside_prompts_where_that_costs_less_than_it_spares() {
    let full = Demand { prompt_tokens: 8000, ..DEMAND };
    let decodes = |costs, demand: &Demand| throughput(costs).next(demand).decodes;
    assert!(decodes(GPU, &full));
    let dear_beside_prompts = Line { fixed_ms: 1.5, token_ms: 0.01 };
    assert!(!decodes(StepCosts { mixed: dear_beside_prompts, ..GPU }, &full));
    // A step less spares what it costs by itself, too.
    let dearer_than_rows = Line { fixed_ms: 1.5, token_ms: 0.004 };
    assert!(decodes(StepCosts { mixed: dearer_than_rows, ..GPU }, &full));
    // Where all have places, no step is spared: few rows wait, until all prompts have run.
    let all_have_places = Demand { places_are_short: false, ..full };
    assert!(!decodes(GPU, &all_have_places));
    assert!(decodes(GPU, &Demand { decode_rows: 2000, ..all_have_places }));
}

/// How long a step of so many decode rows, which alone takes `decode_ms`, and tokens of a prompt behind a context takes.
fn mixed_ms(decode_ms: f32, rows: u32, tokens: u32, context: u32) -> f32 {
    let attention_ms = decode_ms - GPU.decode.at(rows);
    let pairs = tokens as f32 * (context as f32 + tokens as f32 / 2.0);
    GPU.mixed.at(rows + tokens) + attention_ms + GPU.attention.fixed_ms + GPU.attention.token_ms * pairs
}

#[test]
fn with_latency_a_mixed_step_takes_at_most_twice_as_long_as_the_last_decode_step() {
    let mut policy = Policy::Latency.build(GPU, 256);
    let mut portions = Vec::new();
    for (decode_ms, rows, context) in
        [(2.5, 64, 0), (4.0, 64, 0), (4.0, 64, 1000), (4.0, 64, 16000), (8.0, 200, 3000), (2.5, 1, 16000)]
    {
        policy.has_run(StepShape::decode(rows), decode_ms);
        // A step with prompts in it says nothing of how long one without takes.
        policy.has_run(StepShape { prefill_rows: 1, tokens: rows + 100, ..StepShape::decode(rows) }, 50.0);
        let demand = Demand { decode_rows: rows, prompt_tokens: 8000, context, ..DEMAND };
        let Mix { decodes, prompt_tokens } = policy.next(&demand);
        let (taken_ms, allowed_ms) = (mixed_ms(decode_ms, rows, prompt_tokens, context), 2.0 * decode_ms);
        assert!(decodes && taken_ms <= allowed_ms + 1e-3, "{taken_ms} of {allowed_ms}: {prompt_tokens}");
        assert!(taken_ms > 0.9 * allowed_ms, "and not much less than that: {taken_ms} of {allowed_ms}");
        portions.push(prompt_tokens);
    }
    assert!(
        portions[1] > portions[2] && portions[2] > portions[3],
        "behind more there are fewer: {portions:?}"
    );
}

#[test]
fn with_latency_a_step_that_is_long_by_itself_takes_few_tokens_whatever_lies_before_them() {
    let mixed = Line { fixed_ms: 1.5, token_ms: 3e-4 };
    let decode = Line { fixed_ms: 0.2, token_ms: 0.0 };
    for token_ms in [1e-6, 2.28e-6, 1e-5] {
        let costs = StepCosts { decode, mixed, attention: Line { fixed_ms: 0.1, token_ms } };
        for (decode_ms, context) in [(0.2, 0), (0.2, 200), (0.5, 0), (0.65, 200), (0.7, 16_000)] {
            let mut policy = Policy::Latency.build(costs, 256);
            policy.has_run(StepShape::decode(200), decode_ms);
            let demand = Demand { decode_rows: 200, prompt_tokens: 8000, context, ..DEMAND };
            assert_eq!(policy.next(&demand).prompt_tokens, 64, "{decode_ms} ms, behind {context}");
        }
    }
}

#[test]
fn with_latency_a_prompt_ends_with_one_long_step_where_less_than_one_gap_in_a_hundred_is_long() {
    for (rows, may_be_long) in [(1, true), (5, true), (15, true), (17, false), (200, false)] {
        let mut policy = Policy::Latency.build(GPU, 256);
        let decode_ms = 2.5;
        policy.has_run(StepShape::decode(rows), decode_ms);
        // A prompt too long for a usual step comes every few steps.
        let (mut long, steps) = (0, 10_000);
        for step in 0..steps {
            let prompts = u32::from(step % 7 == 0);
            let demand = Demand { decode_rows: rows, prompts, prompt_tokens: prompts * 1000, ..DEMAND };
            let tokens = policy.next(&demand).prompt_tokens * prompts;
            let ms = mixed_ms(decode_ms, rows, tokens.min(1000), 0);
            assert!(tokens == 0 || ms <= 4.0 * decode_ms + 1e-3, "{ms}");
            long += u32::from(tokens >= 1000);
        }
        // All rows of a step see the same gap.
        assert!(f64::from(long) <= f64::from(steps) / 100.0, "{rows} rows: {long}");
        assert_eq!(long > 0, may_be_long, "{rows} rows: {long}");
    }
}

#[test]
fn with_latency_steps_are_long_where_a_crowd_has_waited_for_64_of_them_and_until_it_is_gone() {
    let decode_ms = 2.5;
    for (rows, few, crowd) in [(8, 7, 8), (64, 7, 8), (256, 15, 16)] {
        let mut policy = Policy::Latency.build(GPU, 256);
        policy.has_run(StepShape::decode(rows), decode_ms);
        let mut plain_steps = |prompts| {
            let demand = Demand { decode_rows: rows, prompts, prompt_tokens: 8000, ..DEMAND };
            mixed_ms(decode_ms, rows, policy.next(&demand).prompt_tokens, 0) / decode_ms
        };
        assert!((0..200).all(|_| plain_steps(few) < 2.0), "{few} beside {rows} are no crowd");
        for _ in 0..2 {
            assert!((0..64).all(|_| plain_steps(crowd) < 2.0), "{crowd} beside {rows} are one, not for long");
            assert!((0..100).all(|_| (5.0..6.2).contains(&plain_steps(crowd))), "{crowd} beside {rows}");
            assert!(plain_steps(few) < 2.0, "it is gone");
        }
    }
}

#[test]
fn with_latency_a_prompt_of_five_plain_steps_is_not_cut_where_few_rows_decode() {
    let (rows, decode_ms) = (2, 0.75);
    let mut policy = Policy::Latency.build(GPU, 256);
    policy.has_run(StepShape::decode(rows), decode_ms);
    // Gaps that may be long are saved up.
    let plain = Demand { decode_rows: rows, prompts: 0, prompt_tokens: 0, ..DEMAND };
    (0..300).for_each(|_| assert_eq!(policy.next(&plain).prompt_tokens, 64));
    let demand = Demand { decode_rows: rows, prompts: 1, prompt_tokens: 900, ..DEMAND };
    assert!(policy.next(&demand).prompt_tokens >= 900);
    let plain_steps = mixed_ms(decode_ms, rows, 900, 0) / decode_ms;
    assert!((4.2..6.0).contains(&plain_steps), "{plain_steps}");
}

fn costs() -> impl Strategy<Value = StepCosts> {
    let value = || prop_oneof![Just(0.0f32), Just(f32::INFINITY), Just(f32::NAN), 0.0..100.0f32];
    let line = move || (value(), value()).prop_map(|(fixed_ms, token_ms)| Line { fixed_ms, token_ms });
    (line(), line(), line()).prop_map(|(decode, mixed, attention)| StepCosts { decode, mixed, attention })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whoever_waits_is_let_in_within_64_steps_whatever_steps_seem_to_cost(
        costs in costs(),
        decode_rows in 0..300u32,
        prompt_tokens in 1..200u32,
        places_are_short in any::<bool>(),
        has_arrivals in any::<bool>(),
    ) {
        let demand = Demand { decode_rows, prompt_tokens, places_are_short, has_arrivals, ..DEMAND };
        for policy in [Policy::Throughput, Policy::Latency] {
            let mut policy = policy.build(costs, 256);
            policy.has_run(StepShape::decode(decode_rows), costs.decode.fixed_ms);
            prop_assert!(held(&mut *policy, &demand) <= 64);
        }
    }

    #[test]
    fn with_latency_all_decode_in_every_step_and_prompts_go_on(costs in costs(), decode_rows in 0..300u32) {
        let mut policy = Policy::Latency.build(costs, 256);
        for prompt_tokens in [1, 5000] {
            let mix = policy.next(&Demand { decode_rows, prompt_tokens, ..DEMAND });
            prop_assert!(mix.decodes && mix.prompt_tokens >= 64, "{:?}", mix);
        }
    }
}

#[test]
fn what_steps_cost_is_measured_when_an_engine_is_built() {
    let given = StepCosts {
        decode: Line { fixed_ms: 5.0, token_ms: 0.25 },
        mixed: Line { fixed_ms: 20.0, token_ms: 0.04 },
        attention: Line { fixed_ms: 0.0, token_ms: 1e-4 },
    };
    let limits =
        Limits { running: 256, prefill_tokens: 2048, sequence: 1024, pages: 2048, graph_rows: 256, ..SMALL };
    let engine = Engine::new(Lazy::priced(Pace::Late, given), Hashing::default(), options(limits))
        .expect("valid limits");
    let measured = engine.costs();
    let is_near = |measured: f32, given: f32, by: f32| (measured - given).abs() <= by;
    // The device's clock counts whole milliseconds, and an operation is one of them.
    for rows in [1, 100, 256] {
        assert!(is_near(measured.decode.at(rows), given.decode.at(rows), 8.0), "{rows} rows: {measured:?}");
    }
    for tokens in [64, 1000, 2048] {
        // Their prompts attend to themselves.
        let ms = given.mixed.at(tokens);
        assert!(is_near(measured.mixed.at(tokens), ms, 8.0 + ms / 6.0), "{tokens} tokens: {measured:?}");
    }
    assert!(is_near(measured.attention.token_ms, given.attention.token_ms, 2e-5), "{measured:?}");
    assert!(is_near(measured.attention.fixed_ms, 0.0, 8.0), "{measured:?}");
}

/// Requests that come one by one, one in each step, as texts do from a tokenizer that is slower than the device.
fn one_by_one(policy: Policy, requests: u32) -> Engine<Local<Lazy, Hashing>> {
    let limits = Limits { running: 64, queued: 64, pages: 4000, prefill_tokens: 500, ..SMALL };
    let costs = StepCosts {
        decode: Line { fixed_ms: 4.0, token_ms: 0.1 },
        mixed: Line { fixed_ms: 12.0, token_ms: 0.1 },
        attention: NOTHING,
    };
    let mut options = options(limits);
    options.scheduler.policy = policy;
    let mut engine =
        Engine::new(Lazy::priced(Pace::Late, costs), Hashing::default(), options).expect("valid limits");
    let mut outcomes = Outcomes::default();
    for text in 0..requests {
        let prompt: Vec<u32> = (0..20).map(|i| (text >> i) % 13).collect();
        engine.submit(Request::new(&prompt, exactly(40))).expect("it can run");
        engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
    }
    run_dry(&mut engine, &mut outcomes);
    engine
}

#[test]
fn prompts_that_come_one_by_one_run_together() {
    let stats = one_by_one(Policy::Throughput, 200).stats();
    let steps = stats.prefill_steps + stats.mixed_steps;
    assert!((10..40).contains(&steps), "{stats:?}");
    let stats = one_by_one(Policy::Latency, 200).stats();
    assert!(stats.prefill_steps + stats.mixed_steps > 100, "{stats:?}");
}

#[test]
fn with_latency_no_running_request_waits_for_a_prompt() {
    let limits = Limits { running: 8, sequence: 1024, pages: 1000, prefill_tokens: 512, ..SMALL };
    for (policy, portions) in [(Policy::Latency, 700_u32.div_ceil(64)), (Policy::Throughput, 2)] {
        let mut options = options(limits);
        options.scheduler.policy = policy;
        let costs = StepCosts {
            decode: Line { fixed_ms: 10.0, token_ms: 1.0 },
            mixed: Line { fixed_ms: 20.0, token_ms: 0.3 },
            attention: NOTHING,
        };
        let mut engine =
            Engine::new(Lazy::priced(Pace::Late, costs), Hashing::default(), options).expect("valid limits");
        let mut outcomes = Outcomes::default();
        let submit = |engine: &mut Engine<_>, prompt: &[u32]| {
            engine.submit(Request::new(prompt, exactly(60))).expect("it can run");
        };
        [1, 2, 3].iter().for_each(|text| submit(&mut engine, &[*text; 5]));
        for _ in 0..4 {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
        }
        submit(&mut engine, &[4; 700]);
        let mut shapes = Vec::new();
        for _ in 0..20 {
            let report = engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            shapes.extend(report.launched);
        }
        let waited = shapes.iter().any(|shape| shape.decode_rows < 3);
        assert_eq!(waited, policy == Policy::Throughput, "{policy:?}: {shapes:?}");
        let mixed = shapes.iter().filter(|shape| shape.prefill_rows > 0).count();
        assert_eq!(mixed, portions as usize, "{policy:?}: {shapes:?}");
        run_dry(&mut engine, &mut outcomes);
    }
}

#[test]
fn with_latency_a_step_is_launched_when_the_one_in_flight_is_about_to_end_and_else_at_once() {
    let costs = StepCosts { decode: Line { fixed_ms: 500.0, token_ms: 1.0 }, ..StepCosts::default() };
    for (policy, overlap, pace, is_late) in [
        (Policy::Latency, true, Pace::Late, true),
        (Policy::Latency, true, Pace::AtOnce, false), // The step has run when its launch returns.
        (Policy::Latency, false, Pace::Late, false),
        (Policy::Throughput, true, Pace::Late, false),
    ] {
        let mut options = options(Limits { running: 8, pages: 200, ..SMALL });
        (options.scheduler.policy, options.overlap) = (policy, overlap);
        let mut engine =
            Engine::new(Lazy::priced(pace, costs), Hashing::default(), options).expect("valid limits");
        let mut outcomes = Outcomes::default();
        assert_eq!(engine.launch_after_ms(), 0.0, "nothing is in flight");
        engine.submit(Request::new(&[1, 2, 3], exactly(20))).expect("it can run");
        for _ in 0..5 {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
        }
        let after_ms = engine.launch_after_ms();
        assert_eq!((400.0..510.0).contains(&after_ms), is_late, "{policy:?} {overlap} {pace:?}: {after_ms}");
        assert!(is_late || after_ms == 0.0, "{after_ms}");
        run_dry(&mut engine, &mut outcomes);
        assert_eq!(engine.launch_after_ms(), 0.0, "nothing is in flight");
    }
}

#[test]
fn with_latency_a_device_that_idles_while_nobody_asks_is_no_reason_to_launch_earlier() {
    let costs = StepCosts { decode: Line { fixed_ms: 50.0, token_ms: 0.0 }, ..StepCosts::default() };
    let mut options = options(SMALL);
    options.scheduler.policy = Policy::Latency;
    let mut engine =
        Engine::new(Lazy::priced(Pace::Late, costs), Hashing::default(), options).expect("valid limits");
    for _ in 0..40 {
        engine.submit(Request::new(&[1, 2, 3], exactly(1))).expect("it can run");
        run_dry(&mut engine, &mut Outcomes::default());
    }
    engine.submit(Request::new(&[1, 2, 3], exactly(9))).expect("it can run");
    let mut decode_ms = 0.0;
    for _ in 0..4 {
        let report = engine.step(&mut |_| ()).expect("the device does not fail");
        decode_ms = report.completed.map_or(0.0, |step| step.gpu_ms);
    }
    let lead_ms = decode_ms - engine.launch_after_ms();
    assert!((0.0..1.0).contains(&lead_ms), "{lead_ms} ms before {decode_ms}");
}

#[test]
fn requests_that_share_a_prefix_count_as_what_is_left_of_them() {
    // Two of 72 tokens would fill a step of 128, and run at once; but 68 of each are in the cache.
    let limits = Limits { running: 5, prefill_tokens: 128, sequence: 100, pages: 200, ..SMALL };
    let mut engine = Engine::new(Lazy::priced(Pace::Late, DEAR_PROMPTS), Hashing::default(), options(limits))
        .expect("valid limits");
    let mut outcomes = Outcomes::default();
    let prompt = |tail: u32| -> Vec<u32> { (0..68).map(|i| i % 13).chain([tail; 4]).collect() };
    let mut prefilled = Vec::new();
    for tails in [0..1, 1..3, 3..5] {
        for tail in tails {
            engine.submit(Request::new(&prompt(tail), exactly(20))).expect("it can run");
        }
        prefilled.extend(engine.step(&mut |event| outcomes.take_in(event)).expect("a step").launched);
    }
    run_dry(&mut engine, &mut outcomes);
    assert!(prefilled[1..].iter().all(|shape| shape.is_decode()), "{prefilled:?}");
    assert_eq!(engine.stats().prefill_tokens, 72 + 4 * 4);
}

#[test]
fn a_prompt_is_held_back_only_while_others_wait_for_a_place() {
    for (backlog, runs_at_once) in [(0, true), (9, false)] {
        let limits = Limits { running: 4, prefill_tokens: 128, sequence: 100, pages: 200, ..SMALL };
        let mut engine =
            Engine::new(Lazy::priced(Pace::Late, DEAR_PROMPTS), Hashing::default(), options(limits))
                .expect("valid limits");
        let mut outcomes = Outcomes::default();
        let mut step = |engine: &mut Engine<_>| {
            let report = engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            report.launched.expect("there is something to run")
        };
        engine.submit(Request::new(&[1; 20], exactly(60))).expect("it can run");
        step(&mut engine);
        engine.submit(Request::new(&[2; 20], exactly(60))).expect("it can run");
        engine.set_backlog(backlog);
        assert!(step(&mut engine).is_decode(), "it has just come, and others may follow");
        assert_eq!(step(&mut engine).prefill_rows == 1, runs_at_once, "a backlog of {backlog}");
    }
}

#[test]
fn a_prompt_is_held_back_while_others_find_no_pages() {
    for (pages, runs_at_once) in [(200, true), (20, false)] {
        let limits = Limits { running: 4, prefill_tokens: 128, sequence: 100, pages, ..SMALL };
        let mut engine =
            Engine::new(Lazy::priced(Pace::Late, DEAR_PROMPTS), Hashing::default(), options(limits))
                .expect("valid limits");
        let step = |engine: &mut Engine<_>| {
            let report = engine.step(&mut |_| ()).expect("the device does not fail");
            report.launched.expect("there is something to run")
        };
        engine.submit(Request::new(&[1; 20], exactly(60))).expect("it can run");
        step(&mut engine);
        // Of 14 pages and one for each that runs, the second takes 5, and the third finds less than 10.
        for prompt in [&[2; 20][..], &[3; 40]] {
            engine.submit(Request::new(prompt, exactly(20))).expect("it can run");
        }
        assert!(step(&mut engine).is_decode(), "they have just come, and others may follow");
        assert_eq!(step(&mut engine).prefill_rows > 0, runs_at_once, "{pages} pages");
    }
}

#[test]
fn with_latency_a_prompt_beside_which_nobody_decodes_goes_in_whole_steps() {
    let limits = Limits { running: 8, sequence: 1024, pages: 1000, prefill_tokens: 512, ..SMALL };
    let mut options = options(limits);
    options.scheduler.policy = Policy::Latency;
    let mut engine = Engine::new(Lazy::priced(Pace::Late, DEAR_PROMPTS), Hashing::default(), options)
        .expect("valid limits");
    engine.submit(Request::new(&[4; 1000], exactly(3))).expect("it can run");
    let mut launched = || engine.step(&mut |_| ()).expect("the device does not fail").launched;
    let tokens = [launched(), launched()].map(|shape| shape.map(|shape| shape.prefill_tokens()));
    assert_eq!(tokens, [Some(512), Some(488)]);
}

#[test]
fn a_mix_of_decode_rows_alone_has_no_prompts() {
    assert_eq!(throughput(GPU).next(&Demand { prompts: 0, prompt_tokens: 0, ..DEMAND }), Mix::DECODE);
}
