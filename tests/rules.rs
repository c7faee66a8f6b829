//! Penalties, biases, least lengths, stop tokens, bad words and allowed tokens through the library: what they do, and that nothing beside a
//! request changes what they do to it.

mod common;

use common::{CHECKPOINTS, Scratch, builder, family, greedy, mixed_requests, small};
use minisgl::{
    BackendChoice, Completion, FinishReason, GenerateRequest, KernelSet, Llm, LlmBuilder, Policy,
    RequestError, STOP_BYTES_MAX, SamplingError, SamplingParams, Speculation, SubmitError, TokenRules,
};

fn generate(llm: &mut Llm, request: GenerateRequest) -> Completion {
    llm.generate(&[request]).unwrap().remove(0)
}

fn biased(ids: &[(u32, f32)]) -> TokenRules {
    TokenRules { logit_bias: ids.to_vec(), ..TokenRules::default() }
}

fn allowing(ids: impl IntoIterator<Item = u32>) -> TokenRules {
    TokenRules { allowed_token_ids: Some(ids.into_iter().collect()), ..TokenRules::default() }
}

/// Requests that ask for every kind of edit, beside some that ask for none; many repeat themselves.
fn requests() -> Vec<GenerateRequest> {
    let edited = (0..12u32).map(|i| {
        let prompt: Vec<u32> = (0..8 + 3 * i).map(|j| (j % (3 + 2 * i)) * 7 + i).collect();
        let sampling = SamplingParams {
            temperature: [0.0, 0.7][i as usize % 2],
            top_k: [0, 8][i as usize / 2 % 2],
            repetition_penalty: [1.0, 1.3, 0.7][i as usize % 3],
            presence_penalty: [0.0, 1.5][i as usize / 3 % 2],
            frequency_penalty: [0.0, -0.2, 0.4][i as usize / 2 % 3],
            min_tokens: [0, 9][i as usize / 4 % 2],
            seed: i.into(),
            logprobs: Some(1),
            ..greedy(70 + i)
        };
        let rules = match i % 4 {
            0 if i == 4 => allowing((0..90).rev()),
            0 => TokenRules::default(),
            1 => biased(&[(3, 4.0), (i, -100.0)]),
            2 => TokenRules { stop_token_ids: (0..200).collect(), ..TokenRules::default() },
            _ => TokenRules {
                logit_bias: vec![(7, 3.0)],
                stop_token_ids: vec![7],
                ..if i < 8 { allowing((1..200).step_by(3)) } else { TokenRules::default() }
            },
        };
        GenerateRequest::tokens(prompt).sampling(sampling).rules(rules)
    });
    edited.chain(mixed_requests(4, 300)).collect()
}

fn outputs(builder: LlmBuilder, together: usize) -> (Vec<Completion>, u64) {
    let mut llm = builder.build().unwrap();
    let completions = requests().chunks(together).flat_map(|some| llm.generate(some).unwrap()).collect();
    llm.check();
    let without_cache = |completion: Completion| Completion { cached_tokens: 0, ..completion };
    (Vec::into_iter(completions).map(without_cache).collect(), llm.stats().retractions)
}

/// Engines that `on` makes of a checkpoint's.
fn assert_the_same_however_computed(on: impl Fn(LlmBuilder) -> LlmBuilder) {
    let mut retractions = 0;
    for name in CHECKPOINTS.into_iter().chain(["mistral-window"]) {
        let base = || on(family(name)).max_running(16);
        let (expected, _) = outputs(base(), 1);
        let differ =
            expected.iter().zip(outputs_without_edits(base())).filter(|(a, b)| a.token_ids != b.token_ids);
        assert!(differ.count() >= 6, "{name}: edits change what comes out");
        for (what, builder) in [
            ("together", base()),
            ("no recorded steps, no overlap", base().max_graph_batch(0).overlap(false)),
            ("prompts in chunks", base().max_prefill_tokens(7).policy(Policy::Latency)),
            ("few pages, no prefix cache", base().num_pages(Some(32)).prefix_cache(false)),
            ("drafts", base().speculation(Speculation::Always)),
        ] {
            let (completions, retracted) = outputs(builder, 16);
            assert!(completions == expected, "{name}, {what}");
            retractions += retracted;
        }
    }
    assert!(retractions > 0, "few pages make requests give theirs back");
}

#[test]
fn edits_give_the_same_tokens_whatever_runs_beside_a_request_and_however() {
    assert_the_same_however_computed(|builder| builder);
}

#[test]
#[ignore = "needs a GPU"]
fn edits_on_the_gpu_give_the_same_tokens_whatever_runs_beside_a_request_and_however() {
    assert_the_same_however_computed(|builder| builder.backend(BackendChoice::Cuda));
}

