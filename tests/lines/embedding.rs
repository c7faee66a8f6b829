//! Lines that ask for embeddings, and what comes back.

use minisgl::lines::{self, RequestLine};
use minisgl::{Completion, Embed, FinishReason, Prompt, RequestError};
use serde_json::json;

use super::{completion, native_error, parse, result};

/// A line that asks for an embedding, of each format.
fn to_embed(input: &str, fields: &str) -> [String; 2] {
    [
        format!(r#"{{"id": 1, "embed": {input}{fields}}}"#),
        format!(r#"{{"custom_id": "a", "url": "/v1/embeddings", "body": {{"input": {input}{fields}}}}}"#),
    ]
}

#[test]
fn a_line_with_something_to_embed_asks_for_that_alone() {
    for (input, prompt) in [
        (r#""Once upon""#, Prompt::Text("Once upon".to_owned())),
        ("[3, 4]", Prompt::Tokens(vec![3, 4])),
        (r#"["Once"]"#, Prompt::Text("Once".to_owned())),
        ("[[5, 6.0]]", Prompt::Tokens(vec![5, 6])),
    ] {
        for (fields, dimensions) in [
            ("", None),
            (
                r#", "dimensions": 32, "encoding_format": "float", "user": "me", "model": "Qwen3-0.6B""#,
                Some(32),
            ),
            (r#", "dimensions": null, "encoding_format": "base64", "priority": 0"#, None),
        ] {
            for line in to_embed(input, fields) {
                let request = parse(&line).expect(&line).request;
                assert_eq!((&request.prompt, request.sampling.max_tokens), (&prompt, 0), "{line}");
                assert_eq!(request.sampling.embed, Some(Embed { dimensions }), "{line}");
            }
        }
    }
}

#[test]
fn a_batch_line_may_have_several_inputs_to_embed() {
    let ids = |prompts: &[&[u32]]| prompts.iter().map(|ids| Prompt::Tokens(ids.to_vec())).collect::<Vec<_>>();
    let texts = ["a", "b", "c"].map(|text| Prompt::Text(text.to_owned()));
    for (input, prompts) in [(r#"["a", "b", "c"]"#, texts.to_vec()), ("[[5, 6], [7]]", ids(&[&[5, 6], &[7]]))]
    {
        let [_, line] = to_embed(input, r#", "dimensions": 4"#);
        let RequestLine { request, beside, .. } = parse(&line).expect(&line);
        let asked: Vec<_> = [request].into_iter().chain(beside).collect();
        assert!(
            asked.iter().all(|one| one.sampling.embed == Some(Embed { dimensions: Some(4) })),
            "{asked:?}"
        );
        assert_eq!(asked.into_iter().map(|one| one.prompt).collect::<Vec<_>>(), prompts);
    }
}

#[test]
fn what_can_t_be_embedded_or_told_is_refused_by_its_field() {
    for (fields, says) in [
        (r#", "dimensions": 0"#, "dimensions is 0; it must be a whole number from 1 on"),
        (r#", "dimensions": "all""#, "dimensions is \"all\"; it must be"),
        (r#", "encoding_format": "int8""#, "encoding_format is \"int8\"; it must be \"float\" or \"base64\""),
        (r#", "max_tokens": 3"#, "there is no field \"max_tokens\""),
        (r#", "dimension": 3"#, "there is no field \"dimension\"; did you mean dimensions?"),
        (r#", "truncate_prompt_tokens": 5"#, "truncate_prompt_tokens is 5; prompts are not cut"),
        (r#", "model": "gpt""#, "model is \"gpt\", but"),
        (r#", "user": "a", "user": "b""#, "user is given twice"),
    ] {
        for line in to_embed(r#""a""#, fields) {
            let said = native_error(&line);
            assert!(said.starts_with(says), "{line}: {said}");
        }
    }
    for (input, says) in [
        ("3", "is 3; it must be a text or a list of token ids"),
        ("[-1]", "is [-1]; it must be a text or a list of token ids"),
    ] {
        for (line, field) in to_embed(input, "").iter().zip(["embed", "input"]) {
            assert_eq!(native_error(line), format!("{field} {says}"));
        }
    }
    let [native, _] = to_embed(r#"["a", "b"]"#, "");
    assert_eq!(native_error(&native), "embed is a list of 2 prompts; give each a line of its own");
    let [_, batch] = to_embed(&json!(vec!["a"; 2049]).to_string(), "");
    assert_eq!(native_error(&batch), "input is a list of 2049; give 1 to 2048 in a line");
    assert!(native_error(r#"{"custom_id": "a", "url": "/v1/embeddings", "body": {}}"#).contains("no input"));
    assert!(
        native_error(r#"{"id": 1, "embed": "a", "prompt": "b"}"#).starts_with("there is no field \"prompt\"")
    );
    assert!(native_error(r#"{"embed": "a"}"#).starts_with("the request has no id"));
}

#[test]
fn an_embedding_is_written_as_numbers_or_as_their_bytes() {
    let embedded = Completion {
        token_ids: Vec::new(),
        finish_reason: FinishReason::Length,
        logprobs: None,
        embedding: Some(vec![0.25, -0.5, 0.1]),
        ..completion()
    };
    let bytes = "AACAPgAAAL/NzMw9";
    for (fields, expected) in
        [("", json!([0.25, -0.5, 0.1])), (r#", "encoding_format": "base64""#, json!(bytes))]
    {
        let [native, batch] = to_embed(r#""a""#, fields).map(|line| result(&line, &embedded));
        let usage = json!({"prompt_tokens": 5, "completion_tokens": 0, "cached_tokens": 4});
        let all = json!({"id": 1, "line": 3, "fingerprint": "000000000000009f", "embedding": expected, "usage": usage});
        assert_eq!(native, all);
        let body = json!({
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": expected}],
            "model": "Qwen/Qwen3-0.6B",
            "usage": {"prompt_tokens": 5, "total_tokens": 5},
        });
        assert_eq!((&batch["response"]["status_code"], &batch["response"]["body"]), (&json!(200), &body));
        for written in [native, batch] {
            assert!(lines::read_result(written.to_string().as_bytes()).unwrap().good);
        }
    }
    let refused = Completion { error: Some(RequestError::Pooling("x".to_owned())), ..embedded };
    for line in to_embed(r#""a""#, "") {
        let failed = result(&line, &refused);
        assert!(failed.to_string().contains("embeddings can't be made"), "{failed}");
        assert!(!lines::read_result(failed.to_string().as_bytes()).unwrap().good);
    }
}
