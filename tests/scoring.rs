//! Log-probabilities of given tokens: those of transformers, and to the bit those of sampling, however they are computed.

mod common;

use common::logits::{Logits, checkpoint};
use common::{
    CHECKPOINTS, EXPERTS, FAMILIES, FP8, Golden, Scratch, builder, families_on_cuda, family, greedy, small,
};
use minisgl::{
    BackendChoice, Completion, FinishReason, GenerateRequest, KernelSet, Llm, LlmBuilder, PromptLogprobs,
    RequestError, RerankRequest, SamplingParams, Score, ScoreRequest, TokenLogprobs,
};
use minisgl_cpu::Cpu;

/// A request for the log-probabilities of a prompt's tokens.
fn scored(prompt: &[u32], top: u32, max_tokens: u32) -> GenerateRequest {
    let prompt_logprobs = Some(PromptLogprobs { from: 0, top });
    GenerateRequest::tokens(prompt).sampling(SamplingParams { prompt_logprobs, ..greedy(max_tokens) })
}

/// The logarithm of the softmax.
fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    logits.iter().map(|logit| logit - largest - sum.ln() as f32).collect()
}

/// The largest error of an example's log-probabilities, alternatives included, at each of the positions whose logits the golden
/// file has: the prompt's last ones, and the one that chose the last greedy token.
fn errors(llm: &mut Llm, golden: &Golden, i: usize) -> Vec<f32> {
    let example = &golden.examples[i];
    let whole = [&example.prompt[..], &example.greedy].concat();
    let completion = llm.generate(&[scored(&whole, 20, 0)]).unwrap().remove(0);
    assert_eq!((completion.finish_reason, completion.token_ids.len()), (FinishReason::Length, 0));
    assert_eq!(completion.prompt_token_ids.as_ref(), Some(&whole));
    let scores = completion.prompt_logprobs.unwrap();
    assert_eq!(scores.len(), whole.len() - 1);
    let logits = golden.logits(i);
    let first = example.prompt.len() - logits.len();
    let rows = (first..).zip(logits).chain([(scores.len() - 1, golden.last_logits(i))]);
    let error = |(at, logits): (usize, Vec<f32>)| {
        let (expected, score) = (log_softmax(&logits), &scores[at]);
        assert_eq!(score.top.len(), 20);
        let told = score.top.iter().copied().chain([(whole[at + 1], score.logprob)]);
        let errors = told.map(|(id, logprob)| (logprob - expected[id as usize]).abs());
        errors.fold(0.0, |a: f32, b| if b.is_nan() { f32::INFINITY } else { a.max(b) })
    };
    rows.map(error).collect()
}

/// Gives the errors of all positions.
fn assert_scores(what: &str, builder: LlmBuilder, golden: &Golden, bound: f32) -> Vec<f32> {
    let mut llm = builder.build().unwrap();
    let errors: Vec<f32> = (0..golden.examples.len()).flat_map(|i| errors(&mut llm, golden, i)).collect();
    let largest = errors.iter().copied().fold(0.0, f32::max);
    println!("{what}: largest error of a log-probability {largest:.5}");
    assert!(largest < bound, "{what}: a log-probability is off by {largest}");
    llm.check();
    errors
}

#[test]
fn no_tokens_have_the_log_probability_zero_without_a_sign() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let scores = llm.score(&[ScoreRequest::tokens([1, 2], [])]).unwrap();
    assert_eq!((scores[0].error.as_ref(), scores[0].logprob().to_bits()), (None, 0.0_f64.to_bits()));
}

