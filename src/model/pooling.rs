//! How a checkpoint's hidden states become embeddings: what the files of sentence-transformers beside it say.
//!
//! ```text
//!   modules.json          Transformer ──> Pooling ──> Normalize
//!   1_Pooling/config.json                 └── of the last token
//! ```
//!
//! Without `modules.json` it is the last token's hidden state, scaled to length 1. A checkpoint that asks for something else
//! generates all the same; its embeddings are refused, by the name of what is asked for.

use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pooling {
    /// Are embeddings scaled to length 1?
    normalizes: bool,
    /// Why there are none.
    refusal: Option<String>,
}

impl Default for Pooling {
    fn default() -> Self {
        Pooling { normalizes: true, refusal: None }
    }
}

#[derive(Deserialize)]
struct Module {
    r#type: String,
    #[serde(default)]
    path: String,
}

impl Pooling {
    /// What a checkpoint's folder says.
    pub fn open(folder: &Path) -> Self {
        let normalizes = match read::<Vec<Module>>(folder, "modules.json") {
            Ok(None) => return Pooling::default(),
            Ok(Some(modules)) => normalizes(folder, &modules),
            Err(reason) => Err(reason),
        };
        match normalizes {
            Ok(normalizes) => Pooling { normalizes, refusal: None },
            Err(reason) => Pooling { normalizes: false, refusal: Some(reason) },
        }
    }

    /// Why the checkpoint's embeddings can't be made, if so.
    pub fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// An embedding, of the values that were asked for.
    pub fn embedding(&self, values: &[f32]) -> Vec<f32> {
        let squares: f64 = values.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
        match self.normalizes && squares > 0.0 {
            true => values.iter().map(|value| (f64::from(*value) / squares.sqrt()) as f32).collect(),
            false => values.to_vec(),
        }
    }
}

/// Do the modules end by scaling to length 1?
fn normalizes(folder: &Path, modules: &[Module]) -> Result<bool, String> {
    let kind = |module: &Module| module.r#type.rsplit('.').next().unwrap_or_default().to_owned();
    let kinds: Vec<String> = modules.iter().map(kind).collect();
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    let normalizes = match kinds[..] {
        ["Transformer", "Pooling"] => false,
        ["Transformer", "Pooling", "Normalize"] => true,
        _ => {
            return Err(format!(
                "modules.json asks for {}; Transformer, Pooling and then Normalize or nothing are computed",
                kinds.join(", ")
            ));
        }
    };
    let path = Path::new(&modules[1].path);
    if !path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(format!(
            "modules.json has its pooling in {:?}, outside the checkpoint's folder",
            modules[1].path
        ));
    }
    let file = path.join("config.json").display().to_string();
    let config = read(folder, &file)?;
    let config = config
        .ok_or_else(|| format!("{file} is missing, which modules.json names: fetch it with the weights"))?;
    let modes = modes(&config);
    match modes.iter().all(|mode| mode == "lasttoken") && !modes.is_empty() {
        true => Ok(normalizes),
        false => Err(format!("{file} asks for pooling by {modes:?}; \"lasttoken\" alone is computed")),
    }
}

/// The poolings that a configuration switches on, in its older form or its newer one.
fn modes(config: &Map<String, Value>) -> Vec<String> {
    const OLDER: &str = "pooling_mode_";
    let older = config.iter().filter(|(_, value)| **value == Value::Bool(true));
    let older = older.filter_map(|(name, _)| name.strip_prefix(OLDER)).map(str::to_owned);
    let newer = match config.get("pooling_mode") {
        Some(Value::String(mode)) => vec![mode.clone()],
        Some(Value::Array(modes)) => {
            modes.iter().map(|mode| mode.as_str().unwrap_or("?").to_owned()).collect()
        }
        _ => Vec::new(),
    };
    older.chain(newer).collect()
}

/// A file as JSON; `None` where there is none.
fn read<T: DeserializeOwned>(folder: &Path, file: &str) -> Result<Option<T>, String> {
    match fs::read(folder.join(file)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{file} can't be read: {error}")),
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| format!("{file} is not as it must be: {error}")),
    }
}
