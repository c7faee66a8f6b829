//! Flags as people write them, and flags that can't hold: found before anything is loaded, by name.

mod common;
#[path = "common/flag_tables.rs"]
mod flag_tables;

use std::fs;
use std::process::{Command, Output};

use common::Scratch;
use flag_tables::{assert_documented, part};
use minisgl::{Options, Order, Policy, Speculation};
use serde_json::Value;

const LINE: &str = r#"{"id": 1, "prompt_token_ids": [5, 6, 7], "max_tokens": 6}"#;

/// Runs `generate` on a folder and one line; the output is new each time.
fn generate(folder: &Scratch, flags: &[&str]) -> Output {
    command(folder, flags).output().unwrap()
}

fn command(folder: &Scratch, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
    let _ = fs::remove_file(folder.join("out.jsonl"));
    let _ = fs::remove_file(folder.join("out.jsonl.run.json"));
    let equals = |flag: &str, path: &str| format!("--{flag}={path}");
    command.arg(equals("model", folder.path().to_str().unwrap()));
    command.arg(equals("input", folder.write("in.jsonl", LINE).to_str().unwrap()));
    command.arg(equals("output", folder.join("out.jsonl").to_str().unwrap()));
    command.arg("--max-seq-len=64").args(flags).env_remove("CUDA_VISIBLE_DEVICES");
    command
}

/// The tokens of the one result.
#[track_caller]
fn tokens(folder: &Scratch, flags: &[&str]) -> (Value, String) {
    let output = generate(folder, flags);
    assert!(output.status.success(), "{output:?}");
    let result: Value = serde_json::from_slice(&fs::read(folder.join("out.jsonl")).unwrap()).unwrap();
    (result["token_ids"].clone(), String::from_utf8(output.stderr).unwrap())
}