#[test]
#[ignore = "needs a GPU"]
fn so_they_do_with_kernels_for_any_gpu() {
    let portable = |builder: LlmBuilder| builder.backend(BackendChoice::Cuda).kernels(KernelSet::Portable);
    assert_the_same_however_computed(portable);
}

fn outputs_without_edits(builder: LlmBuilder) -> Vec<Completion> {
    let mut llm = builder.build().unwrap();
    let plain = |request: GenerateRequest| {
        let SamplingParams { temperature, top_k, seed, max_tokens, ignore_eos, .. } = request.sampling;
        let sampling = SamplingParams { temperature, top_k, seed, max_tokens, ignore_eos, ..greedy(1) };
        request.sampling(sampling).rules(TokenRules::default())
    };
    llm.generate(&requests().into_iter().map(plain).collect::<Vec<_>>()).unwrap()
}

#[test]
fn a_bias_forces_a_token_or_forbids_it_and_a_penalty_ends_its_repetition() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let forced = GenerateRequest::tokens([1, 2, 3]).sampling(greedy(6)).rules(biased(&[(77, 100.0)]));
    assert_eq!(generate(&mut llm, forced.clone()).token_ids, [77; 6]);
    let plain = generate(&mut llm, GenerateRequest::tokens([1, 2, 3]).sampling(greedy(6))).token_ids;
    let forbidden = biased(
        &plain
            .iter()
            .map(|id| (*id, -100.0))
            .collect::<std::collections::BTreeMap<_, _>>()
            .into_iter()
            .collect::<Vec<_>>(),
    );
    let other = generate(&mut llm, GenerateRequest::tokens([1, 2, 3]).sampling(greedy(6)).rules(forbidden));
    assert!(other.token_ids.iter().all(|id| !plain.contains(id)));
    // Two tokens as probable as each other take turns when each time costs.
    let sampling = SamplingParams { frequency_penalty: 2.0, repetition_penalty: 1.0, ..greedy(40) };
    let turns =
        GenerateRequest::tokens([1, 2, 3]).sampling(sampling).rules(biased(&[(77, 90.0), (78, 90.0)]));
    let tokens = generate(&mut llm, turns).token_ids;
    let of = |id: u32| tokens.iter().filter(|token| **token == id).count();
    assert!(of(77) + of(78) == 40 && of(77).abs_diff(of(78)) < 10, "{tokens:?}");
    // The prompt counts for the repetition penalty, and not for the others.
    let sampling = SamplingParams { repetition_penalty: 1e30, presence_penalty: 0.0, ..greedy(1) };
    let rules = biased(&[(77, 100.0), (5, 50.0)]);
    let repeated = GenerateRequest::tokens([77]).sampling(sampling).rules(rules.clone());
    assert_eq!(generate(&mut llm, repeated).token_ids, [5]);
    let sampling = SamplingParams { frequency_penalty: 2.0, presence_penalty: 2.0, ..greedy(1) };
    let repeated = GenerateRequest::tokens([77; 40]).sampling(sampling).rules(rules);
    assert_eq!(generate(&mut llm, repeated).token_ids, [77]);
}

#[test]
fn allowed_tokens_alone_are_drawn_as_if_there_were_no_others() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let request = |sampling| GenerateRequest::tokens([1, 2, 3]).sampling(sampling);
    let told = SamplingParams { logprobs: Some(3), ..greedy(6) };
    let free = generate(&mut llm, request(told));
    // Of the second and third most probable tokens, the second is the first to be drawn, and both share all probability.
    let [_, second, third] = free.logprobs.as_ref().unwrap()[0].top[..] else { panic!("{free:?}") };
    let two = generate(&mut llm, request(told).rules(allowing([third.0, second.0])));
    assert!(two.token_ids.iter().all(|id| [second.0, third.0].contains(id)), "{two:?}");
    assert_eq!(two.token_ids[0], second.0);
    let share = second.1 - (second.1.exp() + third.1.exp()).ln();
    assert!((two.logprobs.unwrap()[0].logprob - share).abs() < 1e-4, "{share}");
    // Fewer than top_k, drawn as if all were as probable; one alone; all; and one that is nearly impossible, but for a bias.
    let drawn = SamplingParams { temperature: 1.5, top_k: 20, top_p: 0.9, seed: 3, ..told };
    let few = [5, 9, 200, 77];
    let flat = |seed| SamplingParams { temperature: 50.0, top_p: 1.0, seed, max_tokens: 1, ..drawn };
    let flat: Vec<_> = (0..60).map(|seed| request(flat(seed)).rules(allowing(few))).collect();
    let tokens: Vec<u32> = llm.generate(&flat).unwrap().into_iter().flat_map(|one| one.token_ids).collect();
    assert!(
        few.iter().all(|id| tokens.contains(id)) && tokens.iter().all(|id| few.contains(id)),
        "{tokens:?}"
    );
    assert_eq!(generate(&mut llm, request(drawn).rules(allowing([77]))).token_ids, [77; 6]);
    let vocab = llm.info().vocab;
    let plain = generate(&mut llm, request(drawn));
    let all = generate(&mut llm, request(drawn).rules(allowing(0..vocab)));
    assert_eq!((all.token_ids, all.logprobs), (plain.token_ids, plain.logprobs));
    let rules = TokenRules { logit_bias: vec![(9, 100.0), (6, 100.0)], ..allowing([5, 9]) };
    assert_eq!(generate(&mut llm, request(drawn).rules(rules)).token_ids, [9; 6]);
}

