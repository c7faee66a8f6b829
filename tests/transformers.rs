//! Against transformers on the same GPU: our error against its float32 values is no larger than its own bf16's.
//!
//! `scripts/transformers-reference DIR` makes the checkpoint and the values; MINISGL_REFERENCE names DIR.

mod common;

use std::path::{Path, PathBuf};

use common::logits::{Logits, checkpoint};
use minisgl_cuda::{Cuda, KernelSet, Options};
use safetensors::SafeTensors;

/// The values are rounded once more on their way out (f16 logits), and both errors are samples: some slack.
const SLACK: f64 = 1.05;

fn reference_dir() -> PathBuf {
    let dir = std::env::var_os("MINISGL_REFERENCE");
    PathBuf::from(
        dir.expect("set MINISGL_REFERENCE to the folder that scripts/transformers-reference filled"),
    )
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = tensors.tensor(name).expect("a reference tensor").data().to_vec();
    data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn prompt(tensors: &SafeTensors<'_>, i: usize) -> Vec<u32> {
    let data = tensors.tensor(&format!("prompt.{i}")).expect("a prompt").data().to_vec();
    data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// ‖out − exact‖ / ‖exact‖
fn relative_error(out: &[f32], exact: &[f32]) -> f64 {
    assert_eq!(out.len(), exact.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut out.iter().zip(exact).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut exact.iter().map(|v| f64::from(*v)))
}

fn check(dir: &Path, tensors: &SafeTensors<'_>) {
    let cuda = Cuda::new(&Options { device: 0, kernels: KernelSet::Auto }).expect("a GPU");
    let mut model = Logits::new(cuda, &checkpoint(dir), 1024, true);
    let prompts = tensors.names().iter().filter(|name| name.starts_with("prompt.")).count();
    assert!(prompts > 0, "no prompts in the reference");
    println!("{:>7} {:>7} {:>14} {:>14}", "prompt", "tokens", "ours", "transformers");
    for i in 0..prompts {
        let prompt = prompt(tensors, i);
        let exact = floats(tensors, &format!("float32.{i}"));
        let ours = model.of(&prompt).concat();
        let (ours, theirs) = (
            relative_error(&ours, &exact),
            relative_error(&floats(tensors, &format!("bfloat16.{i}")), &exact),
        );
        println!("{i:>7} {:>7} {ours:>14.3e} {theirs:>14.3e}", prompt.len());
        assert!(
            ours <= theirs * SLACK,
            "prompt {i}: our error {ours:.3e} is above transformers' {theirs:.3e}"
        );
    }
}

#[test]
#[ignore = "needs a GPU and MINISGL_REFERENCE"]
fn our_error_against_float32_is_no_larger_than_transformers_in_bf16() {
    let dir = reference_dir();
    let bytes = std::fs::read(dir.join("reference.safetensors")).expect("reference.safetensors");
    check(&dir, &SafeTensors::deserialize(&bytes).expect("safetensors"));
}
