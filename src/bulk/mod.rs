//! Bulk generation: a file of requests in, a file of results out, neither held in memory.
//!
//! ```text
//!   input ── line by line ──> engine ── as each request ends ──> output, whole lines only
//!                 │                                                 ^
//!                 └── not a request ── error line ──────────────────┘
//! ```
//!
//! A result belongs to a line of the input: to its number and its fingerprint, both of which the result has. So a job that
//! was cut short at any moment can go on ([`Existing::Resume`]): lines with a good result are skipped, all others run.
//! Before the first of them runs, the output is made to hold good results only, one a line: if it has failed ones, or more
//! than one of a line, the good ones are copied to a new file, which then takes the old one's name.
//!
//! Invariant: at every moment the output, less what the last write may have left torn, has whole lines only and no two of one
//! input line; and when [`Bulk::run`] returns without a failed line, it has a good one of each.

mod compression;
mod drive;
mod earlier;
mod error;
mod input;
mod job;
mod output;
mod place;
mod report;
mod settings;
mod shared;
mod tally;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

pub use error::BulkError;
pub use job::{Existing, Job};
pub use place::Place;
pub use report::BulkReport;
pub use settings::Rounding;
pub use tally::Tally;

use crate::progress::{Progress, Unit};
use crate::telemetry::{DeviceReport, RunRecord};
use crate::{EngineHandle, Llm};
use drive::Feed;
use earlier::Earlier;
use input::{Line, Source};
use output::Output;
use settings::Settings;
use shared::{Closed, Shared};

/// A job's files, opened: what can be wrong with them shows before a model is loaded.
pub struct Bulk {
    job: Job,
    source: Source,
    earlier: Earlier,
    /// Where a regular output is, and what is to be known of its results.
    settings: Option<(PathBuf, Settings)>,
    length: Option<u64>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Bulk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bulk").field("job", &self.job).finish_non_exhaustive()
    }
}

impl Bulk {
    /// Opens the files; changes nothing in them. Waits for the reader of an output that is a FIFO.
    ///
    /// # Errors
    /// An input that can't be read, an output that can't be written or gone on from.
    pub fn open(job: Job) -> Result<Self, BulkError> {
        let input_failed = |cause| BulkError::Input { place: job.input.clone(), cause };
        let source = Source::open(&job.input).map_err(input_failed)?;
        // A file that is no text is told now.
        source.reread(job.max_line_bytes).map_err(input_failed)?;
        let output = Output::open(&job.output, source.identity)?;
        let settings = match output.path() {
            Some(path) => Some((path.to_owned(), job.settings(path, &source)?)),
            None => None,
        };
        let earlier = match &settings {
            Some((path, settings)) => job.earlier(path, settings, &output, &source)?,
            None if job.existing.resumes() => return Err(BulkError::NoResume(job.output)),
            None => Earlier::default(),
        };
        let shared = Arc::new(Shared::new(job.output.clone(), output));
        Ok(Bulk { length: source.length, job, source, earlier, settings, shared })
    }

    /// Tokens of a usual request, prompt and output, as far as the first lines tell: a token is about four bytes, and what a
    /// line does not say otherwise is drawn in full. `None` of an input that can be read but once, or has no lines.
    pub fn usual_tokens(&self) -> Option<u32> {
        const LINES: u64 = 64;
        const BYTES_A_TOKEN: u64 = 4;
        let mut lines = self.source.reread(self.job.max_line_bytes).ok()??;
        let (mut count, mut bytes) = (0, 0);
        while count < LINES
            && let Ok(Some(Line { text: Some(text), .. })) = lines.next()
        {
            (count, bytes) = (count + 1, bytes + text.len() as u64);
        }
        let prompt = u32::try_from(bytes.checked_div(count)? / BYTES_A_TOKEN).unwrap_or(u32::MAX);
        Some(prompt.saturating_add(self.job.defaults.sampling.max_tokens))
    }

    /// A view of the job for other threads.
    pub fn handle(&self) -> JobHandle {
        JobHandle {
            resumable: self.settings.is_some(),
            input: self.job.input.clone(),
            length: self.length,
            max_line_bytes: self.job.max_line_bytes,
            earlier: self.earlier.good(),
            shared: Arc::clone(&self.shared),
        }
    }

    /// Runs every line that has no good result.
    ///
    /// # Errors
    /// A failed engine, input or output; [`BulkError::Stopped`] after [`JobHandle::stop`]. What had ended by then is in the
    /// output. After an error of the input, what was read before it has run.
    pub fn run(self, llm: &Llm) -> Result<Tally, BulkError> {
        self.run_on(&llm.handle())
    }

    fn run_on(self, engine: &EngineHandle) -> Result<Tally, BulkError> {
        let shared = Arc::clone(&self.shared);
        let feed = self.begin().inspect_err(|_| {
            // This error is the first one; the lock must not live as long as a handle to the job.
            let _ = shared.close();
        })?;
        drive::run(feed, engine)?;
        Ok(shared.tally())
    }

