//! Qwen3, dense: RMSNorm of each query and key head, no biases.

use minisgl_core::spec::{Attention, DecoderSpec, LayerSpec, Mixer, Mlp, QkNorm};
use minisgl_decoder::{ConfigError, Family, Fields, LayerNames, Preset};
use serde_json::json;

/// `Qwen3ForCausalLM`.
pub static QWEN3: Family = Family {
    architecture: "Qwen3ForCausalLM",
    model_type: "qwen3",
    read,
    names: LayerNames::NORMS_BEFORE,
    presets: PRESETS,
};

fn read(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    fields.only("attention_bias", &[json!(false)])?;
    fields.required("head_dim", fields.get("head_dim"))?;
    let dims = fields.dims()?;
    let attention =
        Attention { qk_norm: QkNorm::PerHead, rope: Some(fields.rope(dims.head_dim)?), ..Attention::plain() };
    let plain = LayerSpec { mlp: Mlp::Dense(fields.activation("hidden_act")?), ..LayerSpec::plain() };
    let layer = |window| LayerSpec { mixer: Mixer::Attention(Attention { window, ..attention }), ..plain };
    let layers = fields.switched_windows(dims.layers)?.into_iter().map(layer).collect();
    Ok(DecoderSpec { tied: fields.tied(false)?, layers, ..DecoderSpec::uniform(dims, plain) })
}

/// `tiny` is ours; the others have the sizes of the published models.
#[rustfmt::skip]
const PRESETS: &[Preset] = &[
    Preset { name: "tiny", config: r#"{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 128, "vocab_size": 2048, "tie_word_embeddings": true, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
    Preset { name: "qwen3-0.6b", config: r#"{"num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": true, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
    Preset { name: "qwen3-1.7b", config: r#"{"num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "tie_word_embeddings": true, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
    Preset { name: "qwen3-4b", config: r#"{"num_hidden_layers": 36, "hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936, "tie_word_embeddings": true, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
    Preset { name: "qwen3-8b", config: r#"{"num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": false, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
    Preset { name: "qwen3-14b", config: r#"{"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 17408, "vocab_size": 151936, "tie_word_embeddings": false, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
    Preset { name: "qwen3-32b", config: r#"{"num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936, "tie_word_embeddings": false, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
];
