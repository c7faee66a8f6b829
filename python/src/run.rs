//! Requests on their way through an engine, and what comes of them.
//!
//! ```text
//!   iterator of (prompt, sampling) ── as there is room ──> Submitter ──> engine ──> Events ── take ──> Python
//! ```
//!
//! Both ends are on the thread that calls [`Run::take`], which pulls no more requests than there is room for, so that it
//! never waits for itself. A task that must not wait calls [`Run::poll`], and is woken through a pipe: the engine's threads
//! write a byte, and the event loop sees its file descriptor become readable.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::mem::forget;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use minisgl::{
    EngineHandle, Error, Events, FinishReason, GenerateRequest, Next, ScoreRequest, SessionEvent,
    SessionOptions, Submitter, TokenLogprobs,
};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList, PyTuple};

use crate::engine::Owner;
use crate::error::{in_arguments, raised};
use crate::prompt::prompt;
use crate::sampling::{Sampling, Scored};

/// How long Ctrl-C may take to be seen.
const LOOK: Duration = Duration::from_millis(50);
/// Events handed over at once.
const EVENTS_MAX: usize = 4096;

/// Another token of a request.
#[pyclass(module = "minisgl._minisgl", frozen, get_all)]
pub struct Token {
    index: u64,
    token_id: u32,
    /// Text that became certain with it.
    text: String,
    logprobs: Option<Logprobs>,
}

/// What came of a request.
#[pyclass(module = "minisgl._minisgl", frozen, get_all)]
pub struct Completion {
    index: u64,
    /// Text that became certain with the end, where tokens are told as they come.
    last_text: String,
    text: Option<String>,
    token_ids: Vec<u32>,
    finish_reason: &'static str,
    /// The stop text that ended it, if one did.
    stop_text: Option<String>,
    prompt_token_ids: Option<Vec<u32>>,
    cached_tokens: u32,
    /// Of each token, where asked for.
    logprobs: Option<Vec<Logprobs>>,
    /// Of each token of the prompt but the first, or of a completion that was given, where asked for.
    prompt_logprobs: Option<Vec<Logprobs>>,
    warning: Option<String>,
    error: Option<String>,
}

/// A token's log-probability, and the most probable tokens with theirs.
type Logprobs = (f32, Vec<(u32, f32)>);

/// See the module.
#[pyclass(module = "minisgl._minisgl")]
pub struct Run {
    /// `None` when it has given its last.
    requests: Option<Py<PyIterator>>,
    submitter: Option<Submitter>,
    /// `None` once the run is aborted or over.
    events: Option<Events>,
    /// How the sampling before was read: most requests have the same object.
    sampling: Option<(Py<PyAny>, Sampling)>,
    submitted: u64,
    seed: u64,
    /// What went wrong, told when all that ended before has been.
    failure: Option<PyErr>,
    bell: Option<Arc<Bell>>,
    owner: Owner,
}

impl Run {
    pub fn new(
        handle: &EngineHandle,
        owner: Owner,
        requests: Py<PyIterator>,
        seed: u64,
        tokens: bool,
    ) -> Self {
        let options = SessionOptions { tokens, text: tokens, prompt_ids: true, ..SessionOptions::default() };
        let (submitter, events) = handle.session(options);
        Run {
            requests: Some(requests),
            submitter: Some(submitter),
            events: Some(events),
            sampling: None,
            submitted: 0,
            seed,
            failure: None,
            bell: None,
            owner,
        }
    }
}

