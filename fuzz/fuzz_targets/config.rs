//! A config.json beside good weights.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl_fuzz::{Folder, open};

static FOLDER: LazyLock<Folder> = LazyLock::new(|| {
    Folder::new(&[("model.safetensors", include_bytes!("../../tests/fixtures/tiny-tied/model.safetensors"))])
});

fuzz_target!(|config: &[u8]| {
    FOLDER.write("config.json", config);
    FOLDER.write("generation_config.json", config);
    open(&FOLDER);
});