/// An end-of-sequence token that is forced.
#[test]
fn an_end_of_sequence_token_ends_an_output_only_where_it_is_allowed() {
    let scratch = Scratch::new();
    scratch.copy("tiny-tied");
    scratch.write("generation_config.json", r#"{"eos_token_id": [77]}"#);
    let mut llm = small(scratch.path()).build().unwrap();
    for (allowed, tokens, end) in
        [(vec![5], vec![5; 4], FinishReason::Length), (vec![5, 77], vec![77], FinishReason::Eos)]
    {
        let rules = TokenRules { logit_bias: vec![(77, 100.0)], ..allowing(allowed) };
        let sampling = SamplingParams { ignore_eos: false, ..greedy(4) };
        let completion = generate(&mut llm, GenerateRequest::tokens([1]).sampling(sampling).rules(rules));
        assert_eq!((completion.token_ids, completion.finish_reason), (tokens, end));
    }
}

#[test]
fn a_request_whose_rules_leave_no_token_fails_by_that_name_alone() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let rules = TokenRules { stop_token_ids: vec![9], ..allowing([9]) };
    let sampling = SamplingParams { min_tokens: 1, ..greedy(4) };
    let request = GenerateRequest::tokens([1, 2]).sampling(sampling).rules(rules);
    let other = GenerateRequest::tokens([5, 6]).sampling(greedy(3));
    let completions = llm.generate(&[request, other]).unwrap();
    assert_eq!(completions[0].error, Some(RequestError::NoTokenLeft));
    assert_eq!((completions[0].token_ids.len(), completions[0].finish_reason), (0, FinishReason::Failed));
    assert_eq!(completions[1].token_ids.len(), 3);
    llm.check();
}

#[test]
fn a_stop_token_ends_a_request_as_its_last_token_but_not_before_its_least_length() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let stop = TokenRules { stop_token_ids: vec![9, 77], ..biased(&[(77, 100.0)]) };
    let request = |min_tokens| {
        let sampling = SamplingParams { min_tokens, ..greedy(8) };
        GenerateRequest::tokens([1, 2]).sampling(sampling).rules(stop.clone())
    };
    let stopped = generate(&mut llm, request(0));
    assert_eq!((stopped.token_ids, stopped.finish_reason), (vec![77], FinishReason::Stop));
    for min_tokens in [1, 3, 8] {
        let stopped = generate(&mut llm, request(min_tokens));
        let (last, before) = stopped.token_ids.split_last().unwrap();
        assert!(!before.contains(&77) && before.len() as u32 == min_tokens.min(7), "{stopped:?}");
        assert_eq!(
            (*last == 77, stopped.finish_reason),
            match min_tokens {
                8 => (false, FinishReason::Length),
                _ => (true, FinishReason::Stop),
            }
        );
    }
}

