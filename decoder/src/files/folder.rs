//! A checkpoint's folder: the configuration in it, and links that lead nowhere, which are named before anything else is read.

use std::fs;
use std::io;
use std::path::Path;

use crate::config::{Config, parse};
use crate::error::{CheckpointError, ConfigError};
use crate::family::Family;
use crate::fields::excerpt;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
/// What ModelOpt writes of quantized weights, of which older checkpoints' `config.json` is silent.
const QUANTIZED: &str = "hf_quant_config.json";

const ADAPTER: &str =
    "is an adapter's: merge it into the model that it was trained on, and give the directory of the result";
const MAKERS: &str = "is of its makers' own layout; take the files of Hugging Face's (config.json, model*.safetensors), which most \
                      such models are published in too";
/// How files begin that belong to no checkpoint in Hugging Face's layout, and what they are.
const OTHERS: [(&str, &str); 4] = [
    ("adapter_config.json", ADAPTER),
    ("adapter_model", ADAPTER),
    ("params.json", MAKERS),
    ("consolidated", MAKERS),
];

/// Reads the configuration of a checkpoint's directory, and says of which family it is.
pub(crate) fn read_config<'a>(
    dir: &Path,
    families: &[&'a Family],
) -> Result<(Config, &'a Family), CheckpointError> {
    let read = |file: &'static str| match fs::read(dir.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(reason) => Err(CheckpointError::Unreadable { path: dir.join(file), reason }),
    };
    let in_file = |file: &str, reason| CheckpointError::Config { path: dir.join(file), reason };
    let Some(text) = read(CONFIG)? else { return Err(without(dir, &file_names(dir)?, CONFIG)) };
    let (config, family) = Config::from_json(&text, families).map_err(|reason| in_file(CONFIG, reason))?;
    if let (None, Some(text)) = (config.quantization, read(QUANTIZED)?) {
        let value = parse(&text).map_err(|reason| in_file(QUANTIZED, reason))?;
        let (field, value) = ("quantization".to_owned(), excerpt(&value["quantization"]));
        return Err(in_file(QUANTIZED, ConfigError::Quantized { field, value }));
    }
    match read(GENERATION_CONFIG)? {
        Some(text) => config
            .with_generation_config(&text)
            .map(|config| (config, family))
            .map_err(|reason| in_file(GENERATION_CONFIG, reason)),
        None => Ok((config, family)),
    }
}

/// Why a directory of these files lacks one: by what they are in place of it, if that can be told.
pub(crate) fn without(dir: &Path, files: &[String], missing: &'static str) -> CheckpointError {
    let dir = dir.to_owned();
    // Beside safetensors they are what training left.
    let is_safetensors = |name: &String| name.ends_with(".safetensors");
    let is_other_format = |name: &&String| {
        [".bin", ".pth", ".pt", ".gguf"].iter().any(|end| name.ends_with(end))
            && !files.iter().any(is_safetensors)
    };
    if let Some((file, what)) = files.iter().find_map(|file| Some((file, other_layout(file)?))) {
        return CheckpointError::OtherLayout { dir, file: file.clone(), what };
    }
    match files.iter().find(is_other_format) {
        Some(file) => CheckpointError::OtherFormat { dir, file: file.clone() },
        None => CheckpointError::NoFile { dir, file: missing },
    }
}

/// What a file is that belongs to no checkpoint in Hugging Face's layout, and what to do.
pub(crate) fn other_layout(file: &str) -> Option<&'static str> {
    OTHERS.iter().find(|(start, _)| file.starts_with(start)).map(|(_, what)| *what)
}

/// Refuses links that lead nowhere among the files that a checkpoint is made of; others are nobody's business.
pub(crate) fn check_links(dir: &Path) -> Result<(), CheckpointError> {
    for name in file_names(dir)? {
        if [".json", ".safetensors", ".jinja"].iter().any(|end| name.ends_with(end)) {
            check_link(&dir.join(name))?;
        }
    }
    Ok(())
}

pub(crate) fn check_link(path: &Path) -> Result<(), CheckpointError> {
    match fs::read_link(path) {
        Ok(target) if !path.exists() => Err(CheckpointError::DanglingLink { path: path.to_owned(), target }),
        _ => Ok(()),
    }
}

/// Names of the directory's entries, in order; those that are no text are nobody's checkpoint.
pub(crate) fn file_names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let unreadable = |reason| CheckpointError::Unreadable { path: dir.to_owned(), reason };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        names.extend(entry.map_err(unreadable)?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}
