//! Gemma 3, text: scaled embeddings, `1 + w` norms around attention and MLP, tanh-GELU, and a window with a rope base of its
//! own on all layers but each sixth.

use minisgl_core::spec::{
    Attention, DecoderSpec, LayerSpec, Mixer, Mlp, NormForm, Norms, QkNorm, Rope, RopeScaling,
};
use minisgl_decoder::{ConfigError, Family, Fields, LayerNames};
use serde_json::json;

/// `Gemma3ForCausalLM`.
pub static GEMMA3: Family = Family {
    architecture: "Gemma3ForCausalLM",
    model_type: "gemma3_text",
    read,
    defaults: || json!({}),
    names: LayerNames::NORMS_AROUND,
    presets: &[],
};

fn read(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    fields.only("attention_bias", &[json!(false)])?;
    for off in ["attn_logit_softcapping", "final_logit_softcapping"] {
        fields.only(off, &[])?;
    }
    fields.only("use_bidirectional_attention", &[json!(false)])?;
    let dims = fields.dims()?;
    let [full, sliding] = ropes(fields, dims.head_dim)?;
    let attention = Attention {
        qk_norm: QkNorm::PerHead,
        scale: Some(fields.positive("query_pre_attn_scalar")?.sqrt().recip() as f32),
        ..Attention::plain()
    };
    let mlp = Mlp::Dense(fields.activation("hidden_activation")?);
    let layer = |window: Option<u32>| {
        let rope = Some(if window.is_some() { sliding } else { full });
        let mixer = Mixer::Attention(Attention { rope, window, ..attention });
        LayerSpec { norms: Norms::Around, mixer, mlp }
    };
    let pattern = match fields.get("sliding_window_pattern") {
        Some(_) => fields.size("sliding_window_pattern", u32::MAX)?,
        None => 6,
    };
    let width = Some(fields.size("sliding_window", u32::MAX)?);
    let windows = fields.windows(dims.layers, width, |i| !(i + 1).is_multiple_of(pattern))?;
    Ok(DecoderSpec {
        norm: NormForm::OnePlusScale,
        embedding_scale: f64::from(dims.hidden).sqrt() as f32,
        tied: fields.tied(true)?,
        layers: windows.into_iter().map(layer).collect(),
        ..DecoderSpec::uniform(dims, LayerSpec::plain())
    })
}

/// Of layers without and with a window: `rope_theta` with its scaling and `rope_local_base_freq`, or one object for each kind
/// of layer.
fn ropes(fields: &Fields<'_>, head_dim: u32) -> Result<[Rope; 2], ConfigError> {
    if let Some(both) = fields.object("rope_parameters")? {
        let rope = |kind| {
            let rope = fields.required(kind, both.object(kind)?)?;
            let scaling = fields.rope_scaling(&rope)?;
            Ok(Rope { scaling, ..Rope::plain(rope.positive("rope_theta")?, head_dim) })
        };
        return Ok([rope("full_attention")?, rope("sliding_attention")?]);
    }
    let local = Rope::plain(fields.positive_or("rope_local_base_freq", 10_000.0)?, head_dim);
    Ok([fields.rope(head_dim)?, Rope { scaling: RopeScaling::Default, ..local }])
}