#[pymethods]
impl Run {
    /// What has happened: waits for something, for a moment at most. `None` when all requests have ended.
    fn take<'py>(&mut self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        self.owner.check()?;
        // Before anything is taken, so that an interrupt loses nothing.
        py.check_signals()?;
        self.submit(py)?;
        let taken = py.detach(|| self.wait());
        self.give(py, taken)
    }

    /// As `take`, for completions alone, which go to their places in `into`; gives the places. What is there when the call
    /// is interrupted stays there.
    fn take_into<'py>(
        &mut self,
        py: Python<'py>,
        into: &Bound<'py, PyList>,
    ) -> PyResult<Option<Bound<'py, PyList>>> {
        self.owner.check()?;
        py.check_signals()?;
        self.submit(py)?;
        let taken = py.detach(|| self.wait());
        let places = PyList::empty(py);
        for event in taken.events {
            if let SessionEvent::Finished { tag, text, completion } = event {
                into.set_item(tag as usize, Py::new(py, Completion::new(tag, text, *completion))?)?;
                places.append(tag)?;
            }
        }
        self.fail_later(taken.error);
        self.over_or(py, places)
    }

    /// What has happened so far, without waiting: when there may be more, `descriptor` becomes readable.
    fn poll<'py>(&mut self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        self.owner.check()?;
        self.submit(py)?;
        let bell = self.bell()?;
        bell.clear();
        let taken = self.look(&bell);
        self.give(py, taken)
    }

    /// A file descriptor that is readable when `poll` may have something to give.
    fn descriptor(&mut self) -> PyResult<i32> {
        Ok(self.bell()?.reader.as_raw_fd())
    }

    /// Ends a request where it is; its completion comes as others do.
    fn abort(&mut self, index: u64) -> PyResult<bool> {
        self.owner.check()?;
        Ok(self.events.as_mut().is_some_and(|events| events.abort(index)))
    }

    /// Ends everything: nothing more is heard of what has not ended.
    fn close(&mut self) {
        self.end();
        self.failure = None;
    }
}

/// What was there to be taken.
#[derive(Default)]
struct Taken {
    events: Vec<SessionEvent>,
    over: bool,
    error: Option<Error>,
}

impl Run {
    /// Submits as many requests as there is room for.
    fn submit(&mut self, py: Python<'_>) -> PyResult<()> {
        let Some(room) = self.submitter.as_ref().map(Submitter::room) else { return Ok(()) };
        let mut pulled = Vec::with_capacity(room);
        while pulled.len() < room {
            match self.pull(py)? {
                Some(request) => pulled.push((self.submitted, request)),
                None => break,
            }
            self.submitted += 1;
        }
        let all = pulled.len() < room;
        let submitted = self.submitter.as_mut().map_or(Ok(()), |submitter| submitter.submit_all(pulled));
        if all || submitted.is_err() {
            (self.submitter, self.requests) = (None, None);
        }
        // Why it is refused comes with the events, behind what ended before; without any it is told here.
        if let (Err(error), None) = (submitted, &self.failure) {
            self.failure = Some(raised(&error));
        }
        Ok(())
    }

    fn pull(&mut self, py: Python<'_>) -> PyResult<Option<GenerateRequest>> {
        let Some(requests) = &self.requests else { return Ok(None) };
        let Some(pair) = requests.bind(py).clone().next() else { return Ok(None) };
        let pair = pair?.cast_into::<PyTuple>()?;
        let (given, sampling) = (pair.get_borrowed_item(0)?, pair.get_borrowed_item(1)?);
        if let Ok(scored) = sampling.cast::<Scored>() {
            let Scored { completion, top } = scored.get();
            let request = ScoreRequest { prompt: prompt(&given)?, completion: completion.clone(), top: *top };
            return Ok(Some(request.into()));
        }
        let known = self.sampling.as_ref().filter(|(known, _)| known.is(&*sampling));
        let sampling = match known {
            Some((_, sampling)) => sampling,
            None => {
                let read = Sampling::of(&sampling)?;
                &self.sampling.insert((sampling.to_owned().unbind(), read)).1
            }
        };
        Ok(Some(sampling.request(prompt(&given)?, self.seed.wrapping_add(self.submitted))))
    }

    /// Waits a moment for an event, and takes with it what else is there.
    fn wait(&mut self) -> Taken {
        let Some(events) = &mut self.events else { return Taken { over: true, ..Taken::default() } };
        let mut taken = Taken::default();
        let mut patience = LOOK;
        while taken.events.len() < EVENTS_MAX {
            match events.next_timeout(patience) {
                Ok(Next::Event(event)) => taken.events.push(event),
                Ok(Next::TimedOut) => break,
                Ok(Next::Over) => {
                    taken.over = true;
                    break;
                }
                Err(error) => {
                    taken.error = Some(error);
                    break;
                }
            }
            patience = Duration::ZERO;
        }
        if taken.over {
            self.events = None;
        }
        taken
    }

