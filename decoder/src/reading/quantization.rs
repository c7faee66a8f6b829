//! `quantization_config`: linear layers in e4m3, in the two forms that checkpoints have.
//!
//! | `quant_method` | elements that share a scale | their scales | inputs |
//! |---|---|---|---|
//! | `fp8`, `weight_block_size` (Qwen3-FP8, DeepSeek) | tiles, 128 x 128 | `weight_scale_inv` | by groups of a tile's columns |
//! | `fp8` without | a matrix | `weight_scale` | by token, or static: `input_scale` |
//! | `compressed-tensors`, strategy `channel`, `tensor`, `block` | a row, a matrix, tiles | `weight_scale` | as they are, by token, by group, or static |
//!
//! Scales are stored as bf16, f16 or f32; whatever their name says, elements are multiplied by them. Which matrices are
//! e4m3 is told by the file itself: `modules_to_not_convert` and `ignore` repeat it.

use minisgl_core::spec::{Fp8, Inputs, ScaleBlock};
use serde_json::{Value, json};

use crate::error::ConfigError;
use crate::fields::{Fields, excerpt};

/// How a checkpoint's linear layers are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Quantization {
    /// What is computed.
    pub format: Fp8,
    /// What a matrix's scales are called in place of its `weight`.
    pub scales: &'static str,
}

/// What the scale of static inputs is called in place of `weight`.
pub(crate) const INPUT_SCALE: &str = "input_scale";

impl Quantization {
    /// Reads what a `config.json` says of it; `None` where nothing is quantized.
    ///
    /// # Errors
    /// A format that no backend computes, by name.
    pub fn read(fields: &Fields<'_>) -> Result<Option<Quantization>, ConfigError> {
        // compressed-tensors wrote `compression_config` once.
        for name in ["quantization_config", "compression_config"] {
            let Some(value) = fields.get(name) else { continue };
            let method = value.get("quant_method").and_then(Value::as_str);
            return match (method, fields.object(name)) {
                (Some("fp8"), Ok(Some(object))) => fp8(&object).map(Some),
                (Some("compressed-tensors"), Ok(Some(object))) => compressed_tensors(&object).map(Some),
                _ => Err(ConfigError::Quantized {
                    field: fields.path(name),
                    // The method may lie where the excerpt is cut.
                    value: method.map_or_else(String::new, |method| format!("{method:?}: "))
                        + &excerpt(value),
                }),
            };
        }
        Ok(None)
    }
}

fn fp8(object: &Fields<'_>) -> Result<Quantization, ConfigError> {
    object.only("fmt", &[json!("e4m3")])?;
    object.only("scale_fmt", &[json!("float")])?;
    object.only("activation_scheme", &[json!("dynamic"), json!("static")])?;
    let is_static = object.get("activation_scheme") == Some(&json!("static"));
    let Some([rows, cols]) = tile(object, "weight_block_size")? else {
        let inputs = if is_static { Inputs::Static } else { Inputs::PerToken };
        return Ok(Quantization {
            format: Fp8 { block: ScaleBlock::Matrix, inputs },
            scales: "weight_scale",
        });
    };
    object.only("activation_scheme", &[json!("dynamic")])?;
    let format = Fp8 { block: ScaleBlock::Tile { rows, cols }, inputs: Inputs::PerGroup(cols) };
    Ok(Quantization { format, scales: "weight_scale_inv" })
}

