//! `offline-bench` as a user runs it, on the tiny preset.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use common::Scratch;
use serde_json::{Value, json};

/// Runs the binary on a small workload, unless `flags` say otherwise.
fn bench(flags: &[&str]) -> Output {
    command(flags).output().unwrap()
}

fn command(flags: &[&str]) -> Command {
    let small = [["--backend", "cpu"], ["--n", "6"], ["--input-len", "5..40"], ["--output-len", "3..24"]];
    let small = small.iter().filter(|flag| !flags.contains(&flag[0])).flatten();
    let mut command = Command::new(env!("CARGO_BIN_EXE_offline-bench"));
    command.env_remove("MINISGL_DISABLE_OVERLAP_SCHEDULING").args(small).args(flags);
    command
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn complaint(flags: &[&str]) -> String {
    let output = bench(flags);
    assert!(!output.status.success(), "{flags:?} should be refused");
    String::from_utf8(output.stderr).unwrap()
}

/// The values behind a row's name in each run's table.
fn rows<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    text.lines().filter_map(|line| line.trim().strip_prefix(name)).map(str::trim).collect()
}

/// A file of this test process that does not exist yet.
fn fresh(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

fn read_json(path: &PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_line_that_tools_read_has_tokens_time_and_their_ratio() {
    let text = stdout(&bench(&["--seed", "3"]));
    assert!(text.contains("preset `tiny` on the CPU"), "{text}");
    let line = text.lines().find(|line| line.starts_with("Total: ")).expect(&text);
    let numbers: Vec<f64> = line
        .split(", ")
        .zip([("Total: ", "tok"), ("Time: ", "s"), ("Throughput: ", "tok/s")])
        .map(|(part, (name, unit))| {
            let number = part.strip_prefix(name).and_then(|rest| rest.strip_suffix(unit));
            number.unwrap_or_else(|| panic!("{line}")).parse().unwrap()
        })
        .collect();
    let [tokens, seconds, rate] = numbers[..] else { panic!("{line}") };
    assert!((6.0 * 3.0..=6.0 * 24.0).contains(&tokens));
    // Seconds are rounded to a hundredth.
    assert!((tokens / rate - seconds).abs() <= 0.006, "{line}");
}

#[test]
fn a_preset_is_told_from_a_directory_that_has_its_name() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.join("tiny")).unwrap();
    for (folder, warns) in [(scratch.path(), true), (&*scratch.join("tiny"), false)] {
        let text = stdout(&command(&["--model", "tiny"]).current_dir(folder).output().unwrap());
        assert_eq!(text.contains("the directory of that name is ./tiny"), warns, "{text}");
    }
}

#[test]
fn recorded_steps_are_told_of_where_there_are_any() {
    for (rows, tells) in [("0", false), ("4", true)] {
        let text = stdout(&bench(&["--max-graph-batch", rows]));
        assert_eq!(text.contains("once decode was recorded up to"), tells, "{text}");
    }
}

#[test]
fn requests_of_a_token_each_are_measured_and_what_did_not_happen_took_no_time() {
    let json = fresh("single.json");
    let flags = ["--input-len", "1..1", "--output-len", "1..1", "--json", json.to_str().unwrap()];
    let text = stdout(&bench(&flags));
    assert!(text.contains("decode        0 tokens in 0 steps of 0.0 rows on average, 0.000 s"), "{text}");
    assert!(text.contains("device idle   0.000 s between steps (0.0%)"), "{text}");
    assert!(!fs::read_to_string(json).unwrap().contains("-0.0"));
}

#[test]
fn settings_that_only_concern_speed_do_not_change_a_token() {
    let hash = |flags: &[&str]| {
        let text = stdout(&bench(flags));
        let hashes = rows(&text, "output hash");
        assert_eq!(hashes.len(), 1, "{text}");
        hashes[0].to_owned()
    };
    let base = hash(&[]);
    for flags in [
        &["--no-overlap"][..],
        &["--no-prefix-cache"],
        &["--max-graph-batch", "0"],
        &["--max-running", "2"],
        &["--max-prefill-tokens", "7"],
        &["--page-size", "32"],
        &["--num-pages", "5"],
        &["--order", "longest-output-first"],
        &["--policy", "latency"],
        &["--policy", "latency", "--max-running", "2", "--num-pages", "5"],
        &["--data-parallel", "2"],
        &["--warmup"],
    ] {
        assert_eq!(hash(flags), base, "{flags:?}");
    }
    assert_ne!(hash(&["--seed", "1"]), base);
    assert_ne!(hash(&["--temperature", "0"]), base);
}

