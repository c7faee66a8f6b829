//! The golden checkpoints on the CPU backend, through the public API, against what transformers computes from them.

mod common;

use common::logits::{Logits, checkpoint};
use common::{CHECKPOINTS, FAMILIES, Golden, builder, family, fixture, greedy_request};
use minisgl::{GenerateRequest, Llm, Policy};
use minisgl_cpu::Cpu;

/// Largest difference between two rows of logits.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| if a.is_finite() { (a - b).abs() } else { f32::INFINITY })
        .fold(0.0, f32::max)
}

fn assert_logits(name: &str, prefill_tokens: u32, prefix_cache: bool) {
    let golden = Golden::open(name);
    let mut model = Logits::new(Cpu::new(), &checkpoint(&fixture(name)), prefill_tokens, prefix_cache);
    for (i, example) in golden.examples.iter().enumerate() {
        let expected = golden.logits(i);
        let mut sequence = example.prompt.clone();
        sequence.extend(&example.greedy[..example.greedy.len() - 1]);
        let logits = model.of(&sequence);
        assert_eq!(logits.len(), sequence.len());
        let prompt = &logits[..example.prompt.len()];
        for (row, expected) in prompt[prompt.len() - expected.len()..].iter().zip(&expected) {
            let error = distance(row, expected);
            assert!(error < 1e-3, "{name}, example {i}: a logit of the prompt is off by {error}");
        }
        let error = distance(logits.last().unwrap(), &golden.last_logits(i));
        assert!(error < 1e-3, "{name}, example {i}: a logit of the last step is off by {error}");
    }
}

#[test]
fn logits_at_every_position_are_those_of_transformers() {
    for name in CHECKPOINTS {
        for (prefill_tokens, prefix_cache) in [(512, true), (7, true), (512, false)] {
            assert_logits(name, prefill_tokens, prefix_cache);
        }
    }
}

#[test]
fn logits_of_every_family_are_those_of_transformers() {
    for name in FAMILIES {
        for prefill_tokens in [512, 50] {
            assert_logits(name, prefill_tokens, true);
        }
    }
}

/// All examples' greedy tokens, together or one by one.
fn assert_greedy(llm: &mut Llm, golden: &Golden, together: bool, what: &str) {
    let request = |example: &common::Example| greedy_request(&example.prompt, example.greedy.len() as u32);
    let requests: Vec<GenerateRequest> = golden.examples.iter().map(request).collect();
    let size = if together { requests.len() } else { 1 };
    let completions = requests.chunks(size).flat_map(|batch| llm.generate(batch).unwrap());
    for (i, (completion, example)) in completions.zip(&golden.examples).enumerate() {
        assert_eq!(completion.token_ids, example.greedy, "example {i}, {what}");
    }
    llm.check();
}

#[test]
fn greedy_tokens_are_those_of_transformers_however_they_are_computed() {
    let both = [false, true];
    for name in CHECKPOINTS {
        let golden = Golden::open(name);
        for (page_size, prefill_tokens) in [(16, 512), (16, 7), (32, 512), (32, 7)] {
            for (prefix_cache, overlap) in both.into_iter().flat_map(|a| both.map(|b| (a, b))) {
                for (graph_rows, policy) in [(0, Policy::Throughput), (8, Policy::Latency)] {
                    let what = format!(
                        "{name}: pages of {page_size}, {prefill_tokens} prefill tokens, prefix cache {prefix_cache}, \
                         overlap {overlap}, recorded up to {graph_rows} rows, {policy:?}"
                    );
                    let builder = builder(name).page_size(page_size).max_prefill_tokens(prefill_tokens);
                    let builder = builder.policy(policy);
                    let builder =
                        builder.prefix_cache(prefix_cache).overlap(overlap).max_graph_batch(graph_rows);
                    let mut llm = builder.build().unwrap();
                    assert_greedy(&mut llm, &golden, true, &what);
                    assert_greedy(&mut llm, &golden, false, &what);
                }
            }
        }
    }
}

#[test]
fn greedy_tokens_of_every_family_are_those_of_transformers_however_they_are_computed() {
    for name in FAMILIES {
        let golden = Golden::open(name);
        // Eight of the 32 ways, chosen so that any two settings meet in all four combinations.
        for bits in 0..8 {
            let [a, b, c] = [1, 2, 4].map(|bit| bits & bit != 0);
            let builder = family(name)
                .page_size(if a { 16 } else { 32 })
                .max_prefill_tokens(if b { 512 } else { 7 })
                .prefix_cache(c)
                .overlap(a == b)
                .max_graph_batch(if b == c { 8 } else { 0 })
                .policy(if a == c { Policy::Throughput } else { Policy::Latency });
            let mut llm = builder.build().unwrap();
            for together in [true, false] {
                assert_greedy(
                    &mut llm,
                    &golden,
                    together,
                    &format!("{name}, way {bits}, together: {together}"),
                );
            }
        }
    }
}

#[test]
fn greedy_tokens_survive_retraction_by_a_tiny_pool() {
    for name in CHECKPOINTS.into_iter().chain(FAMILIES) {
        let golden = Golden::open(name);
        let longest = golden.examples.iter().map(|example| example.prompt.len() + example.greedy.len());
        let pages = longest.max().unwrap().div_ceil(16) as u32;
        let mut llm =
            family(name).page_size(16).max_seq_len(Some(16 * pages)).num_pages(Some(pages)).build().unwrap();
        assert_greedy(&mut llm, &golden, true, "the smallest pool that holds the longest example");
    }
}
