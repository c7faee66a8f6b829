//! `generate`, killed at random moments and resumed until it is done: no line is lost, doubled or torn.
//!
//! A few kills of each kind are tried every time. All fifty of each:
//! `cargo test --test generate_kill -- --ignored`

mod common;

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::generate::{by_line, command_on, is_good, parsed, request, stderr};
use common::{Numbers, Scratch};

/// How the requests come and where the results go.
#[derive(Clone, Copy)]
struct Kind {
    output: &'static str,
    piped: bool,
    bad_lines: bool,
}

const KINDS: [Kind; 5] = [
    Kind { output: "out.jsonl", piped: false, bad_lines: false },
    Kind { output: "out.jsonl", piped: true, bad_lines: true },
    Kind { output: "out.jsonl.gz", piped: false, bad_lines: true },
    Kind { output: "out.jsonl.zst", piped: true, bad_lines: false },
    Kind { output: "out.jsonl.zst", piped: false, bad_lines: true },
];

const LINES: u32 = 120;

fn input(bad_lines: bool) -> String {
    let line = |i: u32| match i % 7 {
        3 if bad_lines => format!("{{\"id\": {}, \"prompt_token_ids\": [1], \"max_token\": 2}}\n", i / 9),
        5 if bad_lines => "no request\n".to_owned(),
        _ => request(i, 10 + i % 50),
    };
    (0..LINES).map(line).collect()
}

fn run(scratch: &Scratch, kind: Kind) -> Command {
    let mut command = command_on(scratch, "in.jsonl", kind.output);
    if kind.piped {
        command = common::generate::command(scratch);
        command.args(["--input", "-", "--output"]).arg(scratch.join(kind.output));
        command.stdin(File::open(scratch.join("in.jsonl")).unwrap());
    }
    command.arg("--resume");
    command
}

/// Kills it so many times, looks at the output after each, and lets it come to its end.
fn survives(kind: Kind, kills: u32, seed: u64) {
    let whole = Scratch::new();
    whole.write("in.jsonl", input(kind.bad_lines));
    let started = std::time::Instant::now();
    let uninterrupted = run(&whole, kind).output().unwrap();
    assert_eq!(uninterrupted.status.code(), Some(i32::from(kind.bad_lines)), "{}", stderr(&uninterrupted));
    let duration = started.elapsed().as_micros() as u64;
    let expected = by_line(&whole.join(kind.output));
    assert_eq!(expected.len() as u32, LINES);

    let scratch = Scratch::new();
    scratch.write("in.jsonl", input(kind.bad_lines));
    let out = scratch.join(kind.output);
    let mut numbers = Numbers(seed);
    let mut completed = 0;
    for kill in 0..kills {
        let mut child = run(&scratch, kind).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_micros(numbers.below(duration)));
        let ended = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        whole_lines(&out, kind);
        if ended {
            // The next kills meet a fresh run.
            assert_eq!(by_line(&out), expected, "kill {kill}");
            completed += 1;
            fs::remove_file(&out).unwrap();
        }
    }
    let last = run(&scratch, kind).output().unwrap();
    assert_eq!(last.status.code(), Some(i32::from(kind.bad_lines)), "{}", stderr(&last));
    assert_eq!(by_line(&out), expected);
    let good = expected.values().filter(|result| is_good(result)).count();
    println!(
        "{}: {kills} kills, {completed} runs came to their end between them, {good} good lines",
        kind.output
    );
}

/// After a kill, what can be read has whole lines but for the last, and no two of one input line.
fn whole_lines(out: &std::path::Path, kind: Kind) {
    let Ok(bytes) = fs::read(out) else { return };
    let mut text = Vec::new();
    // A member that is cut off is an error at its end; what comes before it has been read.
    let _ = match kind.output.rsplit('.').next() {
        Some("gz") => std::io::copy(&mut flate2::read::MultiGzDecoder::new(bytes.as_slice()), &mut text),
        Some("zst") => std::io::copy(&mut zstd::Decoder::new(bytes.as_slice()).unwrap(), &mut text),
        _ => std::io::copy(&mut bytes.as_slice(), &mut text),
    };
    let text = String::from_utf8(text).unwrap();
    let end = text.rfind('\n').map_or(0, |end| end + 1);
    let mut lines: Vec<u64> =
        parsed(&text[..end]).iter().map(|line| line["line"].as_u64().unwrap()).collect();
    lines.sort_unstable();
    let count = lines.len();
    lines.dedup();
    assert_eq!(count, lines.len(), "two results of one line");
}

#[test]
fn killed_at_random_moments_and_resumed_no_line_is_lost_doubled_or_torn() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        survives(kind, 3, i as u64);
    }
}

#[test]
#[ignore = "takes minutes"]
fn killed_fifty_times_and_resumed_no_line_is_lost_doubled_or_torn() {
    for (i, kind) in KINDS.into_iter().enumerate() {
        survives(kind, 50, 100 + i as u64);
    }
}
