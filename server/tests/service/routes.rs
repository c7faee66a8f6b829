//! Fields that a route refuses by name, and the routes beside completions: embeddings, tokenize, detokenize.

use minisgl::Text;
use minisgl::simulated::Control;
use serde_json::{Value, json};

use crate::common::{Running, messages, settings};
use crate::{CHAT, EMBEDDINGS, TEXT};

#[test]
fn a_field_that_can_not_be_served_is_refused_by_its_name() {
    let running = Running::tiny(settings());
    let both = [
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.5)),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!({"5": 101})),
        ("logit_bias", json!({"4000000": 1})),
        ("stop_token_ids", json!([4_000_000])),
        ("bad_words", json!([" "])),
        ("allowed_token_ids", json!([])),
        ("allowed_token_ids", json!([5, 4_000_000])),
        ("max_token", json!(5)),
        ("temperature", json!(-1)),
        ("top_p", json!(0)),
        ("stop", json!([""])),
        ("seed", json!("x")),
        ("n", json!(0)),
        ("n", json!(129)),
        ("stream_options", json!({"include_usage": true})),
        ("min_tokens", json!(-1)),
        ("use_beam_search", json!(true)),
    ];
    let chat = [
        ("response_format", json!({"type": "xml"})),
        ("tool_choice", json!("sometimes")),
        ("top_logprobs", json!(3)),
        ("reasoning_effort", json!("high")),
        ("echo", json!(true)),
        ("functions", json!([{}])),
    ];
    let text =
        [("suffix", json!("x")), ("best_of", json!(3)), ("logprobs", json!(21)), ("tools", json!([{}]))];
    let of_text = both.iter().chain(&text).map(|case| (TEXT, json!({"prompt": "a"}), case));
    let of_chat = both.iter().chain(&chat).map(|case| (CHAT, json!({"messages": messages()}), case));
    for (path, mut body, (field, value)) in of_text.chain(of_chat) {
        body[field] = value.clone();
        let error = running.post(path, &body).refused(400);
        assert_eq!(error["type"], "invalid_request_error");
        let named = if *field == "top_logprobs" { "logprobs" } else { field };
        assert_eq!(error["param"], named, "{body}: {error}");
        if *field != "stream_options" {
            body["stream"] = true.into();
            assert_eq!(running.post(path, &body).status, 400, "before a stream begins, too: {body}");
        }
    }
    let grammar = "start: other";
    for (path, body, field) in [
        (TEXT, json!({}), "prompt"),
        (TEXT, json!({"messages": messages()}), "prompt"),
        (TEXT, json!({"prompt": ""}), "prompt"),
        (TEXT, json!({"prompt": ["a", ""]}), "prompt"),
        (TEXT, json!({"prompt": [4_000_000]}), "prompt"),
        (TEXT, json!({"prompt": vec![5; 300]}), "prompt"),
        (TEXT, json!({"prompt_token_ids": vec![5; 300]}), "prompt_token_ids"),
        (TEXT, json!({"prompt": "a", "stop": "x".repeat(5000)}), "stop"),
        (TEXT, json!({"prompt": "a", "structured_outputs": {"grammar": grammar}}), "structured_outputs"),
        (CHAT, json!({}), "messages"),
        (CHAT, json!({"prompt": "a"}), "messages"),
        (CHAT, json!({"messages": [{"role": "user", "content": "a".repeat(900)}]}), "messages"),
        (CHAT, json!({"messages": messages(), "structured_outputs": {"regex": "("}}), "structured_outputs"),
        (
            CHAT,
            json!({"messages": messages(), "response_format": {"type": "json_schema", "json_schema": {"schema": false}}}),
            "response_format",
        ),
        (
            CHAT,
            json!({"messages": messages(), "response_format": {"type": "json_object", "schema": {}}}),
            "response_format.schema",
        ),
        (
            CHAT,
            json!({"messages": messages(), "response_format": {"type": "json_schema", "json_schema": {"shema": {}}}}),
            "response_format.json_schema.shema",
        ),
        (CHAT, json!({"messages": messages(), "response_format": {}}), "response_format.type"),
        (TEXT, json!({"prompt": "a", "structured_outputs": {"regexp": "a"}}), "structured_outputs.regexp"),
        (
            TEXT,
            json!({"prompt": "a", "stream": true, "stream_options": {"include_usage": 3}}),
            "stream_options.include_usage",
        ),
        (
            TEXT,
            json!({"prompt": "a", "stream": true, "stream_options": {"continuous_usage_stats": true}}),
            "stream_options.continuous_usage_stats",
        ),
        (EMBEDDINGS, json!({"input": ""}), "input"),
        (EMBEDDINGS, json!({"input": [[4_000_000]]}), "input"),
        (EMBEDDINGS, json!({"input": vec![5; 600]}), "input"),
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": ["a", "b"]}), "prompt"),
        ("/tokenize", json!({"messages": [{"role": "elf", "content": ""}]}), "messages"),
    ] {
        assert_eq!(running.post(path, &body).refused(400)["param"], field, "{path} {body}");
    }
    let other_model = json!({"prompt": "a", "model": "gpt-4o"});
    assert_eq!(running.post(TEXT, &other_model).refused(404)["code"], "model_not_found");
    let long = json!({"prompt": vec![5; 300]});
    assert_eq!(running.post(TEXT, &long).refused(400)["code"], "context_length_exceeded");
    assert_eq!(
        running.post(CHAT, &json!({"messages": [{"role": "elf", "content": ""}]})).refused(400)["param"],
        "messages"
    );
    assert_eq!(
        running.post(CHAT, &json!({"messages": messages(), "tools": [{}]})).refused(400)["param"],
        "tools"
    );
}