    /// Makes the output ready for results. Not before the model is there: until now it is as it was.
    fn begin(self) -> Result<Feed, BulkError> {
        let Bulk { job, source, earlier, settings, shared, .. } = self;
        if shared.open(|output| output.begin(&earlier)).is_err() {
            return Err(shared.why_closed());
        }
        if let Some((path, settings)) = settings {
            settings
                .write(&path)
                .map_err(|cause| BulkError::Output { place: settings::path(&path).into(), cause })?;
        }
        Ok(Feed {
            source,
            place: job.input,
            max_line_bytes: job.max_line_bytes,
            defaults: job.defaults,
            earlier,
            strict: job.existing != Existing::ResumeAnyway,
            shared,
            tokens: job.tokens,
        })
    }
}

/// A job as other threads see it.
#[derive(Clone)]
pub struct JobHandle {
    resumable: bool,
    input: Place,
    length: Option<u64>,
    max_line_bytes: usize,
    /// Lines that had a good result before.
    earlier: u64,
    shared: Arc<Shared>,
}

impl fmt::Debug for JobHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobHandle")
            .field("input", &self.input)
            .field("tally", &self.tally())
            .finish_non_exhaustive()
    }
}

impl JobHandle {
    /// What is in the output by now.
    pub fn tally(&self) -> Tally {
        self.shared.tally()
    }

    /// Bytes of the input that were read, and how many there are, where that is known.
    pub fn position(&self) -> (u64, Option<u64>) {
        (self.shared.position.load(Relaxed), self.length)
    }

    /// How far the job is.
    pub fn progress(&self) -> Progress {
        let Tally { finished, failed, skipped, .. } = self.tally();
        let ((read, total), lines) = (self.position(), self.shared.lines.load(Relaxed));
        // Lines that were read and have not ended are taken to be as long as others.
        let ended = (finished + failed + skipped).min(lines) as f64 / lines.max(1) as f64;
        let (output_tokens, load) = self.shared.watch(|recorder| (recorder.total_tokens(), recorder.load()));
        Progress {
            label: String::new(),
            done: (read as f64 * ended) as u64,
            total,
            unit: Unit::Bytes,
            finished,
            failed,
            output_tokens,
            running: load.running,
            waiting: load.waiting,
            pages_used: load.pages_used,
            pages: 0,
        }
    }

    /// What was seen of the job, which took `seconds`, and of the device meanwhile.
    pub fn record(&self, seconds: f64, device_state: Option<DeviceReport>) -> RunRecord {
        self.shared.watch(|recorder| recorder.record(seconds, device_state))
    }

    /// Can another run go on from the output, given the same input?
    pub fn resumable(&self) -> bool {
        self.resumable
    }

    /// Ends the job: what has ended is written, nothing more will be. [`Bulk::run`] returns at the next result, with
    /// [`BulkError::Stopped`]. Waits for a write that is under way.
    ///
    /// # Errors
    /// The last write failed.
    pub fn stop(&self) -> Result<Left, BulkError> {
        match self.shared.close() {
            Err(Closed) if self.shared.is_failed() => Err(self.shared.why_closed()),
            _ => Ok(self.left()),
        }
    }

    /// How many lines have no good result.
    fn left(&self) -> Left {
        let Tally { finished, skipped, .. } = self.tally();
        let read = self.shared.lines.load(Relaxed);
        let counted = Source::open(&self.input).and_then(|source| source.reread(self.max_line_bytes));
        match counted {
            Ok(Some(lines)) => {
                let (lines, all) = count(lines);
                let left = lines.max(read).saturating_sub(finished + self.earlier);
                if all { Left::Exactly(left) } else { Left::AtLeast(left) }
            }
            _ => Left::AtLeast(read.saturating_sub(finished + skipped)),
        }
    }
}

/// Lines that a stopped job has no good result of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// All of the input was counted.
    Exactly(u64),
    /// More may come, or the input is too long to be counted in a moment.
    AtLeast(u64),
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Left::Exactly(1) => f.write_str("1 line is left"),
            Left::Exactly(lines) => write!(f, "{lines} lines are left"),
            Left::AtLeast(lines) => write!(f, "at least {lines} lines are left"),
        }
    }
}

/// Who stops a job does not wait longer for a count.
const COUNT_TIME: Duration = Duration::from_secs(1);

/// Counts lines; false if there was no time for all.
fn count(mut lines: input::Lines) -> (u64, bool) {
    let started = Instant::now();
    let mut counted = 0;
    while let Ok(Some(_)) = lines.next() {
        counted += 1;
        if counted % 1024 == 0 && started.elapsed() > COUNT_TIME {
            return (counted, false);
        }
    }
    (counted, true)
}
