//! Llama and families that differ from it little: each one's comment says by what it does.

mod olmo2;
mod phi3;

use minisgl_core::spec::{Attention, Bias, DecoderSpec, LayerSpec, Mixer, Mlp};
use minisgl_decoder::{ConfigError, Family, Fields, LayerNames, Preset};
use serde_json::{Value, json};

pub use olmo2::OLMO2;
pub use phi3::PHI3;

/// `LlamaForCausalLM`, which SmolLM2 has too.
pub static LLAMA: Family = Family {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    read: llama,
    // Llama 2 was published without a rope base, the first one without key heads too.
    defaults: || {
        json!({
            "rope_theta": 10_000.0, "num_key_value_heads": null, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
        })
    },
    names: LayerNames::NORMS_BEFORE,
    presets: LLAMA_PRESETS,
};

/// `MistralForCausalLM`: a window on every layer, in the first 7B.
pub static MISTRAL: Family = Family {
    architecture: "MistralForCausalLM",
    model_type: "mistral",
    read: mistral,
    // `null` says that there is no window.
    defaults: || json!({"sliding_window": 4096}),
    names: LayerNames::NORMS_BEFORE,
    presets: MISTRAL_PRESETS,
};

/// `Qwen2ForCausalLM`: biases of q, k and v; a window on the later layers, if it is switched on.
pub static QWEN2: Family = Family {
    architecture: "Qwen2ForCausalLM",
    model_type: "qwen2",
    read: qwen2,
    defaults: || json!({}),
    names: LayerNames::NORMS_BEFORE,
    presets: QWEN2_PRESETS,
};

/// `SmolLM3ForCausalLM`: no rope on some layers.
pub static SMOLLM3: Family = Family {
    architecture: "SmolLM3ForCausalLM",
    model_type: "smollm3",
    read: smollm3,
    defaults: || json!({}),
    names: LayerNames::NORMS_BEFORE,
    presets: SMOLLM3_PRESETS,
};

/// `SeedOssForCausalLM`: biases of q, k and v, which can be switched off.
pub static SEED_OSS: Family = Family {
    architecture: "SeedOssForCausalLM",
    model_type: "seed_oss",
    read: seed_oss,
    defaults: || json!({}),
    names: LayerNames::NORMS_BEFORE,
    presets: SEED_OSS_PRESETS,
};

/// A decoder for which `attention_bias` would mean what it means for Llama, a bias on o too, and which has none.
fn decoder(
    fields: &Fields<'_>,
    tied: bool,
    attention: impl Fn(usize, Attention) -> Attention,
) -> Result<DecoderSpec, ConfigError> {
    fields.only("attention_bias", &[json!(false)])?;
    decoder_with_biases(fields, tied, attention)
}

/// A decoder whose layers' attention is what `attention` makes of Llama's, which has rope and nothing else.
fn decoder_with_biases(
    fields: &Fields<'_>,
    tied: bool,
    attention: impl Fn(usize, Attention) -> Attention,
) -> Result<DecoderSpec, ConfigError> {
    fields.only("mlp_bias", &[json!(false)])?;
    let dims = fields.dims()?;
    let llama = Attention { rope: Some(fields.rope(dims.head_dim)?), ..Attention::plain() };
    let plain = LayerSpec { mlp: Mlp::Dense(fields.activation("hidden_act")?), ..LayerSpec::plain() };
    let layer = |i| LayerSpec { mixer: Mixer::Attention(attention(i, llama)), ..plain };
    let layers = (0..dims.layers as usize).map(layer).collect();
    Ok(DecoderSpec { tied: fields.tied(tied)?, layers, ..DecoderSpec::uniform(dims, plain) })
}

fn llama(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    decoder(fields, false, |_, attention| attention)
}

fn mistral(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    let width = fields.get("sliding_window").map(|_| fields.size("sliding_window", u32::MAX)).transpose()?;
    let windows = fields.windows(fields.layers()?, width, |_| true)?;
    decoder(fields, false, |i, attention| Attention { window: windows[i], ..attention })
}

