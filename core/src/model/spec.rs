//! A decoder as data: what each layer computes, for a backend to run or to refuse.
//!
//! ```text
//!   config.json ── a family's reader ──> DecoderSpec ── Ops::supports ──> runs, or Unsupported names what is in the way
//!                                          │
//!                                          └─ one LayerSpec a layer: norms, mixer (attention, …), MLP
//! ```
//!
//! A spec says more than any backend computes. A backend looks at every field, and what it can't compute exactly it refuses
//! by name before a weight is loaded.
//!
//! Invariant: `layers.len() == dims.layers`.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use thiserror::Error;

/// Sizes of a decoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dims {
    /// Decoder layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Width of a dense MLP.
    pub intermediate: u32,
    /// Tokens that the head tells apart.
    pub vocab: u32,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f32,
}

impl Dims {
    /// Width of a fused q, k, v row: `(heads + 2 kv_heads) * head_dim`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) as usize * self.head_dim as usize
    }

    /// Width of a row of all query heads: `heads * head_dim`.
    pub fn q_width(&self) -> usize {
        self.heads as usize * self.head_dim as usize
    }

    /// Width of a row of all key heads, or of all value heads: `kv_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads as usize * self.head_dim as usize
    }
}

/// A decoder: what is the same for all layers, and each layer.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// Sizes.
    pub dims: Dims,
    /// How a norm's stored weight scales.
    pub norm: NormForm,
    /// What an embedded token is multiplied by.
    pub embedding_scale: f32,
    /// Is the head the embedding's matrix?
    pub tied: bool,
    /// Logits become `cap * tanh(logit / cap)`.
    pub logit_cap: Option<f32>,
    /// How linear layers' weights are stored.
    pub weights: WeightFormat,
    /// What keys and values are kept as; `None`: as the device has it, see [`crate::backend::DeviceInfo::kv`].
    pub kv: Option<KvFormat>,
    /// First layer first.
    pub layers: Vec<LayerSpec>,
}

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// e4m3, with a scale for each row.
    Fp8,
}

/// What an RMSNorm multiplies by, of its stored weight w.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormForm {
    /// `w`.
    Scale,
    /// `1 + w`.
    OnePlusScale,
}

/// How linear layers' weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// bf16, or f16 and f32, which a backend may round to bf16.
    Bf16,
    /// e4m3 with scales, but for matrices that the checkpoint has in another type.
    Fp8(Fp8),
}

/// Linear layers in e4m3: see [`crate::fp8`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8 {
    /// The elements that share a scale.
    pub block: ScaleBlock,
    /// What the matrices are applied to.
    pub inputs: Inputs,
}

/// Elements of an e4m3 matrix that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleBlock {
    /// All of a matrix; parts of a stacked one (q, k, v; gate, up) have their own.
    Matrix,
    /// Those of a row: of an output channel.
    Row,
    /// Those of a tile; the last ones of a matrix may be smaller.
    Tile {
        /// Rows of a tile.
        rows: u32,
        /// Its columns.
        cols: u32,
    },
}

/// What an e4m3 matrix is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    /// Activations as they are.
    Plain,
    /// Activations rounded to e4m3, with a scale for each token.
    PerToken,
    /// With a scale for each token's so many columns; the last group of a row may be smaller.
    PerGroup(u32),
    /// With a scale that the checkpoint gives for each matrix.
    Static,
}

/// One decoder layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerSpec {
    /// Where its RMSNorms are.
    pub norms: Norms,
    /// What mixes tokens.
    pub mixer: Mixer,
    /// What follows.
    pub mlp: Mlp,
}

/// Where a layer's RMSNorms are, for the mixer and for the MLP alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// Of what goes in: `x += f(norm(x))`.
    Before,
    /// Of what comes out: `x += norm(f(x))`.
    After,
    /// Of both: `x += norm(f(norm(x)))`.
    Around,
}

impl Norms {
    /// Is there one of what goes in?
    pub fn before(self) -> bool {
        self != Norms::After
    }

    /// Is there one of what comes out?
    pub fn after(self) -> bool {
        self != Norms::Before
    }
}

/// What mixes tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "nearly all layers have attention")]
pub enum Mixer {
    /// Attention over keys and values in pages.
    Attention(Attention),
    /// The gated delta rule (Yang et al., 2024), over a state of fixed size for each request instead of pages.
    GatedDelta {
        /// Query and key heads.
        key_heads: u32,
        /// Value heads.
        value_heads: u32,
        /// Elements of a head.
        head_dim: u32,
        /// Tokens that the convolution before it sees.
        convolution: u32,
    },
}

