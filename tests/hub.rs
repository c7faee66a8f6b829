//! `generate` by a model's name, against a hub on loopback.

mod common;
#[path = "../hub/tests/server/mod.rs"]
mod server;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use common::Scratch;
use server::{COMMIT, Fault, Gate, NAME, Server};

const LINE: &str = r#"{"id": 1, "prompt": "Hello there, world of words", "max_tokens": 3}"#;

/// The golden checkpoint with its tokenizer, served.
fn serve() -> Server {
    let folder = Scratch::with_text();
    let files = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
    Server::start(files.filter(|(name, _)| !name.starts_with("expected")))
}

fn generate(server: &Server, scratch: &Scratch, output: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
    command.env("HF_ENDPOINT", server.endpoint()).env("HF_HOME", scratch.join("hf"));
    for unset in
        ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE"]
    {
        command.env_remove(unset);
    }
    let input = scratch.write("in.jsonl", LINE);
    command.args(["--backend", "cpu", "--max-seq-len", "64", "--model", NAME]).args(flags);
    command.arg("--input").arg(input).arg("--output").arg(scratch.join(output));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[track_caller]
fn complaint(output: &Output) -> String {
    assert!(!output.status.success(), "it should fail: {output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_model_by_name_is_fetched_once_and_gives_what_its_folder_gives() {
    let (server, scratch) = (serve(), Scratch::new());
    let first = generate(&server, &scratch, "a", &[]).output().unwrap();
    assert!(first.status.success(), "{first:?}");
    let said = String::from_utf8(first.stderr).unwrap();
    for part in ["fetching", "model.safetensors", NAME, COMMIT] {
        assert!(said.contains(part), "{part} is not said: {said}");
    }
    server.take_log();
    let second = generate(&server, &scratch, "b", &[]).output().unwrap();
    assert!(second.status.success(), "{second:?}");
    assert_eq!(server.take_log(), ["GET /api/models/tiny/model/revision/main"]);
    let offline = generate(&server, &scratch, "c", &[]).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(offline.status.success(), "{offline:?}");
    let pinned = generate(&server, &scratch, "d", &["--revision", COMMIT]).output().unwrap();
    assert!(pinned.status.success(), "{pinned:?}");
    assert_eq!(server.take_log(), [""; 0], "neither asks the hub");

    let folder = Scratch::with_text();
    let model = folder.path().to_str().unwrap().to_owned() + "/";
    let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
    command.args(["--backend", "cpu", "--max-seq-len", "64", "--model", &model, "--input"]);
    command.arg(scratch.join("in.jsonl")).arg("--output").arg(scratch.join("f"));
    assert!(command.output().unwrap().status.success());
    let expected = fs::read(scratch.join("f")).unwrap();
    for other in ["a", "b", "c", "d"] {
        assert_eq!(fs::read(scratch.join(other)).unwrap(), expected);
    }
}

#[test]
fn two_processes_at_once_fetch_each_file_once() {
    let (server, scratch) = (serve(), Scratch::new());
    // Nothing comes to whoever is first until the other says that it waits.
    let gate = Gate::default();
    server.spoil("/cdn/", Fault::Held(gate.clone()), 10);
    let start = |output| generate(&server, &scratch, output, &[]).spawn().unwrap();
    let waits = |line: &String| line.contains("another process fetches");
    let run = |mut process: Child| {
        let mut said = Vec::new();
        for line in BufReader::new(process.stderr.take().unwrap()).lines() {
            said.push(line.unwrap());
            if said.last().is_some_and(waits) {
                gate.open();
            }
        }
        assert!(process.wait().unwrap().success(), "{said:?}");
        said
    };
    let processes = ["a", "b"].map(start);
    let said: Vec<String> = thread::scope(|scope| {
        let runs = processes.map(|process| scope.spawn(|| run(process)));
        runs.into_iter().flat_map(|run| run.join().unwrap()).collect()
    });
    assert_eq!(fs::read(scratch.join("a")).unwrap(), fs::read(scratch.join("b")).unwrap());
    let log = server.take_log();
    assert_eq!(log.iter().filter(|line| line.contains("/cdn/")).count(), 1, "{log:?}");
    assert!(said.iter().any(waits), "{said:?}");
}

#[test]
fn what_keeps_a_model_away_is_said_with_what_to_do() {
    let (server, scratch) = (serve(), Scratch::new());
    let wrong = generate(&server, &scratch, "a", &["--revision", "v9"]).output().unwrap();
    assert!(complaint(&wrong).contains("no revision `v9`"));
    server.spoil("/api/", Fault::Status(403, "X-Error-Code: GatedRepo\r\n"), 1);
    let gated = generate(&server, &scratch, "b", &[]).output().unwrap();
    assert!(complaint(&gated).contains("accept its terms"));
    let offline = generate(&server, &scratch, "c", &[]).env("HF_HUB_OFFLINE", "true").output().unwrap();
    assert!(complaint(&offline).contains("HF_HUB_OFFLINE"));
    let bad_flag = generate(&server, &scratch, "d", &["--page-size", "24"]).output().unwrap();
    assert!(complaint(&bad_flag).contains("24 is not a power of two"));
    assert!(!scratch.join("hf").join("hub").join("models--tiny--model").join("blobs").exists());
}
