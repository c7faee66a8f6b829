//! Request and result lines: what is taken, what is refused and how, what comes back.

mod damage;
mod embedding;
mod fields;
mod line;
mod prompt;
mod result;
mod scoring;

use minisgl::lines::{self, BadLine, Defaults, LineError, Origin, RequestLine};
use minisgl::openai::ModelName;
use minisgl::{Completion, FinishReason, SamplingParams, TokenLogprobs};
use serde_json::Value;

const ORIGIN: Origin = Origin { line: 3, fingerprint: 0x9f };

fn defaults() -> Defaults {
    let sampling = SamplingParams { seed: 100, max_tokens: 16, ..SamplingParams::default() };
    Defaults { sampling, model: ModelName::new("Qwen/Qwen3-0.6B") }
}

fn parse(line: impl AsRef<[u8]>) -> Result<RequestLine, BadLine> {
    lines::parse(line.as_ref(), 3, &defaults())
}

/// A request in each of the formats that have these fields.
fn in_all_formats(fields: &str) -> [String; 3] {
    let batch = |url: &str, prompt: &str| {
        format!(r#"{{"custom_id": "a", "method": "POST", "url": "{url}", "body": {{{prompt}, {fields}}}}}"#)
    };
    [
        format!(r#"{{"id": 1, "prompt": "a", {fields}}}"#),
        batch("/v1/completions", r#""prompt": "a""#),
        batch("/v1/chat/completions", r#""messages": [{"role": "user", "content": "a"}]"#),
    ]
}

#[track_caller]
fn sampling(fields: &str) -> SamplingParams {
    let [first, others @ ..] = in_all_formats(fields).map(|line| parse(&line).expect(&line).request.sampling);
    assert!(others.iter().all(|other| *other == first), "{fields}");
    first
}

/// The error that these fields give in every format.
#[track_caller]
fn error(fields: &str) -> LineError {
    let [first, others @ ..] = in_all_formats(fields).map(|line| parse(&line).expect_err(&line).error);
    assert!(others.iter().all(|other| *other == first), "{fields}: {first}, {others:?}");
    first
}

fn native_error(line: &str) -> String {
    parse(line).expect_err(line).error.to_string()
}

/// Three tokens: a word, half a character, and one that ends the output.
fn completion() -> Completion {
    let logprobs = |logprob: f32, top: &[(u32, f32)]| TokenLogprobs { logprob, top: top.to_vec() };
    Completion {
        sample: 0,
        token_ids: vec![10, 11, 12],
        text: Some("né \u{fffd}".to_owned()),
        finish_reason: FinishReason::Eos,
        stop_text: None,
        prompt_tokens: 5,
        prompt_token_ids: None,
        cached_tokens: 4,
        max_tokens: 16,
        logprobs: Some(vec![
            logprobs(-0.5, &[(10, -0.5), (11, -1.5)]),
            logprobs(-2.0, &[(10, -0.25), (13, f32::NEG_INFINITY)]),
            logprobs(0.0, &[(12, 0.0), (11, -9.0)]),
        ]),
        prompt_logprobs: None,
        embedding: None,
        warning: None,
        error: None,
    }
}

fn token_bytes(id: u32) -> Option<Vec<u8>> {
    let bytes: &[u8] = match id {
        10 => "né".as_bytes(),
        11 => b" \xF0\x9F",
        12 => b"<eos>",
        _ => return None,
    };
    Some(bytes.to_vec())
}

fn result(line: &str, completion: &Completion) -> Value {
    serde_json::from_str(&written(line, completion)).unwrap()
}

fn written(line: &str, completion: &Completion) -> String {
    written_all(line, std::slice::from_ref(completion))
}

/// Of a request's samples.
fn written_all(line: &str, completions: &[Completion]) -> String {
    let mut out = Vec::new();
    lines::write_result(&mut out, &parse(line).unwrap().header, ORIGIN, completions, None, &token_bytes);
    assert_eq!(out.iter().position(|byte| *byte == b'\n'), Some(out.len() - 1), "one whole line");
    assert!(out.starts_with(b"{\"id\":"));
    String::from_utf8(out).unwrap()
}

const NATIVE: &str = r#"{"id": 7, "prompt": "hi"}"#;

const CHAT: &str = r#"{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
    "body": {"model": "Qwen3-0.6B", "messages": [{"role": "user", "content": "hi"}]}}"#;
const TEXT: &str =
    r#"{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"}}"#;
