//! Real weights, real text: SmolLM2-135M-Instruct, made into a checkpoint by `scripts/smollm2-checkpoint`, gives the text that
//! transformers gives for the same weights, its chat template included.
//!
//! The weights come from PyPI, 93 MB, once; so these tests run when asked for. `MINISGL_SMOLLM2` names a folder that has the
//! checkpoint already.

mod common;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use common::{fixture, greedy};
use minisgl::{BackendChoice, GenerateRequest, Llm, LlmBuilder, Message};
use serde::Deserialize;

#[derive(Deserialize)]
struct Expected {
    examples: Vec<Example>,
}

#[derive(Deserialize)]
struct Example {
    /// `text`, or `chat`: a user's message.
    kind: String,
    user: String,
    /// What is tokenized.
    text: String,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// By how much each of those tokens' logit was above the next best.
    top2_margin: Vec<f64>,
}

impl Example {
    /// How many tokens come before the first that was drawn by less than `margin`.
    fn certain(&self, margin: f64) -> usize {
        self.top2_margin.iter().position(|own| *own < margin).unwrap_or(self.greedy.len())
    }
}

/// The checkpoint, made if it is not there.
fn checkpoint() -> PathBuf {
    if let Some(folder) = env::var_os("MINISGL_SMOLLM2") {
        return folder.into();
    }
    let folder = PathBuf::from("target/smollm2");
    if !folder.join("model.safetensors").exists() {
        let status = Command::new("scripts/smollm2-checkpoint").arg(&folder).status().expect("python3");
        assert!(status.success(), "scripts/smollm2-checkpoint made no checkpoint");
    }
    folder
}

/// Runs the examples: tokens must be right up to the first that was drawn by less than `margin`, where rounding may decide.
fn speaks(builder: impl FnOnce(LlmBuilder) -> LlmBuilder, margin: f64) {
    let text = fs::read(fixture("smollm2-135m").join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_slice(&text).unwrap();
    let llm = Llm::builder(checkpoint().display().to_string()).max_seq_len(Some(512)).num_pages(Some(128));
    let mut llm = builder(llm.max_running(4).max_graph_batch(4)).build().unwrap();
    let mut requests = Vec::new();
    for example in &expected.examples {
        assert_eq!(llm.encode(&example.text).unwrap(), example.prompt, "{:?}", example.text);
        let request = match example.kind.as_str() {
            "chat" => GenerateRequest::chat(vec![Message::new("user", example.user.as_str())]),
            _ => GenerateRequest::text(example.user.as_str()),
        };
        assert_eq!(llm.encode_prompt(request.prompt.clone()).unwrap(), example.prompt, "{:?}", example.user);
        requests.push(request.sampling(greedy(example.greedy.len() as u32)));
    }
    let completions = llm.generate(&requests).unwrap();
    for (completion, example) in completions.iter().zip(&expected.examples) {
        println!("{:?}: {:?}", example.user, completion.text);
        let certain = example.certain(margin);
        assert_eq!(completion.token_ids[..certain], example.greedy[..certain], "{:?}", example.user);
    }
}

#[test]
#[ignore = "takes 93 MB from PyPI: scripts/smollm2-checkpoint"]
fn real_weights_speak_on_the_cpu() {
    speaks(|builder| builder.backend(BackendChoice::Cpu), 0.0);
}

#[test]
#[ignore = "needs a GPU and MINISGL_SMOLLM2"]
fn real_weights_speak_on_the_gpu() {
    // Logits are f16 of about 28, in steps of 1/64, behind 30 layers in bf16.
    speaks(|builder| builder.backend(BackendChoice::Cuda), 0.05);
}