fn qwen2(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    let windows = fields.switched_windows(fields.layers()?)?;
    decoder(fields, false, |i, attention| Attention { bias: Bias::Qkv, window: windows[i], ..attention })
}

fn smollm3(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    fields.only("use_sliding_window", &[json!(false)])?;
    fields.windows(fields.layers()?, None, |_| false)?;
    let turned = layers_with_rope(fields)?;
    decoder(fields, true, |i, attention| Attention {
        rope: attention.rope.filter(|_| turned[i]),
        ..attention
    })
}

/// `no_rope_layers` has a 1 for each layer with rope, and wins over `no_rope_layer_interval`, each so manyth layer without.
fn layers_with_rope(fields: &Fields<'_>) -> Result<Vec<bool>, ConfigError> {
    let layers = fields.layers()?;
    let flag = |value: &Value| value.as_u64().filter(|flag| *flag <= 1).map(|flag| flag == 1);
    let listed = fields.read("no_rope_layers", "an array of 0 and 1", |value| {
        value.as_array()?.iter().map(flag).collect::<Option<Vec<bool>>>()
    })?;
    match listed {
        Some(turned) if turned.len() == layers as usize => Ok(turned),
        Some(turned) => {
            let range = format!("as long as `num_hidden_layers` says, {layers}");
            Err(fields.range_error("no_rope_layers", &format!("{} entries", turned.len()), range))
        }
        None => {
            let interval = match fields.get("no_rope_layer_interval") {
                Some(_) => fields.size("no_rope_layer_interval", u32::MAX)?,
                None => 4,
            };
            Ok((1..=layers).map(|layer| !layer.is_multiple_of(interval)).collect())
        }
    }
}

/// Its dropouts are training's.
fn seed_oss(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    fields.required("head_dim", fields.get("head_dim"))?;
    fields.only("attention_out_bias", &[json!(false)])?;
    let biased = fields.optional_bool("attention_bias")?.unwrap_or(true);
    let bias = if biased { Bias::Qkv } else { Bias::None };
    decoder_with_biases(fields, false, |_, attention| Attention { bias, ..attention })
}

