//! Random request streams over tiny pools: whatever runs beside a request, it gives what it gives alone.
//!
//! A million of them, in some minutes:
//!
//! ```sh
//! PROPTEST_CASES=1000000 cargo test --release -p minisgl-core --test random every_request
//! ```

mod support;

use std::sync::Arc;

use minisgl_core::config::Limits;
use minisgl_core::constraint::Constraint;
use minisgl_core::costs::{Line, StepCosts};
use minisgl_core::embedding::Embed;
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::local::Local;
use minisgl_core::policy::Policy;
use minisgl_core::request::{FinishReason, Request, SubmitError, Ticket};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{PromptLogprobs, SamplingParams};
use minisgl_core::scheduler::{Order, Settings};
use minisgl_core::speculation::Speculation;
use proptest::prelude::*;

use support::expected::{self, EOS, FAILING, HIDDEN, VOCAB};
use support::hashing::Hashing;
use support::lazy::{Lazy, Pace};
use support::rule::Rule;
use support::{Outcome, Outcomes, cases, run_dry};

/// What the caller does next.
#[derive(Clone, Debug)]
enum Action {
    Submit {
        prompt: Vec<u32>,
        params: SamplingParams,
        /// Samples of the prompt, as a group.
        samples: u32,
        /// Tokens that end its output.
        stop: Vec<u32>,
        /// The seed of a constraint, and how late its masks are.
        rule: Option<(u32, u32)>,
        /// The only tokens that may be drawn; where there are none, all.
        allowed: Vec<u32>,
    },
    Step,
    /// Aborts one of those submitted so far.
    Abort(prop::sample::Index),
    ClearPrefixCache,
    /// Says that so many requests wait elsewhere.
    Backlog(u32),
}

#[derive(Clone, Debug)]
struct Stream {
    options: EngineOptions,
    pace: Pace,
    /// What steps take on the device.
    costs: StepCosts,
    /// Positions that a token sees.
    window: Option<u32>,
    actions: Vec<Action>,
}

fn limits() -> impl Strategy<Value = Limits> {
    (1..6u32, 1..5u32, 2..40u32, 1..20u32, 0..4u32, 1..24u32, 0..8u32).prop_map(
        |(running, queued, sequence, prefill_tokens, page_bits, pages, graph_rows)| Limits {
            running,
            queued,
            sequence,
            prefill_tokens,
            page_size: 1 << page_bits,
            pages,
            graph_rows,
        },
    )
}

fn options() -> impl Strategy<Value = EngineOptions> {
    let order = prop::sample::select(&[Order::Given, Order::LongestOutputFirst, Order::Prefix]);
    let policy = prop_oneof![Just(Policy::Throughput), Just(Policy::Latency)];
    let speculation =
        prop::sample::select(&[Speculation::Never, Speculation::WhereItPays, Speculation::Always]);
    let settings =
        (policy, any::<bool>(), order, speculation).prop_map(|(policy, prefix_cache, order, speculation)| {
            Settings { policy, prefix_cache, order, speculation, vocab: VOCAB }
        });
    (limits(), settings, any::<bool>()).prop_map(|(limits, scheduler, overlap)| EngineOptions {
        limits,
        fit: None,
        scheduler,
        eos: vec![EOS],
        overlap,
    })
}

fn costs() -> impl Strategy<Value = StepCosts> {
    let line = || {
        (0..40u8, 0..8u8).prop_map(|(fixed, token)| Line { fixed_ms: fixed.into(), token_ms: token.into() })
    };
    (line(), line(), line()).prop_map(|(decode, mixed, attention)| StepCosts { decode, mixed, attention })
}

/// Prompts that share beginnings: one of three texts cut somewhere, and a tail of its own.
fn prompt() -> impl Strategy<Value = Vec<u32>> {
    (0..3u32, 0..24usize, prop::collection::vec(0..VOCAB, 0..6)).prop_map(|(text, shared, tail)| {
        let shared = (0..shared as u32).map(|i| (i * i + text * (i / 4)) % VOCAB);
        shared.chain(tail).collect()
    })
}

