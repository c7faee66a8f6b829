//! What the threads of a job share: the output behind a lock, the lines on their way, the counts.
//!
//! ```text
//!   input thread ── bad lines ──┐
//!   events thread ── results ───┼── lock ──> Output          stop: the lock, a last flush, closed
//!   whoever stops the job ──────┘
//! ```
//!
//! No thread takes one lock while it holds the other, and none waits for another thread while it holds one.
//!
//! Invariant: a line is counted when it is in the output, not before.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::error::BulkError;
use super::output::Output;
use super::place::Place;
use super::tally::Tally;
use crate::lines::{Header, Origin, REQUESTS_MAX};
use crate::request::{Completion, GenerateRequest};
use crate::telemetry::Recorder;

pub(super) struct Shared {
    pub(super) output_place: Place,
    writer: Mutex<Writer>,
    /// Lines in the engine.
    running: Mutex<HashMap<u64, Running>>,
    finished: AtomicU64,
    failed: AtomicU64,
    skipped: AtomicU64,
    output_tokens: AtomicU64,
    /// Lines with something on them that were read.
    pub(super) lines: AtomicU64,
    /// What is seen of the session.
    recorder: Mutex<Recorder>,
    /// Bytes of the input that were read.
    pub(super) position: Arc<AtomicU64>,
}

/// What is kept of a line in the engine.
struct Running {
    header: Header,
    fingerprint: u64,
    /// How many completions there are going to be.
    expected: usize,
    /// Those that have come, if there are others, with their requests' tags.
    completions: Vec<(u64, Completion)>,
}

/// A line all of whose requests have ended.
pub(super) struct Ended {
    pub(super) header: Header,
    pub(super) origin: Origin,
    /// Of its requests in their order, and of each of its samples in theirs.
    pub(super) completions: Vec<Completion>,
}

/// The tags of a line's requests, the first one's first.
pub(super) fn tags(line: u64) -> impl Iterator<Item = u64> {
    let first = line.wrapping_mul(REQUESTS_MAX as u64);
    first..=first.wrapping_add(REQUESTS_MAX as u64 - 1)
}

/// The line of a request with this tag.
fn line_of(tag: u64) -> u64 {
    tag / REQUESTS_MAX as u64
}

struct Writer {
    output: Output,
    /// Lines that the output has taken and not written.
    unwritten: Tally,
    state: State,
}

enum State {
    /// Nothing is to be changed yet.
    Ready,
    Open,
    Closed,
    /// The first error of the output, until somebody takes it.
    Failed(Option<BulkError>),
}

/// Nothing more is written: the job was stopped, or its output failed.
pub(super) struct Closed;

impl Shared {
    pub(super) fn new(output_place: Place, output: Output) -> Self {
        Shared {
            output_place,
            writer: Mutex::new(Writer { output, unwritten: Tally::default(), state: State::Ready }),
            running: Mutex::default(),
            finished: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            output_tokens: AtomicU64::new(0),
            lines: AtomicU64::new(0),
            recorder: Mutex::default(),
            position: Arc::default(),
        }
    }

    pub(super) fn tally(&self) -> Tally {
        Tally {
            finished: self.finished.load(Relaxed),
            failed: self.failed.load(Relaxed),
            skipped: self.skipped.load(Relaxed),
            output_tokens: self.output_tokens.load(Relaxed),
        }
    }

    fn count(&self, written: Tally) {
        self.finished.fetch_add(written.finished, Relaxed);
        self.failed.fetch_add(written.failed, Relaxed);
        self.output_tokens.fetch_add(written.output_tokens, Relaxed);
    }

    /// A line whose result is there.
    pub(super) fn skip(&self) {
        self.skipped.fetch_add(1, Relaxed);
    }

    /// Keeps what the result of a line with these requests will need.
    pub(super) fn starts(&self, header: Header, origin: Origin, requests: &[GenerateRequest]) {
        let expected = requests.iter().map(|request| request.samples as usize).sum();
        let running = Running { header, fingerprint: origin.fingerprint, expected, completions: Vec::new() };
        locked(&self.running).insert(origin.line, running);
    }

