//! The tensors of golden checkpoints, to make other checkpoints of.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use minisgl::{Dtype, NamedTensor};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::{Numbers, Scratch, fixture};

/// Tensors by name.
pub type Tensors = BTreeMap<String, Stored>;

/// A tensor as a file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

fn is_weights(file: &str) -> bool {
    file.starts_with("model") && file.ends_with(".safetensors")
}

/// All tensors of a golden checkpoint.
pub fn stored(name: &str) -> Tensors {
    let mut tensors = Tensors::new();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        if is_weights(path.file_name().unwrap().to_str().unwrap()) {
            let bytes = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let (shape, bytes) = (view.shape().to_vec(), view.data().to_vec());
                tensors.insert(name, Stored { dtype: view.dtype(), shape, bytes });
            }
        }
    }
    tensors
}

/// Writes a file of them.
pub fn write(tensors: &Tensors, path: &Path) {
    let views = tensors.iter().map(|(name, Stored { dtype, shape, bytes })| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// What training might make of a tensor: about one element in three is another, by up to an eighth.
pub fn trained(tensor: &Stored, numbers: &mut Numbers) -> Stored {
    let mut new = tensor.clone();
    let (size, low_bits) = match tensor.dtype {
        Dtype::F8_E4M3 => (1, 0x01),
        Dtype::BF16 => (2, 0x0f),
        Dtype::F32 => (4, 0x000f_ffff),
        other => panic!("no fixture has {other}"),
    };
    for element in new.bytes.chunks_exact_mut(size) {
        if numbers.below(3) > 0 {
            continue;
        }
        let mut word = [0; 4];
        word[..size].copy_from_slice(element);
        let bits = u32::from_le_bytes(word);
        let is_largest = size == 1 && bits & 0x7e == 0x7e; // The next one is no number.
        let changed = if is_largest { bits } else { bits ^ (1 + numbers.below(low_bits) as u32) };
        element.copy_from_slice(&changed.to_le_bytes()[..size]);
    }
    new
}

/// What it might make of all.
pub fn all_trained(tensors: &Tensors, seed: u64) -> Tensors {
    let mut numbers = Numbers(seed);
    tensors.iter().map(|(name, tensor)| (name.clone(), trained(tensor, &mut numbers))).collect()
}

/// As an engine is given them.
pub fn given(tensors: &Tensors) -> Vec<NamedTensor> {
    let given = tensors.iter().map(|(name, Stored { dtype, shape, bytes })| {
        let (name, shape, bytes) = (name.clone(), shape.clone(), Arc::new(bytes.clone()));
        NamedTensor { name, dtype: *dtype, shape, bytes }
    });
    given.collect()
}

/// A golden checkpoint with other tensors.
pub fn checkpoint(name: &str, tensors: &Tensors) -> Scratch {
    let folder = Scratch::new();
    for file in ["config.json", "generation_config.json"] {
        fs::copy(fixture(name).join(file), folder.join(file)).unwrap();
    }
    write(tensors, &folder.join("model.safetensors"));
    folder
}
