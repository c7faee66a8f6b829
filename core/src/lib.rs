//! The scheduler, the paged KV manager, the backend traits and the engine of minisgl: no I/O, no device, no clock.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod backend;
pub mod batch;
pub mod config;
pub mod constraint;
pub mod costs;
pub mod embedding;
pub mod engine;
mod engine_error;
pub mod executor;
pub mod fit;
pub mod formula;
pub mod fp8;
mod graphs;
mod host;
pub mod kv;
pub mod late_launch;
pub mod local;
pub mod pages;
pub mod policy;
pub mod queue;
pub mod request;
mod resident;
pub mod rules;
pub mod sampling;
mod sampling_limits;
pub mod scheduler;
pub mod shard;
pub mod spec;
pub mod speculation;
pub mod stats;
mod table;
pub mod tensor;
