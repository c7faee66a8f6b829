//! The models whose shapes are timed: Qwen3-0.6B and 14B, or sizes that a caller gives.

use std::str::FromStr;

use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{
    Attention, Bias, DecoderSpec, Dims, Fp8, Inputs, LayerSpec, Mixer, QkNorm, Rope, ScaleBlock, WeightFormat,
};

/// Sizes of a model that cases are taken from; by default those of Qwen3-0.6B.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape {
    pub(crate) name: &'static str,
    pub(crate) layers: u32,
    pub(crate) hidden: u32,
    pub(crate) vocab: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    intermediate: u32,
    /// Positions that a token sees, where not all.
    pub(crate) window: Option<u32>,
    /// Have q, k and v biases, and heads no norms?
    pub(crate) bias: bool,
    /// Are keys and values kept in fp8, are matrices in it, and are these ones' inputs rounded to it?
    pub(crate) kv_fp8: bool,
    weights_fp8: bool,
    inputs_fp8: bool,
}

/// No size of a model is larger, nor are all query heads of a token: so its weights are counted in 64 bits.
const SIZE_MAX: u32 = 1 << 20;
/// Columns that have a scale in fp8, of weights and of their inputs, as `--quantize fp8` makes them.
pub(crate) const FP8_COLS: u32 = 256;
/// Positions that a token sees in cases of models that have no window of their own.
const USUAL_WINDOW: u32 = 1024;

const SMALL: ModelShape = ModelShape {
    name: "0.6b",
    layers: 28,
    hidden: 1024,
    vocab: 151_936,
    heads: 16,
    kv_heads: 8,
    head_dim: 128,
    intermediate: 3072,
    window: None,
    bias: false,
    kv_fp8: false,
    weights_fp8: false,
    inputs_fp8: false,
};

/// Qwen3-0.6B and Qwen3-14B.
pub(crate) const MODELS: [ModelShape; 2] =
    [SMALL, ModelShape { name: "14b", layers: 40, hidden: 5120, heads: 40, intermediate: 17_408, ..SMALL }];

impl Default for ModelShape {
    fn default() -> ModelShape {
        SMALL
    }
}

impl ModelShape {
    pub(crate) fn dims(&self) -> Dims {
        let ModelShape { layers, hidden, vocab, heads, kv_heads, head_dim, intermediate, .. } = *self;
        Dims { layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, norm_eps: 1e-6 }
    }

    /// As data: layers that are alike, with head norms and rope or with biases.
    pub(crate) fn spec(&self) -> DecoderSpec {
        let (bias, qk_norm) = match self.bias {
            true => (Bias::Qkv, QkNorm::None),
            false => (Bias::None, QkNorm::PerHead),
        };
        let rope = Some(Rope::plain(1e6, self.head_dim));
        let attention = Attention { bias, qk_norm, rope, window: self.window, ..Attention::plain() };
        let layer = LayerSpec { mixer: Mixer::Attention(attention), ..LayerSpec::plain() };
        let inputs = if self.inputs_fp8 { Inputs::PerGroup(FP8_COLS) } else { Inputs::Plain };
        let fp8 = WeightFormat::Fp8(Fp8 { block: ScaleBlock::Tile { rows: 128, cols: FP8_COLS }, inputs });
        DecoderSpec {
            kv: self.kv_fp8.then_some(KvFormat::Fp8),
            weights: if self.weights_fp8 { fp8 } else { WeightFormat::Bf16 },
            ..DecoderSpec::uniform(self.dims(), layer)
        }
    }

    /// The model, with keys and values in fp8.
    pub(crate) fn with_kv_fp8(self) -> ModelShape {
        ModelShape { kv_fp8: true, ..self }
    }

    /// The model, and where it has no window the same with one.
    pub(crate) fn and_windowed(self) -> Vec<ModelShape> {
        let windows = self.window.map_or(vec![None, Some(USUAL_WINDOW)], |window| vec![Some(window)]);
        windows.into_iter().map(|window| ModelShape { window, ..self }).collect()
    }

    /// The model, and where it has no biases the same with them.
    pub(crate) fn and_biased(self) -> Vec<ModelShape> {
        let biases: &[bool] = if self.bias { &[true] } else { &[false, true] };
        biases.iter().map(|bias| ModelShape { bias: *bias, ..self }).collect()
    }
}