#[test]
fn log_probabilities_of_given_tokens_are_those_of_transformers() {
    for name in CHECKPOINTS.into_iter().chain(FAMILIES) {
        let golden = Golden::open(name);
        for (prefill_tokens, prefix_cache) in [(512, true), (7, true), (512, false)] {
            let builder = family(name).max_prefill_tokens(prefill_tokens).prefix_cache(prefix_cache);
            assert_scores(&format!("{name}, {prefill_tokens}, {prefix_cache}"), builder, &golden, 1e-3);
        }
    }
    for name in FP8 {
        assert_scores(name, family(name).plain_inputs(true), &Golden::open(name), 1e-3);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn log_probabilities_on_the_gpu_are_those_of_transformers_within_bf16() {
    for name in CHECKPOINTS.into_iter().chain(families_on_cuda()) {
        let bound = if EXPERTS.contains(&name) { FLIPPED_ERROR_MAX } else { GPU_ERROR_MAX };
        for kernels in [KernelSet::Auto, KernelSet::Portable] {
            let what = format!("{name}, {kernels:?}");
            let builder = family(name).backend(BackendChoice::Cuda).kernels(kernels);
            let mut errors = assert_scores(&what, builder, &Golden::open(name), bound);
            errors.sort_by(f32::total_cmp);
            let median = errors[errors.len() / 2];
            println!("{what}: at half of the positions {median:.5} at most");
            assert!(
                median < GPU_MEDIAN_ERROR_MAX,
                "{what}: at half of the positions one is off by {median} or more"
            );
        }
    }
}

/// Rows of logits, which reach 10 here, are off by 3 to 12% of their norm where activations are bf16 (`tests/cuda.rs`).
const GPU_ERROR_MAX: f32 = 0.5;
/// Where a router chooses other experts than in f32 a row is another sum: on an H200 one of qwen3-moe-nonorm is off by 1.74.
const FLIPPED_ERROR_MAX: f32 = 2.5;
/// No router's choice is near at half of the positions.
const GPU_MEDIAN_ERROR_MAX: f32 = 0.25;

/// Prompts that share beginnings, some longer than a chunk.
fn prompts(count: u32) -> Vec<Vec<u32>> {
    let prompt = |i: u32| (0..5 + i * 53 % 190).map(move |at| (at * at * 7 + at / 60 * (i % 3) * 11) % 500);
    (0..count).map(|i| prompt(i).collect()).collect()
}

/// All log-probabilities of a text: of the prompt's tokens as given, of the output's as drawn.
fn all(completion: &Completion) -> Vec<TokenLogprobs> {
    [&completion.prompt_logprobs.as_ref().unwrap()[..], completion.logprobs.as_ref().unwrap()].concat()
}

fn assert_the_same_however_computed(ways: impl IntoIterator<Item = (String, LlmBuilder)>) {
    let drawn = |prompt: &Vec<u32>| {
        let request = scored(prompt, 3, 50);
        let sampling = SamplingParams { temperature: 0.8, seed: 7, logprobs: Some(3), ..request.sampling };
        request.sampling(sampling)
    };
    let prompts = prompts(12);
    let (mut logprobs, mut texts) = (Vec::new(), Vec::new());
    for (way, builder) in ways {
        let mut llm = builder.build().unwrap();
        let requests: Vec<_> = prompts.iter().map(drawn).collect();
        let outputs = llm.generate(&requests).unwrap();
        let told: Vec<_> = outputs.iter().map(all).collect();
        if logprobs.is_empty() {
            logprobs.clone_from(&told);
            texts = outputs.iter().map(|output| output.token_ids.clone()).collect();
        }
        assert_eq!(told, logprobs, "{way}");
        // What was drawn is given, as a whole and behind the prompt; the cache may have all of it by now.
        for together in [true, false] {
            let whole: Vec<_> =
                prompts.iter().zip(&texts).map(|(a, b)| scored(&[&a[..], b].concat(), 3, 0)).collect();
            let behind = |(prompt, text): (&Vec<u32>, &Vec<u32>)| ScoreRequest {
                top: 3,
                ..ScoreRequest::tokens(&prompt[..], &text[..])
            };
            let behind: Vec<_> = prompts.iter().zip(&texts).map(behind).collect();
            let size = if together { prompts.len() } else { 1 };
            let given: Vec<_> = whole.chunks(size).flat_map(|some| llm.generate(some).unwrap()).collect();
            let scores: Vec<Score> = behind.chunks(size).flat_map(|some| llm.score(some).unwrap()).collect();
            for (i, (given, score)) in given.iter().zip(&scores).enumerate() {
                let (all, what) = (&logprobs[i], format!("{way}, together: {together}, text {i}"));
                assert_eq!(given.prompt_logprobs.as_deref(), Some(all), "{what}");
                assert_eq!(score.logprobs, all[prompts[i].len() - 1..], "{what}");
                assert_eq!((&score.token_ids, score.prompt_tokens as usize), (&texts[i], prompts[i].len()));
            }
        }
        if llm.info().limits.pages == FEW_PAGES {
            assert!(llm.stats().retractions > 0, "{way}: {:?}", llm.stats());
        }
        llm.check();
    }
}

/// They hold little more than one text: requests are retracted.
const FEW_PAGES: u32 = 16;

#[test]
fn scores_are_to_the_bit_what_sampling_reports_however_they_are_computed() {
    let way = |(prefill, pages, cache, running): (u32, u32, bool, u32)| {
        let builder = family("tiny-untied").max_prefill_tokens(prefill).num_pages(Some(pages));
        let builder = builder.prefix_cache(cache).max_running(running);
        (format!("{prefill} prefill tokens, {pages} pages, prefix cache {cache}, {running} at once"), builder)
    };
    let ways = [
        (512, 128, true, 8),
        (7, 128, true, 8),
        (64, FEW_PAGES, true, 8),
        (64, FEW_PAGES, false, 8),
        (90, 128, true, 1),
    ];
    assert_the_same_however_computed(ways.map(way));
}

#[test]
#[ignore = "needs a GPU"]
fn scores_on_the_gpu_are_to_the_bit_what_sampling_reports_however_they_are_computed() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        let way = |(prefill, pages, cache, running): (u32, u32, bool, u32)| {
            let builder = family("tiny-untied").backend(BackendChoice::Cuda).kernels(kernels);
            let builder = builder.max_prefill_tokens(prefill).num_pages(Some(pages)).prefix_cache(cache);
            (format!("{kernels:?}, {prefill}, {pages}, {cache}, {running}"), builder.max_running(running))
        };
        let ways = [(512, 128, true, 64), (48, 128, true, 8), (64, FEW_PAGES, false, 8), (512, 128, true, 1)];
        assert_the_same_however_computed(ways.map(way));
    }
}

