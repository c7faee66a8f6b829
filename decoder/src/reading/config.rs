//! `config.json`, read strictly: what can't be computed exactly is refused, with the field's name.
//!
//! ```text
//!   config.json ── architectures ──> Family ── read ──> DecoderSpec, positions, end-of-sequence tokens
//!   generation_config.json ───────────────────────────> end-of-sequence tokens, where it gives them
//! ```
//!
//! Invariant: a [`Config`] holds sizes whose products (of a weight, a layer, a row) fit `usize` and whose heads divide.

use minisgl_core::spec::{DecoderSpec, LayerSpec, Mixer, RopeScaling, WeightFormat};
use serde_json::{Value, json};

use crate::error::ConfigError;
use crate::family::Family;
use crate::fields::{Fields, excerpt};
use crate::quantization::Quantization;

/// Far more positions than any model has.
const POSITIONS_MAX: u32 = 1 << 24;

/// What a checkpoint's configuration says.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// What is computed.
    pub spec: DecoderSpec,
    /// The longest sequence, in tokens, that the model was made for.
    pub max_positions: u32,
    /// End-of-sequence tokens; none where the checkpoint names none.
    pub eos: Vec<u32>,
    pub(crate) quantization: Option<Quantization>,
}

impl Config {
    /// Reads the text of a `config.json` of one of these families, and says of which.
    ///
    /// # Errors
    /// Names the field that is missing, of the wrong type, out of range or not supported.
    pub fn from_json<'a>(text: &[u8], families: &[&'a Family]) -> Result<(Config, &'a Family), ConfigError> {
        let value = parse(text)?;
        let fields = Fields::of(&value)?;
        let family = family_of(&fields, families)?;
        Config::read(&fields, family).map(|config| (config, family))
    }

    pub(crate) fn read(fields: &Fields<'_>, family: &Family) -> Result<Config, ConfigError> {
        let completed = family.completed(fields)?;
        let fields = &Fields::of(&completed)?;
        fields.only("model_type", &[json!(family.model_type)])?;
        for name in ["dtype", "torch_dtype"] {
            fields.only(name, &[json!("bfloat16"), json!("float16"), json!("float32")])?;
        }
        let quantization = Quantization::read(fields)?;
        let mut spec = (family.read)(fields)?;
        if let Some(quantization) = quantization {
            spec.weights = WeightFormat::Fp8(quantization.format);
        }
        let max_positions =
            positions(&spec, trained(fields, fields.size("max_position_embeddings", POSITIONS_MAX)?)?);
        Ok(Config { spec, max_positions, eos: eos(fields)?.unwrap_or_default(), quantization })
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

pub(crate) fn parse(text: &[u8]) -> Result<Value, ConfigError> {
    serde_json::from_slice(text).map_err(|error| ConfigError::Json(error.to_string()))
}

/// The first family that `architectures` names.
pub(crate) fn family_of<'a>(fields: &Fields<'_>, families: &[&'a Family]) -> Result<&'a Family, ConfigError> {
    let names = fields.required("architectures", fields.optional_array("architectures")?)?;
    let named = |family: &&&Family| names.iter().any(|name| name == family.architecture);
    families.iter().find(named).copied().ok_or_else(|| ConfigError::Unsupported {
        field: fields.path("architectures"),
        value: excerpt(&Value::from(names)),
        supported: families.iter().map(|family| family.architecture).collect::<Vec<_>>().join(" or "),
    })
}

/// Of `written` positions those that plain attention reaches. What lies beyond, models with dual chunk attention reach by it,
/// which nobody computes here.
fn trained(fields: &Fields<'_>, written: u32) -> Result<u32, ConfigError> {
    match fields.object("dual_chunk_attention_config")? {
        Some(chunks) => Ok(written.min(chunks.size("original_max_position_embeddings", POSITIONS_MAX)?)),
        None => Ok(written),
    }
}

/// The positions that a model reaches: as many as its configuration says, or as many as YaRN stretches them to. Model cards
/// have YaRN added to a configuration whose positions stay as they were. With LongRoPE, those of the first training.
fn positions(spec: &DecoderSpec, written: u32) -> u32 {
    let scaling = |layer: &LayerSpec| match layer.mixer {
        Mixer::Attention(attention) => attention.rope.map(|rope| rope.scaling),
        Mixer::GatedDelta { .. } => None,
    };
    spec.layers.iter().filter_map(scaling).fold(written, |positions, scaling| match scaling {
        RopeScaling::Yarn { factor, original, .. } => positions.max((factor * original) as u32),
        RopeScaling::Long { original, .. } => positions.min(original),
        RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => positions,
    })
}

/// `eos_token_id`: a token id or an array of them.
fn eos(fields: &Fields<'_>) -> Result<Option<Vec<u32>>, ConfigError> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    fields.read("eos_token_id", "a token id or an array of token ids", |value| match value {
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    })
}
