//! Where a benchmark's requests come from: drawn at random, or a file's.
//!
//! ```text
//!   drawn        lengths and token ids as `offline-bench` draws them
//!   [ …          ShareGPT JSON: the first turn is the prompt, and as many tokens are drawn as the answer to it has
//!   {"timestamp" …   lines of a trace (trace.rs)
//! ```

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use minisgl::Cause;
use minisgl::bench::sharegpt::{self, Exchange};
use minisgl::workload::Workload;
use thiserror::Error;

use super::prompt::{Prompt, Request};
use super::trace::{self, BadTrace};

/// Bytes of a file at most: it is held in memory.
const FILE_BYTES_MAX: u64 = 4 << 30;

/// Where requests come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Random ones, others in every run: a service that keeps what it has computed would know them.
    Drawn(Workload),
    /// A file's, the same in every run.
    File(Vec<Request>),
}

/// Why a file's requests can't be taken.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The file.
    #[error("{} can't be read: {cause}; check --requests", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// More than is held in memory.
    #[error("{} is larger than {FILE_BYTES_MAX} bytes; give its beginning alone", .0.display())]
    TooLarge(PathBuf),
    /// A line of a trace.
    #[error(
        "{}: {bad}; a file of requests is ShareGPT JSON ([{{\"conversations\": …}}, …]) or a trace \
         ({{\"timestamp\", \"input_length\", \"output_length\", \"hash_ids\"}} in each line)", path.display()
    )]
    Trace {
        /// Which file.
        path: PathBuf,
        /// Which line, and why.
        bad: BadTrace,
    },
    /// JSON that is no list of conversations.
    #[error("{} is no ShareGPT JSON ([{{\"conversations\": [{{\"value\": …}}, …]}}, …]): {cause}", path.display())]
    Conversations {
        /// Which file.
        path: PathBuf,
        /// What the parser says.
        cause: serde_json::Error,
    },
    /// An answer whose tokens can't be counted.
    #[error("the tokens of conversation {number} of {} can't be counted: {cause}", path.display())]
    Count {
        /// Which file.
        path: PathBuf,
        /// From 1, of those with an answer.
        number: usize,
        /// Why.
        cause: Cause,
    },
    /// Nothing to run.
    #[error("{} has no requests", .0.display())]
    Empty(PathBuf),
}

impl Source {
    /// The first `most` requests of a file; `count` counts the tokens of a text.
    ///
    /// # Errors
    /// The file can't be read, or has what is no request.
    pub fn open(
        path: &Path,
        most: usize,
        count: &mut dyn FnMut(&str) -> Result<u64, Cause>,
    ) -> Result<Self, SourceError> {
        let unreadable = |cause| SourceError::Read { path: path.to_owned(), cause };
        let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
        let requests = match sharegpt::is_array(&mut file).map_err(unreadable)? {
            true => conversations(file, path, most, count)?,
            false => {
                let mut bytes = Vec::new();
                file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
                if bytes.len() as u64 > FILE_BYTES_MAX {
                    return Err(SourceError::TooLarge(path.to_owned()));
                }
                let read = trace::read(bytes.split(|byte| *byte == b'\n'), most);
                read.map_err(|bad| SourceError::Trace { path: path.to_owned(), bad })?
            }
        };
        match requests.is_empty() {
            true => Err(SourceError::Empty(path.to_owned())),
            false => Ok(Source::File(requests)),
        }
    }

    /// The requests of a run.
    pub fn requests(&self, run: u64) -> Vec<Request> {
        match self {
            Source::File(requests) => requests.clone(),
            Source::Drawn(workload) => {
                let workload = Workload { seed: workload.seed.wrapping_add(run), ..workload.clone() };
                let items = workload.draw(u32::MAX).into_iter();
                let request = |item: minisgl::workload::Item| Request {
                    at: None,
                    prompt: Prompt::Tokens(item.prompt),
                    output_tokens: item.output_tokens,
                };
                items.map(request).collect()
            }
        }
    }

    /// Do its requests say when they are due?
    pub fn is_timed(&self) -> bool {
        matches!(self, Source::File(requests) if requests.iter().all(|request| request.at.is_some()))
    }
}

fn conversations(
    file: impl Read,
    path: &Path,
    most: usize,
    count: &mut dyn FnMut(&str) -> Result<u64, Cause>,
) -> Result<Vec<Request>, SourceError> {
    let exchanges = sharegpt::read(file, most)
        .map_err(|cause| SourceError::Conversations { path: path.to_owned(), cause })?;
    let request = |(i, Exchange { prompt, answer }): (usize, Exchange)| {
        let tokens = count(&answer).map_err(|cause| SourceError::Count {
            path: path.to_owned(),
            number: i + 1,
            cause,
        })?;
        let output_tokens = u32::try_from(tokens.max(1)).unwrap_or(u32::MAX);
        Ok(Request { at: None, prompt: Prompt::Text(prompt), output_tokens })
    };
    exchanges.into_iter().enumerate().map(request).collect()
}
