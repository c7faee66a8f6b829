//! The page that `--report` writes: the numbers of `--json`, in one file, and drawn by a real browser where there is one.

#[path = "browser/mod.rs"]
mod browser;
mod common;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::Scratch;
use serde_json::{Value, json};

/// A benchmark of two short runs; its page and its JSON.
fn benchmark(scratch: &Scratch) -> (PathBuf, Value) {
    let (page, json) = (scratch.join("report.html"), scratch.join("report.json"));
    let output = Command::new(env!("CARGO_BIN_EXE_offline-bench"))
        .args([
            "--backend",
            "cpu",
            "--n",
            "6",
            "--input-len",
            "5..40",
            "--output-len",
            "3..24",
            "--runs",
            "2",
        ])
        .arg("--report")
        .arg(&page)
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    (page, serde_json::from_slice(&fs::read(json).unwrap()).unwrap())
}

/// A job of ten requests that run, two that can't and three lines that are none.
fn job(scratch: &Scratch, flags: &[&str]) -> Output {
    let mut lines = Vec::new();
    for i in 0..10 {
        lines.push(
            json!({"id": i, "prompt_token_ids": [1, 2, 3 + i], "max_tokens": 5 + i, "ignore_eos": true})
                .to_string(),
        );
    }
    lines.push(json!({"id": "long", "prompt_token_ids": vec![1; 5000]}).to_string());
    lines.push(json!({"id": "empty", "prompt_token_ids": []}).to_string());
    lines.extend(["{", "[]", "nonsense"].map(str::to_owned));
    let input = scratch.write("requests.jsonl", lines.join("\n"));
    Command::new(env!("CARGO_BIN_EXE_generate"))
        .args(["--model", "tests/fixtures/tiny-tied", "--backend", "cpu", "--max-seq-len", "256"])
        .arg("--input")
        .arg(input)
        .arg("--output")
        .arg(scratch.join("results.jsonl"))
        .args(flags)
        .output()
        .unwrap()
}

