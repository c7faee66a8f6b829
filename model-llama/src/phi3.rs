//! Phi-3, whose architecture Phi-3.5 and Phi-4 have, too: Llama with q, k and v in one tensor, and gate and up.
//!
//! | model | window | heads | rope |
//! |---|---|---|---|
//! | Phi-3-mini-4k | 2047 | 96 wide | of whole heads |
//! | Phi-3.5-mini | (wider than its positions) | 96 wide | LongRoPE |
//! | Phi-4 | none | 128 wide | of whole heads |
//! | Phi-4-mini | (wider than its positions) | 128 wide | LongRoPE, of three quarters of each head |
//!
//! LongRoPE has two lists of factors: one for sequences within the positions of the first training, and another for all positions
//! of those that are longer. The first alone is computed, so these models reach 4,096 tokens here.

use minisgl_core::spec::{Attention, DecoderSpec, LayerSpec, Mixer, Mlp, ROPE_PAIRS_MAX, RopeScaling};
use minisgl_decoder::{ConfigError, Family, Fields, LayerNames, Preset, Projections};
use serde_json::{Value, json};

/// `Phi3ForCausalLM`: q, k, v in one tensor, gate and up too; a window, in some; rope of a part of each head, LongRoPE, in some.
pub static PHI3: Family = Family {
    architecture: "Phi3ForCausalLM",
    model_type: "phi3",
    read,
    defaults: || json!({}),
    names: LayerNames { projections: Projections::Fused, ..LayerNames::NORMS_BEFORE },
    presets: PRESETS,
};

/// Its dropouts are training's.
fn read(fields: &Fields<'_>) -> Result<DecoderSpec, ConfigError> {
    for bias in ["attention_bias", "mlp_bias", "lm_head_bias"] {
        fields.only(bias, &[json!(false)])?;
    }
    let dims = fields.dims()?;
    let rotated = rotated(fields, dims.head_dim)?;
    let positions = fields.size("max_position_embeddings", 1 << 24)?;
    let window = fields.get("sliding_window").map(|_| fields.size("sliding_window", u32::MAX)).transpose()?;
    let attention = Attention {
        rope: Some(fields.rope_with(rotated, |rope| scaling(fields, rope, rotated))?),
        // One that no sequence is longer than is none.
        window: window.filter(|window| *window < positions),
        ..Attention::plain()
    };
    let layer = LayerSpec {
        mixer: Mixer::Attention(attention),
        mlp: Mlp::Dense(fields.activation("hidden_act")?),
        ..LayerSpec::plain()
    };
    Ok(DecoderSpec { tied: fields.tied(false)?, ..DecoderSpec::uniform(dims, layer) })
}

/// How many elements of a head rope turns, by `partial_rotary_factor`, which either form of a configuration may have.
fn rotated(fields: &Fields<'_>, head_dim: u32) -> Result<u32, ConfigError> {
    const FACTOR: &str = "partial_rotary_factor";
    let mut factor = fields.optional_f64(FACTOR)?;
    for name in ["rope_scaling", "rope_parameters"] {
        if let Some(rope) = fields.object(name)? {
            factor = rope.optional_f64(FACTOR)?.or(factor);
        }
    }
    let factor = factor.unwrap_or(1.0);
    let rotated = (f64::from(head_dim) * factor) as u32;
    if rotated > 0 && rotated <= head_dim && rotated.is_multiple_of(2) {
        Ok(rotated)
    } else {
        let range = format!("a share of a head's {head_dim} elements that is an even number of them");
        Err(fields.range_error(FACTOR, &factor, range))
    }
}

/// Early configurations call LongRoPE `su` or `yarn`.
fn scaling(fields: &Fields<'_>, rope: &Fields<'_>, rotated: u32) -> Result<RopeScaling, ConfigError> {
    let name = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    rope.only(name, &["default", "longrope", "su", "yarn"].map(Value::from))?;
    match rope.get(name).and_then(Value::as_str) {
        None | Some("default") => Ok(RopeScaling::Default),
        Some(_) => long_rope(fields, rope, rotated as usize / 2),
    }
}

fn long_rope(fields: &Fields<'_>, rope: &Fields<'_>, pairs: usize) -> Result<RopeScaling, ConfigError> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    for unknown in ["short_mscale", "long_mscale"] {
        rope.only(unknown, &[])?;
    }
    let original = (if rope.get(ORIGINAL).is_some() { rope } else { fields }).size(ORIGINAL, 1 << 24)?;
    if original == 1 {
        return Err(fields.range_error(ORIGINAL, &original, "above 1 with LongRoPE".to_owned()));
    }
    let factor = match rope.get("factor") {
        Some(_) => rope.positive("factor")?,
        None => fields.positive("max_position_embeddings")? / f64::from(original),
    };
    let magnitude = if factor > 1.0 { (1.0 + factor.ln() / f64::from(original).ln()).sqrt() } else { 1.0 };
    let numbers = rope.read("short_factor", "an array of numbers above 0", |value| {
        let number = |value: &Value| value.as_f64().map(|x| x as f32).filter(|x| *x > 0.0 && x.is_finite());
        value.as_array()?.iter().map(number).collect::<Option<Vec<f32>>>()
    })?;
    let numbers = rope.required("short_factor", numbers)?;
    if numbers.len() != pairs || pairs > ROPE_PAIRS_MAX {
        let range =
            format!("one for each of the {pairs} pairs that turn, which may be {ROPE_PAIRS_MAX} at most");
        return Err(rope.range_error("short_factor", &format!("{} numbers", numbers.len()), range));
    }
    let mut factors = [1.0; ROPE_PAIRS_MAX];
    factors[..pairs].copy_from_slice(&numbers);
    Ok(RopeScaling::Long { original, factors, magnitude: rope.positive_or("attention_factor", magnitude)? })
}

