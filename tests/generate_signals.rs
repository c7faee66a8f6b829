//! SIGINT and SIGTERM: what has ended is kept, and the user is told how to go on.

mod common;

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::Scratch;
use common::generate::{
    by_line, command, command_on, fifo, is_good, lines, requests, signal, stderr, wait_for_bytes,
};

/// Waits until something holds.
#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(120), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a process that must end.
fn end_of(mut child: Child) -> std::process::Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("the process does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn a_run_that_a_signal_ends_leaves_reports_as_they_were_and_the_next_one_writes_them() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(400, 100));
    scratch
        .write("old.json", "an earlier run's, which is longer than what comes in its place: ".repeat(1000));
    let reports = ["--json", "old.json", "--report", "new.html"].map(|word| match word.contains('.') {
        true => scratch.join(word).into_os_string(),
        false => word.into(),
    });
    let mut run = command_on(&scratch, "in.jsonl", "out.jsonl");
    let run = run.args(["--overwrite"]).args(&reports).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_bytes(&scratch.join("out.jsonl"), 1);
    signal("INT", run.id());
    assert_eq!(end_of(run).status.code(), Some(130));
    assert!(fs::read_to_string(scratch.join("old.json")).unwrap().starts_with("an earlier run's"));
    assert!(!scratch.join("new.html").exists());

    scratch.write("in.jsonl", requests(2, 4));
    let run =
        command_on(&scratch, "in.jsonl", "out.jsonl").args(["--overwrite"]).args(&reports).output().unwrap();
    assert!(run.status.success(), "{}", stderr(&run));
    let report: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(scratch.join("old.json")).unwrap()).unwrap();
    assert_eq!(report["program"], "generate");
    assert!(fs::read_to_string(scratch.join("new.html")).unwrap().contains("</html>"));
}

#[test]
fn a_signal_keeps_what_has_ended_and_says_what_is_left_and_the_command_that_goes_on() {
    for (name, status, output) in [("INT", 130, "out.jsonl"), ("TERM", 143, "out.jsonl.gz")] {
        let scratch = Scratch::new();
        scratch.write("in.jsonl", requests(400, 100));
        let mut run = command_on(&scratch, "in.jsonl", output);
        let run = run.args(["--overwrite", "--top-k", "7"]).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_bytes(&scratch.join(output), 1);
        signal(name, run.id());
        let ended = end_of(run);
        assert_eq!(ended.status.code(), Some(status), "{}", stderr(&ended));
        let done = by_line(&scratch.join(output));
        assert!(!done.is_empty() && done.len() < 400 && done.values().all(is_good));
        let words = stderr(&ended);
        assert!(
            words.contains(&format!("{} lines are left", 400 - done.len())),
            "{} done: {words}",
            done.len()
        );

        // The last line is the command.
        let go_on = words.trim_end().lines().last().unwrap();
        assert!(go_on.ends_with(" --resume") && !go_on.contains("--overwrite"), "{go_on}");
        let resumed = Command::new("bash").args(["-c", go_on]).output().unwrap();
        assert!(resumed.status.success(), "{}", stderr(&resumed));
        assert!(stderr(&resumed).contains(&format!("{} skipped", done.len())), "{}", stderr(&resumed));
        assert_eq!(by_line(&scratch.join(output)).len(), 400);
    }
}

#[test]
fn a_signal_ends_a_job_whose_input_says_nothing() {
    let scratch = Scratch::new();
    let input = fifo(&scratch, "in.jsonl");
    let run = command_on(&scratch, "in.jsonl", "out.jsonl").stderr(Stdio::piped()).spawn().unwrap();
    let mut requests_to = File::options().write(true).open(input).unwrap();
    std::io::Write::write_all(&mut requests_to, requests(3, 2).as_bytes()).unwrap();
    wait_for_bytes(&scratch.join("out.jsonl"), 300);
    signal("TERM", run.id());
    let ended = end_of(run);
    assert_eq!(ended.status.code(), Some(143), "{}", stderr(&ended));
    assert!(stderr(&ended).contains("at least "), "{}", stderr(&ended));
    assert!(lines(&scratch.join("out.jsonl")).iter().all(is_good));
}

#[test]
fn a_signal_before_the_first_request_ends_the_program_and_changes_nothing() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(1, 1));
    // Nobody opens the other end, so it waits before it loads the model.
    fifo(&scratch, "out");
    let run = command_on(&scratch, "in.jsonl", "out").stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it catches signals", || catches_interrupts(run.id()));
    signal("INT", run.id());
    assert_eq!(end_of(run).status.code(), Some(130));
}

/// Does a process catch SIGINT? Until then the signal ends it, as any program.
fn catches_interrupts(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    // SIGINT is 2, and the lowest bit 1.
    u64::from_str_radix(caught.trim(), 16).unwrap() & 2 != 0
}

/// How often the threads of a process have gone to sleep by themselves; `None` while one of them works, or waits for a processor.
fn rest(process: u32) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let naps = |task: fs::DirEntry| -> Option<u64> {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let of = |name| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let sleeps = of("State:")?.starts_with('S');
        of("voluntary_ctxt_switches:")?.parse().ok().filter(|_| sleeps)
    };
    tasks.map(|task| naps(task.unwrap())).sum()
}

/// Waits until a process works no more: it sleeps, and a moment later none of its threads has been awake meanwhile.
fn wait_for_rest(process: u32) {
    wait_until("it comes to rest", || {
        let before = rest(process);
        std::thread::sleep(Duration::from_millis(300));
        before.is_some() && before == rest(process)
    });
}

#[test]
fn a_second_signal_ends_at_once_what_can_not_be_written() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(3000, 20));
    let mut run = command(&scratch);
    run.arg("--input").arg(scratch.join("in.jsonl")).args(["--output", "-"]);
    // A pipe that nobody reads fills up; the last write hangs, and the first signal waits for it.
    let mut run = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_rest(run.id());
    signal("TERM", run.id());
    std::thread::sleep(Duration::from_millis(300));
    assert!(run.try_wait().unwrap().is_none(), "it was not held up");
    // Two that come before it has a processor are one to it.
    wait_until("it ends", || {
        signal("TERM", run.id());
        run.try_wait().unwrap().is_some()
    });
    assert_eq!(run.wait().unwrap().code(), Some(143));
}