#[test]
fn a_completions_prompt_comes_from_the_prefix_cache() {
    let mut llm = builder("tiny-tied").page_size(16).build().unwrap();
    let prompt: Vec<u32> = (0..100).collect();
    let scores = llm.score(&[1, 2, 3].map(|id| ScoreRequest::tokens(&prompt[..], [id, 7]))).unwrap();
    assert_eq!(scores[0].cached_tokens, 0);
    // The prompt's last token is run: what follows it is scored.
    assert_eq!([scores[1].cached_tokens, scores[2].cached_tokens], [96, 96]);
    assert!(scores.iter().all(|score| score.logprobs.len() == 2 && score.prompt_tokens == 100));
    assert!(scores[0].logprob() < 0.0 && scores[0].logprob() != scores[1].logprob());
}

#[test]
fn what_cannot_be_scored_says_why_and_the_others_are_scored() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let requests = [
        ScoreRequest::tokens([1, 2], [3]),
        ScoreRequest::tokens([], []),
        ScoreRequest::tokens([1], [5000]),
        ScoreRequest::tokens([1], vec![2; 512]),
        ScoreRequest::text("a", "b"),
        ScoreRequest { top: 21, ..ScoreRequest::tokens([1], [2]) },
        ScoreRequest::tokens([], [4, 5]),
        ScoreRequest::tokens([], [1]),
        ScoreRequest::tokens([4, 5], []),
        ScoreRequest::tokens([1], vec![2; 511]),
    ];
    let scores = llm.score(&requests).unwrap();
    let errors: Vec<_> = scores.iter().map(|score| score.error.as_ref().map(RequestError::kind)).collect();
    assert_eq!(
        errors[..8],
        [
            None,
            Some("empty prompt"),
            Some("token outside the vocabulary"),
            Some("prompt too long"),
            Some("no tokenizer"),
            Some("sampling parameter out of range"),
            // The first token would follow nothing.
            Some("empty prompt"),
            Some("empty prompt"),
        ]
    );
    assert_eq!(errors[8..], [None; 2]);
    assert_eq!((scores[8].token_ids.len(), scores[9].token_ids.len()), (0, 511));
    let nothing = GenerateRequest::tokens([1]).sampling(greedy(0));
    assert!(llm.generate(&[nothing]).unwrap()[0].error.is_some(), "no token and no score");
}

