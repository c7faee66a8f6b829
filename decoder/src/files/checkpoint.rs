//! A checkpoint directory in Hugging Face layout, checked whole before anything goes to a device.
//!
//! ```text
//!   DIR/config.json
//!       generation_config.json          may be absent
//!       model.safetensors                                                     or
//!       model.safetensors.index.json -> model-00001-of-0000N.safetensors, …   or
//!       *.safetensors                   without an index: all of them, but for those of adapters and of makers' own layouts
//! ```
//!
//! Files may be links, as in Hugging Face's cache; one that leads nowhere is named before anything is read.
//!
//! Invariant: a [`Checkpoint`] has every tensor of its configuration, in shape, type and bytes; so loading one can
//! fail only on the device.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{Inputs, WeightFormat};
use minisgl_core::tensor::{HostTensor, TensorData};

use crate::config::Config;
use crate::error::CheckpointError;
use crate::family::{Family, LayerNames};
use crate::folder::{check_link, check_links, read_config};
use crate::presets;
use crate::quantization::INPUT_SCALE;
use crate::safetensors::Shard;
use crate::stored::{StoredTensors, beside};
use crate::tensors::{HEAD, Tensors};
use crate::update::WeightUpdate;

/// A model's configuration and its weights: in mapped files, in memory, or made from seeds.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub(crate) config: Config,
    pub(crate) tensors: Tensors,
    origin: Arc<Origin>,
    plain_inputs: bool,
    pub(crate) quantized: bool,
}

/// What a checkpoint is made from.
#[derive(Clone, Debug)]
struct Origin {
    /// As it is written.
    config: Config,
    names: LayerNames,
    stored: StoredTensors,
    /// Tensors that `stored` lacks are dummies.
    is_preset: bool,
}

impl Checkpoint {
    /// Maps and checks the checkpoint in a directory, of one of these families.
    ///
    /// # Errors
    /// Names the file, and the field or tensor, that is missing or not as it must be.
    pub fn open(dir: impl AsRef<Path>, families: &[&Family]) -> Result<Checkpoint, CheckpointError> {
        let dir = dir.as_ref();
        match fs::metadata(dir) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(CheckpointError::NotADirectory(dir.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                check_link(dir)?;
                return Err(CheckpointError::NoDirectory(dir.to_owned()));
            }
            Err(reason) => return Err(CheckpointError::Unreadable { path: dir.to_owned(), reason }),
        }
        check_links(dir)?;
        let (config, family) = read_config(dir, families)?;
        let stored = StoredTensors::open(dir, Shard::map)?;
        let checkpoint = Checkpoint::of(Origin { config, names: family.names, stored, is_preset: false })?;
        checkpoint.log_extra();
        Ok(checkpoint)
    }

    /// A preset's configuration with dummy weights, which are the same each time.
    ///
    /// # Errors
    /// No preset is called so.
    pub fn preset(name: &str, families: &[&Family]) -> Result<Checkpoint, CheckpointError> {
        let name = || name.to_owned();
        let Some(found) = presets::config(&name(), families) else {
            let presets = presets::names(families).collect::<Vec<_>>().join(", ");
            return Err(CheckpointError::NoPreset { name: name(), presets });
        };
        let (config, family) = found.map_err(|reason| CheckpointError::Preset { name: name(), reason })?;
        let stored = StoredTensors::default();
        Checkpoint::of(Origin { config, names: family.names, stored, is_preset: true })
    }

    /// Finds each tensor of the configuration, and checks it.
    fn of(origin: Origin) -> Result<Checkpoint, CheckpointError> {
        let Origin { config, names, stored, is_preset } = &origin;
        let has = |name: &str| stored.shards.contains_key(name);
        let find = |name: &str, shape| match *is_preset && !has(name) {
            true => Ok(presets::dummy(name, shape, config.spec.norm)),
            false => stored.tensor(name, shape, config.quantization.as_ref()),
        };
        // Dummies are stacked.
        let mut tensors = Tensors::collect(&config.spec, names, |name| *is_preset || has(name), find)?;
        presets::divide_routers(&mut tensors);
        check_stacks(&tensors)?;
        let config = config.clone();
        Ok(Checkpoint { config, tensors, origin: Arc::new(origin), plain_inputs: false, quantized: false })
    }

    /// The checkpoint that it is with these tensors in the place of its own, checked as one that is opened: tensors that are
    /// given count together with those that are not.
    ///
    /// # Errors
    /// Names the tensor that is not as it must be, or that the model does not have. What it leaves aside when it is opened
    /// (the head of a model whose head is tied to the embedding) may be given.
    pub fn updated(&self, update: WeightUpdate) -> Result<Checkpoint, CheckpointError> {
        let WeightUpdate { stored: given, model } = update;
        if let Some((path, config)) = model
            && config.spec != self.origin.config.spec
        {
            return Err(CheckpointError::OtherModel(path));
        }
        let mut origin = Origin::clone(&self.origin);
        origin.stored.shards.extend(given.shards.clone());
        let updated = Checkpoint::of(origin)?;
        let used = updated.used();
        let unknown = |name: &&String| !used.contains(name.as_str()) && !updated.leaves_aside(name);
        if let Some(name) = given.shards.keys().find(unknown) {
            let path = given.shards[name].path().to_owned();
            let example = updated.tensors.norm.name.clone();
            return Err(CheckpointError::UnknownTensor { name: name.clone(), path, example });
        }
        // A decoder's body, which had no head, may be given all else.
        if let (None, Some(head), Some(given)) =
            (&self.tensors.head, &updated.tensors.head, given.shards.get(HEAD))
        {
            return Err(CheckpointError::HeadGiven {
                name: head.name.clone(),
                path: given.path().to_owned(),
            });
        }
        let updated = if self.quantized { updated.quantized_like(self)? } else { updated };
        let updated = if self.plain_inputs { updated.with_plain_inputs() } else { updated };
        Ok(updated.with_kv(self.config.spec.kv))
    }

