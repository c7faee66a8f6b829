//! The engine that a user holds: how it is set up and opened, on which device, and what it is then asked.

pub mod builder;
pub mod device;
pub mod diagnostics;
pub mod info;
pub mod llm;
pub mod memory;
pub mod opening;
pub mod options;
pub mod runner;
pub mod running;
pub mod weights;