fn compressed_tensors(object: &Fields<'_>) -> Result<Quantization, ConfigError> {
    readable(object)?;
    // `frozen` is what the first ones say of the same files.
    object.only("quantization_status", &[json!("compressed"), json!("frozen")])?;
    object.only("kv_cache_scheme", &[])?;
    object.only("transform_config", &[json!({})])?;
    if let Some(sparsity) = object.object("sparsity_config")? {
        sparsity.only("format", &[json!("dense")])?;
    }
    let groups = object.required("config_groups", object.object("config_groups")?)?;
    let mut formats = Vec::new();
    for name in groups.names() {
        let group = groups.required(name, groups.object(name)?)?;
        group.only("targets", &[json!(["Linear"])])?;
        readable(&group)?;
        group.only("output_activations", &[])?;
        let weights = group.required("weights", group.object("weights")?)?;
        let inputs = group.object("input_activations")?;
        let inputs = inputs.map_or(Ok(Inputs::Plain), |inputs| group_inputs(&inputs))?;
        formats.push(Fp8 { block: group_block(&weights)?, inputs });
    }
    match formats[..] {
        [format] => Ok(Quantization { format, scales: "weight_scale" }),
        _ => Err(object.range_error(
            "config_groups",
            &format!("{} groups", formats.len()),
            "one group".to_owned(),
        )),
    }
}

/// Are matrices stored as e4m3, and not as packed integers or four bits?
fn readable(object: &Fields<'_>) -> Result<(), ConfigError> {
    match object.get("format") {
        Some(format) if !["float-quantized", "naive-quantized"].iter().any(|it| format == it) => {
            Err(ConfigError::Quantized { field: object.path("format"), value: excerpt(format) })
        }
        _ => Ok(()),
    }
}

/// Which elements of a group's weights share a scale.
fn group_block(weights: &Fields<'_>) -> Result<ScaleBlock, ConfigError> {
    float8(weights)?;
    weights.only("dynamic", &[json!(false)])?;
    weights.only("strategy", &["channel", "tensor", "block"].map(Value::from))?;
    match weights.get("strategy").and_then(Value::as_str) {
        Some("tensor") => Ok(ScaleBlock::Matrix),
        Some("block") => {
            let [rows, cols] = weights.required("block_structure", tile(weights, "block_structure")?)?;
            Ok(ScaleBlock::Tile { rows, cols })
        }
        Some(_) => Ok(ScaleBlock::Row),
        None => Err(ConfigError::Missing { field: weights.path("strategy") }),
    }
}

/// How a group's inputs are rounded. By a whole step's largest magnitude they are not: a token's bits would depend on what
/// runs beside it.
fn group_inputs(inputs: &Fields<'_>) -> Result<Inputs, ConfigError> {
    float8(inputs)?;
    if inputs.optional_bool("dynamic")?.unwrap_or(false) {
        inputs.only("strategy", &[json!("token"), json!("group")])?;
        let by_group = inputs.get("strategy") == Some(&json!("group"));
        return Ok(if by_group {
            Inputs::PerGroup(inputs.size("group_size", 1 << 20)?)
        } else {
            Inputs::PerToken
        });
    }
    inputs.only("strategy", &[json!("tensor")])?;
    Ok(Inputs::Static)
}

fn float8(scheme: &Fields<'_>) -> Result<(), ConfigError> {
    scheme.only("num_bits", &[json!(8)])?;
    scheme.only("type", &[json!("float")])?;
    scheme.only("symmetric", &[json!(true)])
}

