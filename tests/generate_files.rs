//! What `generate` reads from and writes to: files of all kinds, pipes, FIFOs, devices.

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use common::Scratch;
use common::generate::{
    by_line, command, command_on, fifo, generate, is_good, lines, parsed, request, requests, stderr, succeed,
    write,
};
use serde_json::json;

#[test]
fn an_output_that_exists_is_refused_and_emptied_only_when_told_to() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(1, 1));
    let out = scratch.write("out.jsonl", "something\n");
    let output = generate(&scratch, &[]);
    assert_eq!(output.status.code(), Some(1));
    let error = stderr(&output);
    assert!(error.contains("--resume") && error.contains("--overwrite"), "{error}");
    assert_eq!(fs::read_to_string(&out).unwrap(), "something\n");
    let both = generate(&scratch, &["--resume", "--overwrite"]);
    assert!(stderr(&both).contains("one of them"), "{}", stderr(&both));
    succeed(&scratch, &["--overwrite"]);
    assert_eq!(by_line(&out).len(), 1);
    // Nothing can be lost of an empty one.
    fs::write(&out, "").unwrap();
    succeed(&scratch, &[]);
}

#[test]
fn an_output_that_is_the_input_under_another_name_is_refused() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", requests(2, 1));
    let hard = scratch.join("hard.jsonl");
    fs::hard_link(&input, &hard).unwrap();
    let soft = scratch.join("soft.jsonl");
    std::os::unix::fs::symlink(&input, &soft).unwrap();
    // What is written beside an output may be the input as well.
    let settings = scratch.write("other.jsonl.run.json", requests(2, 1));
    let both = fifo(&scratch, "fifo");
    for (input, output) in [
        (&input, &input),
        (&input, &hard),
        (&input, &soft),
        (&settings, &scratch.join("other.jsonl")),
        (&both, &both),
    ] {
        for flag in ["--overwrite", "--resume"] {
            let run =
                command(&scratch).arg("--input").arg(input).arg("--output").arg(output).arg(flag).output();
            let run = run.unwrap();
            assert_eq!(run.status.code(), Some(1));
            assert!(stderr(&run).contains("same file"), "{}", stderr(&run));
        }
    }
    // Standard output may be appended to a file.
    let appended = File::options().append(true).open(&input).unwrap();
    let run = command(&scratch)
        .arg("--input")
        .arg(&input)
        .args(["--output", "-"])
        .stdout(appended)
        .output()
        .unwrap();
    assert!(stderr(&run).contains("same file"), "{}", stderr(&run));
    assert_eq!(fs::read_to_string(&input).unwrap(), requests(2, 1));
    assert_eq!(fs::read_to_string(&settings).unwrap(), requests(2, 1));
}

#[test]
fn a_second_process_on_one_output_is_refused() {
    let scratch = Scratch::new();
    let input = fifo(&scratch, "in.jsonl");
    let mut first = command_on(&scratch, "in.jsonl", "out.jsonl").stderr(Stdio::null()).spawn().unwrap();
    let mut requests = File::options().write(true).open(&input).unwrap();
    requests.write_all(request(0, 1).as_bytes()).unwrap();
    common::generate::wait_for_bytes(&scratch.join("out.jsonl"), 1);
    scratch.write("other.jsonl", request(1, 1));
    for flag in ["--overwrite", "--resume", "--resume-anyway"] {
        let second = command_on(&scratch, "other.jsonl", "out.jsonl").arg(flag).output().unwrap();
        assert_eq!(second.status.code(), Some(1));
        assert!(stderr(&second).contains("another process"), "{}", stderr(&second));
    }
    drop(requests);
    assert!(first.wait().unwrap().success());
    assert_eq!(by_line(&scratch.join("out.jsonl")).len(), 1);
}

#[test]
fn a_stderr_that_is_closed_full_or_read_by_nobody_costs_messages_not_results() {
    for redirection in ["2>&-", "2>/dev/full", "2> >(exec true)", "2>&- <&-"] {
        let scratch = Scratch::new();
        scratch.write("in.jsonl", requests(3, 2) + "bad\n");
        let run = command_on(&scratch, "in.jsonl", "out.jsonl");
        let mut shell = Command::new("bash");
        shell
            .args(["-c", &format!("\"$0\" \"$@\" {redirection}")])
            .arg(run.get_program())
            .args(run.get_args());
        assert_eq!(shell.status().unwrap().code(), Some(1), "{redirection}");
        assert_eq!(by_line(&scratch.join("out.jsonl")).values().filter(|result| is_good(result)).count(), 3);
    }
}

