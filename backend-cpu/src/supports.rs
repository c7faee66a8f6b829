//! What of a spec this backend computes.

use minisgl_core::computes::Computes;
use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{Activation, Bias, DecoderSpec, NormForm, Norms, QkNorm, RopePairs, Unsupported};

use crate::attention::{OWN_KV, WIDENED_MAX};

/// All but what no published family of those read has.
pub const COMPUTES: Computes = Computes {
    backend: "CPU",
    advice: "",
    width_multiple: 1,
    head_dims: None,
    group_max: None,
    norm_forms: &[NormForm::Scale, NormForm::OnePlusScale],
    norms: &[Norms::Before, Norms::After, Norms::Around],
    embedding_scale: true,
    logit_cap: false,
    kv: &[KvFormat::F32, KvFormat::Bf16, KvFormat::Fp8],
    fp8_weights: true,
    fp8_needs: "",
    mixed_windows: true,
    biases: &[Bias::None, Bias::Qkv],
    qk_norms: &[QkNorm::None, QkNorm::PerHead, QkNorm::FullWidth],
    rope_pairs: &[RopePairs::Halves],
    partial_rope: true,
    score_scale: true,
    activations: &[Activation::Silu, Activation::GeluTanh],
    experts_max: None,
};

/// See [`minisgl_core::backend::Ops::supports`].
pub fn check(spec: &DecoderSpec) -> Result<(), Unsupported> {
    COMPUTES.check(spec)?;
    let head_dim = spec.dims.head_dim;
    if spec.kv.is_some_and(|format| format != OWN_KV) && head_dim as usize > WIDENED_MAX {
        let what =
            format!("its heads have {head_dim} elements; use --kv-dtype auto for more than {WIDENED_MAX}");
        return Err(COMPUTES.refusal(what));
    }
    Ok(())
}
