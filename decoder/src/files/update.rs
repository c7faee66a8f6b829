//! Tensors that take the place of a checkpoint's: out of memory, or out of files.
//!
//! ```text
//!   NamedTensor, …                  ──┐
//!   FILE.safetensors, read whole    ──┼──> WeightUpdate ──┐
//!   a checkpoint's folder, likewise ──┘                   ├── Checkpoint::updated ──> Checkpoint, or an error and nothing has
//!                                            Checkpoint ──┘                                                      changed
//! ```
//!
//! Files are read, not mapped: whoever trains a model writes to the same file again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;

use crate::config::Config;
use crate::error::CheckpointError;
use crate::family::Family;
use crate::folder::read_config;
use crate::safetensors::Shard;
use crate::stored::StoredTensors;

/// Where tensors are that somebody gives.
const GIVEN: &str = "what is given";

/// A tensor under the name that it has in a checkpoint.
#[derive(Clone)]
pub struct NamedTensor {
    /// `model.layers.0.self_attn.q_proj.weight`, for example.
    pub name: String,
    /// Its elements' type.
    pub dtype: Dtype,
    /// As the checkpoint writes it.
    pub shape: Vec<usize>,
    /// The elements, little-endian, row-major, without gaps.
    pub bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
}

/// See the module.
pub struct WeightUpdate {
    pub(crate) stored: StoredTensors,
    /// A configuration that came with them, and where it is.
    pub(crate) model: Option<(PathBuf, Config)>,
}

impl WeightUpdate {
    /// These tensors.
    ///
    /// # Errors
    /// Bytes that are not what type and shape take, or a name that comes twice.
    pub fn of(tensors: impl IntoIterator<Item = NamedTensor>) -> Result<WeightUpdate, CheckpointError> {
        let place = PathBuf::from(GIVEN);
        let mut shards = BTreeMap::new();
        for NamedTensor { name, dtype, shape, bytes } in tensors {
            let shard = Shard::given(&place, &name, dtype, shape, bytes)?;
            if shards.insert(name.clone(), Arc::new(shard)).is_some() {
                return Err(CheckpointError::GivenTwice(name));
            }
        }
        Ok(WeightUpdate { stored: StoredTensors { place, shards }, model: None })
    }

    /// All tensors of a `*.safetensors` file, or of the files in a folder; if it has a `config.json`, that must be of the same
    /// model, which is one of these families.
    ///
    /// # Errors
    /// As of [`Checkpoint::open`](crate::Checkpoint::open), but for what is missing.
    pub fn open(path: impl AsRef<Path>, families: &[&Family]) -> Result<WeightUpdate, CheckpointError> {
        let path = path.as_ref();
        let unreadable = |reason| CheckpointError::Unreadable { path: path.to_owned(), reason };
        if !fs::metadata(path).map_err(unreadable)?.is_dir() {
            let shard = Arc::new(Shard::read(path)?);
            let shards = shard.names().into_iter().map(|name| (name, shard.clone())).collect();
            return Ok(WeightUpdate {
                stored: StoredTensors { place: path.to_owned(), shards },
                model: None,
            });
        }
        let model = match read_config(path, families) {
            Ok((config, _)) => Some((path.to_owned(), config)),
            Err(CheckpointError::NoFile { .. }) => None,
            Err(error) => return Err(error),
        };
        Ok(WeightUpdate { stored: StoredTensors::open(path, Shard::read)?, model })
    }
}
