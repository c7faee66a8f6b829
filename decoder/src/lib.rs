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

mod decoder;
mod error;
mod files;
mod quantize;
mod reading;
mod rope;
mod shard;
mod tensors;
mod weights;

pub use ::safetensors::Dtype;
pub use checkpoint::Checkpoint;
pub use config::Config;
pub use decoder::{Decoder, LoadError};
pub use error::{CheckpointError, ConfigError};
pub use family::{Family, LayerNames, Preset, Projections};
pub use fields::Fields;
use files::{checkpoint, folder, safetensors, stored, update};
pub use presets::names as preset_names;
use reading::{config, family, fields, presets, quantization};
pub use tensors::{LayerTensors, MlpTensors, Tensors};
pub use update::{NamedTensor, WeightUpdate};