/// An attention layer; its heads are those of [`Dims`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Which of its linear layers have a bias.
    pub bias: Bias,
    /// How queries and keys are normed.
    pub qk_norm: QkNorm,
    /// How queries and keys are turned by their positions; `None` leaves them.
    pub rope: Option<Rope>,
    /// Positions that a token attends to, its own included; `None`: all up to its own.
    pub window: Option<u32>,
    /// What scores are multiplied by; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// Scores, scaled, become `cap * tanh(score / cap)`.
    pub score_cap: Option<f32>,
    /// Does each query head have a learned logit that takes its share of the softmax?
    pub sinks: bool,
}

/// Biases of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// None.
    None,
    /// Of q, k and v.
    Qkv,
    /// Of q, k, v and o.
    QkvAndO,
}

/// RMSNorm of queries and keys, before rope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Of each head alone, all with one scale `[head_dim]`.
    PerHead,
    /// Of all query heads together, and of all key heads.
    FullWidth,
}

/// Rotary position embedding (Su et al., 2021).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Which elements turn together.
    pub pairs: RopePairs,
    /// Base of the wavelengths.
    pub base: f64,
    /// How the wavelengths are stretched beyond the positions of the first training.
    pub scaling: RopeScaling,
    /// Elements of a head that turn, the first ones; even.
    pub rotated: u32,
}

/// Which elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// Elements i and i + rotated / 2.
    Halves,
    /// Elements 2i and 2i + 1.
    Neighbours,
}

/// How rope's wavelengths are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there is one a layer, little beside what a layer computes")]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All by the same factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Long ones by a factor, short ones not at all, those between by something between (Llama 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths beyond `original / low` are long.
        low: f64,
        /// Wavelengths below `original / high` are short.
        high: f64,
        /// Positions of the first training.
        original: f64,
    },
    /// YaRN (Peng et al., 2023).
    Yarn {
        /// The factor.
        factor: f64,
        /// Positions of the first training.
        original: f64,
        /// Pairs that turn more often than this within `original` stay as they are.
        fast: f64,
        /// Pairs that turn less often than this are stretched by the whole factor.
        slow: f64,
        /// Are the first and last pair between rounded to whole ones, down and up?
        truncate: bool,
        /// What cosines and sines are multiplied by.
        magnitude: f64,
    },
    /// LongRoPE (Ding et al., 2024), within the positions of the first training. A longer sequence would have other factors, for
    /// its first positions too: its bits would depend on how long it gets.
    Long {
        /// Positions of the first training, which a sequence has at most.
        original: u32,
        /// Each pair's wavelength is stretched by its own; behind the last pair they mean nothing.
        factors: [f32; ROPE_PAIRS_MAX],
        /// What cosines and sines are multiplied by.
        magnitude: f64,
    },
}

/// Pairs of elements that can have factors of their own: those of a head of 128.
pub const ROPE_PAIRS_MAX: usize = 64;

/// What follows the mixer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mlp {
    /// `down(activation(gate x) * up x)` (Shazeer, 2020).
    Dense(Activation),
    /// A router chooses some of many such MLPs for each token.
    Experts(Experts),
}

/// MLPs of which each token gets some (Shazeer et al., 2017).
///
/// A token's logits are `router x`, one an expert, in f32. It gets the experts of the `per_token` largest ones; of equal logits
/// that of the lower expert comes first. An expert's share is `exp(logit)` divided by the sum over all experts or, if
/// `normalized`, over the chosen ones. The layer gives `sum of share * expert(x)`, added in ascending order of the experts'
/// numbers, in f32, whatever tokens are beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Activation of each.
    pub activation: Activation,
    /// How many there are.
    pub count: u32,
    /// How many a token gets, at most all.
    pub per_token: u32,
    /// Width of each.
    pub intermediate: u32,
    /// Do a token's shares add up to 1?
    pub normalized: bool,
}

/// The activation of an MLP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// GELU by its tanh approximation (Hendrycks and Gimpel, 2016).
    GeluTanh,
}

impl LayerSpec {
    /// A layer with norms before, attention over all positions without bias, head norms or rope, and a SiLU MLP. Families
    /// say how theirs differ.
    pub fn plain() -> LayerSpec {
        LayerSpec {
            norms: Norms::Before,
            mixer: Mixer::Attention(Attention::plain()),
            mlp: Mlp::Dense(Activation::Silu),
        }
    }

