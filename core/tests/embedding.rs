//! Embeddings of prompts: each from its own context, whatever runs beside it, and at no cost for logits that nobody wants.

mod support;

use minisgl_core::config::Limits;
use minisgl_core::embedding::Embed;
use minisgl_core::engine::Engine;
use minisgl_core::request::{Event, FinishReason, Request, SubmitError};
use minisgl_core::sampling::{PromptLogprobs, SamplingError, SamplingParams};

use support::expected::{self, FAILING, HIDDEN, VOCAB};
use support::hashing::Hashing;
use support::lazy::{Lazy, Pace};
use support::trace::Trace;
use support::{Outcome, SMALL, engine, exactly, options, run_all};

fn prompt(text: u32, len: u32) -> Vec<u32> {
    (0..len).map(|at| (at * at + text * (at / 3 + 1)) % VOCAB).collect()
}

/// A request for a prompt's embedding.
fn embedded() -> SamplingParams {
    SamplingParams { embed: Some(Embed::default()), ..exactly(0) }
}

fn assert_embedded(outcome: &Outcome, prompt: &[u32]) {
    assert_eq!(outcome.embedding.as_deref(), Some(&expected::embedding(prompt, 0, u32::MAX)[..]));
    assert!(outcome.tokens.is_empty() && matches!(outcome.finished, Some((FinishReason::Length, _))));
}

#[test]
fn prompts_are_embedded_each_by_itself_among_others_that_draw_and_are_scored() {
    for prefill_tokens in [3, 16, 200] {
        let mut engine = engine(options(Limits { prefill_tokens, ..SMALL }));
        let scored =
            SamplingParams { prompt_logprobs: Some(PromptLogprobs { from: 0, top: 0 }), ..exactly(0) };
        let params = [embedded(), exactly(9), embedded(), scored, embedded(), exactly(1)];
        let requests: Vec<_> = (0..).map(|i| prompt(i, 1 + i * 7)).zip(params).collect();
        let outcomes = run_all(&mut engine, &requests);
        for ((prompt, params), outcome) in requests.iter().zip(&outcomes) {
            match params.embed {
                Some(_) => assert_embedded(outcome, prompt),
                None => assert_eq!(outcome.tokens, expected::alone(prompt, params, SMALL.sequence).0),
            }
        }
        assert_eq!((engine.stats().embeddings, engine.stats().finished), (3, 6));
    }
}

#[test]
fn as_many_values_come_as_are_wanted() {
    let mut engine = engine(options(SMALL));
    let cut = |dimensions| SamplingParams { embed: Some(Embed { dimensions }), ..exactly(0) };
    let text = prompt(1, 9);
    let outcome = run_all(&mut engine, &[(text.clone(), cut(Some(2)))]).remove(0);
    assert_eq!(outcome.embedding.as_deref(), Some(&expected::embedding(&text, 0, u32::MAX)[..2]));
    for asked in [0, 4, u32::MAX] {
        let request = Request::new(&text, cut(Some(asked)));
        let refused = SubmitError::Sampling(SamplingError::Dimensions { asked, most: HIDDEN as u32 });
        assert_eq!(engine.submit(request), Err(refused));
        let group = engine.submit_group(&[request; 2], &mut |_| panic!("none is taken in"));
        assert_eq!(group, Err(refused));
    }
    let drawing = [
        SamplingParams { max_tokens: 1, ..embedded() },
        SamplingParams { logprobs: Some(0), ..embedded() },
        SamplingParams { prompt_logprobs: Some(PromptLogprobs { from: 0, top: 0 }), ..embedded() },
    ];
    for params in drawing {
        let refused = engine.submit(Request::new(&text, params));
        assert_eq!(refused, Err(SubmitError::Sampling(SamplingError::EmbedAlone)));
    }
}

#[test]
fn a_prefix_that_the_cache_has_is_not_run_and_changes_nothing() {
    let mut engine = engine(options(SMALL));
    let text = prompt(1, 40);
    let [cold, warm] = [0, 1].map(|_| run_all(&mut engine, &[(text.clone(), embedded())]).remove(0));
    assert_embedded(&cold, &text);
    assert_embedded(&warm, &text);
    // The last token is run, and with it its page.
    assert_eq!(warm.finished, Some((FinishReason::Length, 36)));
}