#[test]
fn results_go_to_standard_output_by_either_name_and_requests_come_from_standard_input() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", requests(3, 2));
    succeed(&scratch, &[]);
    let expected = fs::read_to_string(scratch.join("out.jsonl")).unwrap().len();
    for output in ["-", "/dev/stdout"] {
        for from in ["-", "/dev/stdin"] {
            let run = command(&scratch)
                .args(["--input", from, "--output", output])
                .stdin(File::open(&input).unwrap())
                .output()
                .unwrap();
            assert!(run.status.success(), "{}", stderr(&run));
            let results = parsed(std::str::from_utf8(&run.stdout).unwrap());
            assert!(results.len() == 3 && results.iter().all(is_good) && run.stdout.len() == expected);
        }
        // A shell's >> appends, whatever the output is called.
        let log = scratch.write("log", "before\n");
        let appended = File::options().append(true).open(&log).unwrap();
        let run =
            command(&scratch).arg("--input").arg(&input).args(["--output", output]).stdout(appended).output();
        assert!(run.unwrap().status.success());
        assert_eq!(fs::read_to_string(&log).unwrap().lines().filter(|line| line.starts_with('{')).count(), 3);
        assert!(fs::read_to_string(&log).unwrap().starts_with("before\n"));
    }
}

#[test]
fn dev_null_takes_results_and_gives_no_requests() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(3, 2));
    let to = |input: &str| {
        let run = command(&scratch).args(["--input", input, "--output", "/dev/null"]).output().unwrap();
        assert!(run.status.success(), "{}", stderr(&run));
        stderr(&run)
    };
    assert!(to(scratch.join("in.jsonl").to_str().unwrap()).contains("3 finished, 0 failed"));
    assert!(to("/dev/null").contains("0 finished, 0 failed"));
}

#[test]
fn what_is_written_as_a_stream_can_not_be_resumed() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(1, 1));
    for output in ["-", "/dev/stdout", "/dev/null"] {
        let mut run = command(&scratch);
        run.arg("--input").arg(scratch.join("in.jsonl")).args(["--output", output, "--resume"]);
        let run = run.output().unwrap();
        assert_eq!(run.status.code(), Some(1));
        assert!(stderr(&run).contains("no regular file"), "{}", stderr(&run));
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_job_with_an_error() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(200, 20));
    let mut run = command(&scratch)
        .arg("--input")
        .arg(scratch.join("in.jsonl"))
        .args(["--output", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::with_capacity(1, run.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert!(is_good(&serde_json::from_str(&first).unwrap()));
    let ended = run.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(stderr(&ended).contains("its reader is gone"), "{}", stderr(&ended));
}

#[test]
fn a_writer_that_waits_for_each_result_gets_it() {
    // A line that runs, one that does not, and one so short that it could be the beginning of something else.
    let conversation = [request(0, 2), "{}\n".to_owned(), "(\n".to_owned(), request(1, 2)];
    for (input, output) in [("in", "out"), ("in", "out.gz")] {
        let scratch = Scratch::new();
        let (to, from) = (fifo(&scratch, input), fifo(&scratch, output));
        let mut run = command_on(&scratch, input, output).stderr(Stdio::null()).spawn().unwrap();
        // Whichever end is opened first.
        let results = thread::spawn(move || File::open(from).unwrap()).join().unwrap();
        let mut requests = File::options().write(true).open(to).unwrap();
        requests.write_all(conversation[0].as_bytes()).unwrap();
        // It wants to see a member's head when it is made.
        let mut results: Box<dyn BufRead> = match output.ends_with("gz") {
            true => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(results))),
            false => Box::new(BufReader::new(results)),
        };
        for i in 0..conversation.len() {
            let mut result = String::new();
            results.read_line(&mut result).unwrap();
            assert_eq!(parsed(&result)[0]["line"], i + 1);
            if let Some(next) = conversation.get(i + 1) {
                requests.write_all(next.as_bytes()).unwrap();
            }
        }
        drop(requests);
        assert_eq!(run.wait().unwrap().code(), Some(1));
    }
}