fn action() -> impl Strategy<Value = Action> {
    let scored = (0..24u32, 0..3u32).prop_map(|(from, top)| PromptLogprobs { from, top });
    let scored = prop::option::weighted(0.3, scored);
    // The model's next token is what it is, penalties or not; but who has one reads the history, which the device then checks.
    let penalty = prop::sample::select(&[1.0, 1.0, 1.5]);
    let params = (0..20u32, 0..=FAILING, any::<bool>(), prop::option::of(0..3u32), scored, penalty).prop_map(
        |(max_tokens, seed, ignore_eos, logprobs, prompt_logprobs, repetition_penalty)| SamplingParams {
            max_tokens: max_tokens.max(u32::from(prompt_logprobs.is_none())),
            seed,
            ignore_eos,
            logprobs,
            prompt_logprobs,
            repetition_penalty,
            ..SamplingParams::default()
        },
    );
    let embed = prop::option::weighted(0.2, prop::option::of(1..=HIDDEN as u32));
    let params = (params, embed).prop_map(|(params, embed)| match embed {
        None => params,
        Some(dimensions) => {
            let embed = Some(Embed { dimensions });
            SamplingParams { max_tokens: 0, logprobs: None, prompt_logprobs: None, embed, ..params }
        }
    });
    let stop = prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec(0..VOCAB, 1..3)];
    let samples = prop_oneof![2 => Just(1), 1 => 2..5u32];
    let rule = prop::option::weighted(0.4, (0..1000u32, 0..4u32));
    let allowed = prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec(0..VOCAB, 1..8)];
    prop_oneof![
        5 => (prompt(), params, samples, stop, rule, allowed).prop_map(
            |(prompt, params, samples, stop, rule, allowed)| Action::Submit {
                prompt,
                params,
                samples,
                stop,
                rule,
                allowed,
            },
        ),
        6 => Just(Action::Step),
        1 => any::<prop::sample::Index>().prop_map(Action::Abort),
        1 => Just(Action::ClearPrefixCache),
        1 => (0..3u32).prop_map(Action::Backlog),
    ]
}

fn stream() -> impl Strategy<Value = Stream> {
    let pace = prop::sample::select(&[Pace::AtOnce, Pace::Late, Pace::CopiesFirst, Pace::CopiesLast]);
    let window = prop::option::of(2..24u32);
    (options(), pace, costs(), window, prop::collection::vec(action(), 1..60))
        .prop_map(|(options, pace, costs, window, actions)| Stream { options, pace, costs, window, actions })
}

struct Submitted {
    ticket: Ticket,
    prompt: Vec<u32>,
    params: SamplingParams,
    stop: Vec<u32>,
    rule: Option<(u32, u32)>,
    allowed: Vec<u32>,
    max_tokens: u32,
    aborted: bool,
}

/// Plays a stream to its end and returns what was taken in and what came out.
fn play(stream: &Stream) -> (Vec<Submitted>, Outcomes, Engine<Local<Lazy, Hashing>>) {
    let options = stream.options.clone();
    let mut engine =
        Engine::new(Lazy::priced(stream.pace, stream.costs), Hashing::windowed(stream.window), options)
            .expect("valid limits");
    let (mut taken, mut outcomes) = (Vec::<Submitted>::new(), Outcomes::default());
    for action in &stream.actions {
        match action {
            Action::Submit { prompt, params, samples, stop, rule, allowed } => {
                let samples: Vec<_> = (0..*samples).map(|sample| params.of_sample(sample)).collect();
                let said = (&stop[..], *rule, &allowed[..]);
                taken.extend(submit(&mut engine, prompt, &samples, said, &mut outcomes));
            }
            Action::Step => {
                engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            }
            Action::Abort(_) if taken.is_empty() => {}
            Action::Abort(index) => {
                let request = index.get_mut(&mut taken);
                let ended = outcomes.of(request.ticket).finished.is_some();
                let aborted = engine.abort(request.ticket, &mut |event| outcomes.take_in(event));
                assert_eq!(aborted, !ended, "what has not ended can be aborted");
                request.aborted |= aborted;
            }
            Action::ClearPrefixCache => engine.clear_prefix_cache(),
            Action::Backlog(requests) => engine.set_backlog(*requests),
        }
        engine.check();
    }
    run_dry(&mut engine, &mut outcomes);
    (taken, outcomes, engine)
}

