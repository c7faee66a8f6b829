//! Several samples of a prompt: each is what a request of its own with its seed gives, whatever runs beside it, and their prompt is
//! computed once.

mod common;

use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use common::{CHECKPOINTS, Scratch, builder, family, greedy, small};
use minisgl::{
    BackendChoice, Completion, FinishReason, Flow, GenerateRequest, Grammar, KernelSet, LlmBuilder, Policy,
    PromptLogprobs, SamplingParams, Speculation, StreamEvent, TokenRules, sample_seed,
};

/// Requests of one to six samples: greedy and drawn, with penalties and without, scored and not.
fn requests() -> Vec<GenerateRequest> {
    let request = |i: u32| {
        let prompt: Vec<u32> = (0..5 + 29 * i).map(|j| (j % (11 + i)) * 7 + i).collect();
        let sampling = SamplingParams {
            temperature: [0.9, 0.0, 1.3][i as usize % 3],
            repetition_penalty: [1.0, 1.2][i as usize % 2],
            seed: i.into(),
            logprobs: i.is_multiple_of(2).then_some(1),
            prompt_logprobs: (i % 4 == 3).then_some(PromptLogprobs { from: 0, top: 1 }),
            ..greedy(20 + 5 * i)
        };
        let allowed_token_ids = (i % 3 == 1).then(|| (0..150).collect());
        let rules = TokenRules { logit_bias: vec![(i, 2.0)], allowed_token_ids, ..TokenRules::default() };
        GenerateRequest::tokens(prompt).sampling(sampling).rules(rules).samples(1 + i % 6)
    };
    (0..7).map(request).collect()
}

/// The requests that draw the samples one by one.
fn one_by_one() -> Vec<GenerateRequest> {
    let of_sample = |request: &GenerateRequest, sample| {
        let seed = sample_seed(request.sampling.seed, sample);
        let sampling = SamplingParams { seed, ..request.sampling };
        request.clone().sampling(sampling).samples(1)
    };
    let samples = |request: GenerateRequest| {
        (0..request.samples).map(move |sample| of_sample(&request, sample)).collect::<Vec<_>>()
    };
    requests().into_iter().flat_map(samples).collect()
}

/// What has nothing to do with who came first.
fn comparable(completions: Vec<Completion>) -> Vec<Completion> {
    let comparable = |completion| Completion { sample: 0, cached_tokens: 0, ..completion };
    completions.into_iter().map(comparable).collect()
}

/// Engines that `on` makes of a checkpoint's.
fn assert_as_single_requests(on: impl Fn(LlmBuilder) -> LlmBuilder) {
    let mut retractions = 0;
    for name in CHECKPOINTS.into_iter().chain(["mistral-window"]) {
        let base = || on(family(name)).max_running(16);
        let mut alone = base().build().unwrap();
        let expected: Vec<_> =
            one_by_one().iter().flat_map(|one| alone.generate(std::slice::from_ref(one)).unwrap()).collect();
        let expected = comparable(expected);
        for (what, builder) in [
            ("together", base()),
            ("one at a time", base().max_running(1)),
            ("no recorded steps, no overlap", base().max_graph_batch(0).overlap(false)),
            ("prompts in chunks", base().max_prefill_tokens(7).policy(Policy::Latency)),
            ("few pages, no prefix cache", base().num_pages(Some(24)).prefix_cache(false)),
            ("drafts, no prefix cache", base().speculation(Speculation::Always).prefix_cache(false)),
        ] {
            let mut llm = builder.build().unwrap();
            let completions = llm.generate(&requests()).unwrap();
            llm.check();
            let samples: Vec<u32> = completions.iter().map(|one| one.sample).collect();
            let in_order = requests().into_iter().flat_map(|request| 0..request.samples);
            assert_eq!(samples, in_order.collect::<Vec<_>>());
            assert!(comparable(completions) == expected, "{name}, {what}");
            retractions += llm.stats().retractions;
        }
    }
    assert!(retractions > 0, "few pages make requests give theirs back");
}

#[test]
fn samples_are_what_single_requests_give_whatever_runs_beside_them_and_however() {
    assert_as_single_requests(|builder| builder);
}

#[test]
fn eight_samples_compute_their_prompt_once_and_hold_its_pages_once_with_a_prefix_cache_or_without() {
    assert_one_prompt(|builder| builder);
}

