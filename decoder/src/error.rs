//! Why there is no model: a configuration that makes none, or files that contradict it. Each names its file, and the field or tensor.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A configuration that makes no model.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ConfigError {
    /// Not JSON.
    #[error("not valid JSON: {0}")]
    Json(String),
    /// JSON, but no object.
    #[error("expected a JSON object, found {0}")]
    NoObject(&'static str),
    /// A field that must be there is not.
    #[error("the field `{field}` is missing")]
    Missing {
        /// Its name.
        field: String,
    },
    /// A field of another type.
    #[error("the field `{field}` must be {expected}, but is {found}")]
    Type {
        /// Its name.
        field: String,
        /// What it must be.
        expected: &'static str,
        /// Its value.
        found: String,
    },
    /// A model that would be computed wrongly.
    #[error("the field `{field}` is {value}, which is not supported; only {supported} is")]
    Unsupported {
        /// Its name.
        field: String,
        /// Its value.
        value: String,
        /// What is supported.
        supported: String,
    },
    /// Weights in a format that no backend reads.
    #[error(
        "checkpoints quantized in this way are not supported (`{field}` is {value}); take the model's checkpoint in \
         bfloat16, float16 or float32, or in fp8 (`fp8` or `compressed-tensors`)"
    )]
    Quantized {
        /// The field that says so.
        field: String,
        /// Its value.
        value: String,
    },
    /// A number out of range.
    #[error("the field `{field}` is {value}; it must be {range}")]
    Range {
        /// Its name.
        field: String,
        /// Its value.
        value: String,
        /// The numbers that it can be.
        range: String,
    },
}

/// Why a directory is no checkpoint of this model.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// No such directory.
    #[error("the checkpoint directory {} does not exist", .0.display())]
    NoDirectory(PathBuf),
    /// A file where a directory should be.
    #[error("{} is not a directory; give the directory that holds config.json and the weights", .0.display())]
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
    /// Files of something else than a model in Hugging Face's layout.
    #[error("{} has {file}, which {what}", dir.display())]
    OtherLayout {
        /// The checkpoint's directory.
        dir: PathBuf,
        /// The file that shows it.
        file: String,
        /// What it is, and what to do.
        what: &'static str,
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
        "tensor `{name}` is in {first} and in {second}, and {} has no model.safetensors.index.json to say which counts; remove the file \
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
    #[error("tensor `{name}` in {} has shape {shape:?}; config.json calls for {expected:?}", path.display())]
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
         matrices where config.json has a `quantization_config`: take the model's checkpoint in one of these", path.display())]
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
    /// A matrix that is given in another form than the device has it in.
    #[error(
        "tensor `{name}` is given {what}: give it as the checkpoint has it, or build another engine for it"
    )]
    OtherForm {
        /// Its name.
        name: String,
        /// In which form it is given, and in which the model has it.
        what: &'static str,
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
