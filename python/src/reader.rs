//! The end of a run that is read: it pulls requests, submits them, and takes what comes of them.

use std::mem::{forget, take};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use minisgl::{EngineHandle, Error, Events, GenerateRequest, Next, ScoreRequest, SessionOptions, Submitter};
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyTuple};

use crate::bell::Bell;
use crate::error::raised;
use crate::event::{Event, Groups};
use crate::interrupt::LOOK;
use crate::owner::Owner;
use crate::prompt::prompt;
use crate::sampling::{Embedded, Sampling, Scored};

/// Events handed over at once.
const EVENTS_MAX: usize = 4096;

/// Where requests come from.
pub struct Source {
    pub requests: Py<PyIterator>,
    /// Of requests that have none: theirs is it plus their number.
    pub seed: u64,
    /// Of a request at most.
    pub samples_max: u32,
}

/// See the module.
pub struct Reader {
    /// `None` when it has given its last.
    requests: Option<Py<PyIterator>>,
    submitter: Option<Submitter>,
    /// `None` once the run is closed or over.
    events: Option<Events>,
    /// Ends of requests that could not be read, and so were not submitted.
    unreadable: Vec<Event>,
    groups: Groups,
    /// How the sampling before was read: most requests have the same object.
    sampling: Option<(Py<PyAny>, Sampling)>,
    pulled: u64,
    seed: u64,
    samples_max: u32,
    /// What went wrong, told when all that ended before has been.
    failure: Option<PyErr>,
    owner: Owner,
}

impl Reader {
    pub fn new(
        handle: &EngineHandle,
        owner: Owner,
        Source { requests, seed, samples_max }: Source,
        tokens: bool,
    ) -> (Self, minisgl::Aborter) {
        let options = SessionOptions { tokens, text: tokens, prompt_ids: true, ..SessionOptions::default() };
        let (submitter, events) = handle.session(options);
        let aborter = events.aborter();
        let reader = Reader {
            requests: Some(requests),
            submitter: Some(submitter),
            events: Some(events),
            unreadable: Vec::new(),
            groups: Groups::default(),
            sampling: None,
            pulled: 0,
            seed,
            samples_max,
            failure: None,
            owner,
        };
        (reader, aborter)
    }

    /// Submits as many requests as there is room for. When their iterator fails, what it gave before runs on, and the
    /// failure is told behind that.
    ///
    /// # Errors
    /// What is no failure but wants to end the program, such as Ctrl-C in the iterator, is told at once.
    pub fn submit(&mut self, py: Python<'_>) -> PyResult<()> {
        let Some(room) = self.submitter.as_ref().map(Submitter::room) else { return Ok(()) };
        let mut ready = Vec::with_capacity(room);
        let pulled = self.pull(py, room, &mut ready);
        let submitted = self.submitter.as_mut().map_or(Ok(()), |submitter| submitter.submit_all(ready));
        if !matches!(pulled, Ok(true)) || submitted.is_err() {
            (self.submitter, self.requests) = (None, None);
        }
        // Why it is refused comes with the events, behind what ended before; without any it is told by this.
        if let Err(error) = submitted {
            self.failure.get_or_insert_with(|| raised(&error));
        }
        match pulled {
            Err(error) if error.is_instance_of::<PyException>(py) => {
                self.failure = Some(error);
                Ok(())
            }
            pulled => pulled.map(|_| ()),
        }
    }