/// A checkpoint whose tokenizer knows both answers as words.
fn reranker() -> (Scratch, [u32; 2]) {
    let scratch = Scratch::with_text();
    let path = scratch.join("tokenizer.json");
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let ids = [634, 635];
    for (id, word) in ids.into_iter().zip(["yes", "no"]) {
        let token = serde_json::json!({"id": id, "content": word, "single_word": true, "lstrip": false,
            "rstrip": false, "normalized": false, "special": false});
        tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
    }
    std::fs::write(path, tokenizer.to_string()).unwrap();
    (scratch, ids)
}

#[test]
fn a_documents_relevance_is_the_share_of_yes_in_yes_and_no() {
    let (scratch, ids) = reranker();
    let mut llm = small(scratch.path()).build().unwrap();
    let mut judged = RerankRequest::new("Which moon?", "Phobos is one.");
    let other = RerankRequest::new("Which moon?", "Soup, mostly.");
    judged.instruction = "Find moons".to_owned();
    let relevances = llm.rerank(&[judged, other]).unwrap();
    let [first, second] = [0, 1].map(|i| relevances[i].clone().unwrap());
    assert_ne!(first.relevance, second.relevance);
    // The published prompt, whose parts are encoded one by one.
    let parts = [
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. \
         Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n",
        "<Instruct>: Find moons\n<Query>: Which moon?\n<Document>: Phobos is one.",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ];
    let prompt: Vec<u32> = parts.iter().flat_map(|part| llm.encode(part).unwrap()).collect();
    assert_eq!(first.prompt_tokens as usize, prompt.len());
    let mut model = Logits::new(Cpu::new(), &checkpoint(scratch.path()), 512, true);
    let logits = model.of(&prompt).pop().unwrap();
    let [yes, no] = ids.map(|id| f64::from(logits[id as usize]).exp());
    assert!((first.relevance - yes / (yes + no)).abs() < 1e-5, "{first:?}, {yes}, {no}");
}

#[test]
fn a_file_of_documents_is_judged_as_the_library_judges_them() {
    let (scratch, _) = reranker();
    let documents = ["Phobos is one.", "Soup, mostly.", "Deimos, the smaller one."];
    let mut llm = small(scratch.path()).build().unwrap();
    let asked = documents.map(|document| RerankRequest::new("Which moon?", document));
    let expected: Vec<f64> =
        llm.rerank(&asked).unwrap().into_iter().map(|one| one.unwrap().relevance).collect();
    let line = |(id, document): (usize, &str)| {
        format!("{}\n", serde_json::json!({"id": id, "query": "Which moon?", "document": document}))
    };
    let lines: String = documents.into_iter().enumerate().map(line).collect();
    scratch.write("in.jsonl", lines + "{\"id\": 3, \"document\": \"a\"}\n");
    let [input, output] = ["in.jsonl", "out.jsonl"].map(|name| scratch.join(name));
    let mut command = common::generate::command_within(&scratch, 512);
    let output = command.arg("--input").arg(input).arg("--output").arg(output).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "one line has no query");
    let mut judged = 0;
    for line in std::fs::read_to_string(scratch.join("out.jsonl")).unwrap().lines() {
        let result: serde_json::Value = serde_json::from_str(line).unwrap();
        let Some(relevance) = result["relevance"].as_f64() else {
            assert!(result["error"].as_str().unwrap().starts_with("line 4: the request has no query"));
            continue;
        };
        judged += 1;
        assert_eq!(relevance, expected[result["id"].as_u64().unwrap() as usize]);
    }
    assert_eq!(judged, 3);
}

#[test]
fn a_model_that_does_not_know_the_answers_is_no_reranker() {
    let scratch = Scratch::with_text();
    let mut llm = small(scratch.path()).build().unwrap();
    let error = llm.rerank(&[RerankRequest::new("a", "b")]).unwrap().remove(0).unwrap_err().to_string();
    assert!(error.contains("\"yes\" is 2 of its tokens and must be one"), "{error}");
    let mut llm = builder("tiny-tied").build().unwrap();
    let error = llm.rerank(&[RerankRequest::new("a", "b")]).unwrap().remove(0).unwrap_err();
    assert_eq!(error.kind(), "no tokenizer");
}