    /// The tensors as they are stored, whatever was made of them.
    pub(crate) fn stored(&self) -> Result<Tensors, CheckpointError> {
        Ok(Checkpoint::of(Origin::clone(&self.origin))?.tensors)
    }

    /// Names of the tensors whose elements, or how they are read, are others than in `before`.
    pub fn changed_since(&self, before: &Checkpoint) -> HashSet<String> {
        // Several are of one name where the checkpoint has them in one.
        let mut named: HashMap<&str, Vec<&HostTensor>> = HashMap::new();
        for tensor in before.tensors.iter() {
            named.entry(&tensor.name).or_default().push(tensor);
        }
        let is_same = |tensor: &&HostTensor| {
            named.get(tensor.name.as_str()).is_some_and(|others| others.iter().any(|it| tensor.is_same(it)))
        };
        self.tensors.iter().filter(|tensor| !is_same(tensor)).map(|tensor| tensor.name.clone()).collect()
    }

    /// Is every matrix in fp8 that is in `before`, with scales for the same blocks, and no other? A device may have room for
    /// nothing else where it is.
    ///
    /// # Errors
    /// Names one that is in another form.
    pub fn keeps_forms(&self, before: &Checkpoint) -> Result<(), CheckpointError> {
        let form = |tensor: &HostTensor| match &tensor.data {
            TensorData::Fp8 { scales, .. } => Some(scales.block),
            _ => None,
        };
        match before.tensors.iter().zip(self.tensors.iter()).find(|(old, new)| form(old) != form(new)) {
            Some((old, new)) => {
                let what = match (form(old), form(new)) {
                    (Some(_), None) => "unquantized, and the model has it in fp8",
                    (None, _) => "in fp8, and the model has it unquantized",
                    (Some(_), Some(_)) => "with scales for other blocks than the model has it with",
                };
                Err(CheckpointError::OtherForm { name: new.name.clone(), what })
            }
            None => Ok(()),
        }
    }

    /// Names of all stored tensors that it is made from, scales included.
    fn used(&self) -> HashSet<String> {
        let quantization = self.origin.config.quantization.as_ref();
        let names = self.tensors.iter().flat_map(|tensor| {
            let scales = match (&tensor.data, quantization) {
                (TensorData::Fp8 { .. }, Some(quantization)) => {
                    [quantization.scales, INPUT_SCALE].map(|scales| Some(beside(&tensor.name, scales)))
                }
                _ => [None, None],
            };
            [Some(tensor.name.clone())].into_iter().chain(scales).flatten()
        });
        names.collect()
    }

    /// Is it nothing that the model misses, though checkpoints have it?
    fn leaves_aside(&self, name: &str) -> bool {
        self.config.spec.tied && name == HEAD || name.ends_with(".rotary_emb.inv_freq")
    }

    /// Tensors that the model does not have are no error (a tied checkpoint may store its head), but worth a line.
    fn log_extra(&self) {
        let used = self.used();
        for (name, shard) in self.origin.stored.shards.iter().filter(|(name, _)| !used.contains(*name)) {
            let file = shard.path().display();
            tracing::debug!("ignoring tensor {name} of {file}: the model has none of that name");
        }
    }

    /// Leaves what e4m3 matrices are applied to as it is, whatever the checkpoint says: more exact, and slower where
    /// operations count.
    pub fn with_plain_inputs(mut self) -> Checkpoint {
        self.plain_inputs = true;
        if let WeightFormat::Fp8(format) = &mut self.config.spec.weights {
            format.inputs = Inputs::Plain;
            self.tensors.matrices_mut().for_each(|tensor| {
                if let TensorData::Fp8 { scales, .. } = &mut tensor.data {
                    Arc::make_mut(scales).inputs = Inputs::Plain;
                }
            });
        }
        self
    }

    /// Keeps keys and values in this format; `None`: in the device's own.
    pub fn with_kv(mut self, format: Option<KvFormat>) -> Checkpoint {
        self.config.spec.kv = format;
        self
    }

    /// What the configuration files say.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weights.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }
}

/// Are the inputs of what is stacked rounded alike?
fn check_stacks(tensors: &Tensors) -> Result<(), CheckpointError> {
    let rounding = |tensor: &HostTensor| match &tensor.data {
        TensorData::Fp8 { scales, .. } if scales.inputs != Inputs::Plain => {
            Some((scales.inputs, scales.input_scale))
        }
        _ => None,
    };
    for stack in tensors.stacks() {
        let Some((first, rest)) = stack.split_first() else { continue };
        if let Some(odd) = rest.iter().find(|tensor| rounding(tensor) != rounding(first)) {
            return Err(CheckpointError::MixedStack { name: odd.name.clone(), other: first.name.clone() });
        }
    }
    Ok(())
}