#[test]
fn compressed_inputs_are_read_whatever_they_are_called() {
    let scratch = Scratch::new();
    for name in ["in.jsonl.gz", "in.jsonl.zst"] {
        write(&scratch.join(name), &requests(3, 2));
        let renamed = scratch.join("in.jsonl");
        fs::copy(scratch.join(name), &renamed).unwrap();
        for input in [name, "in.jsonl"] {
            let run = command_on(&scratch, input, "out.jsonl").arg("--overwrite").output().unwrap();
            assert!(run.status.success(), "{}", stderr(&run));
            assert_eq!(by_line(&scratch.join("out.jsonl")).len(), 3);
        }
        let piped = command(&scratch)
            .args(["--input", "-", "--output", "-"])
            .stdin(File::open(&renamed).unwrap())
            .output();
        assert_eq!(parsed(std::str::from_utf8(&piped.unwrap().stdout).unwrap()).len(), 3);
    }
}

#[test]
fn compressed_outputs_read_back_with_the_usual_tools() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(50, 3));
    for (name, tool) in [("out.jsonl.gz", "gzip"), ("out.jsonl.zst", "zstd")] {
        let run = command_on(&scratch, "in.jsonl", name).output().unwrap();
        assert!(run.status.success(), "{}", stderr(&run));
        assert_eq!(by_line(&scratch.join(name)).len(), 50);
        match Command::new(tool).arg("-dc").arg(scratch.join(name)).output() {
            Ok(text) => assert_eq!(parsed(std::str::from_utf8(&text.stdout).unwrap()).len(), 50),
            Err(error) => common::skipped(&format!("{tool}: {error}")),
        }
    }
}

#[test]
fn an_output_of_no_lines_is_a_compressed_text_too_and_can_be_gone_on_from() {
    for name in ["out.jsonl.gz", "out.jsonl.zst"] {
        let scratch = Scratch::new();
        scratch.write("in.jsonl", "\n");
        let run = || command_on(&scratch, "in.jsonl", name).arg("--resume").output().unwrap();
        assert!(run().status.success());
        assert_ne!(fs::metadata(scratch.join(name)).unwrap().len(), 0);
        assert_eq!(lines(&scratch.join(name)).len(), 0);
        scratch.write("in.jsonl", requests(2, 1));
        assert!(run().status.success());
        assert_eq!(by_line(&scratch.join(name)).len(), 2);
    }
}

#[test]
fn what_comes_before_a_cut_in_a_compressed_input_runs_and_resuming_goes_on() {
    let scratch = Scratch::new();
    let input = scratch.join("in.jsonl.gz");
    write(&input, &requests(400, 1));
    let whole = fs::read(&input).unwrap();
    // The file is sound when it is opened, and lacks its end when it is read: it comes through a pipe.
    let cut = scratch.write("cut.gz", &whole[..whole.len() - 100]);
    let out = scratch.join("out.jsonl");
    let run = command(&scratch)
        .args(["--input", "-", "--output"])
        .arg(&out)
        .stdin(File::open(&cut).unwrap())
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    assert!(stderr(&run).contains("can't be read"), "{}", stderr(&run));
    assert!(!by_line(&out).is_empty());
    let run = command_on(&scratch, "in.jsonl.gz", "out.jsonl").arg("--resume").output().unwrap();
    assert!(run.status.success(), "{}", stderr(&run));
    assert_eq!(by_line(&out).len(), 400);
}

#[test]
fn an_input_that_is_no_text_is_named_before_anything_is_written() {
    let scratch = Scratch::new();
    let utf16: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (content, what) in
        [(utf16.as_slice(), "UTF-16"), (b"\xfd7zXZ\0..", "xz -dc"), (b"PK\x03\x04..", "zip")]
    {
        scratch.write("in.jsonl", content);
        let run = generate(&scratch, &[]);
        assert_eq!(run.status.code(), Some(1));
        assert!(stderr(&run).contains(what), "{}", stderr(&run));
        assert!(!scratch.join("out.jsonl").exists());
    }
}

