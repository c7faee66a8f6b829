//! What a backend computes of what a spec may ask for: facts, beside what [`DeviceInfo`](crate::backend::DeviceInfo) says of a device.
//!
//! Every field of a spec is taken apart in one place, [`Computes::check`], so that one that is added to it does not pass unseen. What is no
//! choice of a list, such as which blocks of fp8 weights share a scale, a backend checks by itself. Samplers have no facts: each draws as
//! [`crate::sampling`] and [`crate::rules`] say, all of it.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Debug;

use crate::kv::KvFormat;
use crate::spec::{
    Activation, Attention, Bias, DecoderSpec, Dims, Experts, LayerSpec, Mixer, Mlp, NormForm, Norms, QkNorm,
    RopePairs, Unsupported, WeightFormat,
};

/// What a backend computes. Where a field is a list, it computes each of these.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Computes {
    /// The backend, as a refusal names it.
    pub backend: &'static str,
    /// What a refusal ends with: what else could be done.
    pub advice: &'static str,
    /// Widths of the hidden state and of MLPs are multiples of it.
    pub width_multiple: u32,
    /// Elements of a head; `None`: any number.
    pub head_dims: Option<&'static [u32]>,
    /// Query heads that share a key and value head, at most; `None`: any number.
    pub group_max: Option<u32>,
    /// What norms multiply by.
    pub norm_forms: &'static [NormForm],
    /// Where a layer's norms are.
    pub norms: &'static [Norms],
    /// Embeddings that are scaled.
    pub embedding_scale: bool,
    /// A soft cap on logits.
    pub logit_cap: bool,
    /// What keys and values are kept as.
    pub kv: &'static [KvFormat],
    /// Weights in e4m3.
    pub fp8_weights: bool,
    /// What fp8 would need, where it is not computed: the end of a sentence.
    pub fp8_needs: &'static str,
    /// Layers whose windows differ.
    pub mixed_windows: bool,
    /// Biases of attention.
    pub biases: &'static [Bias],
    /// Norms of queries and keys.
    pub qk_norms: &'static [QkNorm],
    /// Elements that rope turns together.
    pub rope_pairs: &'static [RopePairs],
    /// Rope that turns a part of each head.
    pub partial_rope: bool,
    /// Scores with a scale of their own.
    pub score_scale: bool,
    /// Activations of MLPs and of experts.
    pub activations: &'static [Activation],
    /// Experts of a layer, at most, and of a token; `None`: any number.
    pub experts_max: Option<[u32; 2]>,
}

impl Computes {
    /// Is all of the spec computed?
    ///
    /// # Errors
    /// Names the first thing that is not.
    pub fn check(&self, spec: &DecoderSpec) -> Result<(), Unsupported> {
        self.check_model(spec).map_err(|what| self.refusal(what))?;
        for (i, layer) in spec.layers.iter().enumerate() {
            self.check_layer(&spec.dims, layer)
                .map_err(|what| Unsupported::in_layer(self.backend, i, &(what + self.advice)))?;
        }
        Ok(())
    }

    /// A refusal of this backend's for something that concerns the whole model.
    pub fn refusal(&self, what: impl Into<String>) -> Unsupported {
        Unsupported::new(self.backend, what.into() + self.advice)
    }

    fn check_model(&self, spec: &DecoderSpec) -> Result<(), String> {
        let DecoderSpec { dims, norm, embedding_scale, tied: _, logit_cap, weights, kv, layers } = spec;
        self.check_sizes(dims)?;
        let window = layers.first().and_then(LayerSpec::window);
        let fp8_needs = self.fp8_needs;
        let is_fp8 = |weights: &WeightFormat| match weights {
            WeightFormat::Bf16 => false,
            WeightFormat::Fp8(_) => true,
        };
        let has = |refused: bool, what: &str| if refused { Err(what.to_string()) } else { Ok(()) };
        has(!self.norm_forms.contains(norm), "its norms scale by 1 + w")?;
        has(*embedding_scale != 1.0 && !self.embedding_scale, "its embeddings are scaled")?;
        has(logit_cap.is_some() && !self.logit_cap, "its logits have a soft cap")?;
        has(is_fp8(weights) && !self.fp8_weights, &format!("its weights are fp8{fp8_needs}"))?;
        if let Some(kept) = kv.filter(|kept| !self.kv.contains(kept)) {
            let kept = match kept {
                KvFormat::F32 => "f32".to_string(),
                KvFormat::Bf16 => "bf16".to_string(),
                KvFormat::Fp8 => format!("fp8{fp8_needs}"),
            };
            return Err(format!("its keys and values are to be kept in {kept}; use --kv-dtype auto"));
        }
        let differ = layers.iter().any(|layer| layer.window() != window);
        has(differ && !self.mixed_windows, "not all of its layers have the same window")
    }

