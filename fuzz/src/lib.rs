//! What the fuzz targets share: a checkpoint's folder in memory whose files are written anew for each input.

use std::fs;
use std::path::{Path, PathBuf};

/// A folder of this process alone, in memory where the system has such a place.
pub struct Folder(PathBuf);

impl Folder {
    /// Made with the files that stay the same.
    pub fn new(files: &[(&str, &[u8])]) -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = Folder(parent.join(format!("minisgl-fuzz-{}", std::process::id())));
        let _ = fs::remove_dir_all(&folder.0); // Of an earlier process of this number.
        fs::create_dir_all(&folder.0).unwrap();
        files.iter().for_each(|(name, bytes)| folder.write(name, bytes));
        folder
    }

    /// A file of it.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.0.join(name), bytes).unwrap();
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// Does it open as a checkpoint? One that does has its tensors' bytes whole; one that doesn't says why.
pub fn open(folder: &Folder) -> bool {
    use minisgl_core::tensor::TensorData;
    let opened = minisgl_decoder::Checkpoint::open(folder.path(), minisgl::models::FAMILIES);
    match &opened {
        Ok(checkpoint) => {
            for tensor in checkpoint.tensors().iter() {
                if let TensorData::Bytes { owner, range, dtype } = &tensor.data {
                    let bytes = &(**owner).as_ref()[range.clone()];
                    assert_eq!(bytes.len(), tensor.rows * tensor.cols * dtype.bytes(), "{}", tensor.name);
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    opened.is_ok()
}