#[test]
#[ignore = "needs a GPU"]
fn so_it_is_on_a_gpu() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        let on_gpu = |builder: LlmBuilder| builder.backend(BackendChoice::Cuda).kernels(kernels);
        assert_as_single_requests(on_gpu);
        assert_one_prompt(on_gpu);
    }
}

fn assert_one_prompt(on: impl Fn(LlmBuilder) -> LlmBuilder) {
    let prompt: Vec<u32> = (0..330).map(|i| i * 7 % 290).collect();
    let sampling = SamplingParams { temperature: 1.0, ..greedy(6) };
    for prefix_cache in [true, false] {
        let mut llm = on(builder("tiny-tied")).prefix_cache(prefix_cache).build().unwrap();
        llm.generate(&[GenerateRequest::tokens(prompt.clone()).sampling(sampling).samples(8)]).unwrap();
        let stats = llm.stats();
        // 20 full pages of 16, and behind them 10 tokens, which each sample runs.
        assert_eq!((stats.prefill_tokens, stats.pages_peak), (330 + 7 * 10, 20 + 8), "{prefix_cache}");
    }
}

#[test]
fn samples_share_the_log_probabilities_of_their_prompt() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let scored = SamplingParams { prompt_logprobs: Some(PromptLogprobs { from: 0, top: 2 }), ..greedy(3) };
    let request = GenerateRequest::tokens((5..90).collect::<Vec<u32>>()).sampling(scored);
    let samples = llm.generate(&[request.samples(6)]).unwrap();
    let [first, others @ ..] = &samples[..] else { panic!("there are samples") };
    let of_first = first.prompt_logprobs.as_ref().unwrap();
    assert_eq!(of_first.len(), 84);
    let shares = |one: &Completion| Arc::ptr_eq(one.prompt_logprobs.as_ref().unwrap(), of_first);
    assert!(others.len() == 5 && others.iter().all(shares));
}

#[test]
fn an_abort_ends_all_samples_of_a_request_and_no_other() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let request = |first: u32| GenerateRequest::tokens([first, 2, 3]).sampling(greedy(40)).samples(3);
    let (mut ends, mut handed_over) = (Vec::new(), [0; 3]);
    llm.generate_stream([request(1), request(4)], |event| match event {
        StreamEvent::Token { index: 0, sample, .. } => {
            handed_over[sample as usize] += 1;
            if sample == 1 {
                // Meanwhile the engine goes on, and what it makes nobody is given.
                sleep(Duration::from_millis(100));
                return Flow::AbortRequest;
            }
            Flow::Continue
        }
        StreamEvent::Finished { index, completion, .. } => {
            if index == 0 {
                assert_eq!(completion.token_ids.len(), handed_over[completion.sample as usize]);
            }
            ends.push((index, completion.sample, completion.finish_reason));
            Flow::Continue
        }
        _ => Flow::Continue,
    })
    .unwrap();
    ends.sort_by_key(|(index, sample, _)| (*index, *sample));
    let of_all = |index, reason| (0..3).map(move |sample| (index, sample, reason));
    let expected: Vec<_> = of_all(0, FinishReason::Abort).chain(of_all(1, FinishReason::Length)).collect();
    assert_eq!(ends, expected);
}

#[test]
fn each_sample_follows_the_grammar_by_itself() {
    let scratch = Scratch::with_text();
    let mut llm = small(scratch.path()).build().unwrap();
    let sampling = SamplingParams { temperature: 2.0, max_tokens: 30, ..SamplingParams::default() };
    let expression = "[a-z]{3,9}-[0-9]{2}";
    let grammar = || Grammar::Regex(expression.to_owned());
    let request = GenerateRequest::tokens([5, 6, 7]).sampling(sampling).grammar(grammar());
    let samples = llm.generate(&[request.clone().samples(5)]).unwrap();
    let expected = regex::Regex::new(&format!("^{expression}$")).unwrap();
    for (i, sample) in (0..).zip(&samples) {
        let text = sample.text.as_deref().unwrap();
        assert!(sample.error.is_none() && expected.is_match(text), "{text:?}");
        let sampling = SamplingParams { seed: sample_seed(sampling.seed, i), ..sampling };
        let alone = llm.generate(&[request.clone().sampling(sampling)]).unwrap().remove(0);
        assert_eq!((alone.token_ids, alone.text), (sample.token_ids.clone(), sample.text.clone()));
    }
    assert!(samples.iter().any(|one| one.text != samples[0].text));
}
