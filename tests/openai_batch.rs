//! Batch lines in, Batch lines out: run as a user runs them, read as a user of the `openai` Python package reads them.

mod common;
#[path = "openai/mod.rs"]
mod openai;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::Scratch;
use minisgl::prompt_seed;
use serde_json::{Value, json};

fn generate(scratch: &Scratch, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
    command.arg("--model").arg(scratch.path());
    command.arg("--input").arg(scratch.join("in.jsonl")).arg("--output").arg(scratch.join("out.jsonl"));
    command.args(["--backend", "cpu", "--max-running", "8", "--max-seq-len", "256", "--num-pages", "64"]);
    command.args(flags).output().unwrap()
}

fn chat(custom_id: &str, fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi, wörld 🦀"}], "max_tokens": 8});
    merge(&mut body, fields);
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})
}

fn text(custom_id: &str, fields: Value) -> Value {
    let mut body = json!({"prompt": "Once upon", "max_tokens": 8});
    merge(&mut body, fields);
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})
}

fn embedding(custom_id: &str, fields: Value) -> Value {
    let mut body = json!({"input": "Once upon"});
    merge(&mut body, fields);
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body})
}

fn merge(body: &mut Value, fields: Value) {
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
}

/// Requests of every kind, answered and refused.
fn requests() -> Vec<Value> {
    let drawn = json!({"temperature": 1.5, "seed": 5, "ignore_eos": true, "max_tokens": 40});
    let mut chat_with_bytes = drawn.clone();
    merge(&mut chat_with_bytes, json!({"logprobs": true, "top_logprobs": 5}));
    let mut text_with_bytes = drawn.clone();
    merge(&mut text_with_bytes, json!({"logprobs": 3}));
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
    ]);
    vec![
        chat("plain", json!({})),
        chat("drawn", drawn),
        chat("logprobs", chat_with_bytes),
        chat("no alternatives", json!({"logprobs": true})),
        chat("messages", json!({"messages": messages, "max_completion_tokens": 4, "max_tokens": null})),
        chat(
            "exported",
            json!({"n": 1, "presence_penalty": 0, "user": "u", "metadata": {"a": "b"}, "store": true}),
        ),
        text("text", json!({})),
        chat("two", json!({"n": 2, "temperature": 1, "logprobs": true, "top_logprobs": 1})),
        text("three", json!({"n": 3, "best_of": 3, "temperature": 1})),
        text("prompts", json!({"prompt": ["Once upon", "a time", "Once"], "n": 2, "temperature": 1})),
        text("prompts of ids", json!({"prompt": [[5, 6, 7], vec![8; 90]], "logprobs": 1})),
        text("text logprobs", text_with_bytes),
        text("ids", json!({"prompt": [5, 6, 7], "logprobs": 0})),
        text("stop", json!({"stop": ["e", "a", "o"], "max_tokens": 30})),
        embedding("embedding", json!({"encoding_format": "float"})),
        embedding("embedding cut", json!({"input": [5, 6, 7], "dimensions": 9, "encoding_format": "base64"})),
        embedding("embeddings", json!({"input": ["Once upon", "a time", "Once", "upon a"], "dimensions": 9})),
        embedding(
            "embeddings of ids",
            json!({"input": [[5, 6, 7], vec![8; 90], [9]], "encoding_format": "base64"}),
        ),
        embedding("one too long", json!({"input": [[5, 6, 7], vec![8; 300]]})),
        embedding("too many dimensions", json!({"dimensions": 129})),
        chat("none", json!({"n": 0})),
        chat("misspelt", json!({"max_token": 2})),
        chat("model", json!({"model": "gpt-4o"})),
        chat("too hot", json!({"temperature": -1})),
        chat(
            "role",
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "elf", "content": "b"}]}),
        ),
        chat(
            "image",
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ),
        text("too long", json!({"prompt": vec![5; 300]})),
        text("no prompt", json!({"prompt": null})),
    ]
}

const REFUSED: usize = 10;

#[test]
fn batch_lines_are_answered_as_the_openai_package_expects() {
    let scratch = Scratch::with_text();
    let input: String = requests().iter().map(|request| format!("{request}\n")).collect();
    let input = scratch.write("in.jsonl", input);
    let output = generate(&scratch, &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(&format!("{REFUSED} failed")), "{stderr}");

    let Some(python) = openai::python(Path::new(".")) else { return };
    let check = Command::new(python)
        .arg("tests/openai/check.py")
        .args([input, scratch.join("out.jsonl")])
        .env_remove("PYTHONPATH")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stdout);
    let (answers, stderr) = (requests().len() - REFUSED, String::from_utf8_lossy(&check.stderr));
    assert!(check.status.success(), "{said}{stderr}");
    assert!(said.starts_with(&format!("{answers} answers and {REFUSED} refusals")), "{said}");
}

