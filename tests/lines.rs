//! Request and result lines: what is taken, what is refused and how, what comes back.

use std::sync::Arc;

use minisgl::lines::{self, BadLine, Defaults, LineError, Origin, RequestLine};
use minisgl::openai::ModelName;
use minisgl::{
    Completion, Embed, FinishReason, GenerateRequest, Given, Prompt, PromptLogprobs, RequestError,
    RerankRequest, SamplingParams, TokenLogprobs, TokenRules, prompt_seed,
};
use proptest::prelude::*;
use serde_json::{Value, json};

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

#[test]
fn what_a_line_leaves_out_is_as_the_defaults_say_and_its_seed_is_its_own() {
    let expected = SamplingParams { seed: 103, max_tokens: 16, ..SamplingParams::default() };
    assert_eq!(sampling(r#""user": "me""#), expected);
    for fields in [
        r#""max_tokens": null, "temperature": null, "top_k": null, "top_p": null, "min_p": null, "seed": null"#,
        r#""ignore_eos": null, "logprobs": null, "top_logprobs": null, "stop": null, "max_completion_tokens": null"#,
        r#""top_k": -1, "seed": -1"#,
    ] {
        assert_eq!(sampling(fields), expected, "{fields}");
    }
}

#[test]
fn numbers_are_taken_as_people_and_their_tools_write_them() {
    let taken =
        sampling(r#""max_tokens": 2.0, "top_k": 5.0, "seed": 7.0, "temperature": 1, "top_p": 1, "min_p": 0"#);
    let expected =
        SamplingParams { temperature: 1.0, top_k: 5, seed: 7, max_tokens: 2, ..defaults().sampling };
    assert_eq!(taken, expected);
    assert_eq!(sampling(r#""max_tokens": 1.6e1"#).max_tokens, 16);
    assert_eq!(sampling(r#""top_k": 0"#).top_k, 0);
    assert_eq!(sampling(r#""top_k": -1.0"#).top_k, 0);
    assert_eq!(sampling(r#""seed": 18446744073709551615"#).seed, u64::MAX);
    assert_eq!(sampling(r#""seed": -2"#).seed, u64::MAX - 1);
    // More than a sequence holds is as many as it holds.
    assert_eq!(sampling(r#""max_tokens": 9999999999999"#).max_tokens, u32::MAX);
    let tokens = parse(r#"{"id": 1, "prompt_token_ids": [1.0, 2, 3e0]}"#).unwrap().request.prompt;
    assert_eq!(tokens, Prompt::Tokens(vec![1, 2, 3]));
}

#[test]
fn numbers_that_mean_nothing_are_refused_by_name() {
    for (fields, says) in [
        (r#""max_tokens": 0"#, "max_tokens is 0; it must be a whole number from 1 on"),
        (r#""max_tokens": -1"#, "max_tokens is -1;"),
        (r#""max_tokens": 2.5"#, "max_tokens is 2.5; it must be a whole number"),
        (r#""max_tokens": "16""#, "max_tokens is \"16\"; it must be a whole number"),
        (r#""max_tokens": true"#, "max_tokens is true;"),
        (r#""max_tokens": 1e400"#, "max_tokens can't be read: number out of range"),
        (r#""max_completion_tokens": 0"#, "max_completion_tokens is 0;"),
        (r#""top_k": -2"#, "top_k is -2; it must be a whole number from 1 on, or 0 or -1"),
        (
            r#""seed": 18446744073709551616"#,
            "seed is 18446744073709551616; it must be a whole number of 64 bits",
        ),
        (r#""seed": 1.5"#, "seed is 1.5;"),
        (r#""seed": 1e300"#, "seed is 1e300;"),
        (r#""temperature": "hot""#, "temperature is \"hot\"; it must be a number"),
        (r#""temperature": 1e999"#, "temperature can't be read: number out of range"),
        (r#""top_p": [0.9]"#, "top_p is [0.9]; it must be a number"),
        (r#""ignore_eos": "yes""#, "ignore_eos is \"yes\"; it must be true or false"),
        (r#""stop": 5"#, "stop is 5; it must be a text or a list of texts"),
        (r#""stop": ["a", null]"#, "stop is [\"a\", null];"),
        (r#""include_stop_str_in_output": 1"#, "include_stop_str_in_output is 1; it must be true or false"),
        (r#""stop_token_ids": [-1]"#, "stop_token_ids is [-1]; it must be a list of token ids"),
        (r#""allowed_token_ids": [0.5]"#, "allowed_token_ids is [0.5]; it must be a list of token ids"),
        (r#""allowed_token_ids": 7"#, "allowed_token_ids is 7; it must be a list of token ids"),
        (r#""bad_words": "a""#, "bad_words is \"a\"; it must be a list of texts"),
        (
            r#""logit_bias": {"a": 1}"#,
            "logit_bias is {\"a\": 1}; it must be an object with a number for each",
        ),
        (r#""logit_bias": {"5": null}"#, "logit_bias is {\"5\": null};"),
        (r#""logit_bias": [1]"#, "logit_bias is [1];"),
        (r#""min_tokens": -1"#, "min_tokens is -1; it must be a whole number from 0 on"),
        (r#""presence_penalty": "high""#, "presence_penalty is \"high\"; it must be a number"),
    ] {
        let error = error(fields);
        assert!(error.to_string().starts_with(says), "{fields}: {error}");
        assert!(error.field().is_some_and(|field| fields.starts_with(&format!("\"{field}\""))), "{fields}");
    }
}

#[test]
fn penalties_biases_and_what_ends_an_output_are_read_in_every_format() {
    let penalized = sampling(
        r#""repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -1, "min_tokens": 3"#,
    );
    let expected = SamplingParams {
        repetition_penalty: 1.1,
        presence_penalty: 0.5,
        frequency_penalty: -1.0,
        min_tokens: 3,
        ..sampling(r#""user": "me""#)
    };
    assert_eq!(penalized, expected);
    let fields = r#""logit_bias": {"50256": -100, "7": 2.5}, "stop_token_ids": [5, 6.0], "bad_words": ["a", " b"],
        "allowed_token_ids": [9, 7.0], "stop": "x", "include_stop_str_in_output": true"#;
    for line in in_all_formats(&fields.replace('\n', "")) {
        let request = parse(&line).expect(&line).request;
        let rules = TokenRules {
            logit_bias: vec![(50256, -100.0), (7, 2.5)],
            stop_token_ids: vec![5, 6],
            bad_words: vec!["a".to_owned(), " b".to_owned()],
            allowed_token_ids: Some([9, 7].into()),
        };
        assert_eq!((request.rules, request.include_stop), (rules, true), "{line}");
    }
    for nothing in ["null", "{}"] {
        let line = format!(r#"{{"id": 1, "prompt": "a", "logit_bias": {nothing}, "bad_words": null}}"#);
        assert_eq!(parse(line).unwrap().request.rules, TokenRules::default());
    }
}

#[test]
fn max_tokens_has_two_names_that_may_not_disagree() {
    assert_eq!(sampling(r#""max_completion_tokens": 5"#).max_tokens, 5);
    assert_eq!(sampling(r#""max_completion_tokens": 5, "max_tokens": 5"#).max_tokens, 5);
    let error = error(r#""max_completion_tokens": 5, "max_tokens": 6"#).to_string();
    assert_eq!(error, "max_tokens is 6 and max_completion_tokens says otherwise; give one of them");
}

#[test]
fn logprobs_are_asked_for_by_a_count_or_by_openais_pair() {
    for (fields, asked) in [
        (r#""logprobs": 3"#, Some(3)),
        (r#""logprobs": 0"#, Some(0)),
        (r#""logprobs": 20.0"#, Some(20)),
        (r#""logprobs": true"#, Some(0)),
        (r#""logprobs": true, "top_logprobs": 2"#, Some(2)),
        (r#""logprobs": 2, "top_logprobs": 2"#, Some(2)),
        (r#""logprobs": false"#, None),
        (r#""logprobs": false, "top_logprobs": 0"#, None),
        (r#""top_logprobs": 0"#, None),
    ] {
        assert_eq!(sampling(fields).logprobs, asked, "{fields}");
    }
    for (fields, says) in [
        (r#""logprobs": 21"#, "logprobs is 21; it must be true, false, or a whole number up to 20"),
        (r#""logprobs": -1"#, "logprobs is -1;"),
        (r#""logprobs": "all""#, "logprobs is \"all\";"),
        (r#""logprobs": true, "top_logprobs": 21"#, "top_logprobs is 21; it must be a whole number up to 20"),
        (r#""top_logprobs": 2"#, "the request has no logprobs; top_logprobs needs it to be true"),
        (r#""logprobs": false, "top_logprobs": 2"#, "logprobs is false and top_logprobs says otherwise"),
        (r#""logprobs": 3, "top_logprobs": 2"#, "logprobs is 3 and top_logprobs says otherwise"),
    ] {
        let error = error(fields).to_string();
        assert!(error.starts_with(says), "{fields}: {error}");
    }
}

#[test]
fn stop_is_null_a_text_or_several() {
    for (fields, stop) in [
        (r#""stop": null"#, vec![]),
        (r#""stop": []"#, vec![]),
        (r#""stop": "END""#, vec!["END"]),
        (r#""stop": ["END", "\n"]"#, vec!["END", "\n"]),
    ] {
        for line in in_all_formats(fields) {
            assert_eq!(parse(&line).unwrap().request.stop, stop, "{line}");
        }
    }
}

#[test]
fn fields_at_the_value_that_asks_for_nothing_are_taken() {
    let expected = sampling(r#""user": "me""#);
    for fields in [
        r#""n": 1, "best_of": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0"#,
        r#""min_tokens": 0, "stop_token_ids": [], "skip_special_tokens": true, "stream": false, "logit_bias": {}"#,
        r#""response_format": {"type": "text"}, "echo": false, "suffix": "", "length_penalty": 1, "bad_words": []"#,
        r#""spaces_between_special_tokens": true, "include_stop_str_in_output": false, "use_beam_search": false"#,
        r#""n": null, "guided_json": null, "allowed_token_ids": null, "audio": null, "reasoning_effort": null"#,
        r#""metadata": {"a": "b"}, "store": true, "service_tier": "flex", "safety_identifier": "x", "priority": 5"#,
        r#""modalities": ["text"], "tool_choice": "none", "parallel_tool_calls": true, "stream_options": null"#,
        r#""model": "Qwen/Qwen3-0.6B""#,
        r#""model": "Qwen3-0.6B""#,
        r#""model": null"#,
    ] {
        assert_eq!(sampling(fields), expected, "{fields}");
    }
}

#[test]
fn fields_that_ask_for_what_is_not_done_are_refused_by_name_with_what_to_do() {
    for (fields, says) in [
        (r#""n": 129"#, "n is 129; at most 128 outputs of a prompt are given"),
        (r#""n": 0"#, "n is 0; it must be a whole number from 1 to 128"),
        (r#""n": "1""#, "n is \"1\"; it must be a whole number from 1 to 128"),
        (r#""best_of": 3"#, "best_of is 3; all outputs are given, so it must be as n"),
        (r#""length_penalty": 0.5"#, "length_penalty is 0.5; it may only be 1"),
        (r#""stream": true"#, "stream is true; it may only be false"),
        (r#""echo": true"#, "echo is true;"),
        (r#""guided_regex": "a+""#, "guided_regex is \"a+\"; give it in structured_outputs; leave it out"),
        (
            r#""logits_processors": ["f"]"#,
            "logits_processors is [\"f\"]; it may only be []: requests bring no code",
        ),
        (r#""enable_thinking": false"#, "enable_thinking is false; give it in chat_template_kwargs"),
        (
            r#""tool_choice": "sometimes""#,
            "tool_choice is \"sometimes\"; it may be \"auto\", \"none\", \"required\"",
        ),
        (r#""max_token": 5"#, "there is no field \"max_token\"; did you mean max_tokens?"),
        (r#""temprature": 5"#, "there is no field \"temprature\"; did you mean temperature?"),
        (
            r#""frequencyPenalty": 0"#,
            "there is no field \"frequencyPenalty\"; did you mean frequency_penalty?",
        ),
        (r#""colour": 5"#, "there is no field \"colour\"; remove or correct it"),
        (r#""max_token": null"#, "there is no field \"max_token\""),
        (
            r#""model": "gpt-4o""#,
            "model is \"gpt-4o\", but \"Qwen/Qwen3-0.6B\" is loaded; correct it or leave it out",
        ),
        (r#""model": 4"#, "model is 4; it must be a text"),
        (r#""max_tokens": 5, "max_tokens": 5"#, "max_tokens is given twice; keep one"),
    ] {
        let error = error(fields);
        assert!(error.to_string().starts_with(says), "{fields}: {error}");
        assert!(error.field().is_some_and(|field| fields.starts_with(&format!("\"{field}\""))), "{fields}");
    }
}

#[test]
fn an_id_is_kept_to_the_letter() {
    for id in [
        "18446744073709551616",
        "18446744073709551617",
        "1.0",
        "1e400",
        "-0",
        r#""\ud800""#,
        r#""\u0041 / é""#,
        r#"{"any": ["json", 1.50]}"#,
        "false",
        "123456789012345678901234567890.000000000000000000000000000001",
    ] {
        let lines = [
            format!(r#"{{"id": {id}, "prompt": "a"}}"#),
            format!(r#"{{"custom_id": {id}, "url": "/v1/completions", "body": {{"prompt": "a"}}}}"#),
        ];
        for line in lines {
            let header = parse(&line).expect(&line).header;
            assert_eq!(header.id(), id);
            let mut out = Vec::new();
            lines::write_result(&mut out, &header, ORIGIN, &[completion()], None, &|_| None);
            let out = String::from_utf8(out).unwrap();
            assert!(out.contains(&format!("id\":{id},")), "{out}");
        }
    }
    for line in [r#"{"prompt": "a"}"#, r#"{"id": null, "prompt": "a"}"#] {
        assert!(native_error(line).starts_with("the request has no id;"));
    }
    let line = r#"{"custom_id": null, "url": "/v1/completions", "body": {"prompt": "a"}}"#;
    assert!(native_error(line).starts_with("the request has no custom_id;"));
}

#[test]
fn deeply_nested_values_are_kept_as_ids_and_refused_elsewhere() {
    let deep = format!("{}1{}", "[".repeat(200_000), "]".repeat(200_000));
    assert_eq!(parse(format!(r#"{{"id": {deep}, "prompt": "a"}}"#)).unwrap().header.id(), deep);
    for (field, says) in [
        ("temperature", "temperature"),
        ("prompt", "prompt"),
        ("messages", "messages"),
        ("n", "n is [[["),
        ("whatever", "there is no field"),
        ("body", "there is no field"),
    ] {
        let error = native_error(&format!(r#"{{"id": 1, "{field}": {deep}}}"#));
        assert!(error.starts_with(says) || error.starts_with("give exactly one"), "{error}");
        assert!(error.len() < 300, "an error repeats little of the line: {}", error.len());
    }
    let in_a_message = format!(r#"{{"id": 1, "messages": [{{"role": "user", "content": {deep}}}]}}"#);
    assert!(native_error(&in_a_message).starts_with("messages can't be read: messages[0]: "));
}

#[test]
fn a_line_that_is_no_object_is_said_to_be_none() {
    for (line, says) in [
        (&b"{\"id\": 1, \"prompt"[..], "not valid JSON: EOF while parsing a string at column"),
        (b"{\"id\": 1} x", "not valid JSON: trailing characters at column 11"),
        (b"{'id': 1}", "not valid JSON: key must be a string"),
        (b"{\"id\": NaN}", "not valid JSON: "),
        (b"[1, 2]", "not a JSON object"),
        (b"\"text\"", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"no json", "not valid JSON: expected"),
        (b"{\"id\": 1, \"prompt\": \"\xFF\"}", "not valid UTF-8 at byte 22; save the file as UTF-8"),
        (b"\xFF\xFE{\x00", "not valid UTF-8 at byte 1"),
        (b"\x1F\x8B\x08", "not valid UTF-8 at byte 2"),
    ] {
        let bad = parse(line).unwrap_err();
        assert!(
            bad.error.to_string().starts_with(says),
            "{:?}: {}",
            String::from_utf8_lossy(line),
            bad.error
        );
        assert_eq!((bad.header.id(), bad.error.field()), ("null", None));
    }
}

#[test]
fn a_line_that_is_too_long_to_be_read_says_how_long_it_may_be() {
    let mut out = Vec::new();
    lines::write_bad(&mut out, &BadLine::too_long(64, &defaults()), ORIGIN);
    let result: Value = serde_json::from_slice(&out).unwrap();
    let says = "line 3: the line has more than 64 bytes; shorten it, or raise --max-line-bytes";
    assert_eq!((&result["id"], &result["error"]), (&Value::Null, &json!(says)));
    assert!(!lines::read_result(&out).unwrap().good);
}

#[test]
fn byte_order_marks_line_ends_and_white_space_do_not_count() {
    let line = r#"{"id": 1, "prompt": "a"}"#;
    for line in [format!("\u{feff}{line}\n"), format!("{line}\r\n"), format!(" \t{line}  \n")] {
        assert_eq!(parse(&line).unwrap().header.id(), "1", "{line:?}");
    }
    assert!(["", "\n", "\r\n", " \t\n", "\u{feff}\n"].iter().all(|line| lines::is_blank(line.as_bytes())));
    assert!(!lines::is_blank(b"x\n"));
}

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
            r#""chat_template": "{{ x }}""#,
            "chat_template is \"{{ x }}\"; the checkpoint's chat template is used",
        ),
    ] {
        let error = flags(fields).unwrap_err().error.to_string();
        assert!(error.starts_with(says), "{fields}: {error}");
    }
}

#[test]
fn an_envelope_that_is_not_whole_is_a_bad_batch_line() {
    for (line, says, param) in [
        (r#"{"custom_id": "a"}"#, "the request has no url; it must be \"/v1/chat", "url"),
        (
            r#"{"custom_id": "a", "url": "/v1/responses", "body": {}}"#,
            "url is \"/v1/responses\"; it must be",
            "url",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions"}"#,
            "the request has no body; give the request there",
            "body",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "body": []}"#,
            "body is []; it must be the fields",
            "body",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}"#,
            "method is \"GET\"",
            "method",
        ),
        (
            r#"{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}, "x": 1}"#,
            "there is no field",
            "x",
        ),
        (r#"{"custom_id": "a", "custom_id": "b", "url": "x"}"#, "custom_id is given twice", "custom_id"),
    ] {
        let bad = parse(line).unwrap_err();
        assert!(bad.error.to_string().starts_with(says), "{line}: {}", bad.error);
        let mut out = Vec::new();
        lines::write_bad(&mut out, &bad, ORIGIN);
        let result: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(result["custom_id"], "a");
        assert_eq!(result["error"], Value::Null);
        assert_eq!(result["response"]["status_code"], 400);
        assert_eq!(result["response"]["body"]["error"]["type"], "invalid_request_error");
        assert_eq!(result["response"]["body"]["error"]["param"], param);
        assert_eq!(lines::read_result(&out).unwrap(), lines::Outcome { origin: Some(ORIGIN), good: false });
    }
    for (url, body, says) in [
        ("/v1/chat/completions", r#"{"prompt": "a"}"#, "give exactly one of messages, and no prompt"),
        (
            "/v1/completions",
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            "give exactly one of prompt and",
        ),
    ] {
        let line = format!(r#"{{"custom_id": "a", "url": "{url}", "body": {body}}}"#);
        assert!(native_error(&line).starts_with(says), "{line}");
    }
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

/// A line with everything in it, to be damaged.
const FULL: &str = concat!(
    r#"{"custom_id": "r\u00e9-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "Qwen3-0.6B", "#,
    r#""messages": [{"role": "user", "content": [{"type": "text", "text": "a\ud83e\udd80"}]}], "tools": [{"a": 1e3}], "#,
    r#""max_tokens": 2.0, "top_k": -1, "seed": 18446744073709551615, "stop": ["x", "y"], "logprobs": true, "#,
    r#""top_logprobs": 3, "n": 1, "logit_bias": {}, "chat_template_kwargs": {"enable_thinking": false}}}"#
);

/// Whatever a line is, it runs or gets one error line that can be read back.
fn is_taken_or_refused(line: &[u8]) {
    let Err(bad) = parse(line) else { return };
    assert!(bad.error.to_string().len() < 1000 + line.len());
    let mut out = Vec::new();
    lines::write_bad(&mut out, &bad, ORIGIN);
    assert!(out.starts_with(b"{\"id\":") && out.ends_with(b"\n"));
    assert!(out.iter().filter(|byte| **byte == b'\n').count() == 1);
    let outcome = lines::read_result(&out).expect("an error line is a result line");
    assert_eq!(outcome, lines::Outcome { origin: Some(ORIGIN), good: false });
}

#[test]
fn every_beginning_of_a_line_is_taken_or_refused() {
    assert!(parse(FULL).is_ok());
    for end in 0..FULL.len() {
        is_taken_or_refused(&FULL.as_bytes()[..end]);
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_taken_or_refused(line in prop::collection::vec(any::<u8>(), 0..200)) {
        is_taken_or_refused(&line);
        lines::read_result(&line);
    }

    #[test]
    fn a_damaged_line_is_taken_or_refused(
        damage in prop::collection::vec((0..FULL.len(), prop::sample::select(&b"\"{}[]:,\\u0e-.\x00\xFFn1 \n"[..])), 1..6)
    ) {
        let mut line = FULL.as_bytes().to_vec();
        for (at, byte) in damage {
            line[at] = byte;
        }
        is_taken_or_refused(&line);
    }

    #[test]
    fn parts_of_json_in_any_order_are_taken_or_refused(
        parts in prop::collection::vec(prop::sample::select(&[
            "{", "}", "[", "]", ":", ",", "\"id\"", "\"custom_id\"", "\"url\"", "\"body\"", "\"messages\"", "\"role\"",
            "\"prompt\"", "\"seed\"", "\"/v1/completions\"", "1e999", "-1", "null", "true", "\"\\ud800\"", "1.5",
        ][..]), 0..30)
    ) {
        is_taken_or_refused(parts.concat().as_bytes());
    }
}

#[test]
fn a_prompts_log_probabilities_may_be_asked_for_alone() {
    let asked = |top| Some(PromptLogprobs { from: 0, top });
    assert_eq!(sampling(r#""prompt_logprobs": 5"#).prompt_logprobs, asked(5));
    let alone = sampling(r#""prompt_logprobs": 0, "max_tokens": 0"#);
    assert_eq!((alone.prompt_logprobs, alone.max_tokens), (asked(0), 0));
    assert_eq!(sampling(r#""prompt_logprobs": null"#).prompt_logprobs, None);
    for wrong in ["21", "-1", "true", "1.5"] {
        let error = error(&format!(r#""prompt_logprobs": {wrong}"#)).to_string();
        assert_eq!(error, format!("prompt_logprobs is {wrong}; it must be a whole number up to 20"));
    }
}

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
