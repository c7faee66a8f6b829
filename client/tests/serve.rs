//! Both clients against the service of this workspace, with a tiny model.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::{Scratch, serve_program};

/// The service; it ends with the test.
struct Serve {
    child: Child,
    url: String,
}

impl Serve {
    /// Serves a folder's model, and waits until it is ready.
    fn start(program: &Path, scratch: &Scratch) -> Serve {
        let mut command = Command::new(program);
        command.arg("--model").arg(scratch.path()).args(["--port", "0", "--backend", "cpu"]);
        command.args(["--max-running", "4", "--max-seq-len", "256", "--num-pages", "64"]);
        command.env_remove("MINISGL_API_KEY").stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let url = loop {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "the service ended before it was ready");
            if let Some((_, rest)) = line.split_once("ready at ") {
                break rest.split(':').take(3).collect::<Vec<_>>().join(":");
            }
        };
        // What it says later must go somewhere.
        std::thread::spawn(move || said.lines().for_each(drop));
        Serve { child, url }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn both_clients_work_with_the_service_and_the_service_with_both() {
    let Some(program) = serve_program(env!("CARGO_BIN_EXE_chat")) else { return };
    let scratch = Scratch::with_model();
    let serve = Serve::start(&program, &scratch);

    let mut chat = Command::new(env!("CARGO_BIN_EXE_chat"));
    chat.args(["--url", &serve.url, "--temperature", "0", "--max-tokens", "9"]).env_remove("OPENAI_API_KEY");
    let mut remote =
        chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    remote.stdin.take().unwrap().write_all(b"Hello\nWhy?\n").unwrap();
    let remote = remote.wait_with_output().unwrap();
    assert!(remote.status.success(), "{}", String::from_utf8_lossy(&remote.stderr));
    let mut local = Command::new(env!("CARGO_BIN_EXE_chat"));
    local.arg("--model").arg(scratch.path()).args([
        "--backend",
        "cpu",
        "--max-seq-len",
        "256",
        "--num-pages",
        "64",
    ]);
    local.args(["--temperature", "0", "--max-tokens", "9"]);
    let mut local = local.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    local.stdin.take().unwrap().write_all(b"Hello\nWhy?\n").unwrap();
    assert_eq!(remote.stdout, local.wait_with_output().unwrap().stdout, "the same answers, here and there");

    for api in ["completions", "chat"] {
        let json = scratch.join("report.json");
        let mut bench = Command::new(env!("CARGO_BIN_EXE_serve-bench"));
        bench.args(["--url", &serve.url, "--api", api, "--n", "12", "--concurrency", "6", "--vocab", "600"]);
        bench.args([
            "--input-len",
            "5..20",
            "--output-len",
            "3..9",
            "--pid",
            &serve.child.id().to_string(),
            "--json",
        ]);
        let bench = bench.arg(&json).env_remove("OPENAI_API_KEY").output().unwrap();
        assert!(bench.status.success(), "{}", String::from_utf8_lossy(&bench.stderr));
        let run: &Value = &scratch.json("report.json")["runs"][0];
        assert_eq!((run["finished"].as_u64(), run["short_outputs"].as_u64()), (Some(12), Some(0)), "{run}");
        // Every token is told as one, those without text of their own, too.
        assert_eq!(
            run["itl_ms"]["count"].as_u64(),
            Some(run["output_tokens"].as_u64().unwrap() - 12),
            "{api}: {run}"
        );
        assert!(run["service_us_per_token"].is_f64(), "{run}");
    }
}