#[test]
fn runs_agree_requests_alone_agree_and_no_run_is_served_by_the_one_before() {
    let text = stdout(&bench(&["--runs", "3", "--verify", "4"]));
    let hashes = rows(&text, "output hash");
    assert_eq!(hashes.len(), 3);
    assert!(hashes.iter().all(|hash| *hash == hashes[0]));
    assert_eq!(rows(&text, "prefix cache"), ["0 prompt tokens found"; 3]);
    assert_eq!(rows(&text, "Median of 3 runs:").len(), 1);
    assert_eq!(rows(&text, "Verified:"), ["4 requests alone give the same tokens"]);
}

#[test]
fn the_report_for_machines_says_what_the_table_says() {
    let path = fresh("report.json");
    let flags = [
        "--runs",
        "2",
        "--json",
        path.to_str().unwrap(),
        "--bandwidth",
        "10",
        "--matmul",
        "0.1",
        "--top-k",
        "5",
    ];
    let text = stdout(&bench(&flags));
    assert!(text.contains("temperature 0.6, top_k 5\n"), "{text}");
    let report = read_json(&path);
    let drawn = ["temperature", "top_k", "top_p", "min_p"]
        .map(|name| report["workload"][name].as_f64().unwrap() as f32);
    assert_eq!(drawn, [0.6, 5.0, 1.0, 0.0]);
    assert_eq!(report["model"], "tiny");
    assert_eq!(report["backend"], "cpu");
    assert_eq!(report["workload"]["requests"], 6);
    assert_eq!(report["same_output"], true);
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    assert_eq!(rows(&text, "output hash"), [runs[0]["output_hash"].as_str().unwrap(); 2]);
    for run in runs {
        assert_eq!(run["total_tokens"], report["workload"]["output_tokens"]);
        assert_eq!(run["prefill"]["tokens"], report["workload"]["prompt_tokens"]);
        // The first token of each request comes from prefill.
        assert_eq!(run["decode"]["tokens"].as_u64().unwrap() + 6, run["total_tokens"].as_u64().unwrap());
        let share = run["floor"]["share"].as_f64().unwrap();
        let floor_s = run["floor"]["floor"]["seconds"].as_f64().unwrap();
        assert!((share * run["seconds"].as_f64().unwrap() / floor_s - 1.0).abs() < 1e-9);
    }
}

#[test]
fn engines_built_anew_draw_the_same_tokens_and_their_medians_are_told_apart() {
    let path = fresh("repeat.json");
    let text = stdout(&bench(&["--repeat", "2", "--runs", "2", "--json", path.to_str().unwrap()]));
    let report = read_json(&path);
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.iter().map(|run| run["engine"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 1, 2, 2]);
    assert_eq!(report["same_output"], true);
    let of_engines = &report["tokens_per_s_of_engines"];
    assert!(of_engines["min"].as_f64().unwrap() <= of_engines["max"].as_f64().unwrap());
    assert_eq!(rows(&text, "Median of 4 runs:").len(), 1);
    assert_eq!(rows(&text, "Median of 2 engines:").len(), 1);
}

#[test]
fn latencies_have_their_percentiles_and_a_device_that_cannot_be_asked_is_not_known() {
    let text = stdout(&bench(&[]));
    for name in ["TTFT", "ITL"] {
        let row = rows(&text, name)[0];
        let numbers: Vec<f64> = row.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
        let [p50, p90, p99, most, mean] = numbers[..] else { panic!("{row}") };
        assert!([p50, p90, p99, most].is_sorted() && (0.0..=most).contains(&mean), "{row}");
    }
    assert_eq!(rows(&text, "device  "), ["its clocks and power are not known"], "{text}");
}

