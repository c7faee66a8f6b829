//! `config.json`, read strictly: what this crate can't compute exactly is refused, with the field's name.
//!
//! ```text
//!   config.json ─────────────> Dims, rope, positions, tied, end-of-sequence tokens
//!   generation_config.json ──> end-of-sequence tokens, where it gives them
//! ```
//!
//! Invariant: a [`Config`] holds sizes whose products (of a weight, a layer, a row) fit `usize` and whose heads divide.

use minisgl_core::backend::Dims;
use serde_json::{Value, json};
use thiserror::Error;

use crate::fields::{Fields, excerpt};

/// The architecture that this crate computes, as `config.json` names it.
pub const ARCHITECTURE: &str = "Qwen3ForCausalLM";

/// A Qwen3 model's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Sizes.
    pub dims: Dims,
    /// The longest sequence, in tokens, that the model was made for.
    pub max_positions: u32,
    /// Base of the rotary embedding's wavelengths.
    pub rope_theta: f64,
    /// Is the head the embedding's matrix?
    pub tied: bool,
    /// End-of-sequence tokens; none where the checkpoint names none.
    pub eos: Vec<u32>,
}

/// A configuration that makes no model.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ConfigError {
    /// Not JSON.
    #[error("not valid JSON: {0}")]
    Json(String),
    /// JSON, but no object.
    #[error("expected a JSON object, found {0}")]
    NoObject(&'static str),
    /// A field that must be there is not.
    #[error("the field `{field}` is missing")]
    Missing {
        /// Its name.
        field: String,
    },
    /// A field of another type.
    #[error("the field `{field}` must be {expected}, but is {found}")]
    Type {
        /// Its name.
        field: String,
        /// What it must be.
        expected: &'static str,
        /// Its value.
        found: String,
    },
    /// A model that would be computed wrongly.
    #[error("the field `{field}` is {value}, which is not supported; only {supported} is")]
    Unsupported {
        /// Its name.
        field: String,
        /// Its value.
        value: String,
        /// What is supported.
        supported: String,
    },
    /// Weights in a format that no backend reads.
    #[error(
        "quantized checkpoints are not supported (`{field}` is {value}); take the model's checkpoint in bfloat16, \
         float16 or float32"
    )]
    Quantized {
        /// The field that says so.
        field: String,
        /// Its value.
        value: String,
    },
    /// A number out of range.
    #[error("the field `{field}` is {value}; it must be {range}")]
    Range {
        /// Its name.
        field: String,
        /// Its value.
        value: String,
        /// The numbers that it can be.
        range: String,
    },
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Names the field that is missing, of the wrong type, out of range or not supported.
    pub fn from_json(text: &[u8]) -> Result<Config, ConfigError> {
        let value = parse(text)?;
        let fields = Fields::of(&value)?;
        check_architecture(&fields)?;
        check_features(&fields)?;
        Ok(Config {
            dims: dims(&fields)?,
            max_positions: size(&fields, "max_position_embeddings", 1 << 24)?,
            rope_theta: rope_theta(&fields)?,
            tied: fields.optional_bool("tie_word_embeddings")?.unwrap_or(false),
            eos: eos(&fields)?.unwrap_or_default(),
        })
    }

    /// Takes the end-of-sequence tokens of the text of a `generation_config.json`, if it has any.
    ///
    /// # Errors
    /// The text is no JSON object, or `eos_token_id` is neither a token id nor an array of them.
    pub fn with_generation_config(mut self, text: &[u8]) -> Result<Config, ConfigError> {
        let value = parse(text)?;
        if let Some(eos) = eos(&Fields::of(&value)?)? {
            self.eos = eos;
        }
        Ok(self)
    }
}

fn parse(text: &[u8]) -> Result<Value, ConfigError> {
    serde_json::from_slice(text).map_err(|error| ConfigError::Json(error.to_string()))
}

fn check_architecture(fields: &Fields<'_>) -> Result<(), ConfigError> {
    let names = fields.required("architectures", fields.optional_array("architectures")?)?;
    if names.iter().all(|name| name != ARCHITECTURE) {
        return Err(ConfigError::Unsupported {
            field: fields.path("architectures"),
            value: excerpt(&Value::from(names)),
            supported: format!("[\"{ARCHITECTURE}\"]"),
        });
    }
    fields.only("model_type", &[json!("qwen3")])
}

