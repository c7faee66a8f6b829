//! A file of weights beside a good config.json.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl_fuzz::{Folder, open};

static FOLDER: LazyLock<Folder> =
    LazyLock::new(|| Folder::new(&[("config.json", include_bytes!("../../tests/fixtures/tiny-tied/config.json"))]));

fuzz_target!(|weights: &[u8]| {
    FOLDER.write("model.safetensors", weights);
    open(&FOLDER);
});
