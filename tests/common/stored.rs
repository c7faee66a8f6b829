//! The tensors of golden checkpoints, to make other checkpoints of.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use minisgl::Dtype;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::fixture;

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
