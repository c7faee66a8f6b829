//! How a model's makers would have tokens drawn: the sampling fields of its `generation_config.json`.
//!
//! ```text
//!   ours ── generation_config.json, where `do_sample` is true ── flags ── a request's own fields      the last one counts
//! ```
//!
//! A checkpoint that does not ask for sampling is drawn from greedily, as transformers does.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::str::FromStr;

use serde_json::Value;

use crate::error::Error;
use crate::progress::Stderr;
use crate::request::SamplingParams;
use crate::source::ModelSource;

const FILE: &str = "generation_config.json";

/// Fields that would change what is drawn and have no counterpart here, with the value at which they do nothing.
const WITHOUT_COUNTERPART: [(&str, f64); 4] =
    [("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0.0), ("typical_p", 1.0), ("num_beams", 1.0)];

/// Where sampling comes from that no flag and no request gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenerationConfigChoice {
    /// The checkpoint, where it asks for sampling.
    #[default]
    Auto,
    /// Our own defaults.
    None,
}

impl FromStr for GenerationConfigChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(GenerationConfigChoice::Auto),
            "none" => Ok(GenerationConfigChoice::None),
            _ => Err(format!("{text} is neither auto (the checkpoint's generation_config.json) nor none")),
        }
    }
}

impl GenerationConfigChoice {
    /// What `own` becomes by the model's file, which is said where it changes anything.
    ///
    /// # Errors
    /// As [`ModelSource::generation_config`].
    pub fn sampling(
        self,
        source: &ModelSource,
        own: SamplingParams,
        stderr: &Stderr,
    ) -> Result<SamplingParams, Error> {
        let config = match self {
            GenerationConfigChoice::Auto => source.generation_config()?,
            GenerationConfigChoice::None => None,
        };
        Ok(config.map_or(own, |config| {
            stderr.say(format!(
                "sampling as the checkpoint's {FILE} asks for: {config}; flags and lines come first, --generation-config none \
                 leaves it aside"
            ));
            config.apply(own)
        }))
    }
}

impl ModelSource {
    /// How the model's makers would have tokens drawn; `None` where they say nothing.
    ///
    /// # Errors
    /// A `generation_config.json` that can't be read.
    pub fn generation_config(&self) -> Result<Option<GenerationConfig>, Error> {
        self.folder().map_or(Ok(None), GenerationConfig::open)
    }
}

/// Sampling that a checkpoint recommends.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    not_applied: Vec<String>,
}

impl GenerationConfig {
    /// Reads a checkpoint's file; `None` where there is none, or where it does not ask for sampling.
    ///
    /// # Errors
    /// A file that can't be read, or a field in it that is no number in its range.
    pub fn open(folder: &Path) -> Result<Option<Self>, Error> {
        let path = folder.join(FILE);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|error| error.to_string()),
        };
        let config = text.and_then(|text| Self::read(&text));
        config.map_err(|reason| Error::GenerationConfig { path, reason })
    }

    fn read(text: &[u8]) -> Result<Option<Self>, String> {
        let fields: Value =
            serde_json::from_slice(text).map_err(|error| format!("not valid JSON: {error}"))?;
        if fields.get("do_sample") != Some(&Value::Bool(true)) {
            return Ok(None);
        }
        let number = |name: &str, absent: f64| match fields.get(name) {
            None | Some(Value::Null) => Ok(absent),
            Some(value) => {
                value.as_f64().ok_or_else(|| format!("the field `{name}` must be a number, but is {value}"))
            }
        };
        let top_k = number("top_k", 0.0)?;
        let mut config = GenerationConfig {
            temperature: number("temperature", 1.0)? as f32,
            // 0 and -1 keep all, as 0 does here.
            top_k: top_k.max(0.0) as u32,
            top_p: number("top_p", 1.0)? as f32,
            min_p: number("min_p", 0.0)? as f32,
            not_applied: Vec::new(),
        };
        if top_k.fract() != 0.0 {
            return Err(format!("the field `top_k` must be a whole number, but is {top_k}"));
        }
        config.apply(SamplingParams::default()).check().map_err(|error| error.to_string())?;
        for (name, neutral) in WITHOUT_COUNTERPART {
            let value = number(name, neutral)?;
            if value != neutral {
                config.not_applied.push(format!("{name} {value}"));
            }
        }
        Ok(Some(config))
    }

    /// Puts what it recommends into `default`.
    pub fn apply(&self, default: SamplingParams) -> SamplingParams {
        let GenerationConfig { temperature, top_k, top_p, min_p, .. } = *self;
        SamplingParams { temperature, top_k, top_p, min_p, ..default }
    }
}

/// What it recommends, and what of it can't be followed.
impl fmt::Display for GenerationConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "temperature {}", self.temperature)?;
        let filters =
            [("top_k", self.top_k as f32, 0.0), ("top_p", self.top_p, 1.0), ("min_p", self.min_p, 0.0)];
        for (name, value, _) in filters.into_iter().filter(|(_, value, neutral)| value != neutral) {
            write!(f, ", {name} {value}")?;
        }
        match self.not_applied.as_slice() {
            [] => Ok(()),
            fields => write!(f, "; without its {}", fields.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_checkpoint_recommends_is_taken_where_it_asks_for_sampling() {
        let read = |text: &str| GenerationConfig::read(text.as_bytes()).unwrap();
        let qwen3 = read(
            r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1]}"#,
        )
        .unwrap();
        assert_eq!(qwen3.to_string(), "temperature 0.6, top_k 20, top_p 0.95");
        let sampling = qwen3.apply(SamplingParams { max_tokens: 7, ..SamplingParams::default() });
        assert_eq!(
            (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens),
            (0.6, 20, 0.95, 7)
        );
        for none in [r#"{"do_sample": false, "temperature": 0.6}"#, r#"{"temperature": 0.6}"#, "{}"] {
            assert_eq!(read(none), None, "{none}");
        }
        let plain =
            read(r#"{"do_sample": true, "top_k": -1, "min_p": null, "repetition_penalty": 1.0}"#).unwrap();
        assert_eq!(plain.to_string(), "temperature 1");
        let penalty = read(r#"{"do_sample": true, "top_k": 50.0, "repetition_penalty": 1.05}"#).unwrap();
        assert_eq!(penalty.to_string(), "temperature 1, top_k 50; without its repetition_penalty 1.05");
    }

    #[test]
    fn a_field_that_is_no_number_in_its_range_is_named() {
        for (field, text) in [
            ("temperature", r#"{"do_sample": true, "temperature": "hot"}"#),
            ("temperature", r#"{"do_sample": true, "temperature": -1}"#),
            ("top_k", r#"{"do_sample": true, "top_k": 2.5}"#),
            ("top_p", r#"{"do_sample": true, "top_p": 0}"#),
            ("JSON", "{"),
        ] {
            let error = GenerationConfig::read(text.as_bytes()).unwrap_err();
            assert!(error.contains(field), "{text}: {error}");
        }
    }
}