/// Sizes that differ from those of Qwen3-0.6B, a window, whether there are biases, and for an explanation what is in fp8:
/// `heads=32,head_dim=64`, `window=4096,bias=1`, `kv_fp8=1,weights_fp8=1,inputs_fp8=1`.
impl FromStr for ModelShape {
    type Err = String;

    fn from_str(text: &str) -> Result<ModelShape, String> {
        let mut shape = ModelShape { name: "given", ..SMALL };
        for word in text.split(',') {
            let (name, value) = word.split_once('=').ok_or_else(|| {
                format!("`{word}` is no NAME=NUMBER: a model is told by its sizes, as hidden=2048,heads=16,intermediate=6144")
            })?;
            let value: u32 = value.parse().map_err(|_| format!("`{value}` in `{word}` is no number"))?;
            if value > SIZE_MAX {
                return Err(format!("`{word}`: a model has {SIZE_MAX} of it at most"));
            }
            let size = match name {
                "layers" => &mut shape.layers,
                "hidden" => &mut shape.hidden,
                "vocab" => &mut shape.vocab,
                "heads" => &mut shape.heads,
                "kv_heads" => &mut shape.kv_heads,
                "head_dim" => &mut shape.head_dim,
                "intermediate" => &mut shape.intermediate,
                "window" => {
                    shape.window = Some(value).filter(|window| *window > 0);
                    continue;
                }
                "bias" | "kv_fp8" | "weights_fp8" | "inputs_fp8" => {
                    let is_so = match name {
                        "bias" => &mut shape.bias,
                        "kv_fp8" => &mut shape.kv_fp8,
                        "weights_fp8" => &mut shape.weights_fp8,
                        _ => &mut shape.inputs_fp8,
                    };
                    *is_so = value > 0;
                    continue;
                }
                _ => return Err(format!("a model has no size `{name}`")),
            };
            if value == 0 {
                return Err(format!("`{word}`: a model has at least one of it"));
            }
            *size = value;
        }
        if shape.kv_heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
            return Err(format!("{} heads can't share {} kv_heads", shape.heads, shape.kv_heads));
        }
        if shape.dims().q_width() > SIZE_MAX as usize {
            let ModelShape { heads, head_dim, .. } = shape;
            return Err(format!("{heads} heads of head_dim={head_dim} are wider than {SIZE_MAX}"));
        }
        Ok(shape)
    }
}

/// The largest model there is.
#[cfg(test)]
pub(crate) const LARGEST: &str = "layers=1048576,hidden=1048576,vocab=1048576,intermediate=1048576,window=1048576,\
                                  heads=8192,kv_heads=8192";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Filter, cases};

    #[test]
    fn a_models_sizes_are_those_given_and_else_the_small_models() {
        let dims = "heads=32,head_dim=64".parse::<ModelShape>().unwrap().dims();
        assert_eq!((dims.heads, dims.head_dim, dims.kv_heads, dims.hidden), (32, 64, 8, 1024));
        let shape: ModelShape = "window=4096,bias=1".parse().unwrap();
        assert_eq!((shape.window, shape.bias), (Some(4096), true));
        for wrong in ["heads", "heads=x", "eyes=2", "heads=12", "vocab=0"] {
            assert!(wrong.parse::<ModelShape>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_beyond_what_is_counted_are_refused_by_name_and_the_largest_are_counted() {
        for (wrong, named) in [
            ("layers=4000000000", "layers"),
            ("heads=1048584", "heads"),
            ("window=1048577", "window"),
            ("heads=8192,head_dim=256", "head_dim"),
        ] {
            let error = wrong.parse::<ModelShape>().unwrap_err();
            assert!(error.contains(named) && error.contains("1048576"), "{error}");
        }
        let filter = Filter { model: Some(LARGEST.parse().unwrap()), ..Filter::default() };
        // A decode step's weights, 2 bytes each: in each layer the four matrices of attention and the three of the MLP.
        assert!(cases(&filter).iter().any(|case| case.bytes > 2.0 * 7.0 * 2f64.powi(20 + 40)));
    }
}
