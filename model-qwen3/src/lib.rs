//! The Qwen3 model of minisgl: configuration, weights and the forward pass over a backend's operations.
//!
//! ```text
//!   directory ─ Checkpoint::open ──┐
//!                                  ├─> Checkpoint { Config, Tensors } ─ Qwen3::load ─> Qwen3<B>: Model<B>
//!   name ─── Checkpoint::preset ───┘        checked, on the host                    on a device
//! ```

pub mod checkpoint;
pub mod config;
mod fields;
mod layout;
pub mod presets;
pub mod qwen3;
mod rope;
mod safetensors;

pub use checkpoint::{Checkpoint, CheckpointError};
pub use config::{Config, ConfigError};
pub use layout::{LayerTensors, Tensors};
pub use qwen3::Qwen3;
