//! The Rust half of the Python package `minisgl`: an engine, and runs of requests on it.
//!
//! ```text
//!   minisgl.LLM (Python)     arguments checked, outputs shaped as vLLM's          package/minisgl/
//!        │  model, options        ▲  completions as they end
//!        ▼                        │
//!   Engine ── start ──> Run ── take: the interpreter's lock is released, the thread waits    engine.rs, run.rs, reader.rs
//!        │                │
//!        ▼                ▼
//!   minisgl::Llm     its session: Submitter, Events                               the library
//! ```
//!
//! Threads of the engine never touch the interpreter: whoever asks from Python waits, with the lock released, or is woken
//! through a file descriptor. So Python code may be slow, or die, without holding up a step.
//!
//! Invariant: what belongs to an engine is used, and dropped, by the process that built it alone. A fork has its memory
//! and none of its threads; there it is refused and never freed.

mod array;
mod bell;
mod engine;
mod error;
mod event;
mod interrupt;
mod owner;
mod program;
mod prompt;
mod reader;
mod run;
mod sampling;

use pyo3::prelude::*;

/// The module as Python imports it; `package/minisgl/_minisgl.pyi` describes it to people and type checkers.
#[pymodule]
mod _minisgl {
    #[pymodule_export]
    use crate::engine::Engine;
    #[pymodule_export]
    use crate::error::{EngineError, RequestError};
    #[pymodule_export]
    use crate::event::{Completion, Token};
    #[pymodule_export]
    use crate::program::{chat, offline_bench, serve};
    #[pymodule_export]
    use crate::prompt::Chat;
    #[pymodule_export]
    use crate::run::Run;
    #[pymodule_export]
    use crate::sampling::{Embedded, Scored, check_sampling};
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::error::complete(module.py())
    }
}
