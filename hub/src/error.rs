//! Why a repository can't be had: each error says what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::authorities::BadAuthorities;

/// See the module.
#[derive(Debug, Error)]
pub enum HubError {
    /// Not a name.
    #[error("`{0}` is no model's name on the hub; give OWNER/NAME, for example Qwen/Qwen3-0.6B")]
    Name(String),
    /// Nowhere to put the cache.
    #[error("there is no home directory to keep models in; set HF_HOME to a folder")]
    NoHome,
    /// No such repository, or none that the one who asks may see.
    #[error(
        "{endpoint} has no model {name} that may be seen; check the name, and if it is private set HF_TOKEN to a token \
         that may read it"
    )]
    NoRepository {
        /// The hub.
        endpoint: String,
        /// The repository.
        name: String,
    },
    /// A repository whose terms must be accepted first.
    #[error(
        "access to {name} is restricted: accept its terms at {endpoint}/{name} and set HF_TOKEN to a token of that account"
    )]
    Gated {
        /// The hub.
        endpoint: String,
        /// The repository.
        name: String,
    },
    /// The token is not valid.
    #[error("{endpoint} refuses the token; set HF_TOKEN to a valid one, or unset it for public models")]
    Token {
        /// The hub.
        endpoint: String,
    },
    /// No such branch, tag or commit.
    #[error("{name} has no revision `{revision}`; give a branch, a tag or a full commit (--revision)")]
    NoRevision {
        /// The repository.
        name: String,
        /// As asked for.
        revision: String,
    },
    /// A repository that lacks what a model is made of.
    #[error("{name} has no {file}, so it is no model that can be opened; check the name")]
    NoFile {
        /// The repository.
        name: String,
        /// What is missing.
        file: String,
    },
    /// Weights in another format alone.
    #[error(
        "{name} has its weights in {file} and not as safetensors, the only format that is read; look for a repository or \
         a revision that has them"
    )]
    NoSafetensors {
        /// The repository.
        name: String,
        /// A file of weights.
        file: String,
    },
    /// Files of something else than a model in the hub's usual layout.
    #[error("{name} has {file}, which {what}")]
    OtherLayout {
        /// The repository.
        name: String,
        /// The file that shows it.
        file: String,
        /// What it is, and what to do.
        what: &'static str,
    },
    /// Nobody may be asked.
    #[error(
        "{name} at revision `{revision}` is not whole in {}, and HF_HUB_OFFLINE forbids to ask the hub; unset it, or give \
         the directory of a checkpoint", cache.display()
    )]
    NotCached {
        /// The repository.
        name: String,
        /// As asked for.
        revision: String,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// No network, no hub there, or none that answers.
    #[error(
        "{endpoint} can't be reached: {reason}; check the network and HF_ENDPOINT, or give the directory of a checkpoint"
    )]
    Unreachable {
        /// The hub.
        endpoint: String,
        /// What the network says.
        reason: String,
    },
    /// Nobody's certificate can be trusted.
    #[error("the hub can't be asked: {0}")]
    Authorities(#[from] BadAuthorities),
    /// It asks to be left alone for a while.
    #[error("{url} answers {status}, {attempts} times in a row{}; try again later", after(.wait))]
    Busy {
        /// What was asked for.
        url: String,
        /// 429 or 5xx.
        status: u16,
        /// How often.
        attempts: u32,
        /// How long it asks to wait.
        wait: Option<Duration>,
    },
    /// An answer that nobody expects.
    #[error("{url} answers {reason}; is HF_ENDPOINT the address of a hub?")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A download that breaks off again and again.
    #[error(
        "the download of {file} broke off at byte {at}, {attempts} times in a row: {reason}; run again to go on there"
    )]
    Broken {
        /// The file.
        file: String,
        /// How many bytes are there.
        at: u64,
        /// How often.
        attempts: u32,
        /// What the network says.
        reason: String,
    },
    /// No space left.
    #[error(
        "the disk of {} is full: {file} needs {missing} more bytes; free them, or set HF_HOME to a folder on another disk. \
         What has come is kept", cache.display()
    )]
    DiskFull {
        /// The cache.
        cache: PathBuf,
        /// The file.
        file: String,
        /// Bytes of it that are still to come.
        missing: u64,
    },
    /// A cache that can't be used.
    #[error("{}: {reason}; set HF_HOME to a folder that may be written", path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system says.
        reason: io::Error,
    },
}

fn after(wait: &Option<Duration>) -> String {
    wait.map_or_else(String::new, |wait| format!(", and asks to wait {} s", wait.as_secs()))
}
