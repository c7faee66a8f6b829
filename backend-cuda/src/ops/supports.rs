//! What of a spec this backend computes: what the kernels are written for.

use minisgl_core::computes::Computes;
use minisgl_core::kv::KvFormat;
use minisgl_core::shard::Rank;
use minisgl_core::spec::{
    Activation, Bias, DecoderSpec, Dims, Fp8, Inputs, NormForm, Norms, QkNorm, RopePairs, ScaleBlock,
    Unsupported, WeightFormat,
};
use minisgl_kernels::attention::GROUP_MAX;

use super::experts::{COUNT_MAX, PER_TOKEN_MAX};
use super::operands::SEGMENT;
use crate::context::Properties;
use crate::weight::{Fp8Codes, Fp8Tiles, Rounding};

/// An expert's down begins at a tile of its own, so it has whole ones.
const FP8_ROWS: u32 = Fp8Tiles::ROWS as u32;
/// Codes that are multiplied themselves come 16 bytes at a time, too.
const ROUNDED_MULTIPLE: u32 = 16;
/// A scale of fp8 is that of whole tiles' rows.
const FP8_COLS: u32 = Fp8Tiles::COLS as u32;

/// What is computed by the kernels for Hopper, or by those for any GPU.
pub fn computes(hopper: bool) -> Computes {
    Computes {
        backend: "CUDA",
        advice: " (--backend cpu has fewer limits)",
        width_multiple: 8, // 16 bytes, what the copy engines move at least
        head_dims: Some(&[64, 128]),
        group_max: Some(GROUP_MAX),
        norm_forms: &[NormForm::Scale],
        norms: &[Norms::Before],
        embedding_scale: false,
        logit_cap: false,
        kv: if hopper { &[KvFormat::Bf16, KvFormat::Fp8] } else { &[KvFormat::Bf16] },
        fp8_weights: hopper,
        fp8_needs: ", which has kernels for Hopper alone",
        mixed_windows: false,
        biases: &[Bias::None, Bias::Qkv],
        qk_norms: &[QkNorm::None, QkNorm::PerHead],
        rope_pairs: &[RopePairs::Halves],
        partial_rope: false,
        score_scale: false,
        activations: &[Activation::Silu],
        experts_max: Some([COUNT_MAX, PER_TOKEN_MAX]),
    }
}

impl Properties {
    /// See [`minisgl_core::backend::Ops::computes`]; the device need not be open.
    pub fn computes(&self) -> Computes {
        computes(self.hopper)
    }

    /// See [`minisgl_core::backend::Ops::supports`]; the device need not be open, and `rank` is who computes the spec.
    pub fn supports(&self, spec: &DecoderSpec, rank: Rank) -> Result<(), Unsupported> {
        check(spec, self.hopper)?;
        check_rank(spec, rank)
    }
}

/// See [`minisgl_core::backend::Ops::supports`]; `hopper`: are the kernels those of Hopper?
pub fn check(spec: &DecoderSpec, hopper: bool) -> Result<(), Unsupported> {
    let computes = computes(hopper);
    computes.check(spec)?;
    check_fp8(spec).map_err(|what| computes.refusal(what))
}

/// Likewise, of what one of several ranks computes.
pub fn check_rank(spec: &DecoderSpec, rank: Rank) -> Result<(), Unsupported> {
    let has_experts = spec.layers.iter().any(|layer| layer.experts().is_some());
    let is_cut = spec.dims.hidden.is_multiple_of(rank.count * SEGMENT);
    let refused = [
        (spec.weights != WeightFormat::Bf16, "its weights are fp8"),
        (
            has_experts && !is_cut,
            "it has experts, and a hidden_size of which each GPU's share is no multiple of 64",
        ),
    ];
    match first(&refused).filter(|_| rank.count > 1) {
        None => Ok(()),
        Some(what) => {
            let what =
                format!("{what}, which one GPU computes, and --tensor-parallel {} does not", rank.count);
            Err(computes(true).refusal(what))
        }
    }
}

/// What products with weights in fp8 are made for.
fn check_fp8(spec: &DecoderSpec) -> Result<(), String> {
    let DecoderSpec { dims, weights, layers, .. } = spec;
    let WeightFormat::Fp8(fp8) = weights else { return Ok(()) };
    let has_experts = layers.iter().any(|layer| layer.experts().is_some());
    let refused = [
        (
            matches!(fp8, Fp8 { block: ScaleBlock::Tile { cols, .. }, inputs: Inputs::Plain } if cols % FP8_COLS != 0),
            "its fp8 weights have scales for blocks of columns that are no multiples of 64",
        ),
        (
            dims.hidden % FP8_ROWS != 0 && has_experts,
            "its experts are fp8 and its hidden_size is no multiple of 64",
        ),
    ];
    first(&refused).map_or(Ok(()), |what| Err(what.to_owned()))?;
    if fp8.inputs == Inputs::Plain { Ok(()) } else { check_rounded(dims, fp8, has_experts) }
}

