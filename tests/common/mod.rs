//! What the tests share: the fixtures, found from the directory that cargo runs tests in, and temporary directories.
#![allow(dead_code)]

pub mod generate;
pub mod logits;
pub mod ranks;
pub mod stored;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use minisgl::{BackendChoice, GenerateRequest, Llm, LlmBuilder, SamplingParams};
use safetensors::SafeTensors;
use serde::Deserialize;

/// The golden checkpoints that everything is tried on.
pub const CHECKPOINTS: [&str; 2] = ["tiny-tied", "tiny-untied"];

/// Golden checkpoints of other families, each about a thing of its own.
pub const FAMILIES: [&str; 13] = [
    "llama-rope3",
    "qwen2-bias",
    "qwen2-yarn",
    "mistral-window",
    "smollm3-nope",
    "seed-oss",
    "phi3",
    "phi4-mini",
    "olmo2",
    "qwen3-yarn",
    "gemma3",
    "qwen3-moe",
    "qwen3-moe-nonorm",
];

/// Those of them that have experts, where rounding to bf16 may flip a router's choice (`tests/cuda.rs`).
pub const EXPERTS: [&str; 2] = ["qwen3-moe", "qwen3-moe-nonorm"];

/// Those of them that the CUDA backend refuses, and by which words.
pub const CPU_ALONE: [(&str, &str); 3] = [
    ("gemma3", "head_dim is 256"),
    ("phi4-mini", "rope that does not turn the halves of whole heads"),
    ("olmo2", "norms behind attention and MLP"),
];

/// Those of them that it computes.
pub fn families_on_cuda() -> impl Iterator<Item = &'static str> {
    FAMILIES.into_iter().filter(|name| CPU_ALONE.iter().all(|(refused, _)| refused != name))
}

/// Golden checkpoints with fp8 weights.
pub const FP8: [&str; 3] = ["qwen3-fp8", "llama-fp8ct", "qwen3-moe-fp8"];

/// One of them on the CPU.
pub fn family(name: &str) -> LlmBuilder {
    builder(name).max_seq_len(Some(256))
}

/// Says that something was not tried, and why, past the capture that hides what a passing test prints.
pub fn skipped(why: &str) {
    let _ = writeln!(io::stderr(), "skipped: {why}");
}

/// A fixture's path.
pub fn fixture(name: &str) -> PathBuf {
    Path::new("tests/fixtures").join(name)
}

/// A golden checkpoint on the CPU, with small capacities.
pub fn builder(name: &str) -> LlmBuilder {
    small(fixture(name))
}

/// A checkpoint in any folder, likewise.
pub fn small(folder: impl AsRef<Path>) -> LlmBuilder {
    Llm::builder(folder.as_ref().display().to_string())
        .backend(BackendChoice::Cpu)
        .max_running(8)
        .max_queued(16)
        .max_seq_len(Some(512))
        .num_pages(Some(128))
        .max_graph_batch(8)
}

/// Greedy sampling of `max_tokens` tokens, whatever they are.
pub fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() }
}

/// Does what an engine must not be quicker than, until it was not: on a busy machine the test may be the one that waits.
pub fn in_time<T>(attempt: impl FnMut() -> Option<T>) -> T {
    std::iter::repeat_with(attempt).take(10).flatten().next().expect("in none of ten attempts it was in time")
}

/// Deterministic numbers below `bound`.
pub struct Numbers(pub u64);

impl Numbers {
    /// The next one.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Requests of mixed lengths, half of them greedy; some share a prefix.
pub fn mixed_requests(count: usize, vocab: u64) -> Vec<GenerateRequest> {
    let mut numbers = Numbers(42);
    let shared: Vec<u32> = (0..70).map(|_| numbers.below(vocab) as u32).collect();
    (0..count)
        .map(|i| {
            let mut prompt = if i % 3 == 0 { shared.clone() } else { Vec::new() };
            prompt.extend((0..1 + numbers.below(300)).map(|_| numbers.below(vocab) as u32));
            let sampling = greedy(1 + numbers.below(90) as u32);
            let drawn = SamplingParams {
                temperature: 0.8,
                top_k: [0, 40][i / 2 % 2],
                top_p: [1.0, 0.9][i / 4 % 2],
                seed: i as u64,
                ..sampling
            };
            GenerateRequest::tokens(prompt).sampling(if i % 2 == 0 { sampling } else { drawn })
        })
        .collect()
}

/// A request for greedy tokens.
pub fn greedy_request(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest::tokens(prompt).sampling(greedy(max_tokens))
}

/// What transformers computes from a golden checkpoint.
pub struct Golden {
    pub examples: Vec<Example>,
    tensors: Vec<u8>,
}

#[derive(Deserialize)]
pub struct Example {
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
    pub top2_margin: Vec<f32>,
}

impl Golden {
    pub fn open(name: &str) -> Self {
        Golden::of(name, "expected")
    }

    /// What is computed where activations are rounded to fp8 too.
    pub fn with_rounded_inputs(name: &str) -> Self {
        Golden::of(name, "expected_actq")
    }

    fn of(name: &str, files: &str) -> Self {
        #[derive(Deserialize)]
        struct File {
            examples: Vec<Example>,
        }
        let read = |file: &str| fs::read(fixture(name).join(file)).unwrap();
        let file: File = serde_json::from_slice(&read(&format!("{files}.json"))).unwrap();
        Golden { examples: file.examples, tensors: read(&format!("{files}.safetensors")) }
    }

    /// Logits at the last positions of example `i`'s prompt.
    pub fn logits(&self, i: usize) -> Vec<Vec<f32>> {
        self.tensor(&format!("logits.{i}"))
    }

    /// Logits at the step that chose example `i`'s last greedy token.
    pub fn last_logits(&self, i: usize) -> Vec<f32> {
        self.tensor(&format!("last_logits.{i}")).remove(0)
    }

    fn tensor(&self, name: &str) -> Vec<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = file.tensor(name).unwrap();
        let width = *view.shape().last().unwrap();
        let values: Vec<f32> =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        values.chunks_exact(width).map(<[f32]>::to_vec).collect()
    }
}

/// `|a - b| / |b|`.
pub fn relative_error(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let norm = |squares: f32| squares.sqrt();
    norm(a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()) / norm(b.iter().map(|x| x * x).sum())
}

/// A directory that is removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("minisgl-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.join(name), content).unwrap();
        self.join(name)
    }

    /// Copies a fixture's files here.
    pub fn copy(&self, name: &str) {
        for entry in fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), self.join(entry.file_name().to_str().unwrap())).unwrap();
        }
    }

    /// A golden checkpoint with a tokenizer and a chat template.
    pub fn with_text() -> Self {
        let scratch = Scratch::new();
        scratch.copy("tiny-tied");
        scratch.copy("text");
        scratch
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
