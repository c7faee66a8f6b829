//! What the programs have in common: their flags, what they say while they work, and what an engine is measured with.

pub mod flags;
pub mod progress;
pub mod workload;
