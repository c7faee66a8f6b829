//! The scheduler, the paged KV manager, the backend traits and the engine of minisgl: no I/O, no device, no clock.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod device;
mod model;
mod output;
mod scheduling;
mod steps;

pub use device::{backend, batch, computes, fit, local};
use device::{graphs, host, resident};
pub use model::{fp8, kv, shard, spec, tensor};
use output::sampling_limits;
pub use output::{constraint, embedding, rules, sampling};
use scheduling::table;
pub use scheduling::{pages, policy, queue, request, scheduler, speculation, stats};
use steps::engine_error;
pub use steps::{config, costs, engine, executor, formula, late_launch};