#[test]
fn a_file_may_hold_lines_of_both_formats_and_each_is_answered_in_its_own() {
    let scratch = Scratch::with_text();
    let lines = [
        json!({"id": 1, "prompt": "Once", "max_tokens": 2}).to_string(),
        chat("a", json!({"max_tokens": 2})).to_string(),
        "no json".to_owned(),
    ];
    scratch.write("in.jsonl", lines.join("\n"));
    let output = generate(&scratch, &[]);
    assert_eq!(output.status.code(), Some(1));
    let out = fs::read_to_string(scratch.join("out.jsonl")).unwrap();
    let results: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results.len(), 3);
    let native = results.iter().find(|result| result["id"] == 1).unwrap();
    assert_eq!(native["token_ids"].as_array().unwrap().len(), 2);
    let batch = results.iter().find(|result| result["custom_id"] == "a").unwrap();
    assert_eq!(batch["response"]["body"]["usage"]["completion_tokens"], 2);
    let bad = results.iter().find(|result| result["line"] == 3).unwrap();
    assert!(bad["error"].as_str().unwrap().starts_with("line 3: not valid JSON"), "{bad}");
}

#[test]
fn a_line_of_several_prompts_has_each_ones_result_in_its_place() {
    let scratch = Scratch::with_text();
    // In the order of their first tokens the last one runs first.
    let inputs: Vec<Vec<u32>> = (0..9).map(|i| (0..90 - 10 * i).map(|id| 20 + id - i).collect()).collect();
    let each = inputs.iter().map(|input| embedding("one", json!({"input": input})));
    let drawn = |prompts: Value, seed: u64| {
        text("drawn", json!({"prompt": prompts, "n": 2, "max_tokens": 4, "temperature": 1, "seed": seed}))
    };
    let each = each.chain((0..9).map(|i| drawn(json!(inputs[i]), prompt_seed(7, i as u32))));
    let all = [embedding("all", json!({"input": inputs})), drawn(json!(inputs), 7)];
    let lines: Vec<_> = all.into_iter().chain(each).collect();
    scratch.write("in.jsonl", lines.iter().map(|line| format!("{line}\n")).collect::<String>());
    let output = generate(&scratch, &["--order", "prefix"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let out = fs::read_to_string(scratch.join("out.jsonl")).unwrap();
    let mut results: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let line = |result: &Value| -> u64 {
        let id = result["id"].as_str().unwrap().trim_start_matches("batch_req_");
        id.split_once('-').unwrap().0.parse().unwrap()
    };
    results.sort_by_key(line);
    let body = |line: usize| &results[line]["response"]["body"];
    let (all, choices) = (body(0)["data"].as_array().unwrap(), body(1)["choices"].as_array().unwrap());
    assert_eq!((all.len(), choices.len(), results.len()), (9, 18, 20));
    for (i, one) in all.iter().enumerate() {
        assert_eq!((&one["index"], &one["embedding"]), (&json!(i), &body(2 + i)["data"][0]["embedding"]));
    }
    for (i, choice) in choices.iter().enumerate() {
        let alone = &body(11 + i / 2)["choices"][i % 2]["text"];
        assert_eq!((&choice["index"], &choice["text"]), (&json!(i), alone));
    }
    for all in [body(0), body(1)] {
        assert_eq!(all["usage"]["prompt_tokens"], inputs.iter().map(Vec::len).sum::<usize>());
    }
}

#[test]
fn both_formats_draw_the_same_tokens() {
    let scratch = Scratch::with_text();
    let sampling = json!({"temperature": 0.9, "seed": 3, "max_tokens": 12, "ignore_eos": true});
    let mut native = json!({"id": 1, "prompt": "Once upon"});
    merge(&mut native, sampling.clone());
    scratch.write("in.jsonl", format!("{native}\n{}\n", text("a", sampling)));
    let output = generate(&scratch, &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let out = fs::read_to_string(scratch.join("out.jsonl")).unwrap();
    let results: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let native = results.iter().find(|result| result["id"] == 1).unwrap();
    let batch = results.iter().find(|result| result["custom_id"] == "a").unwrap();
    assert_eq!(batch["response"]["body"]["choices"][0]["text"], native["text"]);
    assert_eq!(batch["response"]["body"]["choices"][0]["finish_reason"], "length");
}
