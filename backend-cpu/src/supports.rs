//! What of a spec this backend computes: everything but what is named here.
//!
//! Every field of a spec is taken apart, so that one that is added to it does not pass unseen.

use minisgl_core::spec::{
    Attention, Bias, DecoderSpec, Experts, LayerSpec, Mixer, Mlp, RopePairs, Unsupported, WeightFormat,
};

use crate::attention::{OWN_KV, WIDENED_MAX};

const BACKEND: &str = "CPU";

/// See [`minisgl_core::backend::Ops::supports`].
pub fn check(spec: &DecoderSpec) -> Result<(), Unsupported> {
    let DecoderSpec { dims, norm: _, embedding_scale: _, tied: _, logit_cap, weights, kv, layers } = spec;
    if logit_cap.is_some() {
        return Err(Unsupported::new(BACKEND, "its logits have a soft cap"));
    }
    let (WeightFormat::Bf16 | WeightFormat::Fp8(_)) = weights;
    if kv.is_some_and(|format| format != OWN_KV) && dims.head_dim as usize > WIDENED_MAX {
        let what = format!(
            "its heads have {} elements; use --kv-dtype auto for more than {WIDENED_MAX}",
            dims.head_dim
        );
        return Err(Unsupported::new(BACKEND, what));
    }
    for (i, layer) in layers.iter().enumerate() {
        check_layer(layer).map_err(|what| Unsupported::in_layer(BACKEND, i, what))?;
    }
    Ok(())
}

fn check_layer(layer: &LayerSpec) -> Result<(), &'static str> {
    let LayerSpec { norms: _, mixer, mlp } = layer;
    match mixer {
        Mixer::Attention(attention) => check_attention(attention)?,
        Mixer::GatedDelta { .. } => return Err("a gated delta rule instead of attention"),
    }
    match mlp {
        Mlp::Dense(_) => Ok(()),
        Mlp::Experts(Experts { activation: _, count, per_token, intermediate: _, normalized: _ }) => {
            if (1..=*count).contains(per_token) {
                Ok(())
            } else {
                Err("fewer experts than a token gets, or none")
            }
        }
    }
}

fn check_attention(attention: &Attention) -> Result<(), &'static str> {
    let Attention { bias, qk_norm: _, rope, window: _, scale: _, score_cap, sinks } = attention;
    if *bias == Bias::QkvAndO {
        return Err("a bias on attention's output");
    }
    if rope.is_some_and(|rope| rope.pairs == RopePairs::Neighbours) {
        return Err("rope that turns neighbouring elements");
    }
    if score_cap.is_some() {
        return Err("a soft cap on attention's scores");
    }
    if *sinks {
        return Err("attention sinks");
    }
    Ok(())
}
