//! OLMo 2: Llama whose norms come behind attention and MLP, and whose queries and keys are normed across all heads.

use minisgl_core::spec::{Attention, DecoderSpec, LayerSpec, Norms, QkNorm};
use minisgl_decoder::{ConfigError, Family, Fields, LayerNames, Preset};
use serde_json::json;

use crate::decoder;

/// `Olmo2ForCausalLM`: norms behind attention and MLP instead of before them; queries and keys normed across all heads.
pub static OLMO2: Family = Family {
    architecture: "Olmo2ForCausalLM",
    model_type: "olmo2",
    read,
    defaults: || json!({}),
    names: LayerNames::NORMS_AFTER,
    presets: PRESETS,
};

fn read(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    let spec = decoder(fields, false, |_, attention| Attention { qk_norm: QkNorm::FullWidth, ..attention })?;
    let layers = spec.layers.iter().map(|layer| LayerSpec { norms: Norms::After, ..*layer }).collect();
    Ok(DecoderSpec { layers, ..spec })
}

/// OLMo-2-0425-1B and OLMo-2-1124-7B.
#[rustfmt::skip]
const PRESETS: &[Preset] = &[
    Preset { name: "olmo-2-1b", config: r#"{"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192, "vocab_size": 100352, "tie_word_embeddings": false, "rms_norm_eps": 1e-06, "max_position_embeddings": 4096, "rope_theta": 500000}"# },
    Preset { name: "olmo-2-7b", config: r#"{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 100352, "tie_word_embeddings": false, "rms_norm_eps": 1e-06, "max_position_embeddings": 4096, "rope_theta": 500000}"# },
];
