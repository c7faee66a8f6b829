//! perf-cuda as a user meets it without a GPU: it lists its cases, explains a step, and says in a sentence why it can't run them.

mod common;

use std::process::{Command, Output};

use common::skipped;

fn perf_cuda(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_perf-cuda")).args(args).output().unwrap()
}

#[test]
fn the_cases_that_hold_all_words_are_listed() {
    let output = perf_cuda(&["gemm_down ", "tokens=3 ", "--rows", "3,5", "--list"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().count() > 0);
    assert!(text.lines().all(|line| line.starts_with("gemm_down ") && line.contains(" tokens=3 ")), "{text}");
}

#[test]
fn a_list_that_nobody_reads_to_its_end_is_an_error_not_a_panic() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut perf_cuda = Command::new(env!("CARGO_BIN_EXE_perf-cuda"));
    let output = perf_cuda.arg("--list").stdout(writer).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("perf-cuda: ") && text.lines().count() == 1, "{text}");
}

#[test]
fn sizes_of_a_model_that_is_neither_are_taken() {
    let output = perf_cuda(&["attention_decode", "--model", "heads=32,head_dim=64", "--rows", "2", "--list"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.lines().count() > 0, "{text}");
    assert!(text.lines().all(|line| line.contains("model=given ")), "{text}");
    assert!(!perf_cuda(&["--model", "heads=3", "--list"]).status.success(), "3 heads can't share 8");
    let named = String::from_utf8(perf_cuda(&["--model", "1.7b", "--list"]).stderr).unwrap();
    assert!(named.contains("by its sizes, as hidden="), "{named}");
}

#[test]
fn a_step_is_explained_without_a_gpu_and_the_architectures_page_has_what_is_said() {
    let output = perf_cuda(&["--explain", "rows=128"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.lines().count() > 10, "{text}");
    let page = std::fs::read_to_string("docs/architecture.md").unwrap();
    assert!(
        page.contains(&format!("```text\n{text}```\n")),
        "docs/architecture.md has another text than:\n{text}"
    );
}

#[test]
fn a_step_that_is_none_and_a_model_that_the_kernels_do_not_take_are_errors() {
    for (step, model, named) in [
        ("heads=2", "layers=28", "heads"),
        ("rows=0", "layers=28", "rows"),
        ("rows=8", "head_dim=96", "head_dim"),
    ] {
        let output = perf_cuda(&["--explain", step, "--model", model]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && text.contains(named), "{text}");
    }
}

#[test]
fn without_a_gpu_it_says_so_in_one_sentence_and_fails() {
    if minisgl_cuda::device_count().is_ok_and(|count| count > 0) {
        skipped("there is a GPU");
        return;
    }
    let output = perf_cuda(&["empty"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("perf-cuda: ") && text.lines().count() == 1, "{text}");
    assert!(text.contains("driver") || text.contains("GPU"), "{text}");
}
