//! `serve-bench` as a user runs it, against a service that answers as the test wants. What is asserted are counts: that
//! percentiles are those of the times noted is tested where times are told (`bench::recorder`).

mod support;

use std::collections::BTreeSet;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{AUTHORITY, Fake, Reply, Scratch};

fn serve_bench(url: &str, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serve-bench"));
    if !flags.contains(&"--url") {
        command.args(["--url", url]);
    }
    command.args(flags).env_remove("OPENAI_API_KEY").output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The report of a run; its exit status must be this.
fn report(fake: &Fake, flags: &[&str], status: i32) -> Value {
    let scratch = Scratch::new();
    let json = scratch.join("report.json");
    let mut all = vec!["--json", json.to_str().unwrap()];
    all.extend(flags);
    let output = serve_bench(&fake.url(), &all);
    assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
    scratch.json("report.json")
}

#[test]
fn every_request_is_asked_once_as_the_workload_says_and_every_token_is_counted() {
    let fake = Fake::start(Reply::in_full);
    let flags =
        ["--n", "20", "--concurrency", "4", "--input-len", "3..9", "--output-len", "1..5", "--seed", "2"];
    let report = report(&fake, &flags, 0);
    let asked = fake.asked();
    assert_eq!(asked.len(), 20);
    assert!(asked.iter().all(|asked| asked.path == "/v1/completions" && asked.body["model"] == "fake"));
    assert!(asked.iter().all(|asked| (3..=9).contains(&asked.body["prompt"].as_array().unwrap().len())));
    assert!(asked.iter().all(|asked| asked.body["ignore_eos"] == true && asked.body["stream"] == true));
    let seeds: BTreeSet<_> = asked.iter().map(|asked| asked.body["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds, (2..22).collect());
    assert!(fake.connections() <= 4, "{} connections for 4 requests at once", fake.connections());

    let tokens: u64 = asked.iter().map(|asked| asked.body["max_tokens"].as_u64().unwrap()).sum();
    let run = &report["runs"][0];
    assert_eq!(run["finished"], 20);
    assert_eq!((&run["failed"], &run["short_outputs"]), (&json!(0), &json!(0)));
    assert_eq!((run["output_tokens"].as_u64(), run["prompt_tokens"].as_u64()), (Some(tokens), Some(200)));
    assert_eq!(run["ttft_ms"]["count"], 20);
    assert_eq!(run["itl_ms"]["count"].as_u64(), Some(tokens - 20));
    assert_eq!((&run["open_peak"], &run["arrivals"]), (&json!(4), &json!("4 at once")));
    assert!(run["client"]["us_per_token"].as_f64().unwrap() > 0.0);
    assert_eq!((&report["model"], &report["api"]), (&json!("fake"), &json!("completions")));
}

#[test]
fn a_service_behind_tls_is_measured_like_any_other_once_it_is_trusted() {
    let fake = Fake::start_tls(Reply::in_full);
    let scratch = Scratch::new();
    let (url, json) = (fake.url(), scratch.join("report.json"));
    let run = |authority: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_serve-bench"));
        command.args(["--n", "60", "--concurrency", "6", "--input-len", "900", "--output-len", "1..40"]);
        command.args(["--url", &url, "--json"]).arg(&json);
        command.env_remove("OPENAI_API_KEY").env("SSL_CERT_FILE", authority).output().unwrap()
    };
    let output = run(AUTHORITY);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = scratch.json("report.json");
    let tokens: u64 = fake.asked().iter().map(|asked| asked.body["max_tokens"].as_u64().unwrap()).sum();
    let measured = &report["runs"][0];
    assert_eq!((&measured["finished"], measured["output_tokens"].as_u64()), (&json!(60), Some(tokens)));
    assert!(fake.connections() <= 6, "{} connections for 6 requests at once", fake.connections());
    let damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let damaged = scratch.write("damaged.pem", damaged).display().to_string();
    // The service's own certificate does not make it trusted, nor does a file that has none.
    for (authority, complaint) in [
        ("", "certificate"),
        ("/nowhere", "SSL_CERT_FILE is /nowhere"),
        ("tests/support/mod.rs", "no certificate is in it"),
        (&damaged, "the certificate in it can't be read"),
    ] {
        let output = run(authority);
        assert_eq!(output.status.code(), Some(1), "{authority}");
        assert!(stderr(&output).contains(complaint), "{authority}: {}", stderr(&output));
    }
    assert_eq!(fake.asked().len(), 60, "who is not trusted is not asked");
}

#[test]
fn hundreds_of_streams_are_open_at_once() {
    const OPEN: usize = 300;
    // Nobody is answered before all are there.
    let (arrived, all) = (Arc::new(Mutex::new(0)), Arc::new(Condvar::new()));
    let fake = Fake::start(move |asked| {
        let mut count = arrived.lock().unwrap();
        *count += 1;
        all.notify_all();
        while *count < OPEN {
            count = all.wait(count).unwrap();
        }
        Reply::in_full(asked)
    });
    let open = OPEN.to_string();
    let flags = ["--n", "600", "--concurrency", &open, "--input-len", "2", "--output-len", "3"];
    let report = report(&fake, &flags, 0);
    let run = &report["runs"][0];
    assert_eq!((&run["finished"], &run["open_peak"]), (&json!(600), &json!(OPEN)));
    assert_eq!((&run["output_tokens"], fake.connections()), (&json!(1800), OPEN));
}

#[test]
fn chat_is_asked_in_words_with_the_key_and_the_fields_that_are_wanted() {
    let fake = Fake::start(Reply::in_full);
    let flags = [
        "--api",
        "chat",
        "--n",
        "2",
        "--input-len",
        "5",
        "--output-len",
        "2",
        "--rate",
        "500",
        "--api-key",
        "k",
    ];
    let more =
        ["--standard-fields", "--extra-body", r#"{"top_p": 0.5}"#, "--model", "mine", "--temperature", "0"];
    let report = report(&fake, &[&flags[..], &more[..]].concat(), 0);
    for asked in fake.asked() {
        assert_eq!(asked.path, "/v1/chat/completions");
        assert_eq!(asked.key.as_deref(), Some("Bearer k"));
        assert_eq!(asked.text().split(' ').count(), 5);
        assert_eq!((&asked.body["model"], &asked.body["top_p"]), (&json!("mine"), &json!(0.5)));
        assert!(asked.body.get("ignore_eos").is_none());
    }
    assert_eq!((&report["runs"][0]["finished"], fake.asked().len()), (&json!(2), 2));
    assert!(!report["command"].as_array().unwrap().contains(&json!("k")), "a key is written down: {report}");
}

#[test]
fn what_fails_is_counted_by_what_was_wrong() {
    const STREAM: &str = "HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": [{\"text\": \"a\"}]}\n\n";
    let fake = Fake::start(|asked| match asked.number {
        0 | 1 => Reply::Json(429, json!({"error": {"message": "the queue is full"}})),
        2 => {
            Reply::Bytes(format!("{STREAM}data: {{\"error\": {{\"message\": \"out of pages\"}}}}\n\n").into())
        }
        3 => Reply::Bytes(STREAM.into()),
        4 => Reply::Bytes(b"SSH-2.0-OpenSSH\r\n".to_vec()),
        5 => Reply::Bytes(Vec::new()),
        6 => Reply::Bytes(format!("{STREAM}data: <html>\n\n").into()),
        _ => Reply::in_full(asked),
    });
    let flags = ["--n", "10", "--concurrency", "1", "--input-len", "2", "--output-len", "2"];
    let report = report(&fake, &flags, 1);
    let run = &report["runs"][0];
    assert_eq!((&run["finished"], &run["failed"]), (&json!(3), &json!(7)), "{run}");
    for (kind, count, said) in [
        ("status 429", 2, "the queue is full"),
        ("failed on the way", 1, "out of pages"),
        ("stream cut off", 1, "without [DONE]"),
        ("no HTTP", 1, "no HTTP/1.1"),
        ("connection broken", 1, "closed"),
        ("no completion", 1, "no chunk"),
    ] {
        let failures = &run["failures"][kind];
        assert_eq!(failures["count"], count, "{kind}: {run}");
        assert!(failures["first"].as_str().unwrap().contains(said), "{failures}");
    }
}

#[test]
fn a_service_that_says_nothing_is_given_up() {
    // One that takes connections and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let scratch = Scratch::new();
    let json = scratch.join("report.json");
    let flags =
        ["--model", "m", "--n", "2", "--timeout", "1", "--input-len", "2", "--json", json.to_str().unwrap()];
    let output = serve_bench(&url, &flags);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(scratch.json("report.json")["runs"][0]["failures"]["time-out"]["count"], 2);
}

#[test]
fn a_kept_connection_that_the_service_had_closed_costs_no_request() {
    let fake = Fake::start(|asked| match Reply::in_full(asked) {
        Reply::Stream(texts) if asked.number.is_multiple_of(3) => Reply::StreamThenClose(texts),
        reply => reply,
    });
    let flags = ["--n", "30", "--concurrency", "2", "--input-len", "2", "--output-len", "2"];
    let report = report(&fake, &flags, 0);
    assert_eq!((&report["runs"][0]["finished"], fake.asked().len()), (&json!(30), 30));
    assert!(fake.connections() >= 10);
}

#[test]
fn sharegpts_prompts_are_asked_and_as_many_tokens_as_the_answer_has() {
    let fake = Fake::start(Reply::in_full);
    let scratch = Scratch::new();
    let file = json!([
        {"id": "a", "conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "one two three"}]},
        {"id": "b", "conversations": [{"from": "human", "value": "alone"}]},
        {"id": "c", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]},
    ]);
    let file = scratch.write("sharegpt.json", &file.to_string());
    let flags = ["--requests", file.to_str().unwrap(), "--concurrency", "1"];
    report(&fake, &flags, 0);
    let asked: Vec<_> =
        fake.asked().iter().map(|asked| (asked.text(), asked.body["max_tokens"].clone())).collect();
    assert_eq!(asked, [("Hi there".to_owned(), json!(3)), ("Why?".to_owned(), json!(1))]);
}

#[test]
fn a_tokenizer_of_ones_own_counts_where_the_service_does_not() {
    let fake = Fake::start(Reply::in_full);
    let scratch = Scratch::with_model();
    let file = json!([{"conversations": [{"value": "Hi"}, {"value": "héllo"}]}]).to_string();
    let file = scratch.write("sharegpt.json", &file);
    let tokenizer = scratch.path().to_str().unwrap();
    report(&fake, &["--requests", file.to_str().unwrap(), "--tokenizer", tokenizer], 0);
    // A word to the service, and several tokens to the fixture's tokenizer.
    assert!(fake.asked()[0].body["max_tokens"].as_u64().unwrap() > 1);
}

#[test]
fn a_traces_requests_go_out_in_its_order_and_share_what_its_prompts_shared() {
    let fake = Fake::start(Reply::in_full);
    let scratch = Scratch::new();
    let trace = [
        json!({"chat_id": 2, "timestamp": 61.01, "input_length": 40, "output_length": 2, "hash_ids": [7, 8, 9]}),
        json!({"chat_id": 1, "timestamp": 61.0, "input_length": 33, "output_length": 1, "hash_ids": [7, 8, 5]}),
    ];
    let file = scratch.write("trace.jsonl", &format!("{}\n{}\n", trace[0], trace[1]));
    let report = report(&fake, &["--requests", file.to_str().unwrap(), "--time-scale", "0.5"], 0);
    assert!(report["runs"][0]["arrivals"].as_str().unwrap().contains("trace"));
    let mut asked = fake.asked();
    // Both may be on their way at once; their lengths tell them apart.
    asked.sort_by_key(|asked| asked.body["max_tokens"].as_u64());
    let prompts: Vec<_> = asked.iter().map(|asked| asked.body["prompt"].as_array().unwrap()).collect();
    assert_eq!((prompts[0].len(), prompts[1].len()), (33, 40));
    assert_eq!(prompts[0][..32], prompts[1][..32]);
    assert_ne!(prompts[0][32], prompts[1][32]);
}

#[test]
fn a_sweep_tells_whether_any_rate_keeps_the_goals_and_asks_anew_in_each_run() {
    let fake = Fake::start(Reply::in_full);
    let flags = ["--n", "5", "--input-len", "9", "--output-len", "2", "--sweep", "200..400"];
    let hopeless = report(&fake, &[&flags[..], &["--goal-ttft", "0.000001"]].concat(), 0);
    assert_eq!((hopeless["runs"].as_array().unwrap().len(), &hopeless["highest_rate"]), (1, &Value::Null));
    assert_eq!(hopeless["runs"][0]["keeps_goals"], false);
    let easy = report(&fake, &[&flags[..], &["--goal-e2e", "600000", "--warmup", "3"]].concat(), 0);
    assert_eq!((easy["runs"].as_array().unwrap().len(), &easy["highest_rate"]), (2, &json!(400.0)));
    let prompts: BTreeSet<String> =
        fake.asked()[5..].iter().map(|asked| asked.body["prompt"].to_string()).collect();
    assert_eq!(prompts.len(), 3 + 5 + 5, "no prompt twice");
}

#[test]
fn ctrl_c_ends_a_run_with_what_was_seen_so_far() {
    let fake = Fake::start(|asked| match asked.number {
        0..3 => Reply::in_full(asked),
        _ => Reply::Hang(vec!["a".to_owned(), "b".to_owned()]),
    });
    let scratch = Scratch::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_serve-bench"));
    command.args([
        "--url",
        &fake.url(),
        "--concurrency",
        "2",
        "--input-len",
        "2",
        "--output-len",
        "4",
        "--json",
    ]);
    let bench = command
        .arg(scratch.join("report.json"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while fake.asked().len() < 5 {
        assert!(started.elapsed() < Duration::from_secs(60), "{} requests have come", fake.asked().len());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &bench.id().to_string()]).status().unwrap().success());
    let output = bench.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("unfinished    2 when the run was stopped"));
    let run = &scratch.json("report.json")["runs"][0];
    assert_eq!((&run["finished"], &run["failed"], &run["unfinished"]), (&json!(3), &json!(0), &json!(2)));
}

#[test]
fn bad_flags_and_files_are_refused_with_what_to_do() {
    let scratch = Scratch::new();
    let line = scratch.write("line.jsonl", "{\"timestamp\": 1}\n");
    let empty = scratch.write("empty.jsonl", "\n");
    let list = scratch.write("list.json", "[{\"conversations\": 3}]");
    let fake = Fake::start(Reply::in_full);
    for (flags, complaint) in [
        (vec!["--n", "0"], "must be at least 1"),
        (vec!["--rate", "-1"], "--rate is -1; it must be above 0"),
        (vec!["--rate", "1", "--concurrency", "2"], "give one"),
        (vec!["--time-scale", "2"], "these requests have none"),
        (vec!["--sweep", "1..2"], "give --goal-ttft"),
        (vec!["--sweep", "2..1", "--goal-itl", "5"], "write 1..64"),
        (vec!["--extra-body", "[]"], "no JSON object"),
        (vec!["--url", "localhost"], "give one like"),
        (vec!["--url", "https://127.0.0.1:1", "--model", "m"], "check --url, and that the service runs"),
        (vec!["--url", "http://127.0.0.1:1"], "check --url, and that the service runs"),
        (vec!["--url", "http://127.0.0.1:1", "--model", "m"], "check --url, and that the service runs"),
        (vec!["--requests", "/nowhere"], "check --requests"),
        (vec!["--requests", line.to_str().unwrap()], "line 1 is no request of a trace"),
        (vec!["--requests", empty.to_str().unwrap()], "has no requests"),
        (vec!["--requests", list.to_str().unwrap()], "no ShareGPT JSON"),
        (vec!["--requests", "x", "--input-len", "3"], "are of random requests"),
        (vec!["--api", "edits"], "use completions or chat"),
        (vec!["--json", "/nowhere/report.json"], "can't be written"),
    ] {
        let output = serve_bench(&fake.url(), &flags);
        assert_eq!(output.status.code(), Some(1), "{flags:?}");
        assert!(stderr(&output).contains(complaint), "{flags:?}: {}", stderr(&output));
    }
    assert!(fake.asked().is_empty());
}
