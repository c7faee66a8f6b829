//! The weights that a model has, apart from the engine that computes with them.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use minisgl_decoder::{Checkpoint, CheckpointError, NamedTensor, WeightUpdate};

use crate::error::Error;
use crate::models::FAMILIES;

/// The weights of an [`Llm`](crate::Llm) as they are now, on the host: in the checkpoint's files, and what
/// [`Llm::update_weights`](crate::Llm::update_weights) was given since. A copy costs nothing.
#[derive(Clone, Debug)]
pub struct Weights(pub(crate) Arc<Checkpoint>);

impl Weights {
    /// What they become with these tensors, and the names of those that change by it. On a GPU a matrix's room is what its form
    /// takes, which stays.
    pub(crate) fn with(
        &self,
        update: WeightUpdate,
        on_gpu: bool,
    ) -> Result<(Weights, HashSet<String>), Error> {
        let updated = self.0.updated(update).map_err(wrong)?;
        if on_gpu {
            updated.keeps_forms(&self.0).map_err(wrong)?;
        }
        let changed = updated.changed_since(&self.0);
        Ok((Weights(Arc::new(updated)), changed))
    }
}

/// Tensors that are given.
pub(crate) fn given(tensors: impl IntoIterator<Item = NamedTensor>) -> Result<WeightUpdate, Error> {
    WeightUpdate::of(tensors).map_err(wrong)
}

/// Tensors in a file or a folder.
pub(crate) fn read(path: &Path) -> Result<WeightUpdate, Error> {
    WeightUpdate::open(path, FAMILIES).map_err(wrong)
}

fn wrong(cause: CheckpointError) -> Error {
    Error::Model(cause.into())
}
