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

/// Runs the examples; of the last one's tokens as many must be right as `last` says: its last has a margin that bf16 has not.
fn speaks(builder: impl FnOnce(LlmBuilder) -> LlmBuilder, last: usize) {
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
    let count = completions.len();
    for (i, (completion, example)) in completions.iter().zip(&expected.examples).enumerate() {
        println!("{:?}: {:?}", example.user, completion.text);
        let right = if i + 1 == count { last } else { example.greedy.len() };
        assert_eq!(completion.token_ids[..right], example.greedy[..right], "{:?}", example.user);
    }
}

#[test]
#[ignore = "takes 93 MB from PyPI: scripts/smollm2-checkpoint"]
fn real_weights_speak_on_the_cpu() {
    speaks(|builder| builder.backend(BackendChoice::Cpu), 32);
}

#[test]
#[ignore = "needs a GPU and MINISGL_SMOLLM2"]
fn real_weights_speak_on_the_gpu() {
    speaks(|builder| builder.backend(BackendChoice::Cuda), 31);
}
