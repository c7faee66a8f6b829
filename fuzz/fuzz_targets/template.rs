//! A chat template: one that compiles renders a conversation, or says why it doesn't.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use minisgl::{ChatPrompt, Message, Text};
use minisgl_fuzz::Folder;

static FOLDER: LazyLock<Folder> = LazyLock::new(|| Folder::new(&[]));

fuzz_target!(|template: &[u8]| {
    FOLDER.write("chat_template.jinja", template);
    if let Ok(text) = Text::open(FOLDER.path()) {
        let _ = text.render(&ChatPrompt::new([Message::new("user", "Größe: 🦀")]));
    }
});
