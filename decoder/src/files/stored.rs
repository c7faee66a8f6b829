//! Stored tensors by their names, each in the file that has it.
//!
//! The only file has all of them, or an index says which file has which, or no two files may have the same. Scales of e4m3 are found
//! beside their matrix.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use minisgl_core::spec::{Inputs, ScaleBlock};
use minisgl_core::tensor::{HostTensor, Scales};
use serde_json::Value;

use crate::error::CheckpointError;
use crate::folder::{file_names, other_layout, without};
use crate::quantization::{INPUT_SCALE, Quantization};
use crate::safetensors::{Numbers, Shard};
use crate::tensors::Shape;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// See the module.
#[derive(Clone, Default)]
pub(crate) struct StoredTensors {
    /// What says where tensors are: the only file, the index, or the directory.
    pub place: PathBuf,
    /// What has each tensor.
    pub shards: BTreeMap<String, Arc<Shard>>,
}

impl fmt::Debug for StoredTensors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tensors of {}", self.shards.len(), self.place.display())
    }
}

/// How a file is opened.
pub(crate) type OpenShard = fn(&Path) -> Result<Shard, CheckpointError>;

impl StoredTensors {
    /// Those of a directory.
    pub fn open(dir: &Path, open: OpenShard) -> Result<StoredTensors, CheckpointError> {
        if dir.join(SINGLE).exists() {
            let stored = StoredTensors::listed(dir, [SINGLE.to_owned()], open)?;
            return Ok(StoredTensors { place: dir.join(SINGLE), ..stored });
        }
        if dir.join(INDEX).exists() {
            return StoredTensors::indexed(dir, open);
        }
        let is_shard = |name: &String| name.ends_with(".safetensors") && other_layout(name).is_none();
        let (shards, others): (Vec<_>, Vec<_>) = file_names(dir)?.into_iter().partition(is_shard);
        if shards.is_empty() {
            return Err(without(dir, &others, "model.safetensors or model.safetensors.index.json"));
        }
        check_count(dir, &shards)?;
        StoredTensors::listed(dir, shards, open)
    }

    /// The shards that the index names, each tensor in the one that it says.
    fn indexed(dir: &Path, open: OpenShard) -> Result<StoredTensors, CheckpointError> {
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
        Ok(StoredTensors { place: index, shards })
    }

    /// These files, each tensor in the one that has it.
    fn listed(
        dir: &Path,
        names: impl IntoIterator<Item = String>,
        open: OpenShard,
    ) -> Result<StoredTensors, CheckpointError> {
        let mut stored = StoredTensors { place: dir.to_owned(), shards: BTreeMap::new() };
        for file in names {
            let shard = Arc::new(open(&dir.join(&file))?);
            for name in shard.names() {
                if let Some(first) = stored.shards.insert(name.clone(), shard.clone()) {
                    let first = first.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
                    let (dir, second) = (dir.to_owned(), file);
                    return Err(CheckpointError::TensorTwice { name, dir, first, second });
                }
            }
        }
        Ok(stored)
    }

    /// A tensor of this shape, with its scales where it is e4m3.
    pub fn tensor(
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
pub(crate) fn beside(matrix: &str, name: &str) -> String {
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
