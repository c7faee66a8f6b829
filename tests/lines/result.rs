//! Result lines: OpenAI's where the request was, and what they say of a request that failed.

use minisgl::lines;
use minisgl::{Completion, FinishReason, RequestError};
use serde_json::{Value, json};

use super::{CHAT, ORIGIN, TEXT, completion, in_all_formats, parse, result, written_all};

#[test]
fn a_chat_completion_is_openais() {
    let mut result = result(CHAT, &completion());
    let created = result["response"]["body"]["created"].take();
    assert!(created.as_u64().is_some_and(|seconds| seconds > 1_700_000_000), "{created}");
    let name = "3-000000000000009f";
    let half = json!({"token": " \\xf0\\x9f", "bytes": [32, 240, 159], "logprob": -1.5});
    let word = json!({"token": "né", "bytes": [110, 195, 169], "logprob": -0.5});
    let entry = |token: &Value, logprob: f64, top: Value| {
        let mut entry = token.clone();
        entry["logprob"] = logprob.into();
        entry["top_logprobs"] = top;
        entry
    };
    let eos = json!({"token": "<eos>", "bytes": [60, 101, 111, 115, 62], "logprob": 0.0});
    let unknown = json!({"token": "token_id:13", "bytes": null, "logprob": -9999.0});
    let with = |token: &Value, logprob: f64| {
        let mut token = token.clone();
        token["logprob"] = logprob.into();
        token
    };
    let content = json!([
        entry(&word, -0.5, json!([word, half])),
        entry(&half, -2.0, json!([with(&word, -0.25), unknown])),
        entry(&eos, 0.0, json!([eos, with(&half, -9.0)])),
    ]);
    let expected = json!({
        "id": format!("batch_req_{name}"),
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": format!("req_{name}"), "body": {
            "id": format!("chatcmpl-{name}"),
            "object": "chat.completion",
            "created": null,
            "model": "Qwen3-0.6B",
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": "né \u{fffd}", "refusal": null},
                "logprobs": {"content": content, "refusal": null},
                "finish_reason": "stop",
            }],
            "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8,
                "prompt_tokens_details": {"cached_tokens": 4}},
        }},
        "error": null,
    });
    assert_eq!(result, expected);
}

#[test]
fn a_text_completion_is_openais() {
    let body = &result(TEXT, &completion())["response"]["body"];
    assert_eq!((&body["object"], &body["model"]), (&json!("text_completion"), &json!("Qwen/Qwen3-0.6B")));
    let expected = json!({
        "index": 0,
        "text": "né \u{fffd}",
        "logprobs": {
            "tokens": ["né", "bytes: \\xf0\\x9f", "<eos>"],
            "token_logprobs": [-0.5, -2.0, 0.0],
            "top_logprobs": [
                {"né": -0.5, "bytes: \\xf0\\x9f": -1.5},
                {"né": -0.25, "bytes: \\xf0\\x9f": -2.0, "token_id:13": -9999.0},
                {"<eos>": 0.0, "bytes: \\xf0\\x9f": -9.0},
            ],
            "text_offset": [0, 2, 4],
        },
        "finish_reason": "stop",
    });
    assert_eq!(body["choices"], json!([expected]));
}

