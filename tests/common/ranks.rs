//! What tests of several ranks ask for, on the CPU and on GPUs, and what of it may not depend on how it is computed.

use minisgl::{
    Completion, GenerateRequest, LlmBuilder, Policy, Prompt, PromptLogprobs, Speculation, TokenRules,
};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use serde_json::Value;

use super::{Numbers, Scratch, mixed_requests};

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

/// A checkpoint of random numbers in bf16: what `config` says, with an untied head, and of each layer tensors of these names and shapes besides
/// attention and norms.
pub fn random_checkpoint(config: &Value, mlp: &[(String, Vec<usize>)]) -> Scratch {
    let scratch = Scratch::new();
    let size = |name: &str| config[name].as_u64().unwrap() as usize;
    let (hidden, vocab, head) = (size("hidden_size"), size("vocab_size"), size("head_dim"));
    let (q, kv) = (size("num_attention_heads") * head, size("num_key_value_heads") * head);
    let mut numbers = Numbers(5);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut push = |name: String, shape: &[usize]| {
        let mut element = || half_bits((numbers.below(2001) as f32 - 1000.0) / 4000.0);
        let bytes = (0..shape.iter().product()).flat_map(|_| element().to_le_bytes()).collect();
        tensors.push((name, shape.to_vec(), bytes));
    };
    push("model.embed_tokens.weight".to_owned(), &[vocab, hidden]);
    push("lm_head.weight".to_owned(), &[vocab, hidden]);
    push("model.norm.weight".to_owned(), &[hidden]);
    for layer in 0..size("num_hidden_layers") {
        let attention: [(&str, &[usize]); 6] = [
            ("input_layernorm", &[hidden]),
            ("post_attention_layernorm", &[hidden]),
            ("self_attn.q_proj", &[q, hidden]),
            ("self_attn.k_proj", &[kv, hidden]),
            ("self_attn.v_proj", &[kv, hidden]),
            ("self_attn.o_proj", &[hidden, q]),
        ];
        for (name, shape) in attention {
            push(format!("model.layers.{layer}.{name}.weight"), shape);
        }
        if config["model_type"] == "qwen3_moe" {
            ["q_norm", "k_norm"]
                .iter()
                .for_each(|name| push(format!("model.layers.{layer}.self_attn.{name}.weight"), &[head]));
        }
        mlp.iter().for_each(|(name, shape)| push(format!("model.layers.{layer}.{name}"), shape));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    scratch.write("model.safetensors", serialize(views, None).unwrap());
    scratch.write("config.json", config.to_string());
    scratch
}

/// bf16's bits of a number, cut.
fn half_bits(x: f32) -> u16 {
    (x.to_bits() >> 16) as u16
}

/// A checkpoint with stacked experts that 8 ranks can share on the CPU, and 4 on GPUs.
pub fn with_experts() -> Scratch {
    let (hidden, inner, experts, vocab) = (256, 64, 8, 103);
    let config = serde_json::json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 256, "moe_intermediate_size": inner,
        "num_experts": experts, "num_experts_per_tok": 3, "norm_topk_prob": true, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": false
    });
    let mlp = [
        ("mlp.gate.weight", vec![experts, hidden]),
        ("mlp.experts.gate_up_proj", vec![experts, 2 * inner, hidden]),
        ("mlp.experts.down_proj", vec![experts, hidden, inner]),
    ];
    random_checkpoint(&config, &mlp.map(|(name, shape)| (name.to_owned(), shape)))
}
