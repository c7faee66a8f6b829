//! Ctrl-C during what takes long.

use std::panic::resume_unwind;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// How long Ctrl-C may take to be seen.
pub const LOOK: Duration = Duration::from_millis(50);

/// Does work on a thread of its own, while this one waits with the interpreter's lock released and looks for Ctrl-C. That is raised
/// at once; the work can't be broken off, and comes to its end with nobody waiting.
pub fn interruptible<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce() -> T + Send + 'static,
) -> PyResult<T> {
    let (done, mut end) = channel();
    let thread = thread::Builder::new().name("minisgl".to_owned()).spawn(move || {
        // Nobody may be there to hear of it.
        let _ = done.send(work());
    });
    let thread =
        thread.map_err(|error| PyRuntimeError::new_err(format!("no thread can be started: {error}")))?;
    loop {
        let end = &mut end;
        match py.detach(move || end.recv_timeout(LOOK)) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    match thread.join() {
        Err(panic) => resume_unwind(panic),
        Ok(()) => Err(PyRuntimeError::new_err("a thread ended without a result")),
    }
}
