//! The flags of `chat` and `serve-bench`, held against the tables of the docs.

#[path = "../../tests/common/flag_tables.rs"]
mod flag_tables;

use std::fs;
use std::process::Command;

use flag_tables::{assert_documented, part};

fn help(program: &str) -> String {
    let output = Command::new(program).arg("--help").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn repository(path: &str) -> String {
    fs::read_to_string(format!("{}/../{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn the_docs_tables_have_every_flag_and_its_default() {
    let (flags, clients) = (repository("docs/flags.md"), repository("docs/clients.md"));
    let shared = part(&flags, "Of `offline-bench`, `generate`", "## ");
    let (chat, serve_bench) = clients.split_once("\n## serve-bench").unwrap();
    assert_documented(&help(env!("CARGO_BIN_EXE_chat")), &[shared, chat]);
    assert_documented(&help(env!("CARGO_BIN_EXE_serve-bench")), &[serve_bench]);
}
