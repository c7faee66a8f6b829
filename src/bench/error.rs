//! Why a benchmark has no result.

use std::io;

use thiserror::Error;

use super::requests::RequestsError;
use crate::error::Error;
use crate::report::OutputError;
use crate::request::RequestError;

/// Why there is no result.
#[derive(Debug, Error)]
pub enum BenchError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] Error),
    /// The file of requests.
    #[error(transparent)]
    Requests(#[from] RequestsError),
    /// A request that the engine refuses.
    #[error("request {index} of the workload can't run: {error}")]
    Rejected {
        /// Which one.
        index: usize,
        /// Why.
        error: RequestError,
    },
    /// A result that can't be written.
    #[error(transparent)]
    Write(#[from] OutputError),
    /// The table can't be printed.
    #[error("the report can't be printed: {0}")]
    Print(#[source] io::Error),
}
