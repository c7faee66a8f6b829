//! Lines whose texts are scored: a prompt, a completion behind it, a document by a query.

use std::sync::Arc;

use minisgl::lines::{self, RequestLine};
use minisgl::{
    Completion, GenerateRequest, Given, Prompt, PromptLogprobs, RequestError, RerankRequest, SamplingParams,
    TokenLogprobs, TokenRules,
};
use serde_json::{Value, json};

use super::{CHAT, NATIVE, ORIGIN, TEXT, completion, native_error, parse, result, written};

#[test]
fn a_line_with_a_completion_is_to_be_scored() {
    let scored = |line: &str| parse(line).expect(line).request;
    let request = scored(r#"{"id": 1, "prompt": "a", "completion": " b"}"#);
    assert_eq!((request.prompt, request.given), (Prompt::Text("a".into()), Some(Given::Text(" b".into()))));
    let SamplingParams { max_tokens, logprobs, prompt_logprobs, .. } = request.sampling;
    assert_eq!((max_tokens, logprobs), (0, None));
    assert_eq!(prompt_logprobs, Some(PromptLogprobs { from: 0, top: 0 }));
    for completion in [r#""completion": [3, 4]"#, r#""completion_token_ids": [3, 4]"#] {
        let line = format!(r#"{{"id": 1, "prompt_token_ids": [1, 2], {completion}, "logprobs": 4}}"#);
        let request = scored(&line);
        assert_eq!(request.given, Some(Given::Tokens(vec![3, 4])));
        assert_eq!(request.sampling.prompt_logprobs, Some(PromptLogprobs { from: 0, top: 4 }));
    }
    let idle = r#""max_tokens": 0, "stop": [], "repetition_penalty": 1.0, "logit_bias": {}, "response_format": {"type": "text"}"#;
    let line = format!(r#"{{"id": 1, "prompt": "a", "completion": " b", "temperature": 0.5, {idle}}}"#);
    assert_eq!(scored(&line).rules, TokenRules::default());
    for (fields, error) in [
        (r#""completion": 3"#, "completion is 3; it must be a text or a list of token ids"),
        (
            r#""completion": ["a", "b"]"#,
            r#"completion is ["a", "b"]; it must be a text or a list of token ids"#,
        ),
        (
            r#""completion": "a", "completion_token_ids": [1]"#,
            "completion is \"a\" and completion_token_ids says otherwise",
        ),
        (
            r#""completion": "a", "max_tokens": 3"#,
            "max_tokens is 3; it may only be 0: what a line gives is scored, and nothing drawn behind it",
        ),
        (
            r#""completion": "a", "prompt_logprobs": 0"#,
            "prompt_logprobs is 0; the completion alone is scored",
        ),
        (r#""completion": "a", "stop": "x""#, "stop is \"x\"; it may only be []: "),
        (
            r#""completion": "a", "allowed_token_ids": [1]"#,
            "allowed_token_ids is [1]; what a line gives is scored",
        ),
        (r#""completion": "a", "logit_bias": {"5": 1}"#, "logit_bias is {\"5\": 1}; it may only be {}: "),
        (r#""completion": "a", "repetition_penalty": 1.1"#, "repetition_penalty is 1.1; it may only be 1: "),
        (r#""completion": "a", "n": 2"#, "n is 2; it may only be 1: what a line gives is scored"),
        (r#""completion": "a", "structured_outputs": {"regex": "b"}"#, "structured_outputs is {\"regex\""),
        (r#""completion": "a", "response_format": {"type": "json_object"}"#, "response_format is {\"type\""),
        (r#""completion": "a", "complete": 1"#, "there is no field \"complete\""),
    ] {
        let told = native_error(&format!(r#"{{"id": 1, "prompt": "p", {fields}}}"#));
        assert!(told.starts_with(error), "{told} instead of {error}");
    }
}

/// A completion whose prompt of three tokens was scored.
fn scored() -> Completion {
    let logprobs = |logprob: f32, top: &[(u32, f32)]| TokenLogprobs { logprob, top: top.to_vec() };
    Completion {
        prompt_tokens: 3,
        prompt_token_ids: Some(vec![12, 10, 11]),
        prompt_logprobs: Some(Arc::new(vec![
            logprobs(-3.0, &[(11, -0.5), (13, f32::NEG_INFINITY)]),
            logprobs(-0.25, &[(11, -0.25), (10, -2.0)]),
        ])),
        ..completion()
    }
}

#[test]
fn a_prompts_log_probabilities_are_vllms() {
    let entry = |logprob: f32, rank: Option<u32>, token: Option<&str>| json!({"logprob": logprob, "rank": rank, "decoded_token": token});
    let half = Some(" \u{fffd}");
    let expected = json!([
        null,
        {"10": entry(-3.0, None, Some("né")), "11": entry(-0.5, Some(1), half), "13": entry(-9999.0, Some(2), None)},
        {"11": entry(-0.25, Some(1), half), "10": entry(-2.0, Some(2), Some("né"))},
    ]);
    let chat = &result(CHAT, &scored())["response"]["body"]["prompt_logprobs"];
    let text = &result(TEXT, &scored())["response"]["body"]["choices"][0]["prompt_logprobs"];
    assert_eq!([chat, text, &result(NATIVE, &scored())["prompt_logprobs"]], [&expected; 3]);
    assert_eq!(result(NATIVE, &completion()).get("prompt_logprobs"), None);
    // The token that stands there comes first.
    let line = written(NATIVE, &scored());
    assert!(line.contains(r#"{"10":{"logprob":-3.0,"rank":null,"decoded_token":"né"},"11":"#), "{line}");
}

#[test]
fn a_line_with_a_document_is_judged_by_its_two_answers() {
    let line = r#"{"id": 7, "query": "Which moon?", "document": "Phobos", "temperature": 0.5}"#;
    let RequestLine { request, beside, .. } = parse(line).unwrap();
    let mut asked = RerankRequest::new("Which moon?", "Phobos");
    assert_eq!(request.prompt, Prompt::Rerank(asked.clone()));
    let answer = |request: &GenerateRequest| match &request.given {
        Some(Given::Text(text)) => (text.clone(), request.sampling.max_tokens),
        given => panic!("{given:?}"),
    };
    let [beside] = &beside[..] else { panic!("two answers") };
    assert_eq!([answer(&request), answer(beside)], [("yes".to_owned(), 0), ("no".to_owned(), 0)]);
    assert_eq!(beside.prompt, request.prompt);
    asked.instruction = "Find moons".to_owned();
    let instructed =
        r#"{"id": 7, "query": "Which moon?", "document": "Phobos", "instruction": "Find moons"}"#;
    assert_eq!(parse(instructed).unwrap().request.prompt, Prompt::Rerank(asked));
    // Scores of one token each, of tokens that spell the answers, in whichever order they end.
    let scored = |id: u32, logprob: f32| Completion {
        prompt_token_ids: Some(vec![5, 6, id]),
        prompt_logprobs: Some(Arc::new(vec![TokenLogprobs { logprob, top: vec![] }])),
        ..scored()
    };
    let bytes = |id: u32| Some(if id == 1 { b"yes".to_vec() } else { b"no".to_vec() });
    for completions in [[scored(1, -0.25), scored(2, -2.25)], [scored(2, -2.25), scored(1, -0.25)]] {
        let mut out = Vec::new();
        lines::write_result(&mut out, &parse(line).unwrap().header, ORIGIN, &completions, None, &bytes);
        let result: Value = serde_json::from_slice(&out).unwrap();
        let relevance = 1.0 / (1.0 + (-2.0_f64).exp());
        assert!((result["relevance"].as_f64().unwrap() - relevance).abs() < 1e-9, "{result}");
        assert_eq!(result["usage"], json!({"prompt_tokens": 2, "completion_tokens": 0, "cached_tokens": 4}));
        assert_eq!((&result["id"], &result["line"]), (&json!(7), &json!(3)));
        assert!(lines::read_result(&out).unwrap().good);
    }
    for (fields, error) in [
        (r#""document": "a""#, "the request has no query; a document is judged by one"),
        (r#""document": 3, "query": "a""#, "document is 3; it must be a text"),
        (
            r#""document": "a", "query": "b", "prompt": "c""#,
            "give exactly one of query with document, prompt",
        ),
        (r#""document": "a", "query": "b", "max_tokens": 5"#, "max_tokens is 5; it may only be 0"),
        (
            r#""document": "a", "query": "b", "logprobs": 2"#,
            "logprobs is 2; it may only be false: a judgement",
        ),
        (r#""document": "a", "query": "b", "instructions": "c""#, "there is no field \"instructions\""),
        (r#""query": "b""#, "give exactly one of prompt, prompt_token_ids and messages"),
    ] {
        let told = native_error(&format!(r#"{{"id": 1, {fields}}}"#));
        assert!(told.starts_with(error), "{told} instead of {error}");
    }
}

#[test]
fn a_score_has_the_completions_tokens_and_their_sum() {
    let line = r#"{"id": 7, "prompt": "a", "completion": "b"}"#;
    let scored = Completion { token_ids: Vec::new(), logprobs: None, ..scored() };
    let result = result(line, &scored);
    assert_eq!((&result["id"], &result["line"], &result["logprob"]), (&json!(7), &json!(3), &json!(-3.25)));
    assert_eq!(result["token_ids"], json!([10, 11]));
    assert_eq!(result["logprobs"][1], json!({"logprob": -0.25, "top": [[11, -0.25], [10, -2.0]]}));
    assert_eq!(result["usage"], json!({"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 4}));
    let outcome = lines::read_result(written(line, &scored).as_bytes()).unwrap();
    assert!(outcome.good);
    let failed = Completion { error: Some(RequestError::NotNumbers), ..scored };
    assert!(!lines::read_result(written(line, &failed).as_bytes()).unwrap().good);
}
