//! Whose an engine is: threads and GPUs do not survive a fork.

use std::process;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// The process that an engine belongs to.
#[derive(Clone, Copy)]
pub struct Owner(u32);

impl Owner {
    /// This one.
    pub fn this() -> Self {
        Owner(process::id())
    }

    /// Is it this process?
    pub fn is_here(self) -> bool {
        self.0 == process::id()
    }

    /// # Errors
    /// It is another one.
    pub fn check(self) -> PyResult<()> {
        if self.is_here() {
            return Ok(());
        }
        Err(PyRuntimeError::new_err(format!(
            "this LLM was built in process {}, and a forked process has none of its threads nor its GPU: build an LLM in \
             the child instead, or start processes with multiprocessing's \"spawn\"",
            self.0
        )))
    }
}