    /// Its time begins.
    pub(super) fn submits(&self, tag: u64, request: &GenerateRequest) {
        self.watch(|recorder| recorder.submitted(tag, request.samples, Instant::now()));
    }

    /// Takes note of what happens in the session.
    pub(super) fn watch<R>(&self, note: impl FnOnce(&mut Recorder) -> R) -> R {
        note(&mut locked(&self.recorder))
    }

    /// A sample of a request has ended: gives back what was kept of its line, if it is the last one of that.
    pub(super) fn ended(&self, tag: u64, completion: Completion) -> Option<Ended> {
        let line = line_of(tag);
        let mut running = locked(&self.running);
        let of_line = running.get_mut(&line)?;
        of_line.completions.push((tag, completion));
        if of_line.completions.len() < of_line.expected {
            return None;
        }
        let Running { header, fingerprint, mut completions, .. } = running.remove(&line)?;
        drop(running);
        completions.sort_by_key(|(tag, one)| (*tag, one.sample));
        let completions = completions.into_iter().map(|(_, one)| one).collect();
        Some(Ended { header, origin: Origin { line, fingerprint }, completions })
    }

    /// Lets `begin` change the output, and opens it for lines.
    pub(super) fn open(&self, begin: impl FnOnce(&mut Output) -> std::io::Result<()>) -> Result<(), Closed> {
        let mut writer = locked(&self.writer);
        if !matches!(writer.state, State::Ready) {
            return Err(Closed);
        }
        writer.state = State::Open;
        self.attempt(&mut writer, begin)
    }

    /// Writes lines that stand for `tally`.
    pub(super) fn write(&self, lines: &[u8], tally: Tally) -> Result<(), Closed> {
        let mut writer = locked(&self.writer);
        writer.unwritten.add(tally);
        self.attempt(&mut writer, |output| output.write(lines))
    }

    /// Writes what has waited long enough.
    pub(super) fn flush_if_due(&self) -> Result<(), Closed> {
        self.attempt(&mut locked(&self.writer), Output::flush_if_due)
    }

    /// Does the output hold lines back, to compress them together?
    pub(super) fn holds_back(&self) -> bool {
        locked(&self.writer).output.holds_back()
    }

    /// Writes everything, and closes the output for good: others may have it, however long the job's threads live on.
    pub(super) fn close(&self) -> Result<(), Closed> {
        let mut writer = locked(&self.writer);
        let closed = self.attempt(&mut writer, Output::finish);
        writer.output.release();
        if !matches!(writer.state, State::Failed(_)) {
            writer.state = State::Closed;
        }
        closed
    }

    /// Has the output failed, and nobody taken its error?
    pub(super) fn is_failed(&self) -> bool {
        matches!(locked(&self.writer).state, State::Failed(Some(_)))
    }

    /// Why the output is closed: its error, or that the job was stopped.
    pub(super) fn why_closed(&self) -> BulkError {
        match &mut locked(&self.writer).state {
            State::Failed(error) => error.take().unwrap_or(BulkError::Stopped),
            _ => BulkError::Stopped,
        }
    }

    fn attempt(
        &self,
        writer: &mut Writer,
        action: impl FnOnce(&mut Output) -> std::io::Result<()>,
    ) -> Result<(), Closed> {
        if !matches!(writer.state, State::Open) {
            return Err(Closed);
        }
        match action(&mut writer.output) {
            Ok(()) => {
                if writer.output.is_flushed() {
                    self.count(std::mem::take(&mut writer.unwritten));
                }
                Ok(())
            }
            Err(cause) => {
                let error = BulkError::Output { place: self.output_place.clone(), cause };
                writer.state = State::Failed(Some(error));
                Err(Closed)
            }
        }
    }
}

/// A thread that panicked has left nothing half done behind these locks.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
