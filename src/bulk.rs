//! Bulk generation: a file of requests in, a file of results out, neither held in memory.
//!
//! ```text
//!   input ── line by line ──> session ── as each request ends ──> output, one whole line a write
//!                 │                                                 ^
//!                 └── not a request, or its id was used ── error line ┘
//! ```
//!
//! Of the input only a 16-byte fingerprint of each id is kept, to tell ids that were used before: in this file, or with
//! `resume` in the output that an earlier run left. A last line that it left torn is cut off.
//!
//! Invariant: the output consists of whole lines, whenever the process ends.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;
use thiserror::Error;

use crate::Llm;
use crate::front::{EngineHandle, SessionEvent, SessionOptions, Submitter};
use crate::lines::{self, Defaults, Header, Origin, RequestLine};
use crate::request::Completion;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Job {
    /// Request lines; see [`lines`].
    pub input: PathBuf,
    /// Result lines, in the order in which requests end.
    pub output: PathBuf,
    /// Keep what the output has and skip its ids; else it is written anew.
    pub resume: bool,
    /// What lines leave out.
    pub defaults: Defaults,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that ran to their end.
    pub finished: u64,
    /// Lines with an error.
    pub failed: u64,
    /// Requests that the output had already.
    pub skipped: u64,
    /// Tokens drawn.
    pub output_tokens: u64,
}

/// Why a job could not go on.
#[derive(Debug, Error)]
pub enum BulkError {
    /// The input.
    #[error("the input {} can't be read: {cause}; check --input", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The output.
    #[error("the output {} can't be written: {cause}; check that its directory exists and is writable", path.display())]
    Output {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// Writing would destroy the requests.
    #[error("the input and the output are the same file, {}; write the results elsewhere", .0.display())]
    SameFile(PathBuf),
    /// Something else than results is in the way.
    #[error(
        "line {line} of {} is no result line, so --resume can't go on from it; give another --output, or leave out \
         --resume to write it anew", path.display()
    )]
    NotResults {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: u64,
    },
    /// The engine.
    #[error("{0}; the results so far are in the output: run again with --resume")]
    Engine(#[from] crate::Error),
}

/// A job's files, opened: what can be wrong with them shows before a model is loaded.
pub struct Bulk {
    job: Job,
    input: BufReader<File>,
    line: u64,
    output: File,
    /// Where the output goes on: behind the whole lines that are kept.
    end: u64,
    /// Ids that the output has from an earlier run.
    done: HashSet<Fingerprint>,
    seen: HashSet<Fingerprint>,
    /// By line.
    running: HashMap<u64, (Header, Origin)>,
    tally: Tally,
}

impl Bulk {
    /// Opens the files.
    ///
    /// # Errors
    /// An input that can't be read, an output that can't be written or gone on from.
    pub fn open(job: Job) -> Result<Self, BulkError> {
        let input = open_input(&job.input)?;
        if let (Ok(a), Ok(b)) = (job.input.canonicalize(), job.output.canonicalize())
            && a == b
        {
            return Err(BulkError::SameFile(job.output));
        }
        let (output, done, end) = open_output(&job)?;
        Ok(Bulk {
            job,
            input: BufReader::new(input),
            line: 0,
            output,
            end,
            done,
            seen: HashSet::new(),
            running: HashMap::new(),
            tally: Tally::default(),
        })
    }

    /// Runs every request.
    ///
    /// # Errors
    /// A failed step or file; what had ended by then is in the output.
    pub fn run(mut self, llm: &mut Llm) -> Result<Tally, BulkError> {
        // Not before the model is there: until now the output is as it was.
        let cut = self.output.set_len(self.end).and_then(|()| self.output.seek(SeekFrom::Start(self.end)));
        cut.map_err(|cause| BulkError::Output { path: self.job.output.clone(), cause })?;
        let engine = llm.handle();
        let (submitter, mut events) = engine.session(SessionOptions::default());
        let mut submitter = Some(submitter);
        let mut refused = Ok(());
        loop {
            if let Some(open) = &mut submitter {
                let more = match self.fill(open) {
                    Ok(more) => more,
                    // What ended before the engine did is still to come.
                    Err(BulkError::Engine(error)) => {
                        refused = Err(error);
                        false
                    }
                    Err(error) => return Err(error),
                };
                if !more {
                    submitter = None;
                }
            }
            match events.next().transpose()? {
                Some(SessionEvent::Finished { tag, completion, .. }) => {
                    self.write_completion(tag, &completion, &engine)?
                }
                Some(_) => {}
                None => {
                    refused?;
                    return Ok(self.tally);
                }
            }
        }
    }

