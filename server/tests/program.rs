//! The program as a user starts it and ends it.

mod common;
#[path = "../../tests/common/flag_tables.rs"]
mod flag_tables;

use std::ffi::OsStr;
use std::io::{BufRead, Read, Write};
use std::net::TcpStream;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::serve::{Served, command};
use common::{Scratch, Stream, checkpoint, request, send};
use flag_tables::{assert_documented, part};
use minisgl::openai::ModelName;
use minisgl_server::Settings;
use serde_json::{Value, json};

fn signal(served: &Served, name: &str) {
    let status = Command::new("kill").args(["-s", name, &served.child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn the_docs_tables_have_every_flag_and_its_default() {
    let output = Command::new(env!("CARGO_BIN_EXE_serve")).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let page = |name| std::fs::read_to_string(format!("{}/../{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let (flags, serving) = (page("docs/flags.md"), page("docs/serving.md"));
    let shared = part(&flags, "Of `offline-bench`, `generate`", "## ");
    assert_documented(&help, &[shared, part(&serving, "## Flags", "## ")]);
}

/// The help's text is written by hand; a service without the flag has `Settings`' default.
#[test]
fn the_help_says_the_defaults_that_a_service_has() {
    let output = Command::new(env!("CARGO_BIN_EXE_serve")).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    let (_, options) = help.split_once("Options:").unwrap();
    let settings = Settings::new(ModelName::new("any"));
    let seconds = |time: Duration| time.as_secs() as usize;
    for (flag, default) in [
        ("--max-queued", settings.queued_max),
        ("--max-body-bytes", settings.body_bytes_max),
        ("--max-connections", settings.connections_max),
        ("--header-seconds", seconds(settings.header_timeout)),
        ("--body-seconds", seconds(settings.body_timeout)),
        ("--write-seconds", seconds(settings.write_timeout)),
        ("--drain-seconds", seconds(settings.drain)),
        ("--max-rebuilds", settings.rebuilds_max as usize),
    ] {
        let (_, behind) = options.split_once(&format!("{flag} ")).unwrap_or_else(|| panic!("{flag}: {help}"));
        let (said, _) = behind.split_once(" --").unwrap_or((behind, ""));
        assert!(said.contains(&format!("(default {default}")), "{flag}: {said}");
    }
}

#[test]
fn it_says_where_it_is_with_a_command_that_works() {
    let scratch = Scratch::new();
    checkpoint(scratch.path());
    let served = Served::start(scratch.path(), &[]);
    let line = served.said.lines().last().unwrap();
    let (_, body) = line.split_once(" -d '").unwrap();
    let body = body.strip_suffix('\'').unwrap();
    assert!(
        line.contains(&format!(
            "curl {}/v1/chat/completions -H 'Content-Type: application/json'",
            served.url()
        ))
    );
    let reply = send(served.address, &request("/v1/chat/completions", "", body.as_bytes()));
    assert_eq!(reply.status, 200);
    assert!(reply.json()["choices"][0]["message"]["content"].is_string());
    // A model without a tokenizer is tried with token ids.
    let bare = Served::start("tiny".as_ref(), &[]);
    let (_, body) = bare.said.lines().last().unwrap().split_once(" -d '").unwrap();
    let reply = send(bare.address, &request("/v1/completions", "", body.trim_end_matches('\'').as_bytes()));
    assert!(reply.json()["choices"][0]["token_ids"].is_array());
}

#[test]
fn a_signal_lets_open_requests_end_and_then_the_program_with_status_0() {
    for name in ["TERM", "INT"] {
        let scratch = Scratch::new();
        checkpoint(scratch.path());
        let mut served = Served::start(scratch.path(), &["--drain-seconds", "600"]);
        let body = json!({"prompt": "Once", "max_tokens": 200, "ignore_eos": true, "stream": true, "return_token_ids": true});
        let mut stream = Stream::open(served.address, "/v1/completions", &body);
        assert!(stream.next().is_some());
        signal(&served, name);
        let events: Vec<Value> = stream.collect();
        assert_eq!(events.last(), Some(&Value::Null), "it had its time");
        let mut said = String::new();
        served.stderr.read_to_string(&mut said).unwrap();
        assert_eq!(served.child.wait().unwrap().code(), Some(0), "{said}");
        assert!(
            said.contains("no more requests are taken") && said.contains("all requests have ended"),
            "{said}"
        );
        let logged = said.lines().find(|line| line.contains("POST /v1/completions 200"));
        let logged = logged.unwrap_or_else(|| panic!("the access log has it: {said}"));
        for stage in ["encoding ", "queueing ", "prefilling ", "sending "] {
            assert!(logged.contains(stage), "{logged}");
        }
    }
}

/// A checkpoint, served by a device that takes 30 ms for each step.
fn slow(scratch: &Scratch, flags: &[&str]) -> Served {
    checkpoint(scratch.path());
    let line = |step: f64| json!({"step": step, "token": 0});
    let device = json!({
        "name": "slow", "pages": 100, "decode_ms": line(30.0), "mixed_ms": line(30.0), "attention_ms": line(0.0), "context_ms": 0,
        "further_row_ms": 0, "sample_ms": 0, "attention_least_ms": 0,
    });
    let file = scratch.path().join("device.json");
    std::fs::write(&file, device.to_string()).unwrap();
    Served::start(scratch.path(), &[&["--simulate", file.to_str().unwrap()], flags].concat())
}

#[test]
fn the_log_has_every_request_and_says_which_were_cut_off() {
    let scratch = Scratch::new();
    let mut served = slow(&scratch, &["--cors-origin", "*", "--served-model-name", "model"]);
    let address = served.address;
    let mut logged = |asked: &str| {
        let mut line = String::new();
        while !line.contains(asked) {
            line.clear();
            assert!(served.stderr.read_line(&mut line).unwrap() > 0, "{asked} is not logged");
        }
        (line.contains(" 200 "), line.contains(", cut off"))
    };
    let head = |method: &str, path: &str| {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: https://a.example\r\n\
             Access-Control-Request-Method: POST\r\n\r\n"
        );
        send(address, head.as_bytes());
    };
    for (method, path) in [("GET", "/health"), ("HEAD", "/health"), ("OPTIONS", "/v1/completions")] {
        head(method, path);
        assert_eq!(logged(&format!("{method} {path} ")), (true, false), "{method}");
    }
    let metrics = || {
        let get = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        String::from_utf8(send(address, get).body).unwrap()
    };
    for stream in [false, true] {
        let body = json!({"prompt": "Once", "max_tokens": 200, "ignore_eos": true, "stream": stream});
        let mut socket = TcpStream::connect(address).unwrap();
        socket.write_all(&request("/v1/completions", "", body.to_string().as_bytes())).unwrap();
        // One that goes before the request was looked at leaves nothing to tell.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !metrics().contains("vllm:num_requests_running{model_name=\"model\"} 1") {
            assert!(Instant::now() < deadline, "it does not run");
            // Each look is logged, and nobody reads the log meanwhile.
            std::thread::sleep(Duration::from_millis(50));
        }
        if stream {
            // It has begun to be answered.
            socket.read_exact(&mut [0; 16]).unwrap();
        }
        drop(socket);
        assert_eq!(logged("POST /v1/completions "), (stream, true), "{body}");
    }
}

#[test]
fn a_device_that_is_not_there_takes_its_time() {
    let scratch = Scratch::new();
    let served = slow(&scratch, &[]);
    assert!(served.said.contains("no device, simulated: slow"), "{}", served.said);
    let body = json!({"prompt": "Once", "max_tokens": 20, "ignore_eos": true, "stream": true, "return_token_ids": true});
    let started = Instant::now();
    let events: Vec<Value> = Stream::open(served.address, "/v1/completions", &body).collect();
    let tokens = events.iter().filter(|event| event["choices"][0]["token_ids"].is_array()).count();
    assert_eq!(tokens, 20);
    assert!(started.elapsed() >= Duration::from_millis(20 * 30), "{:?}", started.elapsed());
}

#[test]
fn what_can_not_be_served_is_said_at_once() {
    let scratch = Scratch::new();
    checkpoint(scratch.path());
    let served = Served::start(scratch.path(), &[]);
    let port = served.address.port().to_string();
    let missing = scratch.path().join("nothing").display().to_string();
    for (flags, expected) in [
        (vec!["--port", &port], "choose another --port"),
        (vec!["--api-key-file", &missing], "--api-key-file"),
        (vec!["--api-key", ""], "an API key is empty"),
        (vec!["--simulate", &missing], "the simulated device"),
        (vec!["--cors-origin", "a\nb"], "--cors-origin"),
        (vec!["--tool-format", "xml"], "use qwen3 or llama3"),
        (vec!["--top-p", "2"], "top_p is 2"),
        (vec!["--max-seq-len", "99999999"], "--max-seq-len"),
    ] {
        let output = command(scratch.path(), &flags).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{flags:?}: {said}");
        assert!(said.contains(expected), "{flags:?}: {said}");
    }
    // Rather than be open to everybody.
    let mut command = command(scratch.path(), &[]);
    let output =
        command.env("MINISGL_API_KEY", OsStr::from_bytes(b"k\xff")).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.contains("MINISGL_API_KEY is not UTF-8"), "{said}");
}
