//! A prompt in any of its forms: text, tokens, a conversation, several in a line.

use std::sync::Arc;

use minisgl::lines::{BadLine, RequestLine};
use minisgl::{Completion, GenerateRequest, Prompt, RequestError, prompt_seed};
use serde_json::{Value, json};

use super::{completion, native_error, parse, written_all};

#[test]
fn a_prompt_is_given_once_in_any_of_its_forms() {
    let prompt = |fields: &str| parse(format!(r#"{{"id": 1, {fields}}}"#)).map(|line| line.request.prompt);
    for (fields, expected) in [
        (r#""prompt": "a""#, Prompt::Text("a".to_owned())),
        (r#""prompt": ["a"]"#, Prompt::Text("a".to_owned())),
        (r#""prompt": """#, Prompt::Text(String::new())),
        (r#""prompt": [5, 6]"#, Prompt::Tokens(vec![5, 6])),
        (r#""prompt": [[5, 6]]"#, Prompt::Tokens(vec![5, 6])),
        (r#""prompt_token_ids": [5, 6], "prompt": null"#, Prompt::Tokens(vec![5, 6])),
    ] {
        assert_eq!(prompt(fields).unwrap(), expected, "{fields}");
    }
    for (fields, says) in [
        (r#""max_tokens": 5"#, "give exactly one of prompt, prompt_token_ids and messages"),
        (
            r#""text": "a", "max_tokens": 5, "user": "b", "tools": [], "parallel_tool_calls": true"#,
            "there is no field \"text\"; give exactly one of prompt, prompt_token_ids and messages",
        ),
        (r#""promt": "a""#, "there is no field \"promt\"; did you mean prompt?"),
        (
            r#""best_of": 1, "echo": false, "chat_template_kwargs": {}, "add_special_tokens": true, "tool_choice": "auto""#,
            "give exactly one of prompt",
        ),
        (r#""tool_choice": "any""#, "tool_choice is \"any\""),
        (r#""prompt": "a", "prompt_token_ids": [1]"#, "give exactly one of"),
        (r#""prompt": ["a", "b"]"#, "prompt is a list of 2 prompts; give each a line of its own"),
        (r#""prompt": [[1], [2], [3]]"#, "prompt is a list of 3 prompts"),
        (r#""prompt": 5"#, "prompt is 5; it must be a text or a list of token ids"),
        (r#""prompt": [-1]"#, "prompt is [-1];"),
        (r#""prompt": "\ud800""#, "prompt can't be read: "),
        (r#""prompt_token_ids": [1.5]"#, "prompt_token_ids is [1.5]; it must be a list of token ids"),
        (r#""prompt_token_ids": [4294967296]"#, "prompt_token_ids is [4294967296];"),
        (r#""prompt_token_ids": "a""#, "prompt_token_ids is \"a\";"),
        (r#""messages": []"#, "messages is []; it must be a list of messages, at least one"),
        (r#""messages": "hi""#, "messages is \"hi\";"),
        (r#""messages": [{"content": "hi"}]"#, "messages can't be read: messages[0]: "),
        (r#""messages": [{"role": "user", "content": "a"}, 5]"#, "messages can't be read: messages[1]: "),
        (r#""prompt": "a", "tools": []"#, "tools goes with messages; give the prompt as messages"),
        (r#""prompt": "a", "chat_template_kwargs": {}"#, "chat_template_kwargs goes with messages"),
        (r#""prompt": "a", "add_special_tokens": false"#, "add_special_tokens is false; it may only be true"),
    ] {
        let error = prompt(fields).unwrap_err().error.to_string();
        assert!(error.starts_with(says), "{fields}: {error}");
    }
}

#[test]
fn a_conversation_is_handed_on_with_all_that_its_template_may_know() {
    let line = json!({
        "id": 1,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "7"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "auto",
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"enable_thinking": false},
    });
    let Prompt::Chat(chat) = parse(line.to_string()).unwrap().request.prompt else {
        panic!("no conversation")
    };
    assert_eq!(serde_json::to_value(&chat.messages).unwrap(), line["messages"]);
    assert_eq!(Value::from(chat.tools), line["tools"]);
    assert_eq!(Value::from(chat.documents), line["documents"]);
    assert_eq!(Value::from(chat.kwargs), line["chat_template_kwargs"]);
    assert!(chat.add_generation_prompt && !chat.continue_final_message);

    let flags = |fields: &str| {
        let messages = r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well,"}]"#;
        let line = parse(format!(r#"{{"id": 1, "messages": {messages}, {fields}}}"#))?;
        let Prompt::Chat(chat) = line.request.prompt else { panic!("no conversation") };
        Ok::<_, BadLine>((chat.add_generation_prompt, chat.continue_final_message))
    };
    assert_eq!(
        flags(r#""continue_final_message": true, "add_generation_prompt": false"#).unwrap(),
        (false, true)
    );
    assert_eq!(flags(r#""continue_final_message": true"#).unwrap(), (false, true));
    assert_eq!(flags(r#""add_generation_prompt": false"#).unwrap(), (false, false));
    assert_eq!(flags(r#""tools": [], "tool_choice": "none""#).unwrap(), (true, false));
    for (fields, says) in [
        (
            r#""continue_final_message": true, "add_generation_prompt": true"#,
            "continue_final_message is true and",
        ),
        (r#""chat_template_kwargs": []"#, "chat_template_kwargs is []; it must be an object"),
        (r#""tools": {}"#, "tools is {}; it must be a list of tools"),
        (
            r#""tools": [{"function": {"name": "f"}}, 7]"#,
            "tools can't be read: tools[1].function has no name",
        ),
        (
            r#""tools": [{"type": "custom", "custom": {"name": "f"}}]"#,
            "tools can't be read: tools[0].type is \"custom\"; it may only be \"function\"",
        ),
        (
            r#""chat_template": "{{ x }}""#,
            "chat_template is \"{{ x }}\"; the checkpoint's chat template is used",
        ),
    ] {
        let error = flags(fields).unwrap_err().error.to_string();
        assert!(error.starts_with(says), "{fields}: {error}");
    }
}

#[test]
fn a_batch_line_may_have_several_prompts() {
    let line = |prompt: &str| {
        format!(
            r#"{{"custom_id": "a", "url": "/v1/completions", "body": {{"prompt": {prompt}, "n": 2, "stop": "."}}}}"#
        )
    };
    let RequestLine { request, beside, .. } = parse(line(r#"["a", "b", "c"]"#)).unwrap();
    let asked: Vec<_> = [request].into_iter().chain(beside).collect();
    let of = |one: &GenerateRequest| (one.prompt.clone(), one.sampling.seed, one.samples, one.stop.clone());
    let expected = |(i, text): (u32, &str)| {
        (Prompt::Text(text.to_owned()), prompt_seed(103, i), 2, vec![".".to_owned()])
    };
    assert_eq!(
        asked.iter().map(of).collect::<Vec<_>>(),
        (0..).zip(["a", "b", "c"]).map(expected).collect::<Vec<_>>()
    );
    let ids = parse(line("[[5, 6], [7]]")).unwrap();
    assert_eq!(
        (ids.request.prompt, ids.beside[0].prompt.clone()),
        (Prompt::Tokens(vec![5, 6]), Prompt::Tokens(vec![7]))
    );
    let many = line(&json!(vec!["a"; 2049]).to_string());
    assert_eq!(native_error(&many), "prompt is a list of 2049; give 1 to 2048 in a line");
    // A prompt counts once, however many outputs it has.
    let output = |sample| Completion { sample, ..completion() };
    let outputs = [output(0), output(1), output(0), output(1)];
    let result: Value = serde_json::from_str(&written_all(&line(r#"["a", "b"]"#), &outputs)).unwrap();
    let body = &result["response"]["body"];
    let indices: Vec<_> =
        body["choices"].as_array().unwrap().iter().map(|choice| choice["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    let (one, usage) = (completion(), &body["usage"]);
    assert_eq!(usage["prompt_tokens"], 2 * one.prompt_tokens);
    assert_eq!(usage["completion_tokens"], 4 * one.token_ids.len());
    // Of several it is said which one failed.
    let failed = |sample| Completion { error: Some(RequestError::NotNumbers), ..output(sample) };
    let message = |prompts: &str, outputs: &[Completion]| {
        let result: Value = serde_json::from_str(&written_all(&line(prompts), outputs)).unwrap();
        result["response"]["body"]["error"]["message"].as_str().unwrap().to_owned()
    };
    let alone = message(r#""a""#, &[output(0), failed(1)]);
    assert_eq!(alone, RequestError::NotNumbers.to_string());
    let among = [output(0), output(1), output(0), failed(1), output(0), failed(1)];
    assert_eq!(message(r#"["a", "b", "c"]"#, &among), format!("prompt 1: {alone}"));
}

#[test]
fn the_prompts_of_a_line_share_its_schema() {
    let format = r#"{"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}"#;
    let body = format!(r#"{{"prompt": ["a", "b"], "response_format": {format}}}"#);
    let line = format!(r#"{{"custom_id": "a", "url": "/v1/completions", "body": {body}}}"#);
    let RequestLine { request, beside, .. } = parse(line).unwrap();
    let grammar = |one: &GenerateRequest| one.grammar.clone().unwrap();
    assert!(Arc::ptr_eq(&grammar(&request), &grammar(&beside[0])));
}