/// Refuses what would change the arithmetic. Absent fields have the defaults of transformers' `Qwen3Config`.
fn check_features(fields: &Fields<'_>) -> Result<(), ConfigError> {
    fields.only("hidden_act", &[json!("silu")])?;
    fields.only("attention_bias", &[json!(false)])?;
    fields.only("use_sliding_window", &[json!(false)])?;
    for name in ["quantization_config", "compression_config"] {
        if let Some(value) = fields.get(name) {
            return Err(ConfigError::Quantized { field: fields.path(name), value: excerpt(value) });
        }
    }
    for name in ["dtype", "torch_dtype"] {
        fields.only(name, &[json!("bfloat16"), json!("float16"), json!("float32")])?;
    }
    let layer_types = fields.optional_array("layer_types")?.unwrap_or_default();
    match layer_types.iter().find(|kind| *kind != "full_attention") {
        Some(kind) => Err(ConfigError::Unsupported {
            field: fields.path("layer_types"),
            value: excerpt(kind),
            supported: "\"full_attention\"".to_owned(),
        }),
        None => Ok(()),
    }
}

/// The sizes. Their bounds lie far above any model and far below where a product of two leaves `usize`.
fn dims(fields: &Fields<'_>) -> Result<Dims, ConfigError> {
    let dims = Dims {
        layers: size(fields, "num_hidden_layers", 1 << 12)?,
        hidden: size(fields, "hidden_size", 1 << 20)?,
        heads: size(fields, "num_attention_heads", 1 << 12)?,
        kv_heads: size(fields, "num_key_value_heads", 1 << 12)?,
        head_dim: size(fields, "head_dim", 1 << 12)?,
        intermediate: size(fields, "intermediate_size", 1 << 20)?,
        vocab: size(fields, "vocab_size", 1 << 24)?,
        norm_eps: positive(fields, "rms_norm_eps")? as f32,
    };
    if !dims.heads.is_multiple_of(dims.kv_heads) {
        let range = format!("a divisor of `num_attention_heads`, which is {}", dims.heads);
        return Err(range_error(fields, "num_key_value_heads", &dims.kv_heads, range));
    }
    if !dims.head_dim.is_multiple_of(2) {
        let range = "even: rope turns pairs of elements".to_owned();
        return Err(range_error(fields, "head_dim", &dims.head_dim, range));
    }
    Ok(dims)
}

fn size(fields: &Fields<'_>, name: &str, max: u32) -> Result<u32, ConfigError> {
    let value = fields.u32(name)?;
    if (1..=max).contains(&value) {
        Ok(value)
    } else {
        Err(range_error(fields, name, &value, format!("from 1 to {max}")))
    }
}

/// A number that is above 0 and finite, as f32 too.
fn positive(fields: &Fields<'_>, name: &str) -> Result<f64, ConfigError> {
    let value = fields.f64(name)?;
    if value as f32 > 0.0 && (value as f32).is_finite() {
        Ok(value)
    } else {
        Err(range_error(fields, name, &value, "a finite number above 0".to_owned()))
    }
}

fn range_error(fields: &Fields<'_>, name: &str, value: &impl ToString, range: String) -> ConfigError {
    ConfigError::Range { field: fields.path(name), value: value.to_string(), range }
}

/// The base of the rotary embedding: `rope_theta` itself, or within `rope_parameters` as transformers 5 writes it.
fn rope_theta(fields: &Fields<'_>) -> Result<f64, ConfigError> {
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = fields.object(name)? else { continue };
        rope.only("rope_type", &[json!("default")])?;
        rope.only("type", &[json!("default")])?;
        rope.only("partial_rotary_factor", &[json!(1), json!(1.0)])?;
    }
    let outer = fields.get("rope_theta").map(|_| positive(fields, "rope_theta")).transpose()?;
    let inner = match fields.object("rope_parameters")? {
        Some(rope) if outer.is_none() || rope.get("rope_theta").is_some() => {
            Some(positive(&rope, "rope_theta")?)
        }
        _ => None,
    };
    match (outer, inner) {
        (Some(outer), Some(inner)) if outer != inner => {
            let range = format!("the same as `rope_parameters.rope_theta`, which is {inner}");
            Err(range_error(fields, "rope_theta", &outer, range))
        }
        (outer, inner) => fields.required("rope_theta", inner.or(outer)),
    }
}

/// `eos_token_id`: a token id or an array of them.
fn eos(fields: &Fields<'_>) -> Result<Option<Vec<u32>>, ConfigError> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    fields.read("eos_token_id", "a token id or an array of token ids", |value| match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    })
}
