//! A model.safetensors.index.json beside good shards and a good config.json: one that opens names files beside it alone, which are
//! those that are fetched by it; whatever it is, nothing is fetched to another place.
#![no_main]

// By its path: the rest of the hub's client would bring TLS along.
#[allow(dead_code)]
#[path = "../../hub/src/index.rs"]
mod fetched;

use std::collections::BTreeSet;
use std::path::{Component, Path};
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
    let fetched = fetched::shards(index);
    for file in fetched.iter().flatten() {
        assert!(
            Path::new(file).components().all(|part| matches!(part, Component::Normal(_))),
            "{file} is elsewhere"
        );
    }
    FOLDER.write("model.safetensors.index.json", index);
    if open(&FOLDER) {
        let index: Value = serde_json::from_slice(index).unwrap();
        let files: BTreeSet<&str> =
            index["weight_map"].as_object().unwrap().values().map(|file| file.as_str().unwrap()).collect();
        assert!(files.iter().all(|file| Path::new(file).file_name().unwrap() == *file), "outside the folder");
        assert!(fetched.unwrap().iter().eq(&files), "not all of them are fetched");
    }
});
