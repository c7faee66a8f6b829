//! A job at work: one thread reads lines and submits them, another writes results as they end.
//!
//! ```text
//!   input thread:   line ── parse ──┬── request ──> Submitter (waits while the engine has enough)
//!                                   └── bad line ──> output
//!   caller:         Events ── Finished ──> output
//! ```
//!
//! A request's tag is its line's number and its place in the line (`shared`). The input thread is not waited for when the job ends early: it may be waiting for a
//! writer that never writes.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use super::earlier::{Earlier, Found};
use super::error::BulkError;
use super::input::Source;
use super::output::CHUNK_AGE;
use super::place::Place;
use super::shared::{self, Closed, Ended, Shared};
use super::tally::Tally;
use crate::lines::{self, BadLine, Defaults, Origin, RequestLine};
use crate::request::Completion;
use crate::{EngineHandle, Events, Next, SessionEvent, SessionOptions, Submitter};

/// The input's side of a job.
pub(super) struct Feed {
    pub(super) source: Source,
    pub(super) place: Place,
    pub(super) max_line_bytes: usize,
    pub(super) defaults: Defaults,
    pub(super) earlier: Earlier,
    /// Results of lines that the input does not have are an error.
    pub(super) strict: bool,
    pub(super) shared: Arc<Shared>,
    /// Every token is heard of.
    pub(super) tokens: bool,
}

/// Runs every line that has no good result, until the input ends.
pub(super) fn run(feed: Feed, engine: &EngineHandle) -> Result<(), BulkError> {
    let shared = Arc::clone(&feed.shared);
    let (submitter, events) =
        engine.session(SessionOptions { tokens: feed.tokens, steps: true, ..Default::default() });
    let place = feed.place.clone();
    let input = thread::Builder::new().name("input".to_owned()).spawn(move || feed.run(submitter));
    let input = input.map_err(|cause| BulkError::Input { place, cause })?;
    let ended = write_results(&shared, engine, events);
    let closed = shared.close();
    ended?;
    // It has let go of its submitter, or the events would not have ended.
    let fed = input.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    match closed {
        Ok(()) => fed,
        Err(Closed) => Err(shared.why_closed()),
    }
}

/// Writes what ends, until all has.
fn write_results(shared: &Shared, engine: &EngineHandle, mut events: Events) -> Result<(), BulkError> {
    let holds_back = shared.holds_back();
    let mut line = Vec::new();
    loop {
        let next = match holds_back {
            true => events.next_timeout(CHUNK_AGE)?,
            false => events.next().transpose()?.map_or(Next::Over, Next::Event),
        };
        if let Next::Event(event) = &next {
            shared.watch(|recorder| recorder.hear(event));
        }
        let written = match next {
            Next::Event(SessionEvent::Finished { tag, completion, .. }) => {
                write_completion(shared, engine, tag, *completion, &mut line)
            }
            Next::Event(_) | Next::TimedOut => shared.flush_if_due(),
            Next::Over => return Ok(()),
        };
        written.map_err(|Closed| shared.why_closed())?;
    }
}

fn write_completion(
    shared: &Shared,
    engine: &EngineHandle,
    tag: u64,
    completion: Completion,
    line: &mut Vec<u8>,
) -> Result<(), Closed> {
    let Some(Ended { header, origin, completions }) = shared.ended(tag, completion) else { return Ok(()) };
    line.clear();
    let tools = engine.text().tool_format();
    lines::write_result(line, &header, origin, &completions, tools, &|token| engine.token_bytes(token));
    let good = completions.iter().all(|one| one.error.is_none());
    let output_tokens = completions.iter().map(|one| one.token_ids.len() as u64).sum();
    shared
        .write(line, Tally { finished: u64::from(good), failed: u64::from(!good), output_tokens, skipped: 0 })
}

impl Feed {
    fn run(self, mut submitter: Submitter) -> Result<(), BulkError> {
        let Feed { source, place, max_line_bytes, defaults, mut earlier, strict, shared, .. } = self;
        let failed = |cause| BulkError::Input { place: place.clone(), cause };
        let differs = |line| BulkError::LineDiffers { output: shared.output_place.clone(), line };
        let mut input = source.lines(max_line_bytes, Arc::clone(&shared.position)).map_err(failed)?;
        while let Some(line) = input.next().map_err(failed)? {
            let origin = Origin { line: line.number, fingerprint: line.fingerprint };
            shared.lines.fetch_add(1, Relaxed);
            match earlier.find(origin.line, origin.fingerprint) {
                Found::Nothing => {}
                Found::Result => {
                    shared.skip();
                    continue;
                }
                Found::Stranger => return Err(differs(origin.line)),
            }
            let parsed = match line.text {
                Some(text) => lines::parse(text, origin.line, &defaults),
                None => Err(BadLine::too_long(max_line_bytes, &defaults)),
            };
            // An engine that has stopped or an output that is closed is the caller's to tell.
            let goes_on = match parsed {
                Ok(RequestLine { header, request, beside }) => {
                    let asked: Vec<_> = [request].into_iter().chain(beside).collect();
                    shared.starts(header, origin, &asked);
                    let asked = shared::tags(origin.line).zip(asked);
                    submitter
                        .submit_all(asked.inspect(|(tag, request)| shared.submits(*tag, request)))
                        .is_ok()
                }
                Err(bad) => write_bad(&shared, &bad, origin).is_ok(),
            };
            if !goes_on {
                return Ok(());
            }
        }
        match earlier.beyond(input.last()) {
            Some(line) if strict => Err(differs(line)),
            _ => Ok(()),
        }
    }
}

fn write_bad(shared: &Shared, bad: &BadLine, origin: Origin) -> Result<(), Closed> {
    shared.watch(|recorder| recorder.failed("line that is no request"));
    let mut line = Vec::new();
    lines::write_bad(&mut line, bad, origin);
    shared.write(&line, Tally { failed: 1, ..Tally::default() })
}