/// An end-of-sequence token that is forced.
#[test]
fn an_end_of_sequence_token_waits_for_the_least_length_and_one_that_is_ignored_does_not() {
    let scratch = Scratch::new();
    scratch.copy("tiny-tied");
    // One is beyond the vocabulary: no such token is ever drawn, nor kept back.
    scratch.write("generation_config.json", r#"{"eos_token_id": [77, 1000000]}"#);
    let mut llm = small(scratch.path()).build().unwrap();
    let mut ends = |ignore_eos| {
        let sampling = SamplingParams { min_tokens: 4, ignore_eos, ..greedy(6) };
        let request = GenerateRequest::tokens([1]).sampling(sampling).rules(biased(&[(77, 100.0)]));
        let completion = generate(&mut llm, request);
        (completion.token_ids.iter().position(|id| *id == 77), completion.finish_reason)
    };
    assert_eq!(ends(false), (Some(4), FinishReason::Eos));
    assert_eq!(ends(true), (Some(0), FinishReason::Length));
}

#[test]
fn bad_words_do_not_come_up_with_or_without_a_space_before_them() {
    let mut llm = small(Scratch::with_text().path()).build().unwrap();
    let mut found = 0;
    for start in 0..12 {
        let request = |bad_words: &[&str]| {
            let bad_words = bad_words.iter().map(|word| (*word).to_owned()).collect();
            let rules = TokenRules { bad_words, ..TokenRules::default() };
            GenerateRequest::tokens([start * 31, 7]).sampling(greedy(40)).rules(rules)
        };
        let free = generate(&mut llm, request(&[]));
        // Words are two of its tokens' texts: the second one can't follow the first.
        let word = llm.decode(&free.token_ids[4..6]).unwrap();
        if word.trim_start() != word
            || word.contains('\u{fffd}')
            || llm.encode(&word).unwrap() != free.token_ids[4..6]
        {
            continue;
        }
        found += 1;
        let output = generate(&mut llm, request(&[&word, "another"]));
        assert!(!output.token_ids.windows(2).any(|pair| *pair == free.token_ids[4..6]), "{word:?}");
        let first = free.token_ids.windows(2).position(|pair| *pair == free.token_ids[4..6]).unwrap();
        assert_eq!(output.token_ids[..=first], free.token_ids[..=first], "up to there nothing is forbidden");
    }
    assert!(found > 0, "some outputs have words to forbid");
}

#[test]
fn an_output_may_end_with_its_stop_text_or_the_text_of_its_stop_token() {
    let mut llm = small(Scratch::with_text().path()).build().unwrap();
    let ids = llm.encode("ab").unwrap();
    let forced: Vec<(u32, f32)> = ids[..1].iter().map(|id| (*id, 100.0)).collect();
    let letter = llm.decode(&ids[..1]).unwrap();
    let request = |include_stop, stop: Option<String>, stop_token_ids: Vec<u32>| GenerateRequest {
        include_stop,
        stop: stop.into_iter().collect(),
        rules: TokenRules { stop_token_ids, ..biased(&forced) },
        ..GenerateRequest::text("Once").sampling(greedy(9))
    };
    let three = letter.repeat(3);
    for (include, text) in [(false, String::new()), (true, three.clone())] {
        let completion = generate(&mut llm, request(include, Some(three.clone()), vec![]));
        assert_eq!(completion.text.as_ref(), Some(&text));
        assert_eq!((completion.token_ids.len(), completion.finish_reason), (3, FinishReason::Stop));
    }
    for (include, text) in [(false, ""), (true, &letter)] {
        // As text comes, and all at once.
        for stop in [None, Some("never".to_owned())] {
            let completion = generate(&mut llm, request(include, stop, ids[..1].to_vec()));
            assert_eq!(completion.text.as_deref(), Some(text));
            assert_eq!(
                (&completion.token_ids[..], completion.finish_reason),
                (&ids[..1], FinishReason::Stop)
            );
        }
    }
    // A stop text may not end within the least length: the first that does so behind it counts.
    let mut later = request(true, Some(three), vec![]);
    later.sampling.min_tokens = 5;
    let completion = generate(&mut llm, later);
    assert_eq!(completion.text, Some(letter.repeat(6)));
}

#[test]
fn stop_texts_of_every_length_are_found_and_too_many_to_look_for_are_an_error_of_their_request_alone() {
    let mut llm = small(Scratch::with_text().path()).build().unwrap();
    let ids = llm.encode("ab").unwrap();
    let letter = llm.decode(&ids[..1]).unwrap();
    let request = |stop: Vec<String>| GenerateRequest {
        stop,
        ..GenerateRequest::text("Once").sampling(greedy(130)).rules(biased(&[(ids[0], 100.0)]))
    };
    for count in [1, 2, 7, 64, 129] {
        let completion = generate(&mut llm, request(vec![letter.repeat(count)]));
        assert_eq!((completion.token_ids.len(), completion.finish_reason), (count, FinishReason::Stop));
    }
    // The longest, which all but come up.
    let near = letter.repeat(STOP_BYTES_MAX / letter.len() - 1) + "!";
    let completion = generate(&mut llm, request(vec![near]));
    assert_eq!((completion.finish_reason, completion.text), (FinishReason::Length, Some(letter.repeat(130))));
    let too_many =
        [vec!["x".repeat(STOP_BYTES_MAX + 1)], vec!["xy".to_owned(); 100_000], vec![letter.repeat(1 << 20)]];
    for stop in too_many {
        let other = GenerateRequest::tokens([5, 6]).sampling(greedy(3));
        let completions = llm.generate(&[request(stop), other]).unwrap();
        assert_eq!(completions[0].finish_reason, FinishReason::Rejected);
        let error = completions[0].error.clone().unwrap().to_string();
        assert!(error.starts_with("stop texts have ") && error.contains("at most 4096"), "{error}");
        assert_eq!(completions[1].token_ids.len(), 3);
    }
}

#[test]
fn rules_that_can_not_be_kept_are_an_error_of_their_request_alone() {
    let mut llm = small(Scratch::with_text().path()).build().unwrap();
    let mut refused = |request: GenerateRequest| {
        let other = GenerateRequest::tokens([5, 6]).sampling(greedy(3));
        let completions = llm.generate(&[request, other]).unwrap();
        assert_eq!(completions[0].finish_reason, FinishReason::Rejected);
        assert_eq!(completions[1].token_ids.len(), 3);
        completions[0].error.clone().unwrap().to_string()
    };
    let sampled = |sampling| GenerateRequest::tokens([1]).sampling(sampling);
    let base = SamplingParams::default();
    for value in [f32::NAN, f32::INFINITY, -2.1, 2.1] {
        let presence = refused(sampled(SamplingParams { presence_penalty: value, ..base }));
        assert!(presence.starts_with(&format!("presence_penalty is {value}")), "{presence}");
        let frequency = refused(sampled(SamplingParams { frequency_penalty: value, ..base }));
        assert!(frequency.starts_with(&format!("frequency_penalty is {value}")), "{frequency}");
    }
    for value in [f32::NAN, f32::INFINITY, 0.0, -1.0] {
        let repetition = refused(sampled(SamplingParams { repetition_penalty: value, ..base }));
        assert!(repetition.starts_with(&format!("repetition_penalty is {value}")), "{repetition}");
    }
    let min = refused(sampled(SamplingParams { min_tokens: 5, max_tokens: 4, ..base }));
    assert_eq!(min, SubmitError::from(SamplingError::MinTokens { min: 5, max: 4 }).to_string());
    let rules = |rules| GenerateRequest::tokens([1]).rules(rules);
    let many: Vec<(u32, f32)> = (0..100_000).map(|id| (id, 1.0)).collect();
    assert!(refused(rules(biased(&many))).starts_with("logit_bias has 100000 tokens; at most 1024"));
    assert!(
        refused(rules(biased(&[(1 << 30, 1.0)]))).contains("token id 1073741824 in logit_bias is outside")
    );
    assert!(refused(rules(biased(&[(1, f32::NAN)]))).contains("logit_bias of token 1 is NaN"));
    let bad =
        |word: String, count| rules(TokenRules { bad_words: vec![word; count], ..TokenRules::default() });
    assert!(refused(bad(" ".to_owned(), 1)).starts_with("a bad word is empty"));
    assert!(refused(bad("a".to_owned(), 100_000)).starts_with("bad_words are 100000 sequences"));
    assert!(refused(bad("ab ".repeat(1 << 20), 1)).starts_with("bad_words are 1 sequences"));
    assert!(refused(rules(allowing([]))).starts_with("allowed_token_ids is empty"));
    let outside = refused(rules(allowing([4, 1 << 30])));
    assert!(outside.contains("token id 1073741824 in allowed_token_ids is outside"), "{outside}");
    let stop = TokenRules { stop_token_ids: (0..300).collect(), ..TokenRules::default() };
    assert!(refused(rules(stop)).starts_with("300 tokens would end the output"));
}

#[test]
fn what_is_at_the_ends_of_its_range_still_gives_tokens() {
    let mut llm = builder("tiny-tied").build().unwrap();
    for (repetition_penalty, penalty) in [(f32::MIN_POSITIVE, -2.0), (f32::MAX, 2.0), (1e-45, 2.0)] {
        let sampling = SamplingParams {
            temperature: 0.9,
            repetition_penalty,
            presence_penalty: penalty,
            frequency_penalty: penalty,
            logprobs: Some(3),
            ..greedy(50)
        };
        let request =
            GenerateRequest::tokens([1, 2, 3]).sampling(sampling).rules(biased(&[(1, 100.0), (2, -100.0)]));
        let completion = generate(&mut llm, request);
        assert_eq!(completion.error, None);
        assert!(completion.logprobs.unwrap().iter().all(|entry| entry.logprob <= 1e-6), "they are numbers");
    }
}
