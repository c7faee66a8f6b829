//! What of a spec this backend computes: what the kernels are written for.
//!
//! Every field of a spec is taken apart, so that one that is added to it does not pass unseen.

use minisgl_core::spec::{
    Activation, Attention, Bias, DecoderSpec, Dims, LayerSpec, Mixer, Mlp, NormForm, Norms, QkNorm,
    RopePairs, Unsupported, WeightFormat,
};
use minisgl_kernels::attention::GROUP_MAX;

const BACKEND: &str = "CUDA";
/// Widths are multiples of this: 16 bytes, what the copy engines move at least.
const WIDTH_MULTIPLE: u32 = 8;

/// See [`minisgl_core::backend::Ops::supports`].
pub fn check(spec: &DecoderSpec) -> Result<(), Unsupported> {
    check_model(spec).map_err(|what| Unsupported::new(BACKEND, what + ADVICE))?;
    for (i, layer) in spec.layers.iter().enumerate() {
        check_layer(&spec.dims, layer)
            .map_err(|what| Unsupported::in_layer(BACKEND, i, &(what.to_owned() + ADVICE)))?;
    }
    Ok(())
}

const ADVICE: &str = " (--backend cpu has fewer limits)";

fn check_model(spec: &DecoderSpec) -> Result<(), String> {
    let DecoderSpec { dims, norm, embedding_scale, tied: _, logit_cap, weights, layers } = spec;
    check_sizes(dims)?;
    let window = layers.first().and_then(LayerSpec::window);
    let refused = [
        (*norm != NormForm::Scale, "its norms scale by 1 + w"),
        (*embedding_scale != 1.0, "its embeddings are scaled"),
        (logit_cap.is_some(), "its logits have a soft cap"),
        (*weights != WeightFormat::Bf16, "its weights are fp8; take a checkpoint in bf16"),
        (layers.iter().any(|layer| layer.window() != window), "not all of its layers have the same window"),
    ];
    first(&refused).map_or(Ok(()), |what| Err(what.to_owned()))
}

fn check_sizes(dims: &Dims) -> Result<(), String> {
    let Dims { hidden, heads, kv_heads, head_dim, intermediate, .. } = *dims;
    let widths = [("hidden_size", hidden), ("intermediate_size", intermediate)];
    if let Some((name, width)) = widths.into_iter().find(|(_, width)| width % WIDTH_MULTIPLE != 0) {
        return Err(format!("{name} is {width}; the kernels take multiples of {WIDTH_MULTIPLE}"));
    }
    if head_dim != 64 && head_dim != 128 {
        return Err(format!("head_dim is {head_dim}; the attention kernels take 64 and 128"));
    }
    if heads < kv_heads || heads / kv_heads > GROUP_MAX {
        return Err(format!(
            "{heads} query heads share {kv_heads} key and value heads; the attention kernels take 1 to {GROUP_MAX} for each"
        ));
    }
    Ok(())
}

fn check_layer(dims: &Dims, layer: &LayerSpec) -> Result<(), &'static str> {
    let LayerSpec { norms, mixer, mlp } = layer;
    if *norms != Norms::Before {
        return Err("norms behind attention and MLP");
    }
    match mixer {
        Mixer::Attention(attention) => check_attention(dims, attention)?,
        Mixer::GatedDelta { .. } => return Err("a gated delta rule instead of attention"),
    }
    match mlp {
        Mlp::Dense(Activation::Silu) => Ok(()),
        Mlp::Dense(Activation::GeluTanh) => Err("GELU in its MLP"),
        Mlp::Experts { .. } => Err("experts"),
    }
}

fn check_attention(dims: &Dims, attention: &Attention) -> Result<(), &'static str> {
    let Attention { bias, qk_norm, rope, window: _, scale, score_cap, sinks } = attention;
    let turns = rope.is_none_or(|rope| rope.pairs == RopePairs::Halves && rope.rotated == dims.head_dim);
    let refused = [
        (*bias == Bias::QkvAndO, "a bias on attention's output"),
        (*qk_norm == QkNorm::FullWidth, "queries and keys that are normed across heads"),
        (!turns, "rope that does not turn the halves of whole heads"),
        (scale.is_some(), "a score scale of its own"),
        (score_cap.is_some(), "a soft cap on attention's scores"),
        (*sinks, "attention sinks"),
    ];
    first(&refused).map_or(Ok(()), Err)
}

/// The first thing that is so.
fn first(things: &[(bool, &'static str)]) -> Option<&'static str> {
    things.iter().find(|(is_so, _)| *is_so).map(|(_, what)| *what)
}
