//! Checkpoints with q, k and v in one tensor, and gate and up: what is computed of them is what is computed of the same matrices
//! apart, bit for bit.
//!
//! Llama's golden checkpoints are made Phi-3's, which computes the same of tensors that are fused.

mod common;

use std::fs;

use common::stored::{Stored, Tensors, stored, write};
use common::{Golden, Scratch, fixture, greedy, small};
use minisgl::{Completion, Dtype, GenerateRequest, LlmBuilder, Quantize, SamplingParams};
use serde_json::{Value, json};

/// A checkpoint's configuration and tensors.
#[derive(Clone)]
struct Model {
    config: Value,
    tensors: Tensors,
}

fn llama(name: &str) -> Model {
    let config = fs::read(fixture(name).join("config.json")).unwrap();
    Model { config: serde_json::from_slice(&config).unwrap(), tensors: stored(name) }
}

/// Rows of several tensors, stacked; a scale of all of a tensor is the same for all.
fn stack(parts: &[Stored]) -> Stored {
    let mut all = parts[0].clone();
    if all.shape != [1] {
        all.shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        all.bytes = parts.iter().flat_map(|part| part.bytes.clone()).collect();
    }
    all
}

impl Model {
    fn fused(mut self) -> Model {
        (self.config["architectures"], self.config["model_type"]) =
            (json!(["Phi3ForCausalLM"]), json!("phi3"));
        let qkv = ["self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."];
        let gate_up = ["mlp.gate_proj.", "mlp.up_proj."];
        for (fused, apart) in [("self_attn.qkv_proj.", &qkv[..]), ("mlp.gate_up_proj.", &gate_up)] {
            let names: Vec<_> = self.tensors.keys().filter(|name| name.contains(apart[0])).cloned().collect();
            for name in names {
                let part = |part: &&str| self.tensors.remove(&name.replace(apart[0], part)).unwrap();
                let parts: Vec<_> = apart.iter().map(part).collect();
                self.tensors.insert(name.replace(apart[0], fused), stack(&parts));
            }
        }
        self
    }

    /// One with e4m3 weights, in the form of published FP8 checkpoints, with tiles of `rows x cols` or scales of whole matrices.
    fn in_tiles(mut self, tile: Option<[usize; 2]>) -> Model {
        let block = tile.map(|tile| json!(tile));
        self.config["quantization_config"] =
            json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block});
        self.tensors.retain(|name, _| !name.ends_with(".weight_scale"));
        let scales = |(name, tensor): (&String, &Stored)| {
            let shape = match tile {
                Some(tile) => vec![tensor.shape[0].div_ceil(tile[0]), tensor.shape[1].div_ceil(tile[1])],
                None => vec![1],
            };
            let values = (0..shape.iter().product()).map(|i| 0.002 + 0.0005 * (i % 7) as f32);
            let bytes = values.flat_map(f32::to_le_bytes).collect();
            let suffix = if tile.is_some() { "weight_scale_inv" } else { "weight_scale" };
            (name.replace("weight", suffix), Stored { dtype: Dtype::F32, shape, bytes })
        };
        let matrices = self.tensors.iter().filter(|(_, tensor)| tensor.dtype == Dtype::F8_E4M3);
        let scales: Tensors = matrices.map(scales).collect();
        self.tensors.extend(scales);
        self
    }

    fn written(&self) -> Scratch {
        let folder = Scratch::new();
        folder.write("config.json", self.config.to_string());
        write(&self.tensors, &folder.join("model.safetensors"));
        folder
    }
}

/// Greedy tokens of a golden checkpoint's prompts, with log-probabilities.
fn outputs(builder: LlmBuilder, golden: &Golden) -> Vec<Completion> {
    let sampling = SamplingParams { logprobs: Some(3), ..greedy(24) };
    let request = |prompt: &Vec<u32>| GenerateRequest::tokens(&prompt[..]).sampling(sampling);
    let requests: Vec<_> = golden.examples.iter().map(|example| request(&example.prompt)).collect();
    let completions = builder.build().unwrap().generate(&requests).unwrap();
    assert!(completions.iter().all(|completion| completion.error.is_none()), "{completions:?}");
    completions
}

#[test]
fn fused_tensors_give_the_bits_of_those_apart_in_every_type_of_weights() {
    let (bf16, rows) = (llama("mistral-window"), llama("llama-fp8ct"));
    let models = [
        ("bf16", "mistral-window", bf16),
        ("a scale a row", "llama-fp8ct", rows.clone()),
        ("tiles", "llama-fp8ct", rows.clone().in_tiles(Some([64, 64]))),
        ("a scale a matrix", "llama-fp8ct", rows.in_tiles(None)),
    ];
    for (what, name, apart) in models {
        let golden = Golden::open(name);
        let (apart, fused) = (apart.clone().written(), apart.fused().written());
        let expected = outputs(small(apart.path()), &golden);
        for ranks in [1, 2] {
            let given = outputs(small(fused.path()).tensor_parallel(ranks), &golden);
            assert_eq!(given, expected, "{what}, {ranks} ranks");
        }
    }
}

#[test]
fn fused_tensors_that_are_quantized_at_load_are_those_apart_that_are() {
    let (name, golden) = ("mistral-window", Golden::open("mistral-window"));
    let (apart, fused) = (llama(name).written(), llama(name).fused().written());
    let [apart, fused] =
        [apart, fused].map(|folder| outputs(small(folder.path()).quantize(Some(Quantize::Fp8)), &golden));
    assert_eq!(fused, apart);
}

#[test]
fn what_does_not_fit_a_fused_tensor_is_refused_by_its_name() {
    const QKV: &str = "model.layers.1.self_attn.qkv_proj.weight";
    let refused = |model: &Model| small(model.written().path()).build().err().unwrap().to_string();
    let fused = llama("mistral-window").fused();
    let mut short = fused.clone();
    let tensor = short.tensors.get_mut(QKV).unwrap();
    (tensor.shape[0], _) = (511, tensor.bytes.drain(..256));
    let mut missing = fused;
    missing.tensors.remove(QKV);
    // 256 rows of q, 128 of k: the third tile of 96 rows has some of both.
    let tiles = llama("llama-fp8ct").fused().in_tiles(Some([96, 128]));
    for (model, words) in [
        (short, [QKV, "[511, 128]", "[512, 128]"]),
        (missing, [QKV, "missing", ""]),
        (tiles, ["model.layers.0.self_attn.qkv_proj.weight", "row 256", "tile of 96 rows"]),
    ] {
        let error = refused(&model);
        assert!(words.iter().all(|word| error.contains(word)), "{error} has not {words:?}");
    }
}
