//! Qwen3, dense and with experts: RMSNorm of each query and key head, no biases.

use minisgl_core::spec::{Attention, DecoderSpec, Dims, Experts, LayerSpec, Mixer, Mlp, QkNorm};
use minisgl_decoder::{ConfigError, Family, Fields, LayerNames, Preset};
use serde_json::{Value, json};

/// `Qwen3ForCausalLM`.
pub static QWEN3: Family = Family {
    architecture: "Qwen3ForCausalLM",
    model_type: "qwen3",
    read,
    defaults: || json!({}),
    names: LayerNames::NORMS_BEFORE,
    presets: PRESETS,
};

/// `Qwen3MoeForCausalLM`.
pub static QWEN3_MOE: Family = Family {
    architecture: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    read: read_moe,
    defaults: || json!({}),
    names: LayerNames::NORMS_BEFORE,
    presets: MOE_PRESETS,
};

fn read(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    fields.required("head_dim", fields.get("head_dim"))?;
    let dims = fields.dims()?;
    let attention = attention(fields, &dims)?;
    let plain = LayerSpec { mlp: Mlp::Dense(fields.activation("hidden_act")?), ..LayerSpec::plain() };
    let layer = |window| LayerSpec { mixer: Mixer::Attention(Attention { window, ..attention }), ..plain };
    let layers = fields.switched_windows(dims.layers)?.into_iter().map(layer).collect();
    Ok(DecoderSpec { tied: fields.tied(false)?, layers, ..DecoderSpec::uniform(dims, plain) })
}

/// Most experts of a layer.
const EXPERTS_MAX: u32 = 1 << 12;

/// Qwen3 with experts in place of the MLP, in all layers but those that the configuration leaves out.
fn read_moe(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    // A window would be all layers', whatever `max_window_layers` says; no published model has one.
    fields.only("use_sliding_window", &[json!(false)])?;
    let dims = fields.dims()?;
    fields.windows(dims.layers, None, |_| false)?;
    let mixer = Mixer::Attention(attention(fields, &dims)?);
    let dense = Mlp::Dense(fields.activation("hidden_act")?);
    let experts = Mlp::Experts(experts(fields)?);
    let step = match fields.get("decoder_sparse_step") {
        Some(_) => fields.size("decoder_sparse_step", u32::MAX)?,
        None => 1,
    };
    let left_out = layer_numbers(fields, "mlp_only_layers", dims.layers)?;
    let layer = |i: u32| LayerSpec {
        mixer,
        mlp: if (i + 1).is_multiple_of(step) && !left_out.contains(&i) { experts } else { dense },
        ..LayerSpec::plain()
    };
    let layers = (0..dims.layers).map(layer).collect();
    Ok(DecoderSpec { tied: fields.tied(false)?, layers, ..DecoderSpec::uniform(dims, LayerSpec::plain()) })
}

/// Attention of both.
fn attention(fields: &Fields<'_>, dims: &Dims) -> Result<Attention, ConfigError> {
    fields.only("attention_bias", &[json!(false)])?;
    let rope = Some(fields.rope(dims.head_dim)?);
    Ok(Attention { qk_norm: QkNorm::PerHead, rope, ..Attention::plain() })
}

/// transformers 4 writes `num_experts`, transformers 5 `num_local_experts`.
fn experts(fields: &Fields<'_>) -> Result<Experts, ConfigError> {
    let names = ["num_experts", "num_local_experts"];
    let name = names.into_iter().find(|name| fields.get(name).is_some()).unwrap_or(names[0]);
    let count = fields.size(name, EXPERTS_MAX)?;
    fields.only(names[1], &[json!(count)])?;
    let per_token = fields.size("num_experts_per_tok", EXPERTS_MAX)?;
    if per_token > count {
        let range = format!("at most `{name}`, which is {count}");
        return Err(fields.range_error("num_experts_per_tok", &per_token, range));
    }
    Ok(Experts {
        activation: fields.activation("hidden_act")?,
        count,
        per_token,
        intermediate: fields.size("moe_intermediate_size", 1 << 20)?,
        normalized: fields.optional_bool("norm_topk_prob")?.unwrap_or(false),
    })
}

/// Numbers of layers; none where the field is absent.
fn layer_numbers(fields: &Fields<'_>, name: &str, layers: u32) -> Result<Vec<u32>, ConfigError> {
    let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n < layers);
    let all = |value: &Value| value.as_array()?.iter().map(number).collect();
    Ok(fields.read(name, "an array of numbers of layers, which count from 0", all)?.unwrap_or_default())
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

/// `tiny-moe` is ours.
#[rustfmt::skip]
const MOE_PRESETS: &[Preset] = &[
    Preset { name: "tiny-moe", config: r#"{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": true, "vocab_size": 2048, "tie_word_embeddings": true, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
    Preset { name: "qwen3-30b-a3b", config: r#"{"num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": true, "vocab_size": 151936, "tie_word_embeddings": false, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960, "rope_theta": 1000000}"# },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn experts_of(config: &Value) -> Vec<bool> {
        let spec = read_moe(&Fields::of(config).unwrap()).unwrap();
        spec.layers.iter().map(|layer| layer.experts().is_some()).collect()
    }

    fn config() -> Value {
        let mut config: Value = serde_json::from_str(MOE_PRESETS[0].config).unwrap();
        config["num_hidden_layers"] = json!(6);
        config
    }

    #[test]
    fn a_layer_has_experts_by_its_number_unless_it_is_left_out() {
        let mut config = config();
        assert_eq!(experts_of(&config), [true; 6]);
        config["decoder_sparse_step"] = json!(2);
        assert_eq!(experts_of(&config), [false, true, false, true, false, true]);
        config["mlp_only_layers"] = json!([1, 4]);
        assert_eq!(experts_of(&config), [false, false, false, true, false, true]);
    }

    #[test]
    fn experts_that_make_no_sense_are_refused_by_field() {
        let wrong = [
            ("num_experts", json!(0)),
            ("num_experts", Value::Null),
            ("num_local_experts", json!(17)),
            ("num_experts_per_tok", json!(17)),
            ("moe_intermediate_size", Value::Null),
            ("norm_topk_prob", json!("yes")),
            ("decoder_sparse_step", json!(0)),
            ("mlp_only_layers", json!([6])),
            ("mlp_only_layers", json!([-1])),
            ("use_sliding_window", json!(true)),
            ("attention_bias", json!(true)),
        ];
        for (field, value) in wrong {
            let mut config = config();
            config[field] = value;
            let error = read_moe(&Fields::of(&config).unwrap()).unwrap_err().to_string();
            assert!(error.contains(field), "{field} is not named: {error}");
        }
        let mut config = config();
        config["num_local_experts"] = config["num_experts"].take();
        assert_eq!(experts_of(&config), [true; 6]);
    }
}