/// A tile's rows and columns.
fn tile(fields: &Fields<'_>, name: &str) -> Result<Option<[u32; 2]>, ConfigError> {
    let size = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
    fields.read(name, "an array of two sizes above 0", |value| match value.as_array()?.as_slice() {
        [rows, cols] => Some([size(rows)?, size(cols)?]),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: Value) -> Result<Option<Quantization>, ConfigError> {
        Quantization::read(&Fields::of(&config)?)
    }

    /// A compressed-tensors configuration with one group.
    fn compressed(strategy: &str, inputs: Value) -> Value {
        let weights = json!({ "num_bits": 8, "type": "float", "symmetric": true, "dynamic": false, "strategy": strategy,
            "block_structure": if strategy == "block" { json!([64, 128]) } else { Value::Null } });
        let group = json!({ "targets": ["Linear"], "weights": weights, "input_activations": inputs });
        json!({ "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": { "group_0": group },
        }})
    }

    fn inputs(dynamic: bool, strategy: &str) -> Value {
        json!({ "num_bits": 8, "type": "float", "symmetric": true, "dynamic": dynamic, "strategy": strategy, "group_size": 128 })
    }

    /// As the first of them were written: what is as usual is left out, and the status is another.
    fn of_the_first() -> Value {
        let scheme = json!({ "num_bits": 8, "type": "float", "strategy": "tensor" });
        json!({ "quantization_config": {
            "quant_method": "compressed-tensors", "format": "naive-quantized", "quantization_status": "frozen",
            "config_groups": { "group_0": { "targets": ["Linear"], "weights": scheme, "input_activations": scheme } },
        }})
    }

    #[test]
    fn published_forms_are_read() {
        let tile = ScaleBlock::Tile { rows: 64, cols: 128 };
        let fp8 = |more: Value| {
            let mut config = json!({ "quant_method": "fp8", "fmt": "e4m3" });
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({ "quantization_config": config })
        };
        let forms = [
            (
                fp8(json!({ "activation_scheme": "dynamic", "weight_block_size": [64, 128] })),
                tile,
                Inputs::PerGroup(128),
            ),
            (fp8(json!({ "activation_scheme": "dynamic" })), ScaleBlock::Matrix, Inputs::PerToken),
            (fp8(json!({ "activation_scheme": "static" })), ScaleBlock::Matrix, Inputs::Static),
            (compressed("channel", inputs(true, "token")), ScaleBlock::Row, Inputs::PerToken),
            (compressed("tensor", inputs(false, "tensor")), ScaleBlock::Matrix, Inputs::Static),
            (compressed("block", inputs(true, "group")), tile, Inputs::PerGroup(128)),
            (compressed("channel", Value::Null), ScaleBlock::Row, Inputs::Plain),
            (of_the_first(), ScaleBlock::Matrix, Inputs::Static),
        ];
        for (config, block, inputs) in forms {
            let read = read(config.clone()).unwrap().unwrap();
            assert_eq!(read.format, Fp8 { block, inputs }, "{config}");
            let inverse = config["quantization_config"]["weight_block_size"].is_array();
            assert_eq!(read.scales, if inverse { "weight_scale_inv" } else { "weight_scale" }, "{config}");
        }
        assert_eq!(read(json!({ "quantization_config": null })), Ok(None));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let with = |path: [&str; 2], value: Value| {
            let mut config = compressed("channel", inputs(true, "token"));
            config["quantization_config"][path[0]][path[1]] = value;
            config
        };
        let method = |name: &str| json!({ "quantization_config": { "quant_method": name } });
        let mut tiles = method("fp8");
        tiles["quantization_config"]["weight_block_size"] = json!([128, 0]);
        let mut both = method("fp8");
        both["quantization_config"]["weight_block_size"] = json!([128, 128]);
        both["quantization_config"]["activation_scheme"] = json!("static");
        let mut kv = compressed("channel", Value::Null);
        kv["quantization_config"]["kv_cache_scheme"] = json!({ "num_bits": 8 });
        let mut rotated = compressed("channel", Value::Null);
        rotated["quantization_config"]["transform_config"] = json!({ "config_groups": { "R1": {} } });
        let mut packed = compressed("channel", Value::Null);
        packed["quantization_config"]["format"] = json!("nvfp4-pack-quantized");
        let second = json!({ "targets": ["Linear"], "weights": { "num_bits": 4, "type": "int" } });
        let refused = [
            (method("awq"), "quantization_config"),
            (method("mxfp4"), "quantization_config"),
            (json!({ "quantization_config": "gptq" }), "quantization_config"),
            (tiles, "weight_block_size"),
            (both, "activation_scheme"),
            (kv, "kv_cache_scheme"),
            (rotated, "transform_config"),
            (packed, "nvfp4-pack-quantized"),
            (with(["config_groups", "group_1"], second), "num_bits"),
            (compressed("group", Value::Null), "strategy"),
            (compressed("channel", inputs(true, "tensor")), "strategy"),
        ];
        for (config, field) in refused {
            let error = read(config.clone()).unwrap_err().to_string();
            assert!(error.contains(field), "{config}: {error}");
        }
    }
}
