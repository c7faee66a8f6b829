//! The bulk generation command, run as a user runs it.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::generate::{generate, lines, stderr, succeed};
use common::{Golden, Scratch, fixture};
use serde_json::{Value, json};

/// The result with an id.
fn result(results: &[Value], id: impl Into<Value>) -> &Value {
    let id = id.into();
    let mut found = results.iter().filter(|result| result["id"] == id);
    let first = found.next().unwrap_or_else(|| panic!("no result of {id}"));
    assert!(found.next().is_none(), "two results of {id}");
    first
}

#[test]
fn every_request_line_gets_a_result_line() {
    let scratch = Scratch::new();
    let golden = Golden::open("tiny-tied");
    let request = |(i, example): (usize, &common::Example)| {
        json!({"id": i, "prompt_token_ids": example.prompt, "max_tokens": 24, "ignore_eos": true}).to_string()
    };
    let mut input: Vec<String> = golden.examples.iter().enumerate().map(request).collect();
    input.insert(1, String::new());
    input.push(
        json!({"id": {"any": ["json"]}, "prompt_token_ids": [1], "max_tokens": 2, "logprobs": 3}).to_string(),
    );
    scratch.write("in.jsonl", input.join("\n"));

    let output = generate(&scratch, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("5 finished, 0 failed"), "{}", stderr(&output));
    let results = lines(&scratch.join("out.jsonl"));
    assert_eq!(results.len(), 5);
    for (i, example) in golden.examples.iter().enumerate() {
        let result = result(&results, i);
        let usage = json!({
            "prompt_tokens": example.prompt.len(), "completion_tokens": 24,
            "cached_tokens": result["usage"]["cached_tokens"].as_u64().unwrap(),
        });
        // The second line is blank.
        let line = if i == 0 { 1 } else { i + 2 };
        let expected = json!({
            "id": i, "line": line, "fingerprint": result["fingerprint"].as_str().unwrap(), "token_ids": example.greedy, "text": null, "finish_reason": "length", "usage": usage,
        });
        assert_eq!(*result, expected);
    }
    let result = result(&results, json!({"any": ["json"]}));
    let logprobs = result["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 2);
    for (entry, token) in logprobs.iter().zip(result["token_ids"].as_array().unwrap()) {
        assert_eq!(entry["top"].as_array().unwrap().len(), 3);
        assert_eq!(entry["top"][0], json!([token, entry["logprob"]]));
    }
}

#[test]
fn text_and_conversations_come_back_as_text() {
    let scratch = Scratch::with_text();
    let input = [
        json!({"id": "t", "prompt": "Once upon", "max_tokens": 6, "temperature": 0.8, "seed": 3, "top_k": 50}),
        json!({"id": "c", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "min_p": 0.01, "top_p": 0.9}),
        json!({"id": "s", "prompt": "A page", "max_tokens": 6, "stop": ["\u{1}"]}),
    ];
    scratch.write("in.jsonl", input.map(|line| line.to_string()).join("\n"));
    let output = generate(&scratch, &["--ignore-eos"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let results = lines(&scratch.join("out.jsonl"));
    for id in ["t", "c", "s"] {
        let result = result(&results, id);
        assert!(result["text"].is_string());
        assert_eq!(result["token_ids"].as_array().unwrap().len(), 6);
        assert_eq!(result.get("logprobs"), None);
    }
}

#[test]
fn what_was_drawn_is_scored_as_it_was_drawn() {
    let scratch = Scratch::with_text();
    let prompts = ["Once upon", "Once upon a time", "A page"];
    let draw = |(id, prompt): (usize, &str)| json!({"id": id, "prompt": prompt, "max_tokens": 9, "temperature": 0.8, "logprobs": 2, "ignore_eos": true});
    let input = prompts.into_iter().enumerate().map(|line| draw(line).to_string());
    scratch.write("in.jsonl", input.collect::<Vec<_>>().join("\n"));
    succeed(&scratch, &[]);
    let drawn = lines(&scratch.join("out.jsonl"));
    let score = |(id, prompt): (usize, &str)| {
        let completion = &result(&drawn, id)["token_ids"];
        json!({"id": id, "prompt": prompt, "completion": completion, "logprobs": 2})
    };
    let input = prompts.into_iter().enumerate().map(|line| score(line).to_string());
    let by_text = json!({"id": "text", "prompt": "Once upon", "completion": " a time"}).to_string();
    let bad = json!({"id": "bad", "prompt": "Once", "completion": [90_000]}).to_string();
    scratch.write("in.jsonl", input.chain([by_text, bad]).collect::<Vec<_>>().join("\n"));
    let output = generate(&scratch, &["--overwrite"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let scores = lines(&scratch.join("out.jsonl"));
    for id in 0..prompts.len() {
        let (score, drawn) = (result(&scores, id), result(&drawn, id));
        assert_eq!((&score["token_ids"], &score["logprobs"]), (&drawn["token_ids"], &drawn["logprobs"]));
        let sum: f64 =
            drawn["logprobs"].as_array().unwrap().iter().map(|one| one["logprob"].as_f64().unwrap()).sum();
        assert!((score["logprob"].as_f64().unwrap() - sum).abs() < 1e-4, "{score}");
    }
    assert!(result(&scores, "text")["logprob"].as_f64().unwrap() < 0.0);
    assert!(result(&scores, "bad")["error"].as_str().unwrap().contains("token id 90000"));
}

#[test]
fn what_is_to_be_embedded_is_beside_what_is_drawn() {
    let scratch = Scratch::with_text();
    let input = [
        json!({"id": "a", "embed": "Once upon"}),
        json!({"id": "drawn", "prompt": "Once upon", "max_tokens": 6}),
        json!({"id": "again", "embed": "Once upon", "dimensions": 128}),
        json!({"id": "cut", "embed": [5, 6, 7], "dimensions": 3}),
        json!({"id": "bad", "embed": "Once upon", "dimensions": 129}),
    ];
    scratch.write("in.jsonl", input.map(|line| line.to_string()).join("\n"));
    let output = generate(&scratch, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let results = lines(&scratch.join("out.jsonl"));
    let values = |id: &str| result(&results, id)["embedding"].as_array().unwrap().clone();
    assert_eq!((values("a").len(), values("cut").len()), (128, 3));
    assert_eq!(values("a"), values("again"));
    assert_eq!(result(&results, "a")["usage"]["completion_tokens"], 0);
    let error = result(&results, "bad")["error"].as_str().unwrap().to_owned();
    assert!(error.starts_with("line 5: dimensions is 129; it must lie between 1 and 128"), "{error}");
    // Good results are not computed again.
    let output = generate(&scratch, &["--resume"]);
    assert!(stderr(&output).contains("4 skipped"), "{}", stderr(&output));
}

#[test]
fn a_bad_line_gets_an_error_line_with_its_number_and_the_rest_goes_on() {
    let scratch = Scratch::new();
    let bad = [
        ("{\"id\": 1, \"prompt", Value::Null, "not valid JSON"),
        ("[1, 2]", Value::Null, "not a JSON object"),
        ("\u{fffd}\u{0}", Value::Null, "not valid JSON"),
        (r#"{"prompt_token_ids": [1]}"#, Value::Null, "no id"),
        (r#"{"id": 5}"#, json!(5), "exactly one of prompt"),
        (r#"{"id": 6, "prompt": "a", "prompt_token_ids": [1]}"#, json!(6), "exactly one of prompt"),
        (r#"{"id": 7, "prompt": "a"}"#, json!(7), "tokenizer.json"),
        (r#"{"id": 8, "messages": [{"role": "user", "content": "a"}]}"#, json!(8), "chat_template"),
        (r#"{"id": 9, "prompt_token_ids": []}"#, json!(9), "the prompt is empty"),
        (r#"{"id": 10, "prompt_token_ids": [4096]}"#, json!(10), "token id 4096"),
        (r#"{"id": 11, "prompt_token_ids": [-1]}"#, json!(11), "prompt_token_ids is [-1]"),
        (r#"{"id": 12, "prompt_token_ids": [1], "temperature": -1}"#, json!(12), "temperature is -1"),
        (r#"{"id": 13, "prompt_token_ids": [1], "temperature": "hot"}"#, json!(13), "temperature is \"hot\""),
        (r#"{"id": 14, "prompt_token_ids": [1], "top_p": 0}"#, json!(14), "top_p is 0"),
        (r#"{"id": 15, "prompt_token_ids": [1], "top_p": 1.01}"#, json!(15), "top_p is 1.01"),
        (r#"{"id": 16, "prompt_token_ids": [1], "max_tokens": 0}"#, json!(16), "max_tokens is 0"),
        (r#"{"id": 17, "prompt_token_ids": [1], "max_token": 5}"#, json!(17), "\"max_token\""),
        (r#"{"id": 18, "prompt_token_ids": [1], "logprobs": 21}"#, json!(18), "logprobs is 21"),
        (r#"{"id": "good", "prompt_token_ids": [2]}"#, json!("again"), ""),
        (r#"{"id": 20, "messages": [{"content": "a"}]}"#, json!(20), "messages[0]: a message has no role"),
    ];
    let input: Vec<&str> = bad.iter().map(|(line, ..)| *line).collect();
    scratch.write("in.jsonl", input.join("\n"));
    let output = generate(&scratch, &["--max-tokens", "3"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let results = lines(&scratch.join("out.jsonl"));
    assert_eq!(results.len(), bad.len());
    for (i, (_, id, what)) in bad.iter().enumerate() {
        let line = i + 1;
        if *id == "again" {
            assert_eq!(result(&results, "good")["token_ids"].as_array().unwrap().len(), 3);
            continue;
        }
        let result = results.iter().find(|result| result["line"] == line).unwrap();
        assert_eq!(result["id"], *id);
        let error = result["error"].as_str().unwrap();
        assert!(error.starts_with(&format!("line {line}: ")) && error.contains(what), "{error}");
    }
}

#[test]
fn files_that_cannot_be_read_or_written_are_named() {
    let scratch = Scratch::new();
    let output = generate(&scratch, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("in.jsonl") && stderr(&output).contains("--input"),
        "{}",
        stderr(&output)
    );

    scratch.write("in.jsonl", "");
    let run = |output: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
        command.arg("--model").arg(fixture("tiny-tied")).arg("--input").arg(scratch.join("in.jsonl"));
        command.arg("--output").arg(output).args(["--backend", "cpu"]).output().unwrap()
    };
    let output = run(&scratch.join("no/such/directory/out.jsonl"));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("directory/out.jsonl"), "{}", stderr(&output));
    assert!(stderr(&output).contains("writable"), "{}", stderr(&output));
    // A directory can't be written as a file, by whomever.
    assert!(stderr(&run(scratch.path())).contains("can't be written"));
    assert!(stderr(&run(&scratch.join("in.jsonl"))).contains("same file"));
}

#[test]
fn results_of_an_earlier_run_are_kept_until_the_model_is_there() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", r#"{"id": 1, "prompt_token_ids": [1], "max_tokens": 1}"#);
    let earlier = "{\"id\":0}\n".repeat(100);
    let out = scratch.write("out.jsonl", &earlier);
    let output = generate(&scratch, &["--overwrite", "--page-size", "3"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("page size 3"), "{}", stderr(&output));
    assert_eq!(fs::read_to_string(&out).unwrap(), earlier);
    assert!(generate(&scratch, &["--overwrite"]).status.success());
    assert_eq!(lines(&out).len(), 1);
}

#[test]
fn flags_out_of_range_are_refused_before_anything_is_written() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", "");
    for (flag, value, what) in [
        ("--temperature", "NaN", "temperature is NaN"),
        ("--temperature", "-1", "temperature is -1"),
        ("--top-p", "0", "top_p is 0"),
        ("--max-tokens", "0", "max_tokens is 0"),
        ("--kernels", "best", "best is no kernel set"),
        ("--order", "random", "random is no order"),
    ] {
        let output = generate(&scratch, &[flag, value]);
        assert_eq!(output.status.code(), Some(1), "{flag} {value}");
        assert!(stderr(&output).contains(what), "{}", stderr(&output));
        assert!(!scratch.join("out.jsonl").exists());
    }
}

#[test]
fn a_file_larger_than_the_engines_queue_is_streamed() {
    let scratch = Scratch::new();
    let request =
        |i: u32| format!("{{\"id\": {i}, \"prompt_token_ids\": [{}], \"max_tokens\": 1}}\n", i % 1000);
    scratch.write("in.jsonl", (0..3000).map(request).collect::<String>());
    let output = generate(&scratch, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    let results = lines(&scratch.join("out.jsonl"));
    let ids: std::collections::BTreeSet<u64> =
        results.iter().map(|result| result["id"].as_u64().unwrap()).collect();
    assert_eq!((results.len(), ids.len()), (3000, 3000));
}

#[test]
fn a_checkpoint_whose_weights_are_a_link_to_nowhere_is_told_by_the_links_name() {
    let scratch = Scratch::new();
    scratch.copy("tiny-tied");
    scratch.write("in.jsonl", r#"{"id": 1, "prompt_token_ids": [1]}"#);
    fs::remove_file(scratch.join("model.safetensors")).unwrap();
    std::os::unix::fs::symlink("gone", scratch.join("model.safetensors")).unwrap();
    let output = generate(&scratch, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("model.safetensors"), "{}", stderr(&output));
}
