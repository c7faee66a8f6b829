//! A checkpoint directory in Hugging Face layout, checked whole before anything goes to a device.
//!
//! ```text
//!   DIR/config.json
//!       generation_config.json          may be absent
//!       model.safetensors                                                     or
//!       model.safetensors.index.json -> model-00001-of-0000N.safetensors, …   or
//!       *.safetensors                   without an index: all of them
//! ```
//!
//! Files may be links, as in Hugging Face's cache; one that leads nowhere is named before anything is read.
//!
//! Invariant: a [`Checkpoint`] has every tensor of its configuration, in shape, type and bytes; so loading one can
//! fail only on the device.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{Inputs, ScaleBlock, WeightFormat};
use minisgl_core::tensor::{HostTensor, Scales, TensorData};
use serde_json::Value;
use thiserror::Error;

use crate::config::{Config, ConfigError};
use crate::family::{Family, LayerNames};
use crate::presets;
use crate::quantization::{INPUT_SCALE, Quantization};
use crate::safetensors::{Numbers, Shard};
use crate::tensors::{HEAD, Shape, Tensors};
use crate::update::WeightUpdate;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

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
    weights: Weights,
    /// Tensors that `weights` lacks are dummies.
    is_preset: bool,
}

/// Why a directory is no checkpoint of this model.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// No such directory.
    #[error("the checkpoint directory {} does not exist", .0.display())]
    NoDirectory(PathBuf),
    /// A file where a directory should be.
    #[error("{} is not a directory; give the directory that holds {CONFIG} and the weights", .0.display())]
    NotADirectory(PathBuf),
    /// Something a checkpoint has is not there.
    #[error("{} has no {file}; is the download complete?", dir.display())]
    NoFile {
        /// The checkpoint's directory.
        dir: PathBuf,
        /// What is missing.
        file: &'static str,
    },
    /// A link whose target is gone.
    #[error(
        "{} is a link to {}, which does not exist; restore that file or download the checkpoint again",
        path.display(), target.display()
    )]
    DanglingLink {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// The operating system refuses.
    #[error("{} can't be read: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What it says.
        reason: io::Error,
    },
    /// A configuration that makes no model.
    #[error("{}: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: ConfigError,
    },
    /// A file whose contents contradict themselves.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The index names a file that is not there.
    #[error("{} puts tensor `{name}` into {shard}, which does not exist", index.display())]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// One of the file's tensors.
        name: String,
        /// The file's name.
        shard: String,
    },
    /// Weights in files of another kind.
    #[error("{} has its weights in {file}; only *.safetensors are read: convert it, or take a checkpoint in that format", dir.display())]
    OtherFormat {
        /// The checkpoint's directory.
        dir: PathBuf,
        /// A file of weights.
        file: String,
    },
    /// One of several files, by their own count, is not there.
    #[error("{} has {present}, but no {missing}; is the download complete?", dir.display())]
    IncompleteShards {
        /// The checkpoint's directory.
        dir: PathBuf,
        /// One that is there.
        present: String,
        /// The first that is not.
        missing: String,
    },
    /// Two files have it, and no index says which counts.
    #[error(
        "tensor `{name}` is in {first} and in {second}, and {} has no {INDEX} to say which counts; remove the file \
         that does not belong to the model",
        dir.display()
    )]
    TensorTwice {
        /// Its name.
        name: String,
        /// The checkpoint's directory.
        dir: PathBuf,
        /// A file that has it.
        first: String,
        /// Another one.
        second: String,
    },
    /// A tensor is nowhere.
    #[error("tensor `{name}` is missing from {}", path.display())]
    MissingTensor {
        /// Its name.
        name: String,
        /// Where it should be.
        path: PathBuf,
    },
    /// A tensor contradicts the configuration.
    #[error("tensor `{name}` in {} has shape {shape:?}; {CONFIG} calls for {expected:?}", path.display())]
    WrongShape {
        /// Its name.
        name: String,
        /// Its file.
        path: PathBuf,
        /// Its shape.
        shape: Vec<usize>,
        /// By the configuration.
        expected: Vec<usize>,
    },
    /// Elements that no backend reads.
    #[error("tensor `{name}` in {} has elements of type {dtype}; BF16, F16 and F32 are supported, and F8_E4M3 for \
         matrices where {CONFIG} has a `quantization_config`", path.display())]
    WrongDtype {
        /// Its name.
        name: String,
        /// Its file.
        path: PathBuf,
        /// Its elements.
        dtype: String,
    },
    /// Two of one matrix, or of one matrix's experts, want the same inputs rounded in different ways.
    #[error(
        "the inputs of tensor `{name}` are quantized in another way than those of `{other}`, which it is stacked on; \
         both must be of one format"
    )]
    MixedStack {
        /// Its name.
        name: String,
        /// That of the first of the stack.
        other: String,
    },
    /// Elements of two of the matrices in a tensor share a scale.
    #[error(
        "tensor `{name}` in {} has several matrices in one, and the one from row {row} on begins within a tile of {tile} \
         rows that share a scale; take the model's checkpoint in bfloat16",
        path.display()
    )]
    SplitTile {
        /// Its name.
        name: String,
        /// Its file.
        path: PathBuf,
        /// First row of the second matrix.
        row: usize,
        /// Rows of a tile.
        tile: usize,
    },
    /// A tensor that is given in an update, and nobody knows.
    #[error("tensor `{name}` in {} is none of the model's; give tensors by the names that its checkpoint has, like \
         `{example}`", path.display())]
    UnknownTensor {
        /// Its name.
        name: String,
        /// Where it is given.
        path: PathBuf,
        /// A name that is known.
        example: String,
    },
    /// A head that is given to a model without one.
    #[error(
        "tensor `{name}` in {} is an output layer, and the model was loaded without one: no memory was planned for it. Leave it \
         out, or load a checkpoint that has it", path.display()
    )]
    HeadGiven {
        /// Its name.
        name: String,
        /// Where it is given.
        path: PathBuf,
    },
    /// A tensor that is given twice in an update.
    #[error("tensor `{0}` is given twice; give each once")]
    GivenTwice(String),
    /// Weights of a folder whose configuration is another.
    #[error("{} is of another model than the one whose weights are to be updated; build another engine for it", .0.display())]
    OtherModel(PathBuf),
    /// A scale that no element can be multiplied by.
    #[error("tensor `{name}` in {} has a scale of {scale}; scales are finite and not below 0, \
         those of inputs above: the file is damaged", path.display())]
    WrongScale {
        /// Its name.
        name: String,
        /// Its file.
        path: PathBuf,
        /// The first such.
        scale: f32,
    },
    /// No preset is called so.
    #[error("there is no preset `{name}`; there are {presets}")]
    NoPreset {
        /// As asked for.
        name: String,
        /// Those that there are.
        presets: String,
    },
    /// A preset that its own family does not read.
    #[error("the preset `{name}` is wrong: {reason}")]
    Preset {
        /// Its name.
        name: String,
        /// What is wrong with it.
        reason: ConfigError,
    },
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
        let weights = Weights::open(dir, Shard::map)?;
        let checkpoint = Checkpoint::of(Origin { config, names: family.names, weights, is_preset: false })?;
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
        let weights = Weights::default();
        Checkpoint::of(Origin { config, names: family.names, weights, is_preset: true })
    }

    /// Finds each tensor of the configuration, and checks it.
    fn of(origin: Origin) -> Result<Checkpoint, CheckpointError> {
        let Origin { config, names, weights, is_preset } = &origin;
        let has = |name: &str| weights.shards.contains_key(name);
        let find = |name: &str, shape| match *is_preset && !has(name) {
            true => Ok(presets::dummy(name, shape, config.spec.norm)),
            false => weights.tensor(name, shape, config.quantization.as_ref()),
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
        let WeightUpdate { weights: given, model } = update;
        if let Some((path, config)) = model
            && config.spec != self.origin.config.spec
        {
            return Err(CheckpointError::OtherModel(path));
        }
        let mut origin = Origin::clone(&self.origin);
        origin.weights.shards.extend(given.shards.clone());
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
        for (name, shard) in self.origin.weights.shards.iter().filter(|(name, _)| !used.contains(*name)) {
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

/// Reads the configuration of a checkpoint's directory, and says of which family it is.
pub(crate) fn read_config<'a>(
    dir: &Path,
    families: &[&'a Family],
) -> Result<(Config, &'a Family), CheckpointError> {
    let read = |file: &'static str| match fs::read(dir.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(reason) => Err(CheckpointError::Unreadable { path: dir.join(file), reason }),
    };
    let in_file = |file: &str, reason| CheckpointError::Config { path: dir.join(file), reason };
    let text = read(CONFIG)?.ok_or(CheckpointError::NoFile { dir: dir.to_owned(), file: CONFIG })?;
    let (config, family) = Config::from_json(&text, families).map_err(|reason| in_file(CONFIG, reason))?;
    match read(GENERATION_CONFIG)? {
        Some(text) => config
            .with_generation_config(&text)
            .map(|config| (config, family))
            .map_err(|reason| in_file(GENERATION_CONFIG, reason)),
        None => Ok((config, family)),
    }
}

/// Refuses links that lead nowhere among the files that a checkpoint is made of; others are nobody's business.
fn check_links(dir: &Path) -> Result<(), CheckpointError> {
    for name in file_names(dir)? {
        if [".json", ".safetensors", ".jinja"].iter().any(|end| name.ends_with(end)) {
            check_link(&dir.join(name))?;
        }
    }
    Ok(())
}

fn check_link(path: &Path) -> Result<(), CheckpointError> {
    match fs::read_link(path) {
        Ok(target) if !path.exists() => Err(CheckpointError::DanglingLink { path: path.to_owned(), target }),
        _ => Ok(()),
    }
}

/// Names of the directory's entries, in order; those that are no text are nobody's checkpoint.
fn file_names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let unreadable = |reason| CheckpointError::Unreadable { path: dir.to_owned(), reason };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        names.extend(entry.map_err(unreadable)?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Stored tensors by their names.
#[derive(Clone, Default)]
pub(crate) struct Weights {
    /// What says where tensors are: the only file, the index, or the directory.
    pub place: PathBuf,
    /// What has each tensor.
    pub shards: BTreeMap<String, Arc<Shard>>,
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors of {}", self.shards.len(), self.place.display())
    }
}

/// How a file is opened.
pub(crate) type OpenShard = fn(&Path) -> Result<Shard, CheckpointError>;

impl Weights {
    /// Those of a directory.
    pub fn open(dir: &Path, open: OpenShard) -> Result<Weights, CheckpointError> {
        if dir.join(SINGLE).exists() {
            let weights = Weights::listed(dir, [SINGLE.to_owned()], open)?;
            return Ok(Weights { place: dir.join(SINGLE), ..weights });
        }
        if dir.join(INDEX).exists() {
            return Weights::indexed(dir, open);
        }
        let (shards, others): (Vec<_>, Vec<_>) =
            file_names(dir)?.into_iter().partition(|name| name.ends_with(".safetensors"));
        if shards.is_empty() {
            let dir = dir.to_owned();
            let is_other =
                |name: &String| [".bin", ".pth", ".pt", ".gguf"].iter().any(|end| name.ends_with(end));
            return Err(match others.into_iter().find(is_other) {
                Some(file) => CheckpointError::OtherFormat { dir, file },
                None => {
                    CheckpointError::NoFile { dir, file: "model.safetensors or model.safetensors.index.json" }
                }
            });
        }
        check_count(dir, &shards)?;
        Weights::listed(dir, shards, open)
    }

    /// The shards that the index names, each tensor in the one that it says.
    fn indexed(dir: &Path, open: OpenShard) -> Result<Weights, CheckpointError> {
        let index = dir.join(INDEX);
        let mut opened: HashMap<String, Arc<Shard>> = HashMap::new();
        let mut shards = BTreeMap::new();
        for (name, file) in read_index(&index)? {
            let shard = match opened.get(&file) {
                Some(shard) => shard.clone(),
                None if !dir.join(&file).exists() => {
                    return Err(CheckpointError::MissingShard { index, name, shard: file });
                }
                None => {
                    let shard = Arc::new(open(&dir.join(&file))?);
                    opened.insert(file, shard.clone());
                    shard
                }
            };
            shards.insert(name, shard);
        }
        Ok(Weights { place: index, shards })
    }

    /// These files, each tensor in the one that has it.
    fn listed(
        dir: &Path,
        names: impl IntoIterator<Item = String>,
        open: OpenShard,
    ) -> Result<Weights, CheckpointError> {
        let mut weights = Weights { place: dir.to_owned(), shards: BTreeMap::new() };
        for file in names {
            let shard = Arc::new(open(&dir.join(&file))?);
            for name in shard.names() {
                if let Some(first) = weights.shards.insert(name.clone(), shard.clone()) {
                    let first = first.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
                    let (dir, second) = (dir.to_owned(), file);
                    return Err(CheckpointError::TensorTwice { name, dir, first, second });
                }
            }
        }
        Ok(weights)
    }

    fn tensor(
        &self,
        name: &str,
        shape: Shape,
        quantization: Option<&Quantization>,
    ) -> Result<HostTensor, CheckpointError> {
        let shard = self.shard(name)?;
        let scales = || match (quantization, shape) {
            (Some(quantization), Shape::Matrix(rows, cols)) => {
                self.scales(name, [rows, cols], quantization).map(Some)
            }
            (Some(quantization), Shape::Part { first, rows, of, cols }) => {
                let all = self.scales(name, [of, cols], quantization)?;
                let split = || CheckpointError::SplitTile {
                    name: name.to_owned(),
                    path: shard.path().to_owned(),
                    row: first,
                    tile: all.block[0],
                };
                all.of_rows(first..first + rows, [of, cols]).ok_or_else(split).map(Some)
            }
            _ => Ok(None),
        };
        shard.tensor(name, shape, scales)?.ok_or_else(|| missing(name, shard.path()))
    }

    /// The file that has a tensor.
    fn shard(&self, name: &str) -> Result<&Shard, CheckpointError> {
        self.shards.get(name).map(|shard| &**shard).ok_or_else(|| missing(name, &self.place))
    }

    /// The scales of an e4m3 matrix.
    fn scales(
        &self,
        matrix: &str,
        [rows, cols]: [usize; 2],
        quantization: &Quantization,
    ) -> Result<Scales, CheckpointError> {
        let format = quantization.format;
        let block = match format.block {
            ScaleBlock::Matrix => [rows, cols],
            ScaleBlock::Row => [1, cols],
            ScaleBlock::Tile { rows, cols } => [rows as usize, cols as usize],
        };
        let shape = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
        let values = self.numbers(&beside(matrix, quantization.scales), &shape)?;
        let input_scale = match format.inputs {
            Inputs::Static => Some(self.input_scale(&beside(matrix, INPUT_SCALE))?),
            Inputs::Plain | Inputs::PerToken | Inputs::PerGroup(_) => None,
        };
        Ok(Scales { values, block, inputs: format.inputs, input_scale })
    }

    /// The scale of static inputs: they are divided by it.
    fn input_scale(&self, name: &str) -> Result<f32, CheckpointError> {
        match self.numbers(name, &[1, 1])?[..] {
            [scale] if scale > 0.0 => Ok(scale),
            _ => Err(CheckpointError::WrongScale {
                name: name.to_owned(),
                path: self.shard(name)?.path().to_owned(),
                scale: 0.0,
            }),
        }
    }

    /// Scales by name, of this shape but for dimensions of 1, which files have or leave out.
    fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let shard = self.shard(name)?;
        let Numbers { shape: stored, values } =
            shard.numbers(name)?.ok_or_else(|| missing(name, shard.path()))?;
        let long = |shape: &[usize]| shape.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
        let (name, path) = (name.to_owned(), shard.path().to_owned());
        if long(&stored) != long(shape) {
            return Err(CheckpointError::WrongShape { name, path, shape: stored, expected: shape.to_vec() });
        }
        match values.iter().find(|scale| !(scale.is_finite() && **scale >= 0.0)) {
            Some(&scale) => Err(CheckpointError::WrongScale { name, path, scale }),
            None => Ok(values),
        }
    }
}

/// What belongs to a matrix, by its name.
fn beside(matrix: &str, name: &str) -> String {
    format!("{}{name}", matrix.strip_suffix("weight").unwrap_or(matrix))
}

fn missing(name: &str, path: &Path) -> CheckpointError {
    CheckpointError::MissingTensor { name: name.to_owned(), path: path.to_owned() }
}

/// Are all of `NAME-00001-of-0000N.safetensors` there, where files are called so?
fn check_count(dir: &Path, shards: &[String]) -> Result<(), CheckpointError> {
    for present in shards {
        let Some((series, count)) = series(present) else { continue };
        let (width, count) = (count.len(), count.parse::<u32>().unwrap_or(0));
        let names = (1..=count).map(|i| format!("{series}-{i:0width$}-of-{count:0width$}.safetensors"));
        if let Some(missing) = names.into_iter().find(|name| !shards.contains(name)) {
            let (dir, present) = (dir.to_owned(), present.clone());
            return Err(CheckpointError::IncompleteShards { dir, present, missing });
        }
    }
    Ok(())
}

/// `NAME` and `0000N` of `NAME-00001-of-0000N.safetensors`.
fn series(file: &str) -> Option<(&str, &str)> {
    let (start, count) = file.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (series, number) = start.rsplit_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(number) && is_number(count)).then_some((series, count))
}

/// The file of each tensor: the index's `weight_map`, whose files lie beside it.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let malformed = |reason: String| CheckpointError::Malformed { path: path.to_owned(), reason };
    let text =
        fs::read(path).map_err(|reason| CheckpointError::Unreadable { path: path.to_owned(), reason })?;
    let index: Value =
        serde_json::from_slice(&text).map_err(|error| malformed(format!("not valid JSON: {error}")))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| malformed("the object `weight_map` is missing".to_owned()))?;
    map.iter()
        .map(|(name, file)| match file.as_str() {
            Some(file) if is_file_name(file) => Ok((name.clone(), file.to_owned())),
            _ => Err(malformed(format!(
                "`weight_map` puts tensor `{name}` into {file}, which is not the name of a file beside the index"
            ))),
        })
        .collect()
}

/// A plain name: no directory, no `..`, no root.
fn is_file_name(file: &str) -> bool {
    let mut components = Path::new(file).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == file)
}
