//! Running the `generate` command as a user runs it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::{Scratch, fixture};

/// The command with a model and nothing else: a checkpoint in the scratch directory if there is one, else the golden one.
pub fn command(scratch: &Scratch) -> Command {
    command_within(scratch, 256)
}

/// Likewise, with sequences of so many tokens.
pub fn command_within(scratch: &Scratch, sequence: u32) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
    let model = match scratch.join("config.json").exists() {
        true => scratch.path().to_owned(),
        false => fixture("tiny-tied"),
    };
    command.arg("--model").arg(model);
    command.args(["--backend", "cpu", "--max-running", "8", "--num-pages", "64"]);
    command.arg("--max-seq-len").arg(sequence.to_string());
    command.stdin(Stdio::null());
    command
}

/// The command on two files of the scratch directory.
pub fn command_on(scratch: &Scratch, input: &str, output: &str) -> Command {
    let mut command = command(scratch);
    command.arg("--input").arg(scratch.join(input)).arg("--output").arg(scratch.join(output));
    command
}

/// Runs it from `in.jsonl` to `out.jsonl`.
pub fn generate(scratch: &Scratch, flags: &[&str]) -> Output {
    command_on(scratch, "in.jsonl", "out.jsonl").args(flags).output().unwrap()
}

/// Likewise; it must succeed.
pub fn succeed(scratch: &Scratch, flags: &[&str]) -> Output {
    let output = generate(scratch, flags);
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The text of a file, compressed or not.
pub fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap();
    let mut text = String::new();
    if bytes.is_empty() {
        return text; // As a file that a job has only opened.
    }
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_string(&mut text).map(drop),
        Some("zst") => {
            zstd::decode_all(bytes.as_slice()).map(|bytes| text = String::from_utf8(bytes).unwrap())
        }
        _ => String::from_utf8(bytes).map(|read| text = read).map_err(std::io::Error::other),
    }
    .unwrap();
    text
}

/// Compresses a text as a file's name says.
pub fn write(path: &Path, text: &str) {
    let bytes = match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(text.as_bytes()).unwrap();
            encoder.finish().unwrap()
        }
        Some("zst") => zstd::encode_all(text.as_bytes(), 3).unwrap(),
        _ => text.as_bytes().to_vec(),
    };
    fs::write(path, bytes).unwrap();
}

/// The result lines of a text, none of them torn.
pub fn parsed(text: &str) -> Vec<Value> {
    assert!(text.is_empty() || text.ends_with('\n'), "the last line is torn");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The result lines of an output.
pub fn lines(path: &Path) -> Vec<Value> {
    parsed(&read(path))
}

/// What an output has of each input line, which must be one line. What depends on the company is left out.
pub fn by_line(path: &Path) -> BTreeMap<u64, Value> {
    let mut found = BTreeMap::new();
    for mut result in lines(path) {
        if let Some(usage) = result.get_mut("usage") {
            usage["cached_tokens"] = Value::Null;
        }
        let line = result["line"].as_u64().unwrap();
        assert!(found.insert(line, result).is_none(), "two results of line {line}");
    }
    found
}

/// Is a result that of a request that ran?
pub fn is_good(result: &Value) -> bool {
    result["token_ids"].is_array() && result.get("error").is_none()
}

/// A request line that runs, and draws other tokens than another `i`.
pub fn request(i: u32, max_tokens: u32) -> String {
    json!({"id": i, "prompt_token_ids": [i % 4000, i % 7 + 1], "max_tokens": max_tokens, "temperature": 0.9, "ignore_eos": true})
        .to_string()
        + "\n"
}

/// `count` of them.
pub fn requests(count: u32, max_tokens: u32) -> String {
    (0..count).map(|i| request(i, max_tokens)).collect()
}

/// Makes a FIFO.
pub fn fifo(scratch: &Scratch, name: &str) -> PathBuf {
    let path = scratch.join(name);
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path
}

/// Sends a signal by its name.
pub fn signal(name: &str, process: u32) {
    let sent = Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status().unwrap();
    assert!(sent.success());
}

/// Waits until a file has at least so many bytes.
pub fn wait_for_bytes(path: &Path, bytes: u64) {
    let started = std::time::Instant::now();
    while File::open(path).and_then(|file| file.metadata()).map_or(0, |metadata| metadata.len()) < bytes {
        assert!(started.elapsed().as_secs() < 60, "nothing comes into {}", path.display());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}
