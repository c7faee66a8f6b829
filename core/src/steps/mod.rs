//! Step after step: the engine that schedules and launches them, what runs them, and what they cost.

pub mod config;
pub mod costs;
pub mod engine;
pub(crate) mod engine_error;
pub mod executor;
pub mod formula;
pub mod late_launch;
