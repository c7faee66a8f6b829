//! perf-cuda as a user meets it without a GPU: it lists its cases, and says in a sentence why it can't run them.

use std::process::{Command, Output};

fn perf_cuda(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_perf-cuda")).args(args).output().unwrap()
}

#[test]
fn the_cases_that_hold_all_words_are_listed() {
    let output = perf_cuda(&["gemm_down", "tokens=3 ", "--rows", "3,5", "--list"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().count() > 0);
    assert!(text.lines().all(|line| line.starts_with("gemm_down ") && line.contains(" tokens=3 ")), "{text}");
}

#[test]
fn without_a_gpu_it_says_so_in_one_sentence_and_fails() {
    if minisgl_cuda::device_count().is_ok_and(|count| count > 0) {
        return;
    }
    let output = perf_cuda(&["empty"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("perf-cuda: ") && text.lines().count() == 1, "{text}");
    assert!(text.contains("driver") || text.contains("GPU"), "{text}");
}