#[test]
fn reports_are_compared_with_their_ratio_their_spread_and_what_differs() {
    let (first, second) = (fresh("first.json"), fresh("second.json"));
    stdout(&bench(&["--runs", "2", "--json", first.to_str().unwrap()]));
    stdout(&bench(&["--runs", "2", "--max-running", "2", "--json", second.to_str().unwrap()]));
    let compared = |files: [&str; 2]| {
        let output = Command::new(env!("CARGO_BIN_EXE_offline-bench")).arg("--compare").args(files).output();
        stdout(&output.unwrap())
    };
    let same = compared([first.to_str().unwrap(); 2]);
    let row = rows(&same, "output tok/s")[0];
    assert_eq!(row.split_whitespace().last(), Some("1.0000"), "{same}");
    assert!(same.contains("the runs overlap") && !same.contains("WARNING"), "{same}");
    let other = compared([first.to_str().unwrap(), second.to_str().unwrap()]);
    assert!(other.contains("WARNING: engine.max_running differs: 256 and 2"), "{other}");
    assert!(!other.contains("outputs differ"), "a setting that only concerns speed: {other}");
    // Reports of an earlier version, of two cards.
    let cards = compared(["docs/results/h100.json", "docs/results/h200.json"]);
    assert!(cards.contains("WARNING: device differs"), "{cards}");
    assert!(cards.contains("every run of one is beyond every run of the other"), "{cards}");
}

#[test]
fn a_stderr_that_takes_nothing_costs_messages_and_no_result() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_offline-bench"));
    let flags = ["--backend", "cpu", "--n", "3", "--input-len", "5..9", "--output-len", "3..5"];
    let output = command.args(flags).env("RUST_LOG", "trace").stderr(full).output().unwrap();
    assert!(stdout(&output).contains("output hash"));
}

#[test]
fn rust_log_brings_out_what_happens_and_without_it_all_is_quiet() {
    let run = |log: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_offline-bench"));
        command.args(["--backend", "cpu", "--n", "3", "--input-len", "5..9", "--output-len", "3..5"]);
        command.env_remove("RUST_LOG").envs(log.map(|log| ("RUST_LOG", log)));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(run(None), "");
    let told = run(Some("minisgl=info"));
    assert!(told.contains("INFO") && told.contains("ready"), "{told}");
    let bad = run(Some("minisgl=loud"));
    assert!(bad.contains("RUST_LOG is not obeyed"), "{bad}");
}

#[test]
fn the_timeline_holds_every_step_of_the_run_in_order() {
    let (trace, json) = (fresh("trace.json"), fresh("of-trace.json"));
    stdout(&bench(&["--trace", trace.to_str().unwrap(), "--json", json.to_str().unwrap()]));
    let (trace, report) = (read_json(&trace), read_json(&json));
    let events = trace["traceEvents"].as_array().unwrap();
    let starts = |name: &str| -> Vec<f64> {
        let named = events.iter().filter(|event| event["ph"] == "X" && event["name"] == name);
        named.map(|event| event["ts"].as_f64().unwrap()).collect()
    };
    for kind in ["prefill", "mixed", "decode"] {
        assert_eq!(report["runs"][0][kind]["steps"], starts(kind).len(), "{kind}");
        assert!(starts(kind).is_sorted(), "{kind}");
    }
}

#[test]
fn a_late_prompt_joins_those_that_run() {
    let path = fresh("late.json");
    let flags = ["--late-prompt", "700", "--policy", "latency", "--output-len", "100"];
    let text = stdout(&bench(&[&flags[..], &["--json", path.to_str().unwrap()]].concat()));
    let run = &read_json(&path)["runs"][0];
    assert_eq!(run["ended"]["length"], 7, "{run}");
    assert!(run["mixed"]["prefill_tokens"].as_u64().unwrap() >= 700, "{run}");
    assert_eq!(rows(&text, "mixed").len(), 1, "{text}");
    assert!(complaint(&["--late-prompt", "0"]).contains("--late-prompt must be at least 1"));
}

#[test]
fn the_minisgl_workload_has_its_own_requests() {
    let path = fresh("minisgl.json");
    let flags = ["--workload", "minisgl", "--json", path.to_str().unwrap()];
    let line = stdout(&bench(&flags));
    assert!(line.contains("6 requests (minisgl, seed 0)"), "{line}");
    assert_ne!(
        rows(&line, "output hash"),
        rows(&stdout(&bench(&["--workload", "pcg"])), "output hash"),
        "other requests, other tokens"
    );
}