#[test]
fn a_model_is_found_by_its_name_however_a_path_writes_it() {
    let (running, _) = Running::simulated(settings(), Control::default(), Text::default());
    for name in ["model", "mod%65l"] {
        assert_eq!(running.get(&format!("/v1/models/{name}")).json()["id"], "model");
    }
    for name in ["other", "model%FF"] {
        running.get(&format!("/v1/models/{name}")).refused(404);
    }
}

#[test]
fn embeddings_come_in_the_order_of_their_inputs_as_numbers_or_as_their_bytes() {
    let running = Running::tiny(settings());
    let ask = |body: Value| running.post(EMBEDDINGS, &body).json();
    let values = |answer: &Value, at: usize| answer["data"][at]["embedding"].as_array().unwrap().clone();
    let one = ask(json!({"input": "Once upon", "model": "model"}));
    assert_eq!(
        (&one["object"], &one["model"], values(&one, 0).len()),
        (&json!("list"), &json!("model"), 128)
    );
    assert_eq!(one["data"][0]["object"], "embedding");
    let ids = running.post("/tokenize", &json!({"prompt": "Once upon"})).json()["tokens"].clone();
    assert_eq!(ask(json!({"input": ids})), one);
    let tokens = ids.as_array().unwrap().len();
    assert_eq!(one["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));

    let several = ask(json!({"input": ["A page", "Once upon", "a time"], "encoding_format": "float"}));
    assert_eq!(several["data"].as_array().unwrap().len(), 3);
    for (at, item) in several["data"].as_array().unwrap().iter().enumerate() {
        assert_eq!(item["index"], at);
    }
    assert_eq!(values(&several, 1), values(&one, 0));
    assert_ne!(values(&several, 0), values(&one, 0));
    assert_eq!(values(&ask(json!({"input": [[5, 6], [7]], "dimensions": 3})), 1).len(), 3);

    let coded = ask(json!({"input": "Once upon", "encoding_format": "base64"}));
    // 512 bytes.
    assert_eq!(coded["data"][0]["embedding"].as_str().unwrap().len(), 684);

    for (field, value) in [
        ("dimensions", json!(129)),
        ("dimensions", json!(0)),
        ("encoding_format", json!("int8")),
        ("input", json!(7)),
        ("input", json!(null)),
        ("max_tokens", json!(5)),
        ("truncate_prompt_tokens", json!(5)),
    ] {
        let mut body = json!({"input": "a"});
        body[field] = value;
        assert_eq!(running.post(EMBEDDINGS, &body).refused(400)["param"], field, "{body}");
    }
    let empty = running.post(EMBEDDINGS, &json!({"input": []})).refused(400);
    assert!(empty["message"].as_str().unwrap().contains("the prompt is empty"), "{empty}");
    let long = running.post(EMBEDDINGS, &json!({"input": vec![5; 600]})).refused(400);
    assert_eq!(long["code"], "context_length_exceeded");
    assert_eq!(
        running.post(EMBEDDINGS, &json!({"input": "a", "model": "gpt"})).refused(404)["param"],
        "model"
    );
    let metrics = String::from_utf8(running.get("/metrics").body).unwrap();
    assert!(metrics.contains("minisgl:embeddings_total{model_name=\"model\"} 8"), "{metrics}");
}

#[test]
fn text_becomes_tokens_and_tokens_become_text() {
    let running = Running::tiny(settings());
    let text = "Once upon a time, in Zürich";
    let tokens = running.post("/tokenize", &json!({"prompt": text, "return_token_strs": true})).json();
    let ids = tokens["tokens"].as_array().unwrap();
    assert_eq!(
        (&tokens["count"], tokens["token_strs"].as_array().unwrap().len()),
        (&json!(ids.len()), ids.len())
    );
    assert!(tokens["max_model_len"].as_u64().unwrap() > 0 && ids.len() > 4, "{tokens}");
    assert_eq!(running.post("/detokenize", &json!({"tokens": ids})).json()["prompt"], text);
    // A conversation's tokens are those that an answer counts as its prompt.
    let conversation = running.post("/tokenize", &json!({"messages": messages()})).json();
    let answer = running.post(CHAT, &json!({"messages": messages(), "max_tokens": 1})).json();
    assert_eq!(conversation["count"], answer["usage"]["prompt_tokens"]);
}

#[test]
fn what_is_no_text_and_what_are_no_tokens_is_refused_by_name() {
    let running = Running::tiny(settings());
    for (path, body, name) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": ["Once", "upon"]}), "prompt"),
        ("/tokenize", json!({"prompt": "Once", "add_everything": true}), "add_everything"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens"),
        ("/detokenize", json!({"tokens": "Once"}), "tokens"),
    ] {
        let answer = running.post(path, &body);
        let (status, error) = (answer.status, answer.json());
        let message = error["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 400 && message.contains(name), "{path} {body}: {status} {error}");
        assert_eq!(error["error"]["param"], name, "{path} {body}");
    }
}
