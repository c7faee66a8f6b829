//! Speculation by prompt lookup on the CPU, through the public API: the same tokens, log-probabilities and ends, in fewer steps.

mod common;

use std::collections::BTreeMap;

use common::{CHECKPOINTS, family, greedy, mixed_requests};
use minisgl::{Completion, GenerateRequest, LlmBuilder, Policy, SamplingParams, Speculation, Stats};

/// Texts that repeat themselves, some drawn, some with log-probabilities, and some that do not.
fn requests() -> Vec<GenerateRequest> {
    let repeating = (0..6).map(|i| {
        let prompt: Vec<u32> = (0..12 + 9 * i).map(|j| (j % (3 + 2 * i)) * 7 + i).collect();
        let temperature = if i % 2 == 0 { 0.0 } else { 0.5 };
        let sampling = SamplingParams { temperature, top_k: 4, seed: 5, logprobs: Some(2), ..greedy(40 + i) };
        GenerateRequest::tokens(prompt).sampling(sampling)
    });
    repeating.chain(mixed_requests(3, 300)).collect()
}

fn run(builder: LlmBuilder, together: usize) -> (Vec<Completion>, Stats) {
    let mut llm = builder.build().unwrap();
    let requests = requests();
    let completions = requests.chunks(together).flat_map(|some| llm.generate(some).unwrap()).collect();
    llm.check();
    (completions, llm.stats())
}

/// What came out, however much of the prompts was cached.
fn outputs(completions: &[Completion]) -> Vec<Completion> {
    completions.iter().cloned().map(|completion| Completion { cached_tokens: 0, ..completion }).collect()
}

#[test]
fn drafts_change_nothing_that_comes_out() {
    // Some models' texts repeat nothing.
    let mut accepted = BTreeMap::<_, u64>::new();
    for name in CHECKPOINTS.into_iter().chain(["mistral-window", "qwen2-bias", "qwen3-moe"]) {
        let base = || family(name).max_running(16);
        for together in [1, 3] {
            let (expected, without) = run(base(), together);
            let always = || base().speculation(Speculation::Always);
            for (what, builder) in [
                ("always", always()),
                ("where it pays", base().speculation(Speculation::WhereItPays)),
                ("no recorded steps, no overlap", always().max_graph_batch(0).overlap(false)),
                ("prompts in chunks beside drafts", always().max_prefill_tokens(7).policy(Policy::Latency)),
                ("few pages, no prefix cache", always().num_pages(Some(25)).prefix_cache(false)),
            ] {
                let (completions, stats) = run(builder, together);
                let same = outputs(&completions) == outputs(&expected);
                assert!(same, "{name}, {together} together, {what}");
                *accepted.entry((what, together)).or_default() += stats.accepted;
                assert!(stats.accepted <= stats.drafted && stats.output_tokens == without.output_tokens);
            }
            assert_eq!((without.drafted, without.accepted), (0, 0));
        }
    }
    accepted.retain(|(what, _), _| *what != "where it pays");
    assert!(accepted.values().all(|accepted| *accepted > 0), "{accepted:?}");
}

#[test]
fn a_text_that_repeats_itself_takes_fewer_steps() {
    let prompt: Vec<u32> = (0..60).map(|i| i % 10).collect();
    let request = [GenerateRequest::tokens(prompt).sampling(greedy(150))];
    let steps = |speculation| {
        let mut llm = family("tiny-tied").max_running(16).speculation(speculation).build().unwrap();
        let completion = llm.generate(&request).unwrap().remove(0);
        (completion.token_ids, llm.stats())
    };
    let (expected, without) = steps(Speculation::Never);
    let (tokens, with) = steps(Speculation::Always);
    assert_eq!(tokens, expected);
    assert!(with.decode_steps < without.decode_steps, "{} and {}", with.decode_steps, without.decode_steps);
    assert_eq!(with.decode_steps + with.accepted, without.decode_steps, "a right draft saves a step");
}