#[test]
fn the_samples_of_a_line_are_one_result() {
    let other =
        Completion { sample: 1, token_ids: vec![11], finish_reason: FinishReason::Length, ..completion() };
    let samples = [completion(), other];
    for (n, fields) in [(2, r#""n": 2, "best_of": 2"#), (128, r#""n": 128"#)] {
        for line in in_all_formats(fields) {
            assert_eq!(parse(&line).unwrap().request.samples, n);
        }
    }
    let native = r#"{"id": 7, "prompt": "hi", "n": 2}"#;
    let result: Value = serde_json::from_str(&written_all(native, &samples)).unwrap();
    let outputs = result["outputs"].as_array().unwrap();
    let of_output = |one: &Value| (one["token_ids"].clone(), one["finish_reason"].clone());
    let expected = [(json!([10, 11, 12]), json!("eos")), (json!([11]), json!("length"))];
    assert_eq!(outputs.iter().map(of_output).collect::<Vec<_>>(), expected);
    assert_eq!(outputs[1]["logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(result.get("token_ids"), None);
    assert_eq!(result["usage"], json!({"prompt_tokens": 5, "completion_tokens": 4, "cached_tokens": 4}));
    for line in [CHAT, TEXT] {
        let result: Value = serde_json::from_str(&written_all(line, &samples)).unwrap();
        let body = &result["response"]["body"];
        let choice = |one: &Value| (one["index"].clone(), one["finish_reason"].clone());
        let choices = body["choices"].as_array().unwrap().iter().map(choice).collect::<Vec<_>>();
        assert_eq!(choices, [(json!(0), json!("stop")), (json!(1), json!("length"))]);
        assert_eq!(
            (&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]),
            (&json!(5), &json!(4))
        );
    }
    // One that fails fails the line.
    let failed = Completion { error: Some(RequestError::NotNumbers), ..samples[1].clone() };
    for (line, is_good) in [(native, true), (CHAT, true), (TEXT, true), (native, false), (CHAT, false)] {
        let second = if is_good { &samples[1] } else { &failed };
        let line = written_all(line, &[completion(), second.clone()]);
        assert_eq!(lines::read_result(line.as_bytes()).unwrap().good, is_good, "{line}");
    }
}

#[test]
fn log_probabilities_that_nobody_asked_for_are_null() {
    let none = Completion { logprobs: None, ..completion() };
    for line in [CHAT, TEXT] {
        assert_eq!(result(line, &none)["response"]["body"]["choices"][0]["logprobs"], Value::Null);
    }
    let mut without_alternatives = completion();
    without_alternatives.logprobs.as_mut().unwrap().iter_mut().for_each(|entry| entry.top.clear());
    let chat = &result(CHAT, &without_alternatives)["response"]["body"]["choices"][0]["logprobs"];
    assert_eq!(chat["content"][1]["top_logprobs"], json!([]));
    let text = &result(TEXT, &without_alternatives)["response"]["body"]["choices"][0]["logprobs"];
    assert_eq!(text["top_logprobs"], Value::Null);
    assert_eq!(text["token_logprobs"], json!([-0.5, -2.0, 0.0]));
}

#[test]
fn reasons_to_end_are_openais() {
    for (finish_reason, word) in
        [(FinishReason::Eos, "stop"), (FinishReason::Stop, "stop"), (FinishReason::Length, "length")]
    {
        let completion = Completion { finish_reason, ..completion() };
        for line in [CHAT, TEXT] {
            assert_eq!(result(line, &completion)["response"]["body"]["choices"][0]["finish_reason"], word);
        }
    }
}

#[test]
fn a_request_that_the_engine_refuses_is_answered_with_status_400() {
    let completion = Completion {
        finish_reason: FinishReason::Rejected,
        error: Some(RequestError::NoChatTemplate),
        ..completion()
    };
    let refused = result(CHAT, &completion);
    assert_eq!(refused["error"], Value::Null);
    assert_eq!(refused["response"]["status_code"], 400);
    let error = &refused["response"]["body"]["error"];
    assert!(error["message"].as_str().unwrap().contains("chat template"), "{error}");
    assert_eq!(error["type"], "invalid_request_error");

    let native = result(r#"{"id": 7, "prompt": "a"}"#, &completion);
    assert_eq!((&native["id"], &native["line"]), (&json!(7), &json!(3)));
    assert!(native["error"].as_str().unwrap().starts_with("line 3: chat messages need"), "{native}");
}

#[test]
fn a_request_that_fails_on_its_way_is_answered_with_the_status_of_whose_fault_it_is() {
    for (error, status, kind) in [
        (RequestError::NotNumbers, 500, "server_error"),
        (RequestError::EngineFailed { cause: "x".to_owned() }, 503, "service_unavailable"),
        (RequestError::GrammarFailed, 400, "invalid_request_error"),
        (RequestError::NoTokenLeft, 400, "invalid_request_error"),
    ] {
        let completion =
            Completion { finish_reason: FinishReason::Failed, error: Some(error), ..completion() };
        for line in [CHAT, TEXT] {
            let failed = result(line, &completion);
            assert_eq!(
                (&failed["response"]["status_code"], &failed["error"]),
                (&json!(status), &Value::Null)
            );
            assert_eq!(failed["response"]["body"]["error"]["type"], kind);
            assert!(!lines::read_result(failed.to_string().as_bytes()).unwrap().good);
        }
    }
}

#[test]
fn what_stops_a_request_from_outside_is_an_error_beside_the_response() {
    let mut out = Vec::new();
    lines::write_failure(&mut out, &parse(CHAT).unwrap().header, ORIGIN, "the engine failed");
    let result: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(result["response"], Value::Null);
    assert_eq!(result["error"]["message"], "the engine failed");
    assert!(!lines::read_result(&out).unwrap().good);
}

#[test]
fn a_result_says_which_line_it_is_of_and_whether_it_is_good() {
    let good = completion();
    let rejected = Completion { error: Some(RequestError::EmptyStop), ..completion() };
    let native = r#"{"id": "batch_req_5-00000000000000ff", "prompt": "a"}"#;
    for line in [native, CHAT, TEXT] {
        for (completion, is_good) in [(&good, true), (&rejected, false)] {
            let result = result(line, completion).to_string();
            let outcome = lines::read_result(result.as_bytes()).unwrap();
            assert_eq!(outcome, lines::Outcome { origin: Some(ORIGIN), good: is_good }, "{result}");
        }
    }
    // As written before results said where they came from.
    let old = lines::read_result(br#"{"id":7,"token_ids":[1],"text":"a","finish_reason":"length"}"#).unwrap();
    assert_eq!(old, lines::Outcome { origin: None, good: true });
    for nothing in ["my notes", "{}", r#"{"id": 7}"#, r#"{"id": 7, "prompt": "a"}"#, "7", "[]", ""] {
        assert_eq!(lines::read_result(nothing.as_bytes()), None, "{nothing}");
    }
}
