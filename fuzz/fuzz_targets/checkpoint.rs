//! What stands before the tensors' bytes in a file of weights, a length and a header; a good file's bytes and config.json beside it.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl_fuzz::{Folder, open};

const GOOD: &[u8] = include_bytes!("../../tests/fixtures/qwen3-fp8/model.safetensors");

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    Folder::new(&[("config.json", include_bytes!("../../tests/fixtures/qwen3-fp8/config.json"))])
});

fuzz_target!(|header: &[u8]| {
    let (length, rest) = GOOD.split_first_chunk().unwrap();
    let data = &rest[u64::from_le_bytes(*length) as usize..];
    FOLDER.write("model.safetensors", &[header, data].concat());
    open(&FOLDER);
});
