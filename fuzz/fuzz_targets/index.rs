//! A model.safetensors.index.json beside good shards and a good config.json: one that opens names files beside it alone.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl_fuzz::{Folder, open};
use serde_json::Value;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    Folder::new(&[
        ("config.json", include_bytes!("../../tests/fixtures/mistral-window/config.json")),
        (
            "model-00001-of-00002.safetensors",
            include_bytes!("../../tests/fixtures/mistral-window/model-00001-of-00002.safetensors"),
        ),
        (
            "model-00002-of-00002.safetensors",
            include_bytes!("../../tests/fixtures/mistral-window/model-00002-of-00002.safetensors"),
        ),
    ])
});

fuzz_target!(|index: &[u8]| {
    FOLDER.write("model.safetensors.index.json", index);
    if open(&FOLDER) {
        let index: Value = serde_json::from_slice(index).unwrap();
        for file in index["weight_map"].as_object().unwrap().values() {
            let file = file.as_str().unwrap();
            assert_eq!(Path::new(file).file_name().unwrap(), file, "outside the folder");
        }
    }
});