/// The numbers that lie in a page.
fn numbers(page: &str) -> Value {
    let start = r#"<script type="application/json" id="report">"#;
    let (_, rest) = page.split_once(start).unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn the_page_holds_the_same_numbers_as_the_report_for_machines() {
    let scratch = Scratch::new();
    let (page, report) = benchmark(&scratch);
    let page = fs::read_to_string(page).unwrap();
    assert_eq!(numbers(&page), report);
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    let run = &report["runs"][1];
    let timeline = &run["timeline"];
    let entries = timeline["output_tokens_per_s"].as_array().unwrap();
    for series in
        ["prefill_tokens_per_s", "prefill_share", "decode_share", "decode_rows", "running", "waiting"]
    {
        assert_eq!(timeline[series].as_array().unwrap().len(), entries.len(), "{series}");
    }
    let share = |series: &str| timeline[series].as_array().unwrap().iter().map(|one| one.as_f64().unwrap());
    assert!(share("prefill_share").zip(share("decode_share")).all(|(a, b)| (0.0..1.01).contains(&(a + b))));
    // All but the first token of each request come some time after another.
    let (total, requests) = (run["total_tokens"].as_u64().unwrap(), 6);
    assert_eq!(run["first_token_ms"]["count"], requests);
    assert_eq!(run["between_tokens_ms"]["count"], total - requests);
    assert_eq!(run["ended"]["length"], requests);
    assert_eq!(run["device_state"], Value::Null, "nothing is known of a CPU's clocks");
    let counted = |latencies: &Value| -> u64 {
        let counts = latencies["distribution"]["counts"].as_array().unwrap();
        counts.iter().map(|count| count.as_u64().unwrap()).sum()
    };
    assert_eq!(counted(&run["between_tokens_ms"]), total - requests);
}

#[test]
fn a_jobs_report_counts_its_failures_by_kind_and_holds_what_was_seen_of_every_token() {
    let scratch = Scratch::new();
    let (page, json) = (scratch.join("report.html"), scratch.join("report.json"));
    let output = job(&scratch, &["--report", page.to_str().unwrap(), "--json", json.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "some lines failed: {output:?}");
    let report: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert_eq!(numbers(&fs::read_to_string(page).unwrap()), report);
    assert_eq!(report["program"], "generate");
    assert_eq!((&report["job"]["finished"], &report["job"]["failed"]), (&json!(10), &json!(5)));
    let run = &report["runs"][0];
    assert_eq!(run["ended"], json!({"length": 10, "rejected": 2}));
    let failures = json!({"empty prompt": 1, "line that is no request": 3, "prompt too long": 1});
    assert_eq!(run["failures"], failures);
    let tokens: u64 = (5..15).sum();
    assert_eq!(run["total_tokens"], tokens);
    assert_eq!(run["first_token_ms"]["count"], 10);
    assert_eq!(run["between_tokens_ms"]["count"], tokens - 10);
}

#[test]
fn a_report_does_not_overwrite_requests_or_results() {
    let scratch = Scratch::new();
    let requests = scratch.join("requests.jsonl");
    for flag in ["--report", "--json"] {
        let output = job(&scratch, &["--overwrite", flag, requests.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains("would overwrite the requests or the results"), "{error}");
        assert!(fs::read_to_string(&requests).unwrap().contains("nonsense"), "they are still there");
    }
}

/// What is noted stands behind it.
const SEEN: &str = r#"<pre id="seen">"#;

/// What a page looks like to a browser, noted in the page itself when it has been drawn.
const OBSERVER: &str = r#"<script>{
  const faults = [];
  addEventListener("error", (event) => faults.push(event.message));
  const charts = () => [...document.querySelectorAll("figure svg")];
  const drawn = () => charts().filter((svg) => svg.querySelector("polyline, circle, rect")).length;
  const note = (tries) => {
    // Charts are drawn when their size is known, which takes a frame.
    if (drawn() < charts().length && tries > 0) return requestAnimationFrame(() => setTimeout(note, 50, tries - 1));
    const seen = document.createElement("pre");
    seen.id = "seen";
    seen.textContent = JSON.stringify({
      faults, paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
      width: innerWidth, needed: document.documentElement.scrollWidth,
      charts: charts().length, drawn: drawn(),
      labels: charts().map((svg) => [...svg.querySelectorAll("text:not([class])")].map((label) => [label.getAttribute("y"), label.textContent].join(" "))),
      text: document.body.innerText,
    });
    document.body.append(seen);
  };
  addEventListener("load", () => setTimeout(note, 100, 1000));
}</script>"#;

/// Opens a page in a browser and gives what it saw. Of a document that is older than what is noted in it, as a busy machine's
/// may be, nothing is to be learned: then it is opened again.
fn look(browser: &Path, page: &Path, profile: &Path, dark: bool, width: u32) -> Value {
    let url = format!("file://{}", page.display());
    let mut dom = String::new();
    for attempt in 0..5 {
        dom = browser::document(browser, &url, &profile.join(attempt.to_string()), dark, width, 60);
        if dom.contains(SEEN) {
            break;
        }
    }
    let (_, seen) = dom.split_once(SEEN).unwrap_or_else(|| panic!("nothing was seen: {dom}"));
    let seen = seen.split_once("</pre>").unwrap().0;
    let seen = seen.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", " ").replace("&amp;", "&");
    serde_json::from_str(&seen).unwrap()
}

#[test]
fn a_browser_draws_every_chart_light_and_dark_narrow_and_wide() {
    let Some(browser) = browser::find() else {
        common::skipped("there is no Chromium here");
        return;
    };
    let scratch = Scratch::new();
    let (page, report) = benchmark(&scratch);
    let observed =
        fs::read_to_string(&page).unwrap().replacen("<noscript>", &format!("{OBSERVER}<noscript>"), 1);
    let page = scratch.write("observed.html", observed);
    let mut papers = Vec::new();
    for (dark, width) in [(false, 1400), (true, 1400), (false, 390), (true, 390)] {
        let profile = scratch.join(&format!("profile-{dark}-{width}"));
        fs::create_dir(&profile).unwrap();
        let seen = look(&browser, &page, &profile, dark, width);
        assert_eq!(seen["faults"].as_array().unwrap().len(), 0, "{seen:#}");
        assert_eq!((seen["charts"].as_u64(), seen["drawn"].as_u64()), (Some(8), Some(8)), "{seen:#}");
        assert!(
            seen["needed"].as_u64() <= seen["width"].as_u64(),
            "it must not be scrolled sideways: {seen:#}"
        );
        // All requests enter together, so that their first tokens come with one step: a latency alone.
        for labels in seen["labels"].as_array().unwrap().iter().map(|labels| labels.as_array().unwrap()) {
            let told_apart: HashSet<_> = labels.iter().map(Value::to_string).collect();
            assert!(!labels.is_empty() && told_apart.len() == labels.len(), "two are alike: {labels:?}");
        }
        let text = seen["text"].as_str().unwrap();
        for broken in ["NaN", "undefined", "Infinity", "[object"] {
            assert!(!text.contains(broken), "{broken}: {text}");
        }
        let total = report["runs"][1]["total_tokens"].to_string();
        for expected in ["offline-bench: tiny", "Output tokens a second", "are not known", &total] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        papers.push((dark, seen["paper"].clone()));
    }
    let paper = |dark| papers.iter().find(|(is_dark, _)| *is_dark == dark).unwrap().1.clone();
    assert_ne!(paper(false), paper(true), "light and dark are told apart");
}
