//! A checkpoint's folder: the configuration in it, and links that lead nowhere, which are named before anything else is read.

use std::fs;
use std::io;
use std::path::Path;

use crate::config::Config;
use crate::error::CheckpointError;
use crate::family::Family;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

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
    let text = read(CONFIG)?.ok_or(CheckpointError::NoFile { dir: dir.to_owned(), file: CONFIG })?;
    let (config, family) = Config::from_json(&text, families).map_err(|reason| in_file(CONFIG, reason))?;
    match read(GENERATION_CONFIG)? {
        Some(text) => config
            .with_generation_config(&text)
            .map(|config| (config, family))
            .map_err(|reason| in_file(GENERATION_CONFIG, reason)),
        None => Ok((config, family)),
    }
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