/// What products of rounded inputs are made for.
fn check_rounded(dims: &Dims, fp8: &Fp8, has_experts: bool) -> Result<(), String> {
    let Fp8 { block, inputs } = fp8;
    let rows = Fp8Codes::GROUP as u32;
    let refused = [
        (
            matches!(block, ScaleBlock::Tile { rows: high, cols } if high % rows != 0 || cols % Fp8Codes::BLOCK_COLS != 0),
            "have scales for blocks that are no multiples of 8 rows and 128 columns",
        ),
        (
            Rounding::of(*inputs).is_none(),
            "have inputs that are rounded in groups of other than 128 or 256 columns",
        ),
        (has_experts, "are experts' among others"),
        (
            !dims.hidden.is_multiple_of(ROUNDED_MULTIPLE)
                || !dims.intermediate.is_multiple_of(ROUNDED_MULTIPLE),
            "have widths that are no multiples of 16",
        ),
    ];
    let refused = first(&refused);
    refused.map_or(Ok(()), |what| {
        Err(format!("its fp8 weights, whose inputs are rounded to fp8, {what}; with --plain-inputs they are not rounded"))
    })
}

/// The first thing that is so.
fn first(things: &[(bool, &'static str)]) -> Option<&'static str> {
    things.iter().find(|(is_so, _)| *is_so).map(|(_, what)| *what)
}

#[cfg(test)]
mod tests {
    use minisgl_core::spec::{Attention, Experts, LayerSpec, Mixer, Mlp, Rope};

    use super::*;

    const DIMS: Dims = Dims {
        layers: 2,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        intermediate: 1536,
        vocab: 49_152,
        norm_eps: 1e-5,
    };

    fn supported(spec: &DecoderSpec) -> Result<(), Unsupported> {
        check(spec, false)
    }

    fn with(change: impl Fn(Attention) -> Attention) -> DecoderSpec {
        let rope = Some(Rope::plain(1e5, DIMS.head_dim));
        let attention = |change: &dyn Fn(Attention) -> Attention| LayerSpec {
            mixer: Mixer::Attention(change(Attention { rope, ..Attention::plain() })),
            ..LayerSpec::plain()
        };
        let layers = vec![attention(&|it| it), attention(&change)];
        DecoderSpec { layers, ..DecoderSpec::uniform(DIMS, LayerSpec::plain()) }
    }

    #[test]
    fn biases_and_layers_without_rope_or_with_head_norms_are_computed() {
        supported(&with(|it| it)).unwrap();
        supported(&DecoderSpec { kv: Some(KvFormat::Bf16), ..with(|it| it) }).unwrap();
        check(&DecoderSpec { kv: Some(KvFormat::Fp8), ..with(|it| it) }, true).unwrap();
        let plain = WeightFormat::Fp8(Fp8 { block: ScaleBlock::Row, inputs: Inputs::Plain });
        check(&DecoderSpec { weights: plain, ..with(|it| it) }, true).unwrap();
        supported(&with(|it| Attention { bias: Bias::Qkv, rope: None, ..it })).unwrap();
        supported(&with(|it| Attention { qk_norm: QkNorm::PerHead, ..it })).unwrap();
        let windowed = with(|it| it).layers.into_iter().map(|layer| {
            let Mixer::Attention(attention) = layer.mixer else { unreachable!("it has attention") };
            LayerSpec { mixer: Mixer::Attention(Attention { window: Some(4096), ..attention }), ..layer }
        });
        supported(&DecoderSpec { layers: windowed.collect(), ..with(|it| it) }).unwrap();
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let layers = [
            (with(|it| Attention { sinks: true, ..it }), "attention sinks"),
            (with(|it| Attention { score_cap: Some(50.0), ..it }), "soft cap"),
            (with(|it| Attention { scale: Some(0.1), ..it }), "score scale"),
            (with(|it| Attention { bias: Bias::QkvAndO, ..it }), "bias on attention's output"),
            (with(|it| Attention { qk_norm: QkNorm::FullWidth, ..it }), "across heads"),
            (with(|it| Attention { rope: it.rope.map(|rope| Rope { rotated: 32, ..rope }), ..it }), "rope"),
        ];
        let changed = |layer| {
            let spec = with(|it| it);
            DecoderSpec { layers: vec![spec.layers[0], layer], ..spec }
        };
        let plain = LayerSpec::plain();
        let activation = Activation::Silu;
        let experts = Experts { activation, count: 8, per_token: 2, intermediate: 8, normalized: true };
        let with_experts = |experts| changed(LayerSpec { mlp: Mlp::Experts(experts), ..plain });
        supported(&with_experts(experts)).unwrap();
        let others = [
            (changed(LayerSpec { norms: Norms::Around, ..plain }), "norms behind"),
            (changed(LayerSpec { mlp: Mlp::Dense(Activation::GeluTanh), ..plain }), "GELU"),
            (with_experts(Experts { count: 257, ..experts }), "more than 256 experts"),
            (with_experts(Experts { count: 32, per_token: 17, ..experts }), "more than 16 experts"),
            (with_experts(Experts { per_token: 9, ..experts }), "experts for a token"),
            (with_experts(Experts { intermediate: 12, ..experts }), "no multiple of 8"),
            (with_experts(Experts { activation: Activation::GeluTanh, ..experts }), "GELU"),
        ];
        for (spec, name) in layers.into_iter().chain(others) {
            let text = supported(&spec).unwrap_err().to_string();
            assert!(
                text.contains(name) && text.contains("layer 1") && text.contains("--backend cpu"),
                "{text}"
            );
        }
        let spec = || with(|it| it);
        let fp8 = Fp8 { block: ScaleBlock::Row, inputs: Inputs::PerToken };
        let models = [
            (DecoderSpec { norm: NormForm::OnePlusScale, ..spec() }, "1 + w"),
            (DecoderSpec { weights: WeightFormat::Fp8(fp8), ..spec() }, "weights are fp8, which"),
            (DecoderSpec { kv: Some(KvFormat::Fp8), ..spec() }, "for Hopper alone; use --kv-dtype auto"),
            (DecoderSpec { kv: Some(KvFormat::F32), ..spec() }, "kept in f32"),
            (DecoderSpec { dims: Dims { head_dim: 256, ..DIMS }, ..spec() }, "head_dim is 256"),
            (DecoderSpec { dims: Dims { hidden: 570, ..DIMS }, ..spec() }, "hidden_size is 570"),
            (with(|it| Attention { window: Some(32), ..it }), "same window"),
        ];
        let tile = |cols| {
            WeightFormat::Fp8(Fp8 { block: ScaleBlock::Tile { rows: 32, cols }, inputs: Inputs::Plain })
        };
        let odd = check(&DecoderSpec { weights: tile(96), ..spec() }, true).unwrap_err();
        assert!(odd.to_string().contains("multiples of 64"), "{odd}");
        check(&DecoderSpec { weights: tile(192), ..spec() }, true).unwrap();
        let rounded = |block, inputs| WeightFormat::Fp8(Fp8 { block, inputs });
        let tiles = |rows, cols| ScaleBlock::Tile { rows, cols };
        for inputs in [Inputs::PerToken, Inputs::PerGroup(128), Inputs::PerGroup(256), Inputs::Static] {
            for block in
                [ScaleBlock::Row, ScaleBlock::Matrix, tiles(128, 128), tiles(8, 256), tiles(128, 256)]
            {
                let weights = rounded(block, inputs);
                check(&DecoderSpec { weights, ..spec() }, true).unwrap();
                let experts = check(&DecoderSpec { weights, ..with_experts(experts) }, true).unwrap_err();
                assert!(experts.to_string().contains("--plain-inputs"), "{experts}");
            }
        }
        for weights in [
            rounded(tiles(1, 128), Inputs::PerToken),
            rounded(tiles(128, 64), Inputs::PerGroup(128)),
            rounded(ScaleBlock::Row, Inputs::PerGroup(64)),
        ] {
            let refused = check(&DecoderSpec { weights, ..spec() }, true).unwrap_err();
            assert!(refused.to_string().contains(" columns; with --plain-inputs"), "{refused}");
        }
        let weights = WeightFormat::Fp8(Fp8 { inputs: Inputs::Plain, ..fp8 });
        check(&DecoderSpec { weights, ..with_experts(experts) }, true).unwrap();
        let dims = Dims { hidden: 96, ..DIMS };
        let odd = check(&DecoderSpec { weights, dims, ..with_experts(experts) }, true).unwrap_err();
        assert!(odd.to_string().contains("no multiple of 64"), "{odd}");
        for (spec, name) in models {
            let text = supported(&spec).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains("CUDA"), "{text}");
        }
    }
}