#[test]
fn bad_flags_are_refused_with_what_to_do() {
    for (flags, expected) in [
        (&["--input-len", "9..5"][..], "write the shorter length first"),
        (&["--output-len", "0..5"], "the shortest length is 1"),
        (&["--workload", "mt"], "use pcg or minisgl"),
        (&["--backend", "tpu"], "use auto, cpu or cuda"),
        (&["--temperature", "-1"], "temperature is -1"),
        (&["--temperature", "NaN"], "temperature is NaN"),
        (&["--top-p", "0"], "top_p is 0"),
        (&["--runs", "0"], "must be at least 1"),
        (&["--repeat", "0"], "must be at least 1"),
        (&["--n", "0"], "must be at least 1"),
        (&["--page-size", "24"], "not a power of two"),
        (&["--max-running", "0"], "must be at least 1"),
        (&["--max-seq-len", "8"], "--max-seq-len"),
        (&["--bandwidth", "0"], "--bandwidth is 0"),
        (&["--matmul", "-1"], "--matmul is -1"),
        (&["--model", "qwen3-0.6"], "qwen3-0.6b"),
        (&["--json", "/nonexistent/report.json"], "/nonexistent/report.json can't be written"),
        (&["--report", "/nonexistent/report.html"], "/nonexistent/report.html can't be written"),
        (&["--compare", "docs/results/h100.json"], "--compare takes two files, not 1"),
        (&["docs/results/h100.json"], "--compare FIRST.json SECOND.json"),
        (&["--compare", "Cargo.toml", "docs/results/h100.json"], "Cargo.toml is no report"),
        (&["--compare", "nowhere.json", "docs/results/h100.json"], "nowhere.json can't be read"),
        (&["--frobnicate"], "--frobnicate"),
    ] {
        let error = complaint(flags);
        assert!(error.contains(expected), "{flags:?}: {error}");
        assert!(!error.contains("panicked"), "{flags:?}: {error}");
    }
}

#[test]
fn a_device_that_is_not_there_takes_its_time_and_what_the_host_does_beside_it_is_told() {
    let scratch = Scratch::new();
    let line = |step: f64| json!({"step": step, "token": 0});
    let device = json!({
        "name": "slow", "pages": 100, "decode_ms": line(2.0), "mixed_ms": line(3.0), "attention_ms": line(0.0), "context_ms": 0,
        "further_row_ms": 0, "sample_ms": 0, "attention_least_ms": 0,
    });
    let device = scratch.write("device.json", device.to_string()).display().to_string();
    let path = scratch.join("report.json");
    let flags =
        ["--simulate", &device, "--max-running", "4", "--verify", "2", "--json", path.to_str().unwrap()];
    let text = stdout(&bench(&flags));
    assert!(text.contains("no device, simulated: slow"), "{text}");
    assert_eq!(rows(&text, "Verified:"), ["2 requests alone give the same tokens"]);
    let report = read_json(&path);
    let run = &report["runs"][0];
    for (kind, step_s) in [("decode", 0.002), ("prefill", 0.003), ("mixed", 0.003)] {
        let (steps, seconds) = (run[kind]["steps"].as_f64().unwrap(), run[kind]["seconds"].as_f64().unwrap());
        assert!((seconds - steps * step_s).abs() < 1e-6, "{kind}: {steps} steps in {seconds} s");
    }
    assert!(run["seconds"].as_f64().unwrap() >= run["decode"]["seconds"].as_f64().unwrap());
    assert_eq!((&run["host"]["rows"], &run["floor"]), (&json!(4), &Value::Null));
    // Waiting for the device is no work, nor is there a driver.
    assert!(run["host"]["p50_us"].as_f64().unwrap() > 0.0 && run["host"]["driver_p50_us"] == 0.0, "{run}");
    for (flags, expected) in [
        (&["--simulate", "/nowhere.json"][..], "/nowhere.json"),
        (&["--simulate", &device, "--list-models"], "--list-models runs nothing; leave --simulate out"),
    ] {
        let error = complaint(flags);
        assert!(error.contains(expected), "{flags:?}: {error}");
    }
}

/// Runs the binary on a file of requests, with a checkpoint that has a tokenizer.
fn bench_file(scratch: &Scratch, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offline-bench"));
    command
        .args(["--backend", "cpu", "--num-pages", "64", "--max-running", "8"])
        .arg("--model")
        .arg(scratch.path());
    command.arg("--requests").arg(scratch.join("requests")).args(flags).output().unwrap()
}

