//! Requests on their way through an engine, and what comes of them.
//!
//! ```text
//!   iterator of (prompt, sampling, number) ── as there is room ──> Submitter ──> engine ──> Events ── take ──> Python
//! ```
//!
//! Both ends are on the thread that calls [`Run::take`], which pulls no more requests than there is room for, so that it
//! never waits for itself. A task that must not wait calls [`Run::poll`], and is woken through a pipe: the engine's threads
//! write a byte, and the event loop sees its file descriptor become readable.
//!
//! Aborting and closing may come from any thread, and from the iterator, while the reader is at work: they never wait for it.
//! It finds a closed run when it comes back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use minisgl::{Aborter, EngineHandle};
use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyList;

use crate::bell::Bell;
use crate::event::Event;
use crate::owner::Owner;
use crate::reader::{Reader, Source};

/// See the module.
#[pyclass(module = "minisgl._minisgl", frozen)]
pub struct Run {
    reader: Mutex<Reader>,
    aborter: Aborter,
    bell: PyOnceLock<Arc<Bell>>,
    closed: AtomicBool,
    owner: Owner,
}

impl Run {
    pub fn new(handle: &EngineHandle, owner: Owner, source: Source, tokens: bool) -> Self {
        let (reader, aborter) = Reader::new(handle, owner, source, tokens);
        Run {
            reader: Mutex::new(reader),
            aborter,
            bell: PyOnceLock::new(),
            closed: AtomicBool::new(false),
            owner,
        }
    }
}

#[pymethods]
impl Run {
    /// What has happened: waits for something, for a moment at most. `None` when all requests have ended.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        self.read(|reader| listed(py, waited(py, reader)?))
    }

    /// As `take`, for ends alone, which go to their places in `into`, a list of each request's samples; gives the places. What is there when the call
    /// is interrupted stays there.
    fn take_into<'py>(
        &self,
        py: Python<'py>,
        into: &Bound<'py, PyList>,
    ) -> PyResult<Option<Bound<'py, PyList>>> {
        self.read(|reader| {
            let places = PyList::empty(py);
            for event in waited(py, reader)? {
                if let Event::Ended(samples) = event
                    && let Some(place) = samples.first().map(|sample| sample.index)
                {
                    into.set_item(place as usize, samples.into_pyobject(py)?)?;
                    places.append(place)?;
                }
            }
            Ok(places)
        })
    }

    /// What has happened so far, without waiting: when there may be more, `descriptor` becomes readable.
    fn poll<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        // The pipe is the maker's too: a fork must not take its byte.
        self.owner.check()?;
        let bell = self.bell(py)?;
        bell.clear();
        self.read(|reader| {
            reader.submit(py)?;
            listed(py, reader.look(bell))
        })
    }

    /// A file descriptor that is readable when `poll` may have something to give.
    fn descriptor(&self, py: Python<'_>) -> PyResult<i32> {
        Ok(self.bell(py)?.descriptor())
    }

    /// Ends a request where it is; its completion comes as others do. False if it has ended.
    fn abort(&self, index: u64) -> PyResult<bool> {
        self.owner.check()?;
        Ok(!self.closed.load(Ordering::Acquire) && self.aborter.abort(index))
    }

    /// Ends everything: nothing more is heard of what has not ended.
    fn close(&self, py: Python<'_>) {
        self.closed.store(true, Ordering::Release);
        if let Some(mut reader) = self.reader() {
            reader.close();
        } else if self.owner.is_here() {
            self.aborter.abort_all();
        }
        if let Some(bell) = self.bell.get(py).filter(|_| self.owner.is_here()) {
            bell.ring();
        }
    }

    /// The iterator of the requests may hold, by whatever it reads, who reads this run: a cycle, which the collector finds.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.reader().map_or(Ok(()), |reader| reader.visit(&visit))
    }

    fn __clear__(&self) {
        self.closed.store(true, Ordering::Release);
        if let Some(mut reader) = self.reader() {
            reader.close();
        }
    }
}

impl Run {
    /// The reader, unless it is at work.
    fn reader(&self) -> Option<MutexGuard<'_, Reader>> {
        match self.reader.try_lock() {
            Ok(reader) => Some(reader),
            Err(TryLockError::Poisoned(reader)) => Some(reader.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// What `taking` takes; `None` when there will be no more, or the run is closed.
    fn read<'py>(
        &self,
        taking: impl FnOnce(&mut Reader) -> PyResult<Bound<'py, PyList>>,
    ) -> PyResult<Option<Bound<'py, PyList>>> {
        self.owner.check()?;
        let mut reader = self.reader().ok_or_else(|| {
            PyRuntimeError::new_err(
                "these requests are being read already: read them on one thread, and not inside of the iterator that gives \
                 them",
            )
        })?;
        let taken = taking(&mut reader);
        if self.closed.load(Ordering::Acquire) {
            reader.close();
            return taken.map(|_| None);
        }
        let taken = taken?;
        Ok((!taken.is_empty() || reader.goes_on()?).then_some(taken))
    }

    fn bell(&self, py: Python<'_>) -> PyResult<&Arc<Bell>> {
        self.bell.get_or_try_init(py, || {
            Bell::new().map(Arc::new).map_err(|error| {
                PyRuntimeError::new_err(format!(
                    "a pipe can't be made: {error}; raise the limit of open files (ulimit -n)"
                ))
            })
        })
    }
}

/// What has happened, waited for with the interpreter's lock released.
fn waited(py: Python<'_>, reader: &mut Reader) -> PyResult<Vec<Event>> {
    // Before anything is taken, so that an interrupt loses nothing.
    py.check_signals()?;
    reader.submit(py)?;
    Ok(py.detach(|| reader.wait()))
}

fn listed(py: Python<'_>, events: Vec<Event>) -> PyResult<Bound<'_, PyList>> {
    let list = PyList::empty(py);
    for event in events {
        match event {
            Event::Token(token) => list.append(Py::new(py, token)?)?,
            Event::Ended(samples) => list.append(samples.into_pyobject(py)?)?,
        }
    }
    Ok(list)
}
