//! What a model's name stands for.
//!
//! ```text
//!   tiny, qwen3-0.6b, …   a preset: dummy weights of that size
//!   ./model  ~/model/     a folder that is there
//!   OWNER/NAME            else a repository of the Hugging Face hub: fetched into its cache, then a folder
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::models::preset_names;
use crate::progress::Stderr;

/// A model that has been found, its files at hand.
#[derive(Clone, Debug)]
pub struct ModelSource {
    name: String,
    folder: Option<PathBuf>,
    commit: Option<String>,
}

impl ModelSource {
    /// Finds what `name` stands for. A repository's files are fetched as far as the cache lacks them, `revision` saying
    /// which (a branch, a tag, a commit; `None`: `main`), and what happens is said on `stderr`, where there is one.
    ///
    /// # Errors
    /// A name that stands for nothing, a revision of what has none, or files that can't be fetched.
    pub fn find(name: &str, revision: Option<&str>, stderr: Option<&Stderr>) -> Result<ModelSource, Error> {
        let path = expand(name);
        let is_preset = preset_names().any(|preset| preset == name);
        // A link that leads nowhere is there, and will be told from a folder when it is opened.
        if !is_preset && fs::symlink_metadata(&path).is_err() {
            return fetched(name, revision, stderr);
        }
        if let Some(revision) = revision {
            return Err(Error::Revision { name: name.to_owned(), revision: revision.to_owned() });
        }
        Ok(ModelSource { name: name.to_owned(), folder: (!is_preset).then_some(path), commit: None })
    }

    /// As it was asked for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its files are; a preset has none.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The commit of a repository.
    pub fn commit(&self) -> Option<&str> {
        self.commit.as_deref()
    }

    /// What the user should hear: the weights are none, and a directory of the name may be what was meant.
    pub fn warning(&self) -> Option<String> {
        let ModelSource { name, folder, .. } = self;
        (folder.is_none() && Path::new(name).is_dir()).then(|| {
            format!("{name} is a preset, with dummy weights; the directory of that name is ./{name}")
        })
    }
}

/// `~` at the beginning is the user's folder: a shell leaves it alone in `--model=~/model`.
fn expand(name: &str) -> PathBuf {
    let path = PathBuf::from(name);
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

fn unknown(name: &str) -> Error {
    Error::NoModel { name: name.to_owned(), presets: preset_names().collect::<Vec<_>>().join(", ") }
}

/// A repository of the hub.
#[cfg(feature = "hub")]
fn fetched(name: &str, revision: Option<&str>, stderr: Option<&Stderr>) -> Result<ModelSource, Error> {
    use minisgl_hub::{Hub, RepoName, Settings};

    let repository: RepoName = name.parse().map_err(|_| unknown(name))?;
    let hub = Hub::new(Settings::from_env().map_err(Error::hub)?);
    let mut display = crate::download::Display::new(stderr);
    let snapshot = hub.snapshot(&repository, revision.unwrap_or("main"), &mut |event| display.hear(&event));
    let snapshot = snapshot.map_err(Error::hub)?;
    Ok(ModelSource { name: name.to_owned(), folder: Some(snapshot.folder), commit: Some(snapshot.commit) })
}

/// Built without the hub, the library knows folders and presets.
#[cfg(not(feature = "hub"))]
fn fetched(name: &str, _: Option<&str>, _: Option<&Stderr>) -> Result<ModelSource, Error> {
    Err(unknown(name))
}
