//! The programs `serve`, `chat` and `offline-bench` for `python -m`: the same code with the same flags.
//!
//! A wrong flag, and `--help`, end the process, as in the programs.

use minisgl::from_words;
use pyo3::prelude::*;

/// A service with OpenAI's API, until a signal ends it; `words` are the flags behind the name `program`.
#[pyfunction]
pub fn serve(py: Python<'_>, program: &str, words: Vec<String>) -> bool {
    py.detach(|| minisgl_server::program::serve(&from_words(program, &words)))
}

/// A conversation in the terminal.
#[pyfunction]
pub fn chat(py: Python<'_>, program: &str, words: Vec<String>) -> bool {
    py.detach(|| minisgl_client::chat::program::chat(&from_words(program, &words)))
}

/// The offline benchmark.
#[pyfunction]
pub fn offline_bench(py: Python<'_>, program: &str, words: Vec<String>) -> bool {
    py.detach(|| minisgl::bench::program::offline_bench(&from_words(program, &words)))
}