/// The most memory that a process has had, in KiB.
fn peak_memory(run: &Child) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", run.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn memory_does_not_grow_with_the_number_of_lines_whatever_becomes_of_them() {
    let malformed = |_: u32| "{\"id\": 1, \"prompt_token_ids\": [1\n".to_owned();
    let rejected = |i: u32| format!("{{\"id\": {i}, \"prompt_token_ids\": [99999]}}\n");
    let good = |i: u32| format!("{{\"id\": {i}, \"prompt_token_ids\": [{}], \"max_tokens\": 1}}\n", i % 1000);
    for (kind, few, many) in [
        (&malformed as &dyn Fn(u32) -> String, 2000, 200_000),
        (&rejected, 2000, 100_000),
        (&good, 500, 5_000),
    ] {
        let scratch = Scratch::new();
        let out = scratch.join("out.jsonl");
        let mut run = command(&scratch);
        run.args(["--overwrite", "--input", "-", "--output"]).arg(&out);
        let mut run = run.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut stdin = run.stdin.take().unwrap();
        // Of one process: of processes that do the same one in five or so has 6.5 MB less from beginning to end.
        let mut peak = |lines: u32, answered: u32| {
            // The last line needs the model: lines that don't may all be answered before it is loaded.
            let input = (0..lines - 1).map(kind).chain([good(1)]).collect::<String>();
            stdin.write_all(input.as_bytes()).unwrap();
            // Until its input ends it lives, and can be looked at when all is done.
            let written = || fs::read(&out).unwrap_or_default().iter().filter(|byte| **byte == b'\n').count();
            while written() < answered as usize {
                assert!(run.try_wait().unwrap().is_none(), "it ended before its input did");
                thread::sleep(Duration::from_millis(20));
            }
            peak_memory(&run)
        };
        let all = few + many;
        let (first, last) = (peak(few, few), peak(many, all));
        drop(stdin);
        run.wait().unwrap();
        assert_eq!(by_line(&out).len(), all as usize);
        assert!(last < first + 8 * 1024, "{first} KiB, then {last} KiB");
    }
}

#[test]
fn a_line_beyond_the_limit_is_an_error_and_the_rest_goes_on() {
    let scratch = Scratch::new();
    let long = format!("{{\"id\": 1, \"prompt_token_ids\": [1], \"user\": \"{}\"}}\n", "x".repeat(2000));
    scratch.write("in.jsonl", request(0, 2) + &long + &request(2, 2));
    let run = generate(&scratch, &["--max-line-bytes", "1000"]);
    assert_eq!(run.status.code(), Some(1));
    let results = by_line(&scratch.join("out.jsonl"));
    let error = results[&2]["error"].as_str().unwrap();
    assert!(error.contains("1000 bytes") && error.contains("--max-line-bytes"), "{error}");
    assert!(is_good(&results[&1]) && is_good(&results[&3]));
}

#[test]
fn a_bom_crlf_and_blank_lines_change_nothing_but_line_numbers() {
    let scratch = Scratch::new();
    let text =
        format!("\u{feff}{}\n \t\n{}{}", request(0, 2), request(1, 2), request(2, 2)).replace('\n', "\r\n");
    scratch.write("in.jsonl", text.trim_end());
    succeed(&scratch, &[]);
    let results = by_line(&scratch.join("out.jsonl"));
    assert_eq!(results.keys().copied().collect::<Vec<_>>(), [1, 4, 5]);
}

#[test]
fn ids_come_back_as_they_were_written() {
    let scratch = Scratch::new();
    let ids = [
        "18446744073709551616",
        "18446744073709551617",
        "1.0",
        "1e400",
        "-0",
        "\"\\u00e9\"",
        "[1, {\"a\": null}]",
    ];
    let line = |id: &&str| format!("{{\"id\": {id}, \"prompt_token_ids\": [1], \"max_tokens\": 1}}\n");
    scratch.write("in.jsonl", ids.iter().map(line).collect::<String>());
    succeed(&scratch, &[]);
    let text = fs::read_to_string(scratch.join("out.jsonl")).unwrap();
    for id in ids {
        assert!(text.contains(&format!("{{\"id\":{id},")), "{id} in {text}");
    }
}

#[test]
fn two_lines_with_one_id_both_run_and_say_which_line_they_are_of() {
    let scratch = Scratch::new();
    let line = json!({"id": "same", "prompt_token_ids": [1], "max_tokens": 1}).to_string();
    scratch.write("in.jsonl", format!("{line}\n{line}\n"));
    succeed(&scratch, &[]);
    let results = lines(&scratch.join("out.jsonl"));
    assert!(results.len() == 2 && results.iter().all(|result| result["id"] == "same" && is_good(result)));
    assert_eq!(by_line(&scratch.join("out.jsonl")).len(), 2);
}