    /// Submits lines while there is room for them; false when the input has ended.
    fn fill(&mut self, submitter: &mut Submitter) -> Result<bool, BulkError> {
        let mut line = Vec::new();
        while submitter.room() > 0 {
            line.clear();
            let read = self.input.read_until(b'\n', &mut line);
            let read = read.map_err(|cause| BulkError::Input { path: self.job.input.clone(), cause })?;
            if read == 0 {
                return Ok(false);
            }
            self.line += 1;
            if !lines::is_blank(&line) {
                self.submit(&line, submitter)?;
            }
        }
        Ok(true)
    }

    fn submit(&mut self, line: &[u8], submitter: &mut Submitter) -> Result<(), BulkError> {
        let origin = Origin { line: self.line, fingerprint: fingerprint(line)[0] };
        let mut out = Vec::new();
        match lines::parse(line, self.line, &self.job.defaults) {
            Err(bad) => lines::write_bad(&mut out, &bad, origin),
            Ok(RequestLine { header, request }) => {
                let fingerprint = fingerprint(header.id().as_bytes());
                if self.seen.insert(fingerprint) {
                    if self.done.contains(&fingerprint) {
                        self.tally.skipped += 1;
                    } else {
                        self.running.insert(self.line, (header, origin));
                        submitter.submit(self.line, request)?;
                    }
                    return Ok(());
                }
                let reason = "the id was used on a line before; ids must differ";
                lines::write_failure(&mut out, &header, origin, reason);
            }
        }
        self.tally.failed += 1;
        self.write(&out)
    }

    fn write_completion(
        &mut self,
        line: u64,
        completion: &Completion,
        engine: &EngineHandle,
    ) -> Result<(), BulkError> {
        let Some((header, origin)) = self.running.remove(&line) else { return Ok(()) };
        match completion.error {
            None => self.tally.finished += 1,
            Some(_) => self.tally.failed += 1,
        }
        self.tally.output_tokens += completion.token_ids.len() as u64;
        let mut out = Vec::new();
        lines::write_result(&mut out, &header, origin, completion, &|id| engine.token_bytes(id));
        self.write(&out)
    }

    /// A line goes out in one write, unbuffered, so that none is ever cut short by an end of the process.
    fn write(&mut self, line: &[u8]) -> Result<(), BulkError> {
        let written = self.output.write_all(line);
        written.map_err(|cause| BulkError::Output { path: self.job.output.clone(), cause })
    }
}

fn open_input(path: &Path) -> Result<File, BulkError> {
    let is_file = |file: File| match file.metadata()?.is_dir() {
        true => Err(io::Error::from(io::ErrorKind::IsADirectory)),
        false => Ok(file),
    };
    File::open(path).and_then(is_file).map_err(|cause| BulkError::Input { path: path.to_owned(), cause })
}

/// The output, the ids in it that are kept, and where it goes on.
fn open_output(job: &Job) -> Result<(File, HashSet<Fingerprint>, u64), BulkError> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    let failed = |cause| BulkError::Output { path: job.output.clone(), cause };
    let file = options.open(&job.output).map_err(failed)?;
    let (done, end) = if job.resume { read_results(&file, &job.output)? } else { (HashSet::new(), 0) };
    Ok((file, done, end))
}

/// The ids of an earlier run's results, and where its last whole line ends.
fn read_results(file: &File, path: &Path) -> Result<(HashSet<Fingerprint>, u64), BulkError> {
    #[derive(Deserialize)]
    struct Id {
        id: Box<RawValue>,
        custom_id: Option<Box<RawValue>>,
    }
    let mut reader = BufReader::new(file);
    let (mut done, mut end, mut line) = (HashSet::new(), 0, Vec::new());
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line);
        let read = read.map_err(|cause| BulkError::Output { path: path.to_owned(), cause })?;
        if !line.ends_with(b"\n") {
            break; // The end, or a line torn by the end of the process.
        }
        let not_results = |_| BulkError::NotResults { path: path.to_owned(), line: number };
        let Id { id, custom_id } = serde_json::from_slice(&line).map_err(not_results)?;
        let id = custom_id.unwrap_or(id);
        if id.get() != "null" {
            done.insert(fingerprint(id.get().as_bytes()));
        }
        end += read as u64;
    }
    Ok((done, end))
}

/// Stands for an id: ids that differ have the same one with a chance of 2^-128.
type Fingerprint = [u64; 2];

fn fingerprint(bytes: &[u8]) -> Fingerprint {
    [0u8, 1].map(|key| {
        let mut hasher = DefaultHasher::new();
        (key, bytes).hash(&mut hasher);
        hasher.finish()
    })
}