#[track_caller]
fn complaint(output: &Output) -> String {
    assert!(!output.status.success(), "it should fail: {output:?}");
    assert_ne!(output.status.code(), Some(101), "a panic: {output:?}");
    assert_eq!(output.status.code(), Some(1), "an abort: {output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn the_docs_tables_have_every_flag_and_its_default() {
    let help = |program: &str| {
        let output = Command::new(program).arg("--help").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let (flags, generate) =
        (fs::read_to_string("docs/flags.md").unwrap(), fs::read_to_string("docs/generate.md").unwrap());
    let shared = part(&flags, "Of `offline-bench`, `generate`", "## ");
    let bench = part(&flags, "Of `offline-bench`:", "## ");
    assert_documented(&help(env!("CARGO_BIN_EXE_offline-bench")), &[shared, bench]);
    let own = part(&generate, "## Flags of its own", "## ");
    assert_documented(&help(env!("CARGO_BIN_EXE_generate")), &[shared, own]);
}

/// The help's text is written by hand; what is built without the flag is `Options`' default.
#[test]
fn the_help_says_the_defaults_that_are_built_with() {
    let output = Command::new(env!("CARGO_BIN_EXE_offline-bench")).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    let Options { memory_ratio, tensor_parallel, order, policy, speculation, .. } = Options::default();
    assert_eq!((order, policy, speculation), (Order::Given, Policy::Throughput, Speculation::Never));
    for said in [
        &format!("KV pages take (default {memory_ratio})"),
        &format!("with a part of the weights: {tensor_parallel} (default)"),
        "order of admission: given (default)",
        "throughput (most tokens a second; the default,",
        "where few requests run: off (default)",
    ] {
        assert!(help.contains(said), "{said}: {help}");
    }
}

#[test]
fn a_flag_takes_its_value_behind_an_equals_sign() {
    let folder = Scratch::with_text();
    let (spaced, _) = tokens(&folder, &["--backend", "cpu", "--temperature", "2", "--seed", "3"]);
    let (equals, _) = tokens(&folder, &["--backend=cpu", "--temperature=2", "--seed=3"]);
    assert_eq!(spaced, equals);
    let unknown = complaint(&generate(&folder, &["--no-such-flag=1"]));
    assert!(unknown.contains("--no-such-flag"), "{unknown}");
}

#[test]
fn sampling_is_as_the_checkpoint_asks_for_unless_a_flag_or_a_line_says_otherwise() {
    let folder = Scratch::with_text();
    let cpu = "--backend=cpu";
    let (greedy, said) = tokens(&folder, &[cpu]);
    assert!(!said.contains("generation_config.json asks"), "{said}");
    let recommended =
        r#"{"eos_token_id": [2], "do_sample": true, "temperature": 5.0, "top_k": 0, "top_p": 1.0}"#;
    folder.write("generation_config.json", recommended);
    let (drawn, said) = tokens(&folder, &[cpu]);
    assert_ne!(drawn, greedy);
    assert!(said.contains("generation_config.json asks for: temperature 5"), "{said}");
    assert_eq!(tokens(&folder, &[cpu, "--temperature=5"]).0, drawn);
    assert_eq!(tokens(&folder, &[cpu, "--generation-config=none"]).0, greedy);
    assert_eq!(tokens(&folder, &[cpu, "--temperature=0"]).0, greedy);
    folder.write("generation_config.json", r#"{"do_sample": true, "top_p": "all"}"#);
    let said = complaint(&generate(&folder, &[cpu]));
    assert!(said.contains("generation_config.json") && said.contains("top_p"), "{said}");
}

#[test]
fn a_gpu_that_is_named_and_not_there_is_an_error_and_auto_says_what_it_chose() {
    if minisgl::gpu_present().unwrap_or(true) {
        return common::skipped("there is a GPU");
    }
    let folder = Scratch::with_text();
    let said = complaint(&generate(&folder, &["--devices=5"]));
    assert!(said.contains("--devices 5") && said.contains("GPU"), "{said}");
    let hidden = |value: &str| command(&folder, &[]).env("CUDA_VISIBLE_DEVICES", value).output().unwrap();
    let said = complaint(&hidden("9"));
    assert!(said.contains("CUDA_VISIBLE_DEVICES=9"), "{said}");
    for none in ["", "-1"] {
        assert!(hidden(none).status.success());
    }
    let (_, said) = tokens(&folder, &[]);
    assert!(said.contains("(cpu, since there is no NVIDIA driver)"), "{said}");
    let said = complaint(&generate(&folder, &["--backend=cpu", "--devices=0"]));
    assert!(said.contains("--devices 0") && said.contains("--backend cpu"), "{said}");
}

#[test]
fn flags_that_cannot_hold_are_found_before_the_weights() {
    let folder = Scratch::with_text();
    // Weights that can't be read: whoever got so far would complain of them.
    folder.write("model.safetensors", "no weights");
    for (flag, word) in [
        ("--page-size=24", "24"),
        ("--max-running=0", "max running"),
        ("--max-prefill-tokens=0", "max prefill"),
        ("--num-pages=0", "pages"),
        ("--memory-ratio=1.5", "1.5"),
        ("--temperature=-1", "temperature"),
        ("--top-p=0", "top_p"),
    ] {
        let said = complaint(&generate(&folder, &["--backend=cpu", flag]));
        assert!(said.contains(word) && !said.contains("safetensors"), "{flag}: {said}");
    }
    let bench = Command::new(env!("CARGO_BIN_EXE_offline-bench"))
        .args(["--backend=cpu", "--model", folder.path().to_str().unwrap(), "--json"])
        .arg(folder.join("no-folder/report.json"))
        .output()
        .unwrap();
    let said = complaint(&bench);
    assert!(said.contains("no-folder/report.json") && !said.contains("safetensors"), "{said}");
}

#[cfg(target_os = "linux")]
#[test]
fn more_than_memory_holds_is_an_error_with_the_bytes_and_the_flag() {
    let limited = |program: &str, flags: &str| {
        let line = format!("ulimit -v 6000000; exec {program} {flags}");
        Command::new("sh").args(["-c", &line]).output().unwrap()
    };
    let folder = Scratch::with_text();
    let (input, output) = (folder.write("in.jsonl", LINE), folder.join("out.jsonl"));
    let flags = format!("--backend cpu --input {} --output {}", input.display(), output.display());
    let generate = |more: &str| limited(env!("CARGO_BIN_EXE_generate"), &format!("{flags} {more}"));
    let said = complaint(&generate("--model qwen3-0.6b --max-running 500000"));
    assert!(said.contains("--max-running") && said.contains("bytes"), "{said}");

    let bench = limited(env!("CARGO_BIN_EXE_offline-bench"), "--backend cpu --n 1000000000");
    let said = complaint(&bench);
    assert!(said.contains("--n 1000000000") && said.contains("bytes"), "{said}");
}

#[test]
fn a_model_that_is_nothing_is_said_with_what_it_could_be() {
    let folder = Scratch::with_text();
    for (name, words) in
        [("no-such-model", "neither a directory"), ("./a/b", "neither a directory"), ("a/b/c", "OWNER/NAME")]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_generate"))
            .args(["--model", name, "--backend=cpu", "--input"])
            .arg(folder.write("in.jsonl", LINE))
            .arg("--output")
            .arg(folder.join("out.jsonl"))
            .output()
            .unwrap();
        let said = complaint(&output);
        assert!(said.contains(words) && said.contains("tiny"), "{said}");
    }
    let said = complaint(&generate(&folder, &["--backend=cpu", "--revision=main"]));
    assert!(said.contains("--revision main"), "{said}");
    // A shell leaves a tilde behind an equals sign alone.
    let home = folder.path().parent().unwrap();
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_generate"))
        .env("HOME", home)
        .args([&format!("--model=~/{name}/"), "--backend=cpu", "--max-seq-len=64", "--input"])
        .arg(folder.write("in.jsonl", LINE))
        .arg("--output")
        .arg(folder.join("tilde.jsonl"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}
