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

mod checkpoint;
mod config;
mod decoder;
mod error;
mod family;
mod fields;
mod folder;
mod presets;
mod quantization;
mod quantize;
mod read;
mod rope;
mod safetensors;
mod shard;
mod stored;
mod tensors;
mod update;
mod weights;

pub use ::safetensors::Dtype;
pub use checkpoint::Checkpoint;
pub use config::Config;
pub use decoder::{Decoder, LoadError};
pub use error::{CheckpointError, ConfigError};
pub use family::{Family, LayerNames, Preset, Projections};
pub use fields::Fields;
pub use presets::names as preset_names;
pub use tensors::{LayerTensors, MlpTensors, Tensors};
pub use update::{NamedTensor, WeightUpdate};
