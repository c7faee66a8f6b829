//! A model family: how its configuration reads, what its tensors are called, what sizes were published.

use minisgl_core::spec::DecoderSpec;
use serde_json::{Map, Value};

use crate::error::ConfigError;
use crate::fields::Fields;

/// One architecture of `config.json`.
#[derive(Debug)]
pub struct Family {
    /// As `architectures` names it: `Qwen3ForCausalLM`.
    pub architecture: &'static str,
    /// As `model_type` names it: `qwen3`.
    pub model_type: &'static str,
    /// Reads a `config.json` into a spec; refuses by name what would be computed wrongly. What all families have in common
    /// (element types, quantization, positions, end-of-sequence tokens) is read by the caller.
    pub read: fn(&Fields<'_>) -> Result<DecoderSpec, ConfigError>,
    /// What absent fields are, where checkpoints are published without them: an object of the values that the class's own
    /// configuration in transformers has. Those of rope may be within `rope_parameters` instead.
    pub defaults: fn() -> Value,
    /// Names of a layer's tensors, where families differ.
    pub names: LayerNames,
    /// Published sizes, smallest first.
    pub presets: &'static [Preset],
}

impl Family {
    /// A configuration of the family with its defaults in the place of fields that are absent. `null` is no absent field: it
    /// says that there is none.
    pub(crate) fn completed(&self, fields: &Fields<'_>) -> Result<Value, ConfigError> {
        let mut config: Map<String, Value> = fields.written().clone();
        let within = fields.object("rope_parameters")?;
        for (name, value) in (self.defaults)().as_object().into_iter().flatten() {
            if within.is_none_or(|rope| rope.get(name).is_none()) {
                config.entry(name).or_insert_with(|| value.clone());
            }
        }
        Ok(Value::Object(config))
    }
}

/// Names of a layer's tensors, between `model.layers.{i}.` and `.weight`, where families differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerNames {
    /// The norm of what attention gets.
    pub attention_norm: &'static str,
    /// The norm of what attention gives.
    pub attention_out_norm: &'static str,
    /// The norm of what the MLP gets.
    pub mlp_norm: &'static str,
    /// The norm of what the MLP gives.
    pub mlp_out_norm: &'static str,
    /// What is applied to the same rows: q, k and v, and a dense MLP's gate and up.
    pub projections: Projections,
}

/// How matrices that are applied to the same rows are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projections {
    /// A tensor each: `q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`.
    Apart,
    /// Stacked in this order in one: `qkv_proj`; `gate_up_proj`. They have no biases.
    Fused,
}

impl LayerNames {
    /// Of layers with norms before attention and MLP alone.
    pub const NORMS_BEFORE: LayerNames = LayerNames {
        attention_norm: "input_layernorm",
        attention_out_norm: "",
        mlp_norm: "post_attention_layernorm",
        mlp_out_norm: "",
        projections: Projections::Apart,
    };

    /// Of layers with norms behind attention and MLP alone.
    pub const NORMS_AFTER: LayerNames = LayerNames {
        attention_norm: "",
        attention_out_norm: "post_attention_layernorm",
        mlp_norm: "",
        mlp_out_norm: "post_feedforward_layernorm",
        projections: Projections::Apart,
    };

    /// Of layers with four norms.
    pub const NORMS_AROUND: LayerNames = LayerNames {
        attention_norm: "input_layernorm",
        attention_out_norm: "post_attention_layernorm",
        mlp_norm: "pre_feedforward_layernorm",
        mlp_out_norm: "post_feedforward_layernorm",
        projections: Projections::Apart,
    };
}

/// A published model, by name, with what its `config.json` says about its shape.
#[derive(Debug)]
pub struct Preset {
    /// What it is called on the command line.
    pub name: &'static str,
    /// The fields of its `config.json` that its family reads, but for `architectures`.
    pub config: &'static str,
}
