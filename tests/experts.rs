//! Models with experts on the CPU, through the public API: both forms of their weights, and what is said of them.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::logits::{Logits, checkpoint};
use common::{Scratch, fixture, greedy, mixed_requests, small};
use minisgl::{GenerateRequest, Llm, Quantize};
use minisgl_cpu::Cpu;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize};

/// Tensors by name: their shape and bytes, all bf16.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn read(name: &str) -> Tensors {
    let mut tensors = Tensors::new();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        let is_weights = path.file_name().unwrap().to_str().unwrap().starts_with("model")
            && path.extension().is_some_and(|end| end == "safetensors");
        if is_weights {
            let bytes = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                tensors.insert(name, (view.shape().to_vec(), view.data().to_vec()));
            }
        }
    }
    tensors
}

/// Each layer's experts in one tensor for gate and up and one for down, as transformers 5 holds them.
fn stack(tensors: Tensors) -> Tensors {
    let (experts, mut stacked): (Tensors, Tensors) =
        tensors.into_iter().partition(|(name, _)| name.contains(".experts."));
    let layers =
        (0..8).filter(|layer| experts.contains_key(&format!("{}.0.down_proj.weight", prefix(*layer))));
    for layer in layers {
        let mut push = |name: &str, parts: &[&str]| {
            let part =
                |expert: usize, part: &str| experts.get(&format!("{}.{expert}.{part}.weight", prefix(layer)));
            let count = (0..).take_while(|expert| part(*expert, parts[0]).is_some()).count();
            let all = (0..count).flat_map(|expert| parts.iter().map(move |name| part(expert, name).unwrap()));
            let shape = &part(0, parts[0]).unwrap().0;
            let bytes: Vec<u8> = all.flat_map(|(_, bytes)| bytes.clone()).collect();
            let shape = vec![count, parts.len() * shape[0], shape[1]];
            stacked.insert(format!("{}.{name}", prefix(layer)), (shape, bytes));
        };
        push("gate_up_proj", &["gate_proj", "up_proj"]);
        push("down_proj", &["down_proj"]);
    }
    stacked
}

fn prefix(layer: usize) -> String {
    format!("model.layers.{layer}.mlp.experts")
}

fn write(scratch: &Scratch, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    scratch.write("model.safetensors", serialize(views, None).unwrap());
}

/// A checkpoint whose experts are stacked.
fn stacked(name: &str) -> (Scratch, Tensors) {
    let scratch = Scratch::new();
    fs::copy(fixture(name).join("config.json"), scratch.join("config.json")).unwrap();
    let tensors = stack(read(name));
    write(&scratch, &tensors);
    (scratch, tensors)
}

fn tokens(llm: &mut Llm, requests: &[GenerateRequest]) -> Vec<Vec<u32>> {
    llm.generate(requests).unwrap().into_iter().map(|completion| completion.token_ids).collect()
}

#[test]
fn stacked_experts_are_the_same_experts() {
    for name in ["qwen3-moe", "qwen3-moe-nonorm"] {
        let (scratch, _) = stacked(name);
        let requests = mixed_requests(6, 320);
        let mut one_by_one = small(fixture(name)).build().unwrap();
        let mut stacked = small(scratch.path()).build().unwrap();
        assert_eq!(tokens(&mut stacked, &requests), tokens(&mut one_by_one, &requests), "{name}");
        let prompt: Vec<u32> = (0..50).map(|i| i * 5).collect();
        let logits = |folder: &Path| Logits::new(Cpu::new(), &checkpoint(folder), 512, true).of(&prompt);
        assert_eq!(logits(scratch.path()), logits(&fixture(name)), "{name}");
    }
}