    /// Pulls so many requests. False if there are no more.
    fn pull(
        &mut self,
        py: Python<'_>,
        room: usize,
        ready: &mut Vec<(u64, GenerateRequest)>,
    ) -> PyResult<bool> {
        for _ in 0..room {
            let Some(requests) = &self.requests else { return Ok(false) };
            let Some(given) = requests.bind(py).clone().next() else { return Ok(false) };
            let given = given?.cast_into::<PyTuple>()?;
            let index = self.pulled;
            self.pulled += 1;
            match self.read(&given) {
                Ok(request) => {
                    self.groups.expect(index, request.samples);
                    ready.push((index, request));
                }
                Err(error) if error.is_instance_of::<PyException>(py) => {
                    self.unreadable.push(Event::unreadable(index, error.value(py).to_string()));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// A request out of its prompt, its sampling, and its number among all of the engine's.
    fn read(&mut self, given: &Bound<'_, PyTuple>) -> PyResult<GenerateRequest> {
        let (from, sampling) = (given.get_borrowed_item(0)?, given.get_borrowed_item(1)?);
        if let Ok(scored) = sampling.cast::<Scored>() {
            let Scored { completion, top } = scored.get();
            return Ok(
                ScoreRequest { prompt: prompt(&from)?, completion: completion.clone(), top: *top }.into()
            );
        }
        if let Ok(embedded) = sampling.cast::<Embedded>() {
            return Ok(embedded.get().request(prompt(&from)?));
        }
        let number: u64 = given.get_borrowed_item(2)?.extract()?;
        let known = self.sampling.as_ref().filter(|(known, _)| known.is(&*sampling));
        let sampling = match known {
            Some((_, sampling)) => sampling,
            None => {
                let read = Sampling::of(&sampling)?;
                &self.sampling.insert((sampling.to_owned().unbind(), read)).1
            }
        };
        let request = sampling.request(prompt(&from)?, self.seed.wrapping_add(number));
        match request.samples {
            // Each has an end of its own, which this bounds the number of.
            samples if samples > self.samples_max => Err(PyValueError::new_err(format!(
                "n is {samples}, and {} samples of a prompt at most can wait together; give the prompt several times",
                self.samples_max
            ))),
            _ => Ok(request),
        }
    }

    /// Waits a moment for an event, and takes with it what else is there.
    pub fn wait(&mut self) -> Vec<Event> {
        let mut taken = take(&mut self.unreadable);
        let Some(events) = &mut self.events else { return taken };
        let mut patience = if taken.is_empty() { LOOK } else { Duration::ZERO };
        while taken.len() < EVENTS_MAX {
            match events.next_timeout(patience) {
                Ok(Next::Event(event)) => taken.extend(self.groups.event(event)),
                Ok(Next::TimedOut) => break,
                Ok(Next::Over) => {
                    self.events = None;
                    break;
                }
                Err(error) => {
                    self.fail(&error);
                    break;
                }
            }
            patience = Duration::ZERO;
        }
        taken
    }

    /// Takes what is there; the bell rings when there is more.
    pub fn look(&mut self, bell: &Arc<Bell>) -> Vec<Event> {
        let mut taken = take(&mut self.unreadable);
        let Some(events) = &mut self.events else { return taken };
        let waker = Waker::from(bell.clone());
        while taken.len() < EVENTS_MAX {
            match events.poll_next(&mut Context::from_waker(&waker)) {
                Poll::Ready(Some(Ok(event))) => taken.extend(self.groups.event(event)),
                Poll::Ready(Some(Err(error))) => {
                    self.fail(&error);
                    break;
                }
                Poll::Ready(None) => {
                    self.events = None;
                    break;
                }
                Poll::Pending => return taken,
            }
        }
        // It has more to say, though nothing more may happen.
        bell.ring();
        taken
    }

    fn fail(&mut self, error: &Error) {
        self.end();
        self.failure = Some(raised(error));
    }

    /// Will there be more, be it a failure? One that is told is over with.
    pub fn goes_on(&mut self) -> PyResult<bool> {
        match self.events {
            Some(_) => Ok(true),
            None => self.failure.take().map_or(Ok(false), Err),
        }
    }

    /// Aborts what has not ended; nothing more is told.
    pub fn close(&mut self) {
        self.end();
        self.unreadable.clear();
        self.failure = None;
    }

    /// Shows the collector what Python objects are held.
    pub fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.requests)?;
        visit.call(self.sampling.as_ref().map(|(sampling, _)| sampling))
    }

    fn end(&mut self) {
        let (submitter, events) = (self.submitter.take(), self.events.take());
        (self.requests, self.sampling) = (None, None);
        if !self.owner.is_here() {
            forget((submitter, events));
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.end();
    }
}