const REQUEST_LINES: &str = r#"
{"id": 1, "prompt": "Once upon", "max_tokens": 5, "ignore_eos": true}
{"id": 2, "prompt_token_ids": [7, 8, 9], "max_tokens": 4, "ignore_eos": true, "temperature": 0}
{"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "ignore_eos": true}}
"#;

#[test]
fn a_files_request_lines_are_measured_in_either_format() {
    let scratch = Scratch::with_text();
    scratch.write("requests", REQUEST_LINES);
    let json = scratch.join("report.json");
    let text = stdout(&bench_file(&scratch, &["--verify", "3", "--json", json.to_str().unwrap()]));
    assert!(text.contains("Verified: 3 requests alone give the same tokens"), "{text}");
    assert!(text.contains("at most 12 output tokens") && text.contains("Total: 12tok"), "{text}");
    let report = read_json(&json);
    let workload = &report["workload"];
    assert_eq!((workload["requests"].as_u64(), workload["output_tokens"].as_u64()), (Some(3), Some(12)));
    assert_eq!(workload["source"], scratch.join("requests").display().to_string());

    let text = stdout(&bench_file(&scratch, &["--n", "2"]));
    assert!(text.contains("2 requests (") && text.contains("Total: 9tok"), "{text}");
}

#[test]
fn a_sharegpt_file_gives_prompts_and_the_lengths_of_their_answers() {
    let scratch = Scratch::with_text();
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let conversations = json!([
        {"id": "x", "conversations": [turn("human", "Once upon"), turn("gpt", "Hi"), turn("human", "And?")]},
        {"id": "unanswered", "conversations": [turn("human", "Hello?")]},
        {"id": "empty", "conversations": []},
        {"id": "y", "conversations": [turn("human", "a"), turn("gpt", "Größe: 🦀")]},
    ]);
    scratch.write("requests", format!("\u{feff}\n {conversations}\n"));
    let tokenizer = tokenizers::Tokenizer::from_file("tests/fixtures/text/tokenizer.json").unwrap();
    let count = |text: &str| tokenizer.encode(text, true).unwrap().len();
    let (prompts, answers) = (count("Once upon") + count("a"), count("Hi") + count("Größe: 🦀"));
    let text = stdout(&bench_file(&scratch, &["--runs", "2"]));
    assert!(text.contains(&format!("{prompts} prompt and at most {answers} output tokens")), "{text}");
    assert_eq!(text.matches(&format!("Total: {answers}tok")).count(), 2, "{text}");
    let text = stdout(&bench_file(&scratch, &["--n", "1"]));
    assert!(text.contains("1 requests (") && text.contains(&format!("Total: {}tok", count("Hi"))), "{text}");
}

#[test]
fn a_file_that_cannot_be_measured_is_refused_with_the_place_in_it() {
    let scratch = Scratch::with_text();
    let complaint = |content: &str, flags: &[&str]| {
        scratch.write("requests", content);
        let output = bench_file(&scratch, flags);
        assert!(!output.status.success(), "{content} should be refused");
        String::from_utf8(output.stderr).unwrap()
    };
    for (content, says) in [
        ("", "has no requests; give at least one line"),
        ("[]", "has no requests"),
        ("[5]", "is neither request lines nor ShareGPT JSON"),
        (r#"[{"conversations": [{"value": "a"}]"#, "is neither request lines nor ShareGPT JSON"),
        ("{\"id\": 1, \"prompt\": \"a\"}\n{\"id\": 2, \"prmpt\": \"a\"}", "line 2 of "),
        (r#"{"id": 1, "messages": [{"role": "elf", "content": "a"}]}"#, "line 1 of "),
        (r#"{"id": 1, "prompt_token_ids": []}"#, "request 0 of the workload can't run: the prompt is empty"),
    ] {
        let said = complaint(content, &[]);
        assert!(said.contains(says), "{content}: {said}");
    }
    let said = complaint(REQUEST_LINES, &["--input-len", "5"]);
    assert!(said.contains("--input-len is of random requests"), "{said}");
    fs::remove_file(scratch.join("tokenizer.json")).unwrap();
    assert!(complaint(REQUEST_LINES, &[]).contains("tokenizer.json"), "text needs a tokenizer");
    fs::remove_file(scratch.join("requests")).unwrap();
    let said = String::from_utf8(bench_file(&scratch, &[]).stderr).unwrap();
    assert!(said.contains("can't be read") && said.contains("--requests"), "{said}");
}