#[test]
fn experts_that_are_missing_or_of_another_shape_are_named() {
    let refused = |scratch: &Scratch, parts: [&str; 2]| {
        let error = small(scratch.path()).build().err().unwrap().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    let (scratch, whole) = stacked("qwen3-moe");
    let down = format!("{}.down_proj", prefix(1));
    let mut tensors = whole.clone();
    tensors.remove(&down);
    write(&scratch, &tensors);
    refused(&scratch, [&down, "missing"]);
    tensors.insert(down.clone(), (vec![8, 64, 96], whole[&down].1.clone()));
    write(&scratch, &tensors);
    refused(&scratch, [&down, "[8, 96, 64]"]);

    let mut tensors = read("qwen3-moe");
    let up = format!("{}.7.up_proj.weight", prefix(0));
    tensors.remove(&up);
    write(&scratch, &tensors);
    refused(&scratch, [&up, "missing"]);
    let router = "model.layers.1.mlp.gate.weight";
    let mut tensors = read("qwen3-moe");
    tensors.remove(router);
    write(&scratch, &tensors);
    refused(&scratch, [router, "missing"]);
}

#[test]
fn what_is_said_of_a_model_knows_its_experts() {
    let mut llm = small(fixture("qwen3-moe-nonorm")).build().unwrap();
    let experts = llm.info().experts.unwrap();
    assert_eq!((experts.layers, experts.count, experts.per_token), (2, 8, 2));
    assert_eq!(experts.bytes, 3 * 48 * 96 * 2);
    assert!(llm.info().to_string().contains("2 of 8 experts in 2 of 3 layers"), "{}", llm.info());
    let attention = 96 * (4 + 2 * 2 + 4) * 64;
    assert_eq!(llm.info().active_weights, 3 * attention + 2 * 96 * (8 + 2 * 3 * 48) + 3 * 96 * 128);

    let before = llm.experts_read().unwrap();
    llm.generate(&[GenerateRequest::tokens([1, 2, 3]).sampling(greedy(11))]).unwrap();
    let after = llm.experts_read().unwrap();
    let (layers, read) = (after.layers - before.layers, after.experts - before.experts);
    assert_eq!(
        (layers, read),
        (2 * 10, 2 * 2 * 10),
        "one row reads what it chose, in each of ten decode steps"
    );
}

/// The dummy weights' router: all experts are chosen, and not equally often.
#[test]
fn a_dummy_router_spreads_tokens_unevenly() {
    let mut llm = small("tiny-moe").build().unwrap();
    let requests: Vec<_> =
        (0..8u32).map(|i| GenerateRequest::tokens([17 * i + 1, 5 * i]).sampling(greedy(60))).collect();
    let before = llm.experts_read().unwrap();
    llm.generate(&requests).unwrap();
    let after = llm.experts_read().unwrap();
    let mean = (after.experts - before.experts) as f64 / (after.layers - before.layers) as f64;
    let even = llm.info().experts.unwrap().read_by(8);
    assert!(
        (0.6 * even..even).contains(&mean),
        "{mean} of 16 experts by 8 rows, {even} if all were as likely"
    );
}

/// All tensors of a checkpoint's only file: their types, shapes and bytes.
fn stored(name: &str) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(fixture(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

#[test]
fn e4m3_experts_without_their_scales_or_stacked_are_refused_by_name() {
    const FP8: &str = "qwen3-moe-fp8";
    let whole = stored(FP8);
    let refused = |tensors: &BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>, parts: [&str; 2]| {
        let scratch = Scratch::new();
        fs::copy(fixture(FP8).join("config.json"), scratch.join("config.json")).unwrap();
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        scratch.write("model.safetensors", serialize(views, None).unwrap());
        let error = small(scratch.path()).build().err().unwrap().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    let scales = format!("{}.5.down_proj.weight_scale_inv", prefix(1));
    let mut tensors = whole.clone();
    let (dtype, shape, bytes) = tensors.remove(&scales).unwrap();
    refused(&tensors, [&scales, "missing"]);
    tensors.insert(scales.clone(), (dtype, vec![1, 1], bytes[..2].to_vec()));
    refused(&tensors, [&scales, "[1, 2]"]);
    let infinite = [0x80, 0x7f].into_iter().chain(bytes[2..].iter().copied()).collect();
    tensors.insert(scales.clone(), (dtype, shape, infinite));
    refused(&tensors, [&scales, "inf"]);

    // No checkpoint of this family has experts both stacked and in e4m3: where their scales would be is not known.
    let stack = format!("{}.gate_up_proj", prefix(1));
    let mut tensors = whole;
    tensors.insert(stack.clone(), (Dtype::F8_E4M3, vec![8, 512, 128], vec![0; 8 * 512 * 128]));
    refused(&tensors, [&stack, "F8_E4M3"]);
}

#[test]
fn stacked_experts_quantized_at_load_are_those_quantized_one_by_one() {
    let (scratch, _) = stacked("qwen3-moe");
    let requests = mixed_requests(6, 320);
    let in_fp8 = |folder: &Path| {
        let mut llm = small(folder).quantize(Some(Quantize::Fp8)).build().unwrap();
        (tokens(&mut llm, &requests), llm.info().step_weight_bytes, llm.info().experts)
    };
    assert_eq!(in_fp8(scratch.path()), in_fp8(&fixture("qwen3-moe")));
}

/// Bytes of an expert in e4m3, whoever made it so, are those of its elements and its scales; and the floor counts them.
#[test]
fn what_is_said_of_experts_in_fp8_has_their_bytes() {
    let info = |name: &str, quantize| small(fixture(name)).quantize(quantize).build().unwrap().info().clone();
    // Gate, up and down of 48 by 96 are a tile each.
    let at_load = info("qwen3-moe-nonorm", Some(Quantize::Fp8)).experts.unwrap();
    assert_eq!(at_load.bytes, 3 * 48 * 96 + 4 * 3);
    let plain = info("qwen3-moe-nonorm", None);
    assert_eq!((at_load.layers, at_load.count, at_load.per_token), (2, 8, 2));

    // Gate, up and down of 256 by 128 have two tiles each.
    let stored = info("qwen3-moe-fp8", None);
    let experts = stored.experts.unwrap();
    assert_eq!((experts.layers, experts.count, experts.per_token), (1, 8, 3));
    assert_eq!(experts.bytes, 3 * 256 * 128 + 4 * 3 * 2);
    assert!(stored.to_string().contains("3 of 8 experts in 1 of 2 layers"), "{stored}");
    for info in [plain, stored] {
        let others = info.step_weight_bytes - info.experts.unwrap().all_bytes();
        let floor = minisgl::bench::costs(&info);
        assert_eq!((floor.weight_bytes_per_step, floor.expert_bytes), (others, info.experts.unwrap().bytes));
    }
}