#[test]
fn a_prompt_that_loses_its_pages_half_way_is_embedded_all_the_same() {
    let limits = Limits { pages: 24, prefill_tokens: 6, ..SMALL };
    let mut requests: Vec<_> = (0..3).map(|i| (prompt(i, 8), exactly(40))).collect();
    requests.push((prompt(9, 44), embedded()));
    let mut engine = engine(options(limits));
    let outcomes = run_all(&mut engine, &requests);
    assert!(engine.stats().retractions > 0, "{:?}", engine.stats());
    assert_embedded(&outcomes[3], &requests[3].0);
}

#[test]
fn a_step_of_embeddings_alone_computes_no_logits() {
    let limits = Limits { prefill_tokens: 64, ..SMALL };
    let device = Trace::new(Lazy::new(Pace::Late));
    let mut engine = Engine::new(device, Hashing::default(), options(limits)).expect("valid limits");
    let mut asked = |requests: &[(Vec<u32>, SamplingParams)]| {
        engine.backend().take();
        run_all(&mut engine, requests);
        let names = engine.backend().take();
        ["norm", "head", "sample", "replay"].map(|name| names.split(' ').filter(|it| *it == name).count())
    };
    let two = [(prompt(1, 9), embedded()), (prompt(2, 9), embedded())];
    assert_eq!(asked(&two), [1, 0, 0, 0]);
    assert_eq!(asked(&[(prompt(3, 9), embedded()), (prompt(4, 9), exactly(1))]), [1, 1, 1, 0]);
}

#[test]
fn more_prompts_than_come_back_at_once_are_embedded_by_several_steps() {
    let limits = Limits { running: 400, queued: 400, prefill_tokens: 2000, pages: 4000, ..SMALL };
    let mut engine = engine(options(limits));
    // Every fifth draws a token: what lies between two embedded rows comes back with them.
    let params = |i: u32| if i % 5 == 1 { exactly(1) } else { embedded() };
    let requests: Vec<_> = (0..400).map(|i| (prompt(i, 1 + i % 5), params(i))).collect();
    let outcomes = run_all(&mut engine, &requests);
    for ((prompt, params), outcome) in requests.iter().zip(&outcomes) {
        match params.embed {
            Some(_) => assert_embedded(outcome, prompt),
            None => assert_eq!(outcome.tokens, expected::alone(prompt, params, SMALL.sequence).0),
        }
    }
    assert_eq!((engine.stats().prefill_steps, engine.stats().embeddings), (2, 320));
}

#[test]
fn a_model_without_a_head_embeds_and_refuses_to_draw_or_score() {
    let mut engine = Engine::new(Lazy::new(Pace::Late), Hashing::headless(), options(SMALL)).expect("valid");
    let text = prompt(1, 30);
    let outcome = run_all(&mut engine, &[(text.clone(), embedded())]).remove(0);
    assert_embedded(&outcome, &text);
    let scored = SamplingParams { prompt_logprobs: Some(PromptLogprobs { from: 0, top: 0 }), ..exactly(0) };
    for params in [exactly(1), scored] {
        assert_eq!(engine.submit(Request::new(&text, params)), Err(SubmitError::NoHead));
    }
}

#[test]
fn an_embedding_that_is_no_numbers_fails_its_own_request_alone() {
    let failing = SamplingParams { seed: FAILING, ..embedded() };
    let is_failing = |text: &Vec<u32>| expected::embedding(text, FAILING, u32::MAX)[2].is_nan();
    let text = (0..100).map(|text| prompt(text, 20)).find(is_failing).expect("one of 16 contexts has none");
    let outcomes =
        run_all(&mut engine(options(SMALL)), &[(text.clone(), failing), (text.clone(), embedded())]);
    assert!(matches!(outcomes[0].finished, Some((FinishReason::NotNumbers, _))));
    assert_eq!(outcomes[0].embedding, None);
    assert_embedded(&outcomes[1], &text);
}

#[test]
fn as_many_prompts_as_come_back_at_once_are_embedded_in_a_step_and_the_others_in_the_next() {
    let limits =
        Limits { running: 300, queued: 300, prefill_tokens: 600, pages: 600, graph_rows: 0, ..SMALL };
    let mut engine = engine(options(limits));
    for i in 0..300 {
        engine.submit(Request::new(&[i % VOCAB], embedded())).expect("it can run");
    }
    let mut embedded = 0;
    let mut hear = |event: Event<'_>| embedded += u32::from(matches!(event, Event::Embedding { .. }));
    let mut launched = || engine.step(&mut hear).expect("the device does not fail").launched;
    let rows = [(); 3].map(|()| launched().map(|shape| shape.prefill_rows));
    assert_eq!((rows, embedded), ([Some(256), Some(44), None], 300));
}
