//! The golden checkpoints, and what transformers computes from them.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

/// Checkpoints under `tests/fixtures`.
pub const FIXTURES: [&str; 2] = ["tiny-tied", "tiny-untied"];

/// A prompt and what the model makes of it.
pub struct Example {
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
    /// Logits at the last `logits.len()` positions of the prompt, `[vocab]` each.
    pub logits: Vec<Vec<f32>>,
    /// Logits that chose the last greedy token, `[vocab]`.
    pub last_logits: Vec<f32>,
}

/// The directory of a golden checkpoint: `tests/fixtures` here or in a directory above.
pub fn fixture(name: &str) -> PathBuf {
    let start =
        std::env::var("CARGO_MANIFEST_DIR").map_or_else(|_| std::env::current_dir().unwrap(), PathBuf::from);
    let found = start.ancestors().map(|dir| dir.join("tests/fixtures").join(name)).find(|dir| dir.is_dir());
    found.unwrap_or_else(|| panic!("no tests/fixtures/{name} in {} or above", start.display()))
}

/// The examples of a golden checkpoint.
pub fn examples(dir: &Path) -> Vec<Example> {
    let text = fs::read(dir.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&text).unwrap();
    let tensors = fs::read(dir.join("expected.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&tensors).unwrap();
    let examples = expected["examples"].as_array().unwrap();
    let read = |name: String| rows(&tensors, &name);
    examples
        .iter()
        .enumerate()
        .map(|(i, example)| Example {
            prompt: ids(&example["prompt"]),
            greedy: ids(&example["greedy"]),
            logits: read(format!("logits.{i}")),
            last_logits: read(format!("last_logits.{i}")).remove(0),
        })
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The rows of an f32 tensor.
fn rows(tensors: &SafeTensors<'_>, name: &str) -> Vec<Vec<f32>> {
    let tensor = tensors.tensor(name).unwrap();
    let width = *tensor.shape().last().unwrap();
    let floats: Vec<f32> =
        tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
    floats.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

/// Asserts that every logit is within 1e-3 of what is expected.
#[track_caller]
pub fn assert_logits(what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}: vocabulary");
    for (id, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= 1e-3, "{what}, token {id}: {got}, expected {expected}");
    }
}
