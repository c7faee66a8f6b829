//! Models by name, with dummy weights: Qwen3's sizes for benchmarks, and one small enough for two CPU cores.
//!
//! Dummy weights are uniform. A matrix's have the standard deviation 1/sqrt(inputs), so that a row of ones' size stays
//! of that size; a norm's scales lie around 1. A tensor's seed is a hash of its name: the same on every backend and
//! in every run.

use std::convert::Infallible;

use minisgl_core::backend::Dims;
use minisgl_core::tensor::{HostTensor, TensorData, splitmix64};

use crate::config::Config;
use crate::layout::{Shape, Tensors};

struct Preset {
    name: &'static str,
    layers: u32,
    hidden: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    intermediate: u32,
    vocab: u32,
    tied: bool,
}

/// `tiny` is ours; the others have the sizes of the published Qwen3 models.
#[rustfmt::skip]
const PRESETS: [Preset; 6] = [
    Preset { name: "tiny",       layers:  2, hidden:   64, heads:  2, kv_heads: 1, head_dim:  64, intermediate:   128, vocab:   2048, tied: true },
    Preset { name: "qwen3-0.6b", layers: 28, hidden: 1024, heads: 16, kv_heads: 8, head_dim: 128, intermediate:  3072, vocab: 151936, tied: true },
    Preset { name: "qwen3-1.7b", layers: 28, hidden: 2048, heads: 16, kv_heads: 8, head_dim: 128, intermediate:  6144, vocab: 151936, tied: true },
    Preset { name: "qwen3-4b",   layers: 36, hidden: 2560, heads: 32, kv_heads: 8, head_dim: 128, intermediate:  9728, vocab: 151936, tied: true },
    Preset { name: "qwen3-8b",   layers: 36, hidden: 4096, heads: 32, kv_heads: 8, head_dim: 128, intermediate: 12288, vocab: 151936, tied: false },
    Preset { name: "qwen3-14b",  layers: 40, hidden: 5120, heads: 40, kv_heads: 8, head_dim: 128, intermediate: 17408, vocab: 151936, tied: false },
];

/// The presets' names, smallest first.
pub fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|preset| preset.name)
}

/// Is there a preset of this name?
pub fn is_preset(name: &str) -> bool {
    names().any(|preset| preset == name)
}

/// A preset's configuration. It has no end-of-sequence token: dummy weights mean nothing by one.
pub fn config(name: &str) -> Option<Config> {
    let preset = PRESETS.iter().find(|preset| preset.name == name)?;
    Some(Config {
        dims: Dims {
            layers: preset.layers,
            hidden: preset.hidden,
            heads: preset.heads,
            kv_heads: preset.kv_heads,
            head_dim: preset.head_dim,
            intermediate: preset.intermediate,
            vocab: preset.vocab,
            norm_eps: 1e-6,
        },
        max_positions: 40960,
        rope_theta: 1e6,
        tied: preset.tied,
        eos: Vec::new(),
    })
}

/// Dummy weights for any configuration.
pub(crate) fn dummy_tensors(config: &Config) -> Tensors {
    let made: Result<Tensors, Infallible> =
        Tensors::collect(&config.dims, config.tied, |name, shape| Ok(dummy(name, shape)));
    match made {
        Ok(tensors) => tensors,
    }
}

fn dummy(name: &str, shape: Shape) -> HostTensor {
    let (low, high) = match shape {
        Shape::Vector(_) => (0.9, 1.1),
        // A uniform variate on [-a, a) has the standard deviation a / sqrt(3).
        Shape::Matrix(_, inputs) => {
            let bound = (3.0 / inputs as f32).sqrt();
            (-bound, bound)
        }
    };
    let (rows, cols) = shape.rows_cols();
    HostTensor {
        name: name.to_owned(),
        rows,
        cols,
        data: TensorData::Uniform { seed: seed(name), low, high },
    }
}

/// FNV-1a of the name (Fowler, Noll and Vo, 1991), mixed.
fn seed(name: &str) -> u64 {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    splitmix64(hash)
}