#[rustfmt::skip]
const PRESETS: &[Preset] = &[
    Preset { name: "phi-3-mini-4k", config: r#"{"num_hidden_layers": 32, "hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192, "vocab_size": 32064, "tie_word_embeddings": false, "rms_norm_eps": 1e-05, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 2047}"# },
    Preset { name: "phi-4", config: r#"{"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10, "intermediate_size": 17920, "vocab_size": 100352, "tie_word_embeddings": false, "rms_norm_eps": 1e-05, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_theta": 250000}"# },
];

#[cfg(test)]
mod tests {
    use minisgl_core::tensor::{HostTensor, TensorData};
    use minisgl_decoder::{Checkpoint, Config, MlpTensors};

    use super::*;

    /// What is read of Phi-4's configuration with `changes` put on top: the first layer's attention, and the positions.
    fn read(changes: Value) -> Result<(Attention, u32), String> {
        let mut config: Value = serde_json::from_str(PRESETS[1].config).map_err(|e| e.to_string())?;
        config["architectures"] = json!(["Phi3ForCausalLM"]);
        for (field, value) in changes.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        let read = Config::from_json(config.to_string().as_bytes(), &[&PHI3]);
        let (config, _) = read.map_err(|error| error.to_string())?;
        match config.spec.layers[0].mixer {
            Mixer::Attention(attention) => Ok((attention, config.max_positions)),
            Mixer::GatedDelta { .. } => Err("it has attention".to_owned()),
        }
    }

    /// What Phi-4-mini adds, under the name that LongRoPE has in `name`.
    fn long(name: &str, kind: &str) -> Value {
        json!({
            "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
            "rope_scaling": {name: kind, "short_factor": vec![1.5; 48], "long_factor": vec![9.0; 48]},
        })
    }

    #[test]
    fn a_window_that_no_sequence_is_longer_than_is_none() {
        for (window, read_as) in [(2047, Some(2047)), (131_072, None), (262_144, None)] {
            let mut config = long("type", "longrope");
            config["sliding_window"] = json!(window);
            assert_eq!(read(config).unwrap().0.window, read_as);
        }
    }

    #[test]
    fn long_rope_is_read_under_all_of_its_names_and_ends_with_the_first_training() {
        for (name, kind) in
            [("type", "longrope"), ("rope_type", "longrope"), ("type", "su"), ("type", "yarn")]
        {
            let (attention, positions) = read(long(name, kind)).unwrap();
            let rope = attention.rope.unwrap();
            assert_eq!((rope.rotated, positions), (96, 4096), "{kind}");
            let RopeScaling::Long { original, factors, magnitude } = rope.scaling else {
                panic!("{kind} is {:?}", rope.scaling)
            };
            assert!(original == 4096 && factors[..48] == [1.5; 48], "{kind}: {factors:?}");
            // The root of 1 + ln(32) / ln(4096).
            assert!((magnitude - 1.190_238).abs() < 1e-6, "{magnitude}");
        }
        let mut said = long("type", "longrope");
        said["rope_scaling"]["attention_factor"] = json!(1.25);
        let (attention, _) = read(said).unwrap();
        assert!(matches!(attention.rope.unwrap().scaling, RopeScaling::Long { magnitude: 1.25, .. }));
    }

    #[test]
    fn dummies_are_the_rows_of_one_tensor() {
        let preset = Checkpoint::preset("phi-4", &[&PHI3]).unwrap();
        let layer = &preset.tensors().layers[0];
        let MlpTensors::Dense { gate_up, .. } = &layer.mlp else { panic!("its MLP is dense") };
        for stack in [&layer.qkv[..], gate_up] {
            let seed = |tensor: &HostTensor| match tensor.data {
                TensorData::Uniform { seed, .. } => seed,
                _ => panic!("{tensor:?} is no dummy"),
            };
            for (part, next) in stack.iter().zip(&stack[1..]) {
                assert_eq!(seed(next), seed(part).wrapping_add((part.rows * part.cols) as u64), "{next:?}");
            }
        }
    }

    #[test]
    fn both_forms_of_a_configuration_say_how_much_of_a_head_turns() {
        let rotated = |changes| read(changes).map(|(attention, _)| attention.rope.unwrap().rotated);
        assert_eq!(rotated(json!({})), Ok(128));
        assert_eq!(rotated(json!({"partial_rotary_factor": 0.5})), Ok(64));
        let parameters =
            json!({"rope_type": "default", "rope_theta": 250_000, "partial_rotary_factor": 0.25});
        assert_eq!(rotated(json!({"rope_parameters": parameters})), Ok(32));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let with = |field: &str, value: Value| {
            let mut long = long("type", "longrope");
            long["rope_scaling"][field] = value;
            long
        };
        for (refused, field) in [
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"mlp_bias": true}), "mlp_bias"),
            (json!({"lm_head_bias": true}), "lm_head_bias"),
            (json!({"sliding_window": 0}), "sliding_window"),
            (json!({"partial_rotary_factor": 0}), "partial_rotary_factor"),
            (json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor"),
            (json!({"partial_rotary_factor": 0.98}), "partial_rotary_factor"),
            (with("type", json!("linear")), "rope_scaling.type"),
            (with("short_mscale", json!(1.1)), "short_mscale"),
            (with("original_max_position_embeddings", json!(1)), "above 1"),
            (with("short_factor", Value::Null), "short_factor"),
            (with("short_factor", json!(vec![1.0; 64])), "48 pairs"),
            (with("short_factor", json!(vec![-1.0; 48])), "above 0"),
        ] {
            let error = read(refused).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
    }
}
