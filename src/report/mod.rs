//! What a program leaves behind for people and for machines: a page that opens anywhere, and the same numbers as JSON.
//!
//! ```text
//!   anything Serialize, with Setup and `runs` of RunRecords in it ──┬──> FILE.html: one file, no network
//!                                                                    └──> FILE.json
//! ```
//!
//! Files are known to be writable before anything runs: hours of work are not lost to a mistyped path.

mod json;
mod page;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use thiserror::Error;

pub use json::write_json;
pub use page::write_page;

use crate::info::Info;

/// What ran on what: the head of every report.
#[derive(Clone, Debug, Serialize)]
pub struct Setup {
    /// Which program.
    pub program: &'static str,
    /// Of minisgl.
    pub version: &'static str,
    /// The command line.
    pub command: Vec<String>,
    /// When the report was made, in seconds since 1970.
    pub unix_time: u64,
    /// Checkpoint directory or preset.
    pub model: String,
    /// `cpu` or `cuda`.
    pub backend: &'static str,
    /// The device's name.
    pub device: String,
    /// The capacities it ran with.
    pub engine: EngineReport,
}

/// Capacities of the engine, and how long it took to get ready.
#[derive(Clone, Debug, Serialize)]
pub struct EngineReport {
    /// Requests at once.
    pub max_running: u32,
    /// Tokens of a sequence.
    pub max_seq_len: u32,
    /// Tokens of a prefill step.
    pub max_prefill_tokens: u32,
    /// Tokens of a KV page.
    pub page_size: u32,
    /// What keys and values are kept as.
    pub kv_dtype: String,
    /// KV pages.
    pub num_pages: u32,
    /// Rows of the largest recorded decode step.
    pub max_graph_batch: u32,
    /// Bytes of device memory free before the decode steps were recorded.
    pub memory_free_before_recording: u64,
    /// Bytes of device memory free after that.
    pub memory_free_ready: u64,
    /// Seconds to open the device and load the weights.
    pub load_seconds: f64,
    /// Seconds to allocate everything else and record the decode steps.
    pub capture_seconds: f64,
}

impl Setup {
    /// Of an engine that `program` has built, as of now.
    pub fn new(program: &'static str, info: &Info) -> Self {
        Setup {
            program,
            version: env!("CARGO_PKG_VERSION"),
            command: std::env::args().collect(),
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            model: info.model.clone(),
            backend: info.backend,
            device: info.device.clone(),
            engine: EngineReport::new(info),
        }
    }
}

impl EngineReport {
    /// As the engine says of itself.
    pub fn new(info: &Info) -> Self {
        EngineReport {
            max_running: info.limits.running,
            max_seq_len: info.limits.sequence,
            max_prefill_tokens: info.limits.prefill_tokens,
            page_size: info.limits.page_size,
            kv_dtype: info.kv.to_string(),
            num_pages: info.limits.pages,
            max_graph_batch: info.limits.graph_rows,
            memory_free_before_recording: info.memory_free_before_recording,
            memory_free_ready: info.memory_free_ready,
            load_seconds: info.load_seconds,
            capture_seconds: info.capture_seconds,
        }
    }
}

/// A result that can't be written.
#[derive(Debug, Error)]
#[error("{} can't be written: {source}", path.display())]
pub struct OutputError {
    /// Where to.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// A file for results, known to be writable before anything runs, and left as it is until there are some: a run that ends early
/// takes nothing from an earlier one, and leaves no empty file.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    /// What was there: a file, or what can't be opened twice, a pipe.
    there: Option<File>,
}

impl Output {
    /// Opens what is there, or makes sure that a file can be created.
    ///
    /// # Errors
    /// It can't be written, or created.
    pub fn create(path: &Path) -> Result<Self, OutputError> {
        let failed = |source| OutputError { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.write(true);
        let there = match options.clone().create_new(true).open(path) {
            Ok(_) => {
                fs::remove_file(path).map_err(failed)?;
                None
            }
            // A link to nowhere is there, too.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Some(options.create(true).truncate(false).open(path).map_err(failed)?)
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Output { path: path.to_owned(), there })
    }

    /// Writes its content, in place of what was there.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(
        self,
        content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> Result<(), OutputError> {
        let Output { path, there } = self;
        let open = || {
            let file = there.map_or_else(|| File::create(&path), Ok)?;
            if file.metadata()?.is_file() {
                file.set_len(0)?;
            }
            Ok(file)
        };
        let written = open().and_then(|file| {
            let mut file = BufWriter::new(file);
            content(&mut file)?;
            file.flush()
        });
        written.map_err(|source| OutputError { path, source })
    }
}
