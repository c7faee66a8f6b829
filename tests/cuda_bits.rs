//! The same bits on a GPU however a request is computed: Qwen3-0.6B's shape with dummy weights, 256 requests.

mod common;

use common::mixed_requests;
use minisgl::{BackendChoice, GenerateRequest, KernelSet, Llm, LlmBuilder, Policy};

fn tokens(llm: &mut Llm, requests: &[GenerateRequest]) -> Vec<Vec<u32>> {
    let completions = llm.generate(requests).expect("a run");
    llm.check();
    completions.into_iter().map(|completion| completion.token_ids).collect()
}

fn engine(model: &str, kernels: KernelSet) -> LlmBuilder {
    let builder = Llm::builder(model).backend(BackendChoice::Cuda).kernels(kernels);
    builder.max_seq_len(Some(512)).num_pages(Some(9000)).max_prefill_tokens(4096)
}

fn assert_same(expected: &[Vec<u32>], got: &[Vec<u32>], what: &str) {
    let differing: Vec<usize> = (0..expected.len()).filter(|i| expected[*i] != got[*i]).collect();
    let first = differing.first().map(|i| {
        let at = expected[*i].iter().zip(&got[*i]).position(|(a, b)| a != b);
        (*i, at, expected[*i].len())
    });
    assert!(
        differing.is_empty(),
        "{what}: {} requests differ; first (request, token, of) {first:?}",
        differing.len()
    );
}

/// One model, computed in every way; all of it must be the same bit for bit.
fn assert_the_same_bits(model: &str, kernels: KernelSet, count: usize) {
    let requests = mixed_requests(count, 2000);
    let base = engine(model, kernels);
    let mut llm = base.clone().build().expect("an engine on the GPU");
    let expected = tokens(&mut llm, &requests);
    assert_same(&expected, &tokens(&mut llm, &requests), "again, with cached prefixes");
    for i in (0..count).step_by(count / 8) {
        llm.clear_prefix_cache();
        assert_same(&expected[i..=i], &tokens(&mut llm, &requests[i..=i]), "a request alone");
    }
    drop(llm);
    // A small model's prompts would go in two portions by what steps cost.
    let portions = base.clone().policy(Policy::Latency).max_prefill_tokens(256);
    let ways: [(&str, LlmBuilder); 9] = [
        ("without graphs", base.clone().max_graph_batch(0)),
        ("without overlap", base.clone().overlap(false)),
        ("without prefix cache", base.clone().prefix_cache(false)),
        ("prompts in chunks of 100", base.clone().max_prefill_tokens(100)),
        ("pages of 64", base.clone().page_size(64).num_pages(Some(2300))),
        // Who is let in at once is retracted sooner than who waits for a step that is worth it.
        ("with retraction", base.clone().num_pages(Some(64)).policy(Policy::Latency)),
        ("prompts in portions beside those that decode", portions.clone()),
        ("prompts beside a few that decode", portions.max_running(24)),
        ("few at once, prompts together", base.clone().max_running(24)),
    ];
    for (what, builder) in ways {
        let mut llm = builder.build().expect("an engine on the GPU");
        assert_same(&expected, &tokens(&mut llm, &requests), what);
        assert!(what != "with retraction" || llm.stats().retractions > 0, "the pool was not small enough");
        assert!(!what.contains("beside") || llm.stats().mixed_steps > 8, "{what}: {:?}", llm.stats());
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_same_bits_in_every_way_with_the_hopper_kernels() {
    assert_the_same_bits("qwen3-0.6b", KernelSet::Auto, 256);
}

#[test]
#[ignore = "needs a GPU"]
fn the_same_bits_in_every_way_with_the_portable_kernels() {
    assert_the_same_bits("qwen3-0.6b", KernelSet::Portable, 256);
}

#[test]
#[ignore = "needs a GPU"]
fn the_same_bits_in_every_way_with_small_heads() {
    assert_the_same_bits("tiny", KernelSet::Auto, 64);
}