    /// Takes what is there; the bell rings when there is more.
    fn look(&mut self, bell: &Arc<Bell>) -> Taken {
        let Some(events) = &mut self.events else { return Taken { over: true, ..Taken::default() } };
        let mut taken = Taken::default();
        let waker = Waker::from(bell.clone());
        while taken.events.len() < EVENTS_MAX {
            match events.poll_next(&mut Context::from_waker(&waker)) {
                Poll::Ready(Some(Ok(event))) => taken.events.push(event),
                Poll::Ready(Some(Err(error))) => {
                    taken.error = Some(error);
                    break;
                }
                Poll::Ready(None) => {
                    taken.over = true;
                    break;
                }
                Poll::Pending => return taken,
            }
        }
        // It has more to say, though nothing more may happen.
        bell.ring();
        if taken.over {
            self.events = None;
        }
        taken
    }

    fn give<'py>(&mut self, py: Python<'py>, taken: Taken) -> PyResult<Option<Bound<'py, PyList>>> {
        let given = PyList::empty(py);
        for event in taken.events {
            match event {
                SessionEvent::Token { tag, token, text, logprobs, .. } => {
                    let logprobs = logprobs.map(of_token);
                    given.append(Py::new(py, Token { index: tag, token_id: token, text, logprobs })?)?;
                }
                SessionEvent::Finished { tag, text, completion } => {
                    given.append(Py::new(py, Completion::new(tag, text, *completion))?)?;
                }
                SessionEvent::Started { .. } | SessionEvent::Step(_) => {}
            }
        }
        self.fail_later(taken.error);
        self.over_or(py, given)
    }

    fn fail_later(&mut self, error: Option<Error>) {
        if let Some(error) = error {
            self.failure = Some(raised(&error));
            self.end();
        }
    }

    /// What was taken, else the failure, else the end.
    fn over_or<'py>(
        &mut self,
        _: Python<'py>,
        taken: Bound<'py, PyList>,
    ) -> PyResult<Option<Bound<'py, PyList>>> {
        if !taken.is_empty() || (self.events.is_some() && self.failure.is_none()) {
            return Ok(Some(taken));
        }
        self.failure.take().map_or(Ok(None), Err)
    }

    fn end(&mut self) {
        let (submitter, events) = (self.submitter.take(), self.events.take());
        self.requests = None;
        if !self.owner.is_here() {
            forget((submitter, events));
        }
    }

    fn bell(&mut self) -> PyResult<Arc<Bell>> {
        if let Some(bell) = &self.bell {
            return Ok(bell.clone());
        }
        let bell = Bell::new().map_err(|error| {
            PyRuntimeError::new_err(format!(
                "a pipe can't be made: {error}; raise the limit of open files (ulimit -n)"
            ))
        })?;
        Ok(self.bell.insert(Arc::new(bell)).clone())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.end();
    }
}

impl Completion {
    fn new(index: u64, last_text: String, of: minisgl::Completion) -> Self {
        let finish_reason = match of.finish_reason {
            FinishReason::Length => "length",
            FinishReason::Eos => "eos",
            FinishReason::Stop => "stop",
            FinishReason::Abort => "abort",
            FinishReason::Rejected | FinishReason::Failed => "error",
        };
        Completion {
            index,
            last_text,
            text: of.text,
            token_ids: of.token_ids,
            finish_reason,
            stop_text: of.stop_text,
            prompt_token_ids: of.prompt_token_ids,
            cached_tokens: of.cached_tokens,
            logprobs: of.logprobs.map(of_tokens),
            prompt_logprobs: of.prompt_logprobs.map(of_tokens),
            warning: of.warning.map(|warning| in_arguments(&warning)),
            error: of.error.map(|error| in_arguments(&error.to_string())),
        }
    }
}

fn of_tokens(of: Vec<TokenLogprobs>) -> Vec<Logprobs> {
    of.into_iter().map(of_token).collect()
}

fn of_token(of: TokenLogprobs) -> Logprobs {
    (of.logprob, of.top)
}

/// Wakes an event loop: a pipe with a byte in it while there is something to look at.
struct Bell {
    reader: PipeReader,
    writer: PipeWriter,
    rung: AtomicBool,
}

impl Bell {
    fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(Bell { reader, writer, rung: AtomicBool::new(false) })
    }

    /// One byte at most lies in the pipe, so that writing never waits.
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // A pipe of our own with room in it takes a byte.
            let _ = (&self.writer).write(&[0]);
        }
    }

    fn clear(&self) {
        if self.rung.load(Ordering::Acquire) {
            let _ = (&self.reader).read(&mut [0]);
            self.rung.store(false, Ordering::Release);
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}