/// SmolLM2 is a Llama too.
#[rustfmt::skip]
const LLAMA_PRESETS: &[Preset] = &[
    Preset { name: "smollm2-135m", config: r#"{"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": true, "rms_norm_eps": 1e-05, "max_position_embeddings": 8192, "rope_theta": 100000}"# },
    Preset { name: "llama-3.2-1b", config: r#"{"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": true, "rms_norm_eps": 1e-05, "max_position_embeddings": 131072, "rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"# },
    Preset { name: "llama-3.1-8b", config: r#"{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": false, "rms_norm_eps": 1e-05, "max_position_embeddings": 131072, "rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"# },
];

/// Mistral-7B-v0.1.
#[rustfmt::skip]
const MISTRAL_PRESETS: &[Preset] = &[
    Preset { name: "mistral-7b", config: r#"{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "tie_word_embeddings": false, "rms_norm_eps": 1e-05, "max_position_embeddings": 32768, "rope_theta": 10000, "sliding_window": 4096}"# },
];

/// Qwen2.5.
#[rustfmt::skip]
const QWEN2_PRESETS: &[Preset] = &[
    Preset { name: "qwen2.5-0.5b", config: r#"{"num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": true, "rms_norm_eps": 1e-06, "max_position_embeddings": 32768, "rope_theta": 1000000}"# },
    Preset { name: "qwen2.5-7b", config: r#"{"num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": false, "rms_norm_eps": 1e-06, "max_position_embeddings": 32768, "rope_theta": 1000000}"# },
];

#[rustfmt::skip]
const SMOLLM3_PRESETS: &[Preset] = &[
    Preset { name: "smollm3-3b", config: r#"{"num_hidden_layers": 36, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 11008, "vocab_size": 128256, "tie_word_embeddings": true, "rms_norm_eps": 1e-06, "max_position_embeddings": 65536, "rope_theta": 5000000, "no_rope_layer_interval": 4}"# },
];

/// Seed-OSS-36B.
#[rustfmt::skip]
const SEED_OSS_PRESETS: &[Preset] = &[
    Preset { name: "seed-oss-36b", config: r#"{"num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 27648, "vocab_size": 155136, "tie_word_embeddings": false, "rms_norm_eps": 1e-06, "max_position_embeddings": 524288, "rope_theta": 10000000, "attention_bias": true, "attention_out_bias": false}"# },
];

#[cfg(test)]
mod tests {
    use minisgl_decoder::Config;

    use super::*;

    /// What a family reads of a preset's configuration with `changes` put on top, without the fields in `absent`.
    fn config_of(family: &'static Family, changes: Value, absent: &[&str]) -> Result<Config, String> {
        let mut config: Value = serde_json::from_str(family.presets[0].config).map_err(|e| e.to_string())?;
        config["architectures"] = json!([family.architecture]);
        for (field, value) in changes.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        config
            .as_object_mut()
            .into_iter()
            .for_each(|config| absent.iter().for_each(|&it| drop(config.remove(it))));
        let read = Config::from_json(config.to_string().as_bytes(), &[family]);
        read.map(|(config, _)| config).map_err(|error| error.to_string())
    }

    fn attention_of(config: &Config) -> Attention {
        match config.spec.layers[0].mixer {
            Mixer::Attention(attention) => attention,
            Mixer::GatedDelta { .. } => panic!("it has attention"),
        }
    }

    #[test]
    fn a_llama_without_the_fields_of_later_ones_has_what_its_class_has() {
        let later = ["rope_theta", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"];
        let first = config_of(&LLAMA, json!({}), &later).unwrap();
        assert_eq!((first.spec.dims.kv_heads, first.spec.dims.heads), (9, 9));
        assert_eq!((first.spec.dims.norm_eps, first.max_positions), (1e-6, 2048));
        assert_eq!(attention_of(&first).rope.unwrap().base, 10_000.0);
        let null = config_of(&LLAMA, json!({"num_key_value_heads": null}), &[]).unwrap();
        assert_eq!(null.spec.dims.kv_heads, 9);
        // Of transformers 5, with a base and without one.
        for (rope, base) in [(json!({"rope_theta": 5e5}), 5e5), (json!({"rope_type": "default"}), 1e4)] {
            let config = config_of(&LLAMA, json!({"rope_parameters": rope}), &["rope_theta"]).unwrap();
            assert_eq!(attention_of(&config).rope.unwrap().base, base);
        }
    }

    #[test]
    fn a_mistral_has_no_window_where_it_says_so_and_its_classs_where_it_says_nothing() {
        let window =
            |changes, absent: &[&str]| attention_of(&config_of(&MISTRAL, changes, absent).unwrap()).window;
        assert_eq!(window(json!({"sliding_window": 64}), &[]), Some(64));
        assert_eq!(window(json!({"sliding_window": null}), &[]), None);
        assert_eq!(window(json!({}), &["sliding_window"]), Some(4096));
    }

    /// Layer 0's bias of a Seed-OSS whose published configuration has `changes` put on top.
    fn seed_oss_bias(changes: Value) -> Result<Bias, String> {
        Ok(attention_of(&config_of(&SEED_OSS, changes, &[])?).bias)
    }

    #[test]
    fn seed_oss_has_biases_unless_they_are_switched_off() {
        assert_eq!(seed_oss_bias(json!({})), Ok(Bias::Qkv));
        assert_eq!(seed_oss_bias(json!({"attention_bias": null})), Ok(Bias::Qkv));
        assert_eq!(seed_oss_bias(json!({"attention_bias": false})), Ok(Bias::None));
        for (refused, field) in [
            (json!({"attention_out_bias": true}), "attention_out_bias"),
            (json!({"mlp_bias": true}), "mlp_bias"),
            (json!({"head_dim": null}), "head_dim"),
        ] {
            let error = seed_oss_bias(refused).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
    }
}
