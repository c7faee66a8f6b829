//! What model families share: a checkpoint's files, the reading of its configuration, and the forward pass over a backend's
//! operations.
//!
//! ```text
//!   directory ─ Checkpoint::open ──┐          ┌─ Config { DecoderSpec, … } by the family's reader
//!                                  ├─> Checkpoint                                     ── Decoder::load ─> Decoder<B>: Model<B>
//!   name ─── Checkpoint::preset ───┘          └─ Tensors by the family's names               on a device
//! ```
//!
//! A [`Family`] is what one architecture adds: a function from `config.json` to a spec, the names of its tensors, and its
//! published sizes.

pub mod checkpoint;
pub mod config;
mod decoder;
mod family;
mod fields;
mod presets;
mod quantization;
mod quantize;
mod read;
mod rope;
mod safetensors;
mod shard;
mod tensors;
mod update;
mod weights;

pub use ::safetensors::Dtype;
pub use checkpoint::{Checkpoint, CheckpointError};
pub use config::{Config, ConfigError};
pub use decoder::{Decoder, LoadError};
pub use family::{Family, LayerNames, Preset, Projections};
pub use fields::Fields;
pub use presets::names as preset_names;
pub use tensors::{LayerTensors, MlpTensors, Tensors};
pub use update::{NamedTensor, WeightUpdate};
