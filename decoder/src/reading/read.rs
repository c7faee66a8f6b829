//! What the configurations of many families have in common, in both forms: transformers 4 writes `rope_theta` and
//! `rope_scaling`, transformers 5 `rope_parameters`.

use minisgl_core::spec::{Activation, Dims, Rope, RopeScaling};
use serde_json::{Value, json};

use crate::error::ConfigError;
use crate::fields::{Fields, excerpt};

impl Fields<'_> {
    /// A whole number from 1 to `max`.
    ///
    /// # Errors
    /// It is absent, of another type or out of range; likewise below.
    pub fn size(&self, name: &str, max: u32) -> Result<u32, ConfigError> {
        let value = self.u32(name)?;
        if (1..=max).contains(&value) {
            Ok(value)
        } else {
            Err(self.range_error(name, &value, format!("from 1 to {max}")))
        }
    }

    /// A number that is above 0 and finite, as f32 too.
    ///
    /// # Errors
    /// See [`Fields::size`].
    pub fn positive(&self, name: &str) -> Result<f64, ConfigError> {
        let value = self.f64(name)?;
        if value as f32 > 0.0 && (value as f32).is_finite() {
            Ok(value)
        } else {
            Err(self.range_error(name, &value, "a finite number above 0".to_owned()))
        }
    }

    /// The same, or `default` where it is absent.
    ///
    /// # Errors
    /// See [`Fields::size`].
    pub fn positive_or(&self, name: &str, default: f64) -> Result<f64, ConfigError> {
        if self.get(name).is_some() { self.positive(name) } else { Ok(default) }
    }

    /// An error that says what the field must be.
    pub fn range_error(&self, name: &str, value: &impl ToString, range: String) -> ConfigError {
        ConfigError::Range { field: self.path(name), value: value.to_string(), range }
    }

    /// The sizes. Their bounds lie far above any model and far below where a product of two leaves `usize`. Without
    /// `head_dim` a head is the hidden width's share; `null` for the key heads says that each query head has its own.
    ///
    /// # Errors
    /// See [`Fields::size`].
    pub fn dims(&self) -> Result<Dims, ConfigError> {
        let (hidden, heads) =
            (self.size("hidden_size", 1 << 20)?, self.size("num_attention_heads", 1 << 12)?);
        let head_dim = match self.get("head_dim") {
            Some(_) => self.size("head_dim", 1 << 12)?,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let range =
                    format!("a divisor of `hidden_size`, which is {hidden}, where there is no `head_dim`");
                return Err(self.range_error("num_attention_heads", &heads, range));
            }
        };
        let dims = Dims {
            layers: self.layers()?,
            hidden,
            heads,
            kv_heads: match self.written().get("num_key_value_heads") {
                Some(Value::Null) => heads,
                _ => self.size("num_key_value_heads", 1 << 12)?,
            },
            head_dim,
            intermediate: self.size("intermediate_size", 1 << 20)?,
            vocab: self.size("vocab_size", 1 << 24)?,
            norm_eps: self.positive("rms_norm_eps")? as f32,
        };
        if !heads.is_multiple_of(dims.kv_heads) {
            let range = format!("a divisor of `num_attention_heads`, which is {heads}");
            return Err(self.range_error("num_key_value_heads", &dims.kv_heads, range));
        }
        if !head_dim.is_multiple_of(2) {
            let range = "even: rope turns pairs of elements".to_owned();
            return Err(self.range_error("head_dim", &head_dim, range));
        }
        Ok(dims)
    }

    /// `num_hidden_layers`.
    ///
    /// # Errors
    /// See [`Fields::size`].
    pub fn layers(&self) -> Result<u32, ConfigError> {
        self.size("num_hidden_layers", 1 << 12)
    }

    /// Is the head the embedding's matrix? `default` is what the family's configuration has where the field is absent.
    ///
    /// # Errors
    /// See [`Fields::size`].
    pub fn tied(&self, default: bool) -> Result<bool, ConfigError> {
        Ok(self.optional_bool("tie_word_embeddings")?.unwrap_or(default))
    }

    /// The MLP's activation.
    ///
    /// # Errors
    /// It is another one, which is named.
    pub fn activation(&self, name: &str) -> Result<Activation, ConfigError> {
        let gelu = json!("gelu_pytorch_tanh");
        self.only(name, &[json!("silu"), gelu.clone()])?;
        Ok(if self.get(name) == Some(&gelu) { Activation::GeluTanh } else { Activation::Silu })
    }

    /// Which layers have a window, by `layer_types`; `None` where the field is absent.
    ///
    /// # Errors
    /// It has another kind of layer, or not as many as there are layers.
    pub fn windowed_layers(&self, layers: u32) -> Result<Option<Vec<bool>>, ConfigError> {
        let Some(kinds) = self.optional_array("layer_types")? else { return Ok(None) };
        if kinds.len() != layers as usize {
            let range = format!("as many as `num_hidden_layers` says, {layers}");
            return Err(self.range_error("layer_types", &format!("{} entries", kinds.len()), range));
        }
        let windowed = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(ConfigError::Unsupported {
                field: self.path("layer_types"),
                value: excerpt(kind),
                supported: "\"full_attention\" or \"sliding_attention\"".to_owned(),
            }),
        };
        kinds.iter().map(windowed).collect::<Result<_, _>>().map(Some)
    }

    /// Each layer's window: `width` where `layer_types` says so or, without it, where `default` does.
    ///
    /// # Errors
    /// A layer has a window, and `width` is `None`.
    pub fn windows(
        &self,
        layers: u32,
        width: Option<u32>,
        default: impl Fn(u32) -> bool,
    ) -> Result<Vec<Option<u32>>, ConfigError> {
        let windowed = match self.windowed_layers(layers)? {
            Some(windowed) if width.is_none() && windowed.contains(&true) => {
                return Err(ConfigError::Unsupported {
                    field: self.path("layer_types"),
                    value: "\"sliding_attention\"".to_owned(),
                    supported: "\"full_attention\" without a width in `sliding_window`".to_owned(),
                });
            }
            Some(windowed) => windowed,
            None => (0..layers).map(default).collect(),
        };
        Ok(windowed.into_iter().map(|windowed| width.filter(|_| windowed)).collect())
    }

    /// Each layer's window where `use_sliding_window` switches them on, for layers from `max_window_layers` on.
    ///
    /// # Errors
    /// See [`Fields::windows`].
    pub fn switched_windows(&self, layers: u32) -> Result<Vec<Option<u32>>, ConfigError> {
        if !self.optional_bool("use_sliding_window")?.unwrap_or(false) {
            return self.windows(layers, None, |_| false);
        }
        let listed = self.get("layer_types").is_some();
        if self.get("sliding_window").is_none() || !listed && self.get("max_window_layers").is_none() {
            return Err(ConfigError::Unsupported {
                field: self.path("use_sliding_window"),
                value: "true".to_owned(),
                supported: "false without `sliding_window`, and `max_window_layers` or `layer_types`,"
                    .to_owned(),
            });
        }
        let first = if listed { 0 } else { self.u32("max_window_layers")? };
        self.windows(layers, Some(self.size("sliding_window", u32::MAX)?), |layer| layer >= first)
    }

    /// The rotary embedding of whole heads: base and scaling.
    ///
    /// # Errors
    /// A kind of scaling that is not known, or two that contradict each other.
    pub fn rope(&self, head_dim: u32) -> Result<Rope, ConfigError> {
        self.rope_with(head_dim, |rope| self.rope_scaling(rope))
    }

    /// The rotary embedding of the first `rotated` elements of a head; `scaling_of` reads an object that describes one.
    ///
    /// # Errors
    /// Those of `scaling_of`, or two scalings that contradict each other.
    pub fn rope_with(
        &self,
        rotated: u32,
        scaling_of: impl Fn(&Fields<'_>) -> Result<RopeScaling, ConfigError>,
    ) -> Result<Rope, ConfigError> {
        let base = self.rope_base()?;
        let mut scaling = None;
        for name in ["rope_scaling", "rope_parameters"] {
            let Some(rope) = self.object(name)? else { continue };
            let other = scaling_of(&rope)?;
            if scaling.is_some_and(|scaling| scaling != other) {
                let range = "the same as `rope_scaling`".to_owned();
                return Err(self.range_error(name, &"another scaling", range));
            }
            scaling = Some(other);
        }
        Ok(Rope { scaling: scaling.unwrap_or(RopeScaling::Default), ..Rope::plain(base, rotated) })
    }

    /// The base of the wavelengths: `rope_theta` itself, or within `rope_parameters`.
    fn rope_base(&self) -> Result<f64, ConfigError> {
        let outer = self.get("rope_theta").map(|_| self.positive("rope_theta")).transpose()?;
        let inner = match self.object("rope_parameters")? {
            Some(rope) if outer.is_none() || rope.get("rope_theta").is_some() => {
                Some(rope.positive("rope_theta")?)
            }
            _ => None,
        };
        match (outer, inner) {
            (Some(outer), Some(inner)) if outer != inner => {
                let range = format!("the same as `rope_parameters.rope_theta`, which is {inner}");
                Err(self.range_error("rope_theta", &outer, range))
            }
            (outer, inner) => self.required("rope_theta", inner.or(outer)),
        }
    }

    /// The scaling that an object of these fields describes.
    ///
    /// # Errors
    /// See [`Fields::rope`].
    pub fn rope_scaling(&self, rope: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
        rope.only("partial_rotary_factor", &[json!(1), json!(1.0)])?;
        let name = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
        match rope.get(name).map(Value::as_str) {
            None | Some(Some("default")) => Ok(RopeScaling::Default),
            Some(Some("linear")) => Ok(RopeScaling::Linear { factor: rope.positive("factor")? }),
            Some(Some("llama3")) => rope.llama3(),
            Some(Some("yarn")) => self.yarn(rope),
            // It changes sequences alone that are longer than the model's positions, and none is.
            Some(Some("dynamic")) => rope.only("alpha", &[]).map(|()| RopeScaling::Default),
            Some(_) => rope
                .only(name, &["default", "dynamic", "linear", "llama3", "yarn"].map(Value::from))
                .map(|()| RopeScaling::Default),
        }
    }

    fn llama3(&self) -> Result<RopeScaling, ConfigError> {
        let (low, high) = (self.positive("low_freq_factor")?, self.positive("high_freq_factor")?);
        if low >= high {
            let range = format!("below `high_freq_factor`, which is {high}");
            return Err(self.range_error("low_freq_factor", &low, range));
        }
        let original = self.positive("original_max_position_embeddings")?;
        Ok(RopeScaling::Llama3 { factor: self.positive("factor")?, low, high, original })
    }

    /// Without `original_max_position_embeddings`, the model's positions are those of its first training.
    fn yarn(&self, rope: &Fields<'_>) -> Result<RopeScaling, ConfigError> {
        for unknown in ["mscale", "mscale_all_dim"] {
            rope.only(unknown, &[])?;
        }
        let factor = rope.positive("factor")?;
        let original = match rope.get("original_max_position_embeddings") {
            Some(_) => rope.positive("original_max_position_embeddings")?,
            None => self.positive("max_position_embeddings")?,
        };
        if self.rope_base()? <= 1.0 {
            return Err(self.range_error("rope_theta", &self.rope_base()?, "above 1 with YaRN".to_owned()));
        }
        let magnitude = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
        Ok(RopeScaling::Yarn {
            factor,
            original,
            fast: rope.positive_or("beta_fast", 32.0)?,
            slow: rope.positive_or("beta_slow", 1.0)?,
            truncate: rope.optional_bool("truncate")?.unwrap_or(true),
            magnitude: rope.positive_or("attention_factor", magnitude)?,
        })
    }
}
