//! The kernels' benchmark: each family at the shapes that models have, cold, against what the device can do.
//!
//! ```text
//!   cases ── a filter's ──> case ── set up on a device, its result checked ──> timer ──> report: a row, beside the
//!   small, products, attention, decode                                                   ceilings and cuBLASLt
//! ```
//!
//! `perf-cuda` prints it, or what a step would launch, without a device ([`ExplainedStep`]). The ceilings alone are what other benchmarks hold their figures against.
//!
//! Invariant: a case's result is checked before its time is reported.

mod case;
mod cases;
mod ceiling;
mod check;
mod cublaslt;
pub mod drawn;
mod exchange;
mod explain;
mod model;
mod random;
mod report;
mod step;
mod timer;

pub use case::{Case, Cold, Filter, PerfError};
pub use cases::cases;
pub use ceiling::Ceilings;
pub use exchange::{ExchangeRow, exchanges};
pub use explain::ExplainedStep;
pub use model::ModelShape;
pub use report::{Row, run};
pub use timer::{PerfOptions, Timing, perf_cuda};
