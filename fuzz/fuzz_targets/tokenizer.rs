//! A tokenizer.json and, behind a zero byte, a tokenizer_config.json: one that opens encodes and decodes.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl::{Prompt, Text};
use minisgl_fuzz::Folder;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| Folder::new(&[]));

fuzz_target!(|files: &[u8]| {
    let at = files.iter().position(|byte| *byte == 0).unwrap_or(files.len());
    FOLDER.write("tokenizer.json", &files[..at]);
    FOLDER.write("tokenizer_config.json", files.get(at + 1..).unwrap_or(b"{}"));
    if let Ok(text) = Text::open(FOLDER.path())
        && let Ok(ids) = text.encode(Prompt::Text("Größe: 🦀 <|im_start|> the cat".to_owned()))
    {
        text.decode(&ids);
    }
});