    /// Positions that a token attends to at most; `None`: all.
    pub fn window(&self) -> Option<u32> {
        match self.mixer {
            Mixer::Attention(attention) => attention.window,
            Mixer::GatedDelta { .. } => None,
        }
    }

    /// Its experts, if it has any.
    pub fn experts(&self) -> Option<Experts> {
        match self.mlp {
            Mlp::Dense(_) => None,
            Mlp::Experts(experts) => Some(experts),
        }
    }

    /// Elements of its MLP's matrices that a token is multiplied with.
    fn active_mlp(&self, dims: &Dims) -> u64 {
        let hidden = u64::from(dims.hidden);
        match self.mlp {
            Mlp::Dense(_) => 3 * hidden * u64::from(dims.intermediate),
            Mlp::Experts(Experts { count, per_token, intermediate, .. }) => {
                hidden * (u64::from(count) + 3 * u64::from(per_token) * u64::from(intermediate))
            }
        }
    }
}

impl Attention {
    /// Over all positions, with scores divided by the root of `head_dim` and nothing else.
    pub fn plain() -> Attention {
        Attention {
            bias: Bias::None,
            qk_norm: QkNorm::None,
            rope: None,
            window: None,
            scale: None,
            score_cap: None,
            sinks: false,
        }
    }
}

impl Rope {
    /// Of whole heads, halves turning together, without scaling.
    pub fn plain(base: f64, head_dim: u32) -> Rope {
        Rope { pairs: RopePairs::Halves, base, scaling: RopeScaling::Default, rotated: head_dim }
    }
}

impl DecoderSpec {
    /// A decoder of equal layers, with `w` norms, an embedding as it is, a head of its own and plain weights.
    pub fn uniform(dims: Dims, layer: LayerSpec) -> DecoderSpec {
        DecoderSpec {
            dims,
            norm: NormForm::Scale,
            embedding_scale: 1.0,
            tied: false,
            logit_cap: None,
            weights: WeightFormat::Bf16,
            kv: None,
            layers: vec![layer; dims.layers as usize],
        }
    }

    /// Elements of all layers' matrices that a token is multiplied with: of experts, those that it gets.
    pub fn active_weights(&self) -> u64 {
        let attention = u64::from(self.dims.hidden) * (self.dims.qkv_width() + self.dims.q_width()) as u64;
        self.layers.iter().map(|layer| attention + layer.active_mlp(&self.dims)).sum()
    }

    /// The widest of the rows that an MLP's or an expert's `down` gets.
    pub fn activated_width(&self) -> u32 {
        let width = |layer: &LayerSpec| layer.experts().map_or(self.dims.intermediate, |it| it.intermediate);
        self.layers.iter().map(width).max().unwrap_or(0)
    }

    /// The widest window, if every layer has one: keys and values further behind are never read again.
    pub fn window(&self) -> Option<u32> {
        let mut windows = self.layers.iter().map(LayerSpec::window);
        windows.try_fold(0, |widest, window| Some(widest.max(window?))).filter(|window| *window > 0)
    }
}

/// A decoder that a backend can't compute.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the {backend} backend can't compute this model: {what}")]
pub struct Unsupported {
    /// Which backend.
    pub backend: &'static str,
    /// What is in the way, and what to do about it where something can be done.
    pub what: String,
}

impl Unsupported {
    /// Something that concerns the whole model.
    pub fn new(backend: &'static str, what: impl Into<String>) -> Unsupported {
        Unsupported { backend, what: what.into() }
    }

    /// Something that a layer has.
    pub fn in_layer(backend: &'static str, layer: usize, what: &str) -> Unsupported {
        Unsupported::new(backend, format!("layer {layer} has {what}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoder_has_a_window_if_every_layer_has_one() {
        let dims = Dims {
            layers: 3,
            hidden: 8,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            intermediate: 8,
            vocab: 16,
            norm_eps: 1e-6,
        };
        let with = |windows: [Option<u32>; 3]| {
            let layer = |window| {
                let attention = Attention { window, ..Attention::plain() };
                LayerSpec { mixer: Mixer::Attention(attention), ..LayerSpec::plain() }
            };
            let spec = DecoderSpec::uniform(dims, LayerSpec::plain());
            DecoderSpec { layers: windows.map(layer).to_vec(), ..spec }.window()
        };
        assert_eq!(with([Some(32), Some(64), Some(32)]), Some(64));
        assert_eq!(with([Some(32), None, Some(32)]), None);
        assert_eq!(with([None, None, None]), None);
    }
}