    fn check_sizes(&self, dims: &Dims) -> Result<(), String> {
        let Dims { hidden, heads, kv_heads, head_dim, intermediate, layers: _, vocab: _, norm_eps: _ } =
            *dims;
        let multiple = self.width_multiple;
        let widths = [("hidden_size", hidden), ("intermediate_size", intermediate)];
        if let Some((name, width)) = widths.into_iter().find(|(_, width)| width % multiple != 0) {
            return Err(format!("{name} is {width}; the kernels take multiples of {multiple}"));
        }
        if let Some(dims) = self.head_dims.filter(|dims| !dims.contains(&head_dim)) {
            let dims: Vec<String> = dims.iter().map(u32::to_string).collect();
            return Err(format!("head_dim is {head_dim}; the attention kernels take {}", dims.join(" and ")));
        }
        match self.group_max {
            Some(most) if heads < kv_heads || heads / kv_heads > most => Err(format!(
                "{heads} query heads share {kv_heads} key and value heads; the attention kernels take 1 to {most} for each"
            )),
            _ => Ok(()),
        }
    }

    fn check_layer(&self, dims: &Dims, layer: &LayerSpec) -> Result<(), String> {
        let LayerSpec { norms, mixer, mlp } = layer;
        if !self.norms.contains(norms) {
            return Err("norms behind attention and MLP".into());
        }
        match mixer {
            Mixer::Attention(attention) => self.check_attention(dims, attention)?,
            Mixer::GatedDelta { .. } => return Err("a gated delta rule instead of attention".into()),
        }
        match mlp {
            Mlp::Dense(activation) if !self.activations.contains(activation) => Err("GELU in its MLP".into()),
            Mlp::Dense(_) => Ok(()),
            Mlp::Experts(experts) => self.check_experts(experts),
        }
    }

    fn check_attention(&self, dims: &Dims, attention: &Attention) -> Result<(), String> {
        let Attention { bias, qk_norm, rope, window: _, scale, score_cap, sinks } = attention;
        let turns = rope.is_none_or(|rope| {
            self.rope_pairs.contains(&rope.pairs) && (self.partial_rope || rope.rotated == dims.head_dim)
        });
        let refused = [
            (!self.biases.contains(bias), "a bias on attention's output"),
            (!self.qk_norms.contains(qk_norm), "queries and keys that are normed across heads"),
            (!turns && self.partial_rope, "rope that turns neighbouring elements"),
            (!turns, "rope that does not turn the halves of whole heads"),
            (scale.is_some() && !self.score_scale, "a score scale of its own"),
            (score_cap.is_some(), "a soft cap on attention's scores"),
            (*sinks, "attention sinks"),
        ];
        refused.into_iter().find(|(is_so, _)| *is_so).map_or(Ok(()), |(_, what)| Err(what.into()))
    }

    fn check_experts(&self, experts: &Experts) -> Result<(), String> {
        let Experts { activation, count, per_token, intermediate, normalized: _ } = *experts;
        let multiple = self.width_multiple;
        if !self.activations.contains(&activation) {
            return Err("GELU in its experts".into());
        }
        if let Some([most, _]) = self.experts_max.filter(|[most, _]| count > *most) {
            return Err(format!("more than {most} experts"));
        }
        let most = self.experts_max.map(|[_, most]| most);
        if !(1..=count).contains(&per_token) || most.is_some_and(|most| per_token > most) {
            let beyond = most.map_or(String::new(), |most| format!(", more than {most} experts for a token"));
            return Err(format!("fewer experts than a token gets{beyond}, or none"));
        }
        if intermediate % multiple != 0 {
            return Err(format!("experts whose width is no multiple of {multiple}"));
        }
        Ok(())
    }

    /// All of it, for people: what a spec has, in its own words, and which of it is computed.
    pub fn facts(&self) -> [(&'static str, String); 17] {
        fn each<T: Debug>(list: &[T]) -> String {
            let words: Vec<String> = list.iter().map(|word| format!("{word:?}")).collect();
            words.join(", ")
        }
        let yes = |is_so: bool| if is_so { "yes" } else { "no" }.to_string();
        let most = |most: Option<u32>| most.map_or("any".into(), |most| format!("up to {most}"));
        let [experts, per_token] = [0, 1].map(|i| most(self.experts_max.map(|most| most[i])));
        [
            ("widths, multiples of", self.width_multiple.to_string()),
            ("head_dim", self.head_dims.map_or("any".into(), each)),
            ("query heads of a key's", most(self.group_max)),
            ("norm", each(self.norm_forms)),
            ("norms", each(self.norms)),
            ("embedding_scale", yes(self.embedding_scale)),
            ("logit_cap", yes(self.logit_cap)),
            ("kv", each(self.kv)),
            ("weights in fp8", yes(self.fp8_weights)),
            ("windows that differ", yes(self.mixed_windows)),
            ("bias", each(self.biases)),
            ("qk_norm", each(self.qk_norms)),
            (
                "rope",
                format!(
                    "{}, {}",
                    each(self.rope_pairs),
                    if self.partial_rope { "also of a part" } else { "of whole heads" }
                ),
            ),
            ("scale of scores", yes(self.score_scale)),
            ("activation", each(self.activations)),
            ("experts", experts),
            ("experts of a token", per_token),
        ]
    }
}
