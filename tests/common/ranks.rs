//! What tests of several ranks ask for, on the CPU and on GPUs, and what of it may not depend on how it is computed.

use minisgl::{
    Completion, GenerateRequest, LlmBuilder, Policy, Prompt, PromptLogprobs, Speculation, TokenRules,
};

use super::mixed_requests;

/// Tokens and log-probabilities: what may not depend on how they are computed.
pub type Bits = (Vec<u32>, Vec<Vec<(u32, u32)>>);

pub fn bits(completion: &Completion) -> Bits {
    assert_eq!(completion.error, None);
    let all = completion
        .logprobs
        .iter()
        .flatten()
        .chain(completion.prompt_logprobs.as_deref().into_iter().flatten());
    let rows = all.map(|row| {
        let top = row.top.iter().map(|(id, logprob)| (*id, logprob.to_bits()));
        [(0, row.logprob.to_bits())].into_iter().chain(top).collect()
    });
    (completion.token_ids.clone(), rows.collect())
}

/// Requests of every kind of sampling, some scored, some with edits.
pub fn requests(count: usize, vocab: u64) -> Vec<GenerateRequest> {
    let mut requests = mixed_requests(count, vocab);
    for (i, request) in requests.iter_mut().enumerate() {
        if let Prompt::Tokens(prompt) = &mut request.prompt {
            prompt.truncate(200);
        }
        let sampling = &mut request.sampling;
        sampling.max_tokens = sampling.max_tokens.min(24);
        if i % 3 == 0 {
            sampling.logprobs = Some(3);
        }
        if i % 4 == 1 {
            sampling.prompt_logprobs = Some(PromptLogprobs { from: 1, top: 2 });
        }
        if i % 4 == 2 {
            (sampling.repetition_penalty, sampling.presence_penalty) = (1.3, 0.4);
            request.rules = TokenRules { logit_bias: vec![(5, 2.0), (9, -100.0)], ..TokenRules::default() };
        }
        if i % 4 == 3 {
            request.rules.allowed_token_ids = Some((0..vocab as u32).step_by(3).collect());
        }
        if i % 5 == 4 {
            // A text that says the same again and again, which drafts are taken from.
            request.prompt = Prompt::Tokens([3, 1, 4, 1, 5, 9].repeat(9));
        }
    }
    requests
}

pub fn run(builder: LlmBuilder, requests: &[GenerateRequest]) -> Vec<Bits> {
    let mut llm = builder.build().unwrap();
    let completions = llm.generate(requests).unwrap();
    llm.check();
    completions.iter().map(bits).collect()
}

/// Ways to run that change no token: overlap, chunks, pages, recorded steps, a pool that preempts, drafts.
pub fn way(builder: LlmBuilder, bits: u32) -> LlmBuilder {
    let is = |bit: u32| bits >> bit & 1 == 1;
    builder
        .overlap(is(0))
        .prefix_cache(!is(1))
        .max_prefill_tokens(if is(2) { 13 } else { 400 })
        .page_size(if is(0) { 16 } else { 32 })
        .num_pages(Some(if is(3) { 40 } else { 200 }))
        .max_graph_batch(if is(1) { 0 } else { 8 })
        .speculation(if is(4) { Speculation::Always } else { Speculation::Never })
        .policy(if is(2) { Policy::Latency } else { Policy::Throughput })
}