/// Submits samples of a prompt, with steps in between while the queue is full.
fn submit(
    engine: &mut Engine<Local<Lazy, Hashing>>,
    prompt: &[u32],
    samples: &[SamplingParams],
    (stop, rule, allowed): (&[u32], Option<(u32, u32)>, &[u32]),
    outcomes: &mut Outcomes,
) -> Vec<Submitted> {
    let mut rules = Rules::new(vec![], stop.to_vec(), &[]).expect("few stop tokens");
    if !allowed.is_empty() {
        rules = rules.allowing(allowed.to_vec()).expect("a token at least");
    }
    let rules = (!rules.is_empty()).then(|| Arc::new(rules));
    let constraint = |(seed, late)| Arc::new(Rule::new(seed, late)) as Arc<dyn Constraint>;
    let constraints: Vec<_> = samples.iter().map(|_| rule.map(constraint)).collect();
    let request = |(params, constraint): (&SamplingParams, _)| Request {
        rules: rules.as_ref(),
        constraint: Option::as_ref(constraint),
        ..Request::new(prompt, *params)
    };
    let group: Vec<_> = samples.iter().zip(&constraints).map(request).collect();
    loop {
        let mut taken = Vec::new();
        match engine.submit_group(&group, &mut |submitted| taken.push(submitted)) {
            Ok(()) => {
                assert_eq!(taken.len(), samples.len(), "a group is taken in wholly");
                let submitted = taken.into_iter().zip(samples).map(|(taken, params)| Submitted {
                    ticket: taken.ticket,
                    prompt: prompt.to_vec(),
                    params: *params,
                    stop: stop.to_vec(),
                    rule,
                    allowed: allowed.to_vec(),
                    max_tokens: taken.max_tokens,
                    aborted: false,
                });
                return submitted.collect();
            }
            Err(SubmitError::QueueFull { .. }) => {
                engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
                engine.check();
            }
            Err(SubmitError::EmptyPrompt) => {
                assert!(prompt.is_empty());
                return Vec::new();
            }
            Err(SubmitError::PromptTooLong { limit, .. }) => {
                assert!(prompt.len() as u32 > limit);
                return Vec::new();
            }
            Err(SubmitError::TooManySamples { limit, .. }) => {
                assert!(samples.len() > limit && engine.limits().queued as usize >= limit);
                return Vec::new();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn check_outcome(request: &Submitted, outcome: &Outcome, limits: &Limits, window: Option<u32>) {
    let len_max = limits.sequence.min(limits.pages * limits.page_size);
    let (window, rule) = (window.unwrap_or(u32::MAX), request.rule.map(|(seed, _)| seed));
    let (prompt, seed) = (&request.prompt[..], request.params.seed);
    let scores = expected_scores(request, window);
    let numbers = scores.iter().position(|score| score.is_nan());
    let (tokens, reason) = match numbers {
        None => {
            let Submitted { params, stop, allowed, .. } = request;
            expected::alone_allowing(prompt, params, stop, len_max, window, rule, allowed)
        }
        Some(_) => (Vec::new(), FinishReason::NotNumbers),
    };
    let (finished, cached) = outcome.finished.expect("every request ends");
    let all = numbers.is_none() && !request.aborted;
    assert!(scores[..numbers.unwrap_or(scores.len())].starts_with(&outcome.scores), "{scores:?}");
    assert!(!all || outcome.scores.len() == scores.len(), "{scores:?} are told as {:?}", outcome.scores);
    match request.aborted {
        true => {
            assert_eq!(finished, FinishReason::Abort);
            assert!(tokens.starts_with(&outcome.tokens), "{tokens:?} begins with {:?}", outcome.tokens);
        }
        false => assert_eq!((&outcome.tokens, finished), (&tokens, reason)),
    }
    let embedding = expected::embedding(prompt, seed, window);
    let embedding = request.params.embed.map(|asked| asked.of(&embedding).to_vec());
    assert_eq!(outcome.embedding, embedding.filter(|_| finished == FinishReason::Length));
    assert!(tokens.len() as u32 <= request.max_tokens);
    assert!(cached < request.prompt.len() as u32 && cached.is_multiple_of(limits.page_size));
    if let Some(PromptLogprobs { from, .. }) = request.params.prompt_logprobs {
        assert!(cached < from.max(1), "what comes before a scored token is run");
    }
    let logprobs = expected::logprobs(&[prompt, &outcome.tokens].concat(), seed, window);
    match request.params.logprobs {
        Some(_) => assert_eq!(outcome.logprobs, logprobs[prompt.len() - 1..]),
        None => assert_eq!(outcome.logprobs, []),
    }
}

/// The scores of a request's prompt, where they are wanted.
fn expected_scores(request: &Submitted, window: u32) -> Vec<f32> {
    let Some(PromptLogprobs { from, .. }) = request.params.prompt_logprobs else { return Vec::new() };
    let all = expected::logprobs(&request.prompt, request.params.seed, window);
    let unwanted = (from.max(1) as usize - 1).min(all.len());
    all[unwanted..].to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(6000), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_gives_what_it_gives_alone(stream in stream()) {
        let limits = stream.options.limits;
        let (taken, outcomes, engine) = play(&stream);
        for request in &taken {
            check_outcome(request, &outcomes.of(request.ticket), &limits, stream.window);
        }
        let stats = engine.stats();
        let ends = outcomes.list.iter().filter_map(|(_, outcome)| outcome.finished);
        let cached: u32 = ends.clone().map(|(_, cached)| cached).sum();
        let tokens: usize = outcomes.list.iter().map(|(_, outcome)| outcome.tokens.len()).sum();
        prop_assert_eq!(stats.finished, ends.count() as u64);
        prop_assert_eq!(stats.output_tokens, tokens as u64);
        prop_assert_eq!(stats.cached_tokens, u64::from(cached));
        prop_assert!(stats.pages_peak <= limits.pages && stats.rows_peak <= limits.running);
    }

    #[test]
    fn the_same_stream_gives_the_same_events(stream in stream()) {
        let (first, second) = (play(&stream).1, play(&stream).1);
        prop_assert_eq!(first.list, second.list);
    }
}
