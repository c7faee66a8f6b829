//! Calls of tools and thoughts, told apart from what is said.

use minisgl::ToolFormat;
use minisgl::simulated::Control;
use minisgl_server::Settings;
use serde_json::{Value, json};

use crate::CHAT;
use crate::common::{Running, Scratch, checkpoint_with_calls, messages, settings, text};

/// An engine that says a text, whatever it is asked.
fn says(said: &str, settings: Settings) -> Running {
    let script = text().encode(minisgl::Prompt::Text(said.to_owned())).unwrap();
    Running::simulated(settings, Control { script, ..Control::default() }, text()).0
}

#[test]
fn calls_of_tools_are_told_apart_whole_and_streamed() {
    let said =
        "I look. <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bonn\"}}\n</tool_call>";
    let with_tools = Settings { tool_format: Some(ToolFormat::Qwen3), ..settings() };
    let running = says(said, with_tools);
    let tools =
        json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
    let body = json!({"messages": messages(), "tools": tools, "max_tokens": 200});
    let choice = running.post(CHAT, &body).json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    assert_eq!(choice["message"]["content"], "I look.");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({"name": "weather", "arguments": "{\"city\": \"Bonn\"}"}));
    assert!(call["id"].as_str().unwrap().starts_with("call-") && call["type"] == "function");

    let chunks: Vec<Value> = running.stream(CHAT, body.clone()).filter(|chunk| !chunk.is_null()).collect();
    let deltas = || chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]);
    let text: String = deltas().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(text, "I look.");
    let calls: Vec<_> = deltas().filter_map(|delta| delta.get("tool_calls")).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!((&calls[0][0]["index"], &calls[0][0]["function"]), (&json!(0), &call["function"]));
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    // Without tools, or with none to be used, it is text.
    for body in [
        json!({"messages": messages(), "max_tokens": 200}),
        json!({"messages": messages(), "max_tokens": 200, "tools": tools, "tool_choice": "none"}),
    ] {
        let choice = running.post(CHAT, &body).json()["choices"][0].clone();
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(said), &json!("stop")));
    }
}

/// What each choice of a whole answer or of a stream calls, and its end.
fn called(choices: &[Value]) -> (Vec<Value>, Value) {
    let part = |choice: &Value| match choice.get("delta") {
        Some(delta) => delta["tool_calls"].clone(),
        None => choice["message"]["tool_calls"].clone(),
    };
    let calls = choices.iter().flat_map(|choice| part(choice).as_array().cloned().unwrap_or_default());
    let functions = calls.map(|call| call["function"].clone()).collect();
    (functions, choices.last().unwrap()["finish_reason"].clone())
}

#[test]
fn a_call_that_is_asked_for_comes_whatever_the_model_would_say() {
    let count = json!({"type": "object", "additionalProperties": false, "required": ["to"],
                       "properties": {"to": {"type": "integer", "minimum": 1, "maximum": 9}}});
    let paint = json!({"type": "object", "additionalProperties": false, "required": ["in"],
                       "properties": {"in": {"enum": ["red", "grün"]}}});
    let tool = |name: &str, parameters: &Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let tools = json!([tool("count", &count), tool("paint", &paint)]);
    let named = json!({"type": "function", "function": {"name": "paint"}});
    for tool_format in [None, Some(ToolFormat::Llama3)] {
        let scratch = Scratch::new();
        checkpoint_with_calls(scratch.path());
        let running = Running::of_checkpoint(Settings { tool_format, ..settings() }, scratch);
        for (choice, seed) in
            [json!("required"), named.clone()].iter().flat_map(|choice| (0..4).map(move |i| (choice, i)))
        {
            let body = json!({
                "messages": messages(), "tools": tools, "tool_choice": choice, "parallel_tool_calls": false,
                "temperature": 2, "seed": seed, "max_tokens": 150,
            });
            let whole = running.post(CHAT, &body).json()["choices"].as_array().unwrap().clone();
            let (functions, reason) = called(&whole);
            assert_eq!((functions.len(), &reason), (1, &json!("tool_calls")), "{whole:?}");
            assert!(whole[0]["message"]["content"].is_null(), "{whole:?}");
            let schema = match functions[0]["name"].as_str() {
                Some("paint") => &paint,
                Some("count") if *choice == "required" => &count,
                other => panic!("{other:?} is called"),
            };
            let arguments = functions[0]["arguments"].as_str().unwrap();
            assert!(jsonschema::is_valid(schema, &serde_json::from_str(arguments).unwrap()), "{arguments}");
            let chunks: Vec<Value> = running.stream(CHAT, body).filter(|chunk| !chunk.is_null()).collect();
            let choices: Vec<Value> = chunks.iter().map(|chunk| chunk["choices"][0].clone()).collect();
            assert_eq!(called(&choices), (functions, reason), "streamed");
        }
        let several = json!({
            "messages": messages(), "tools": tools, "tool_choice": named, "temperature": 2, "seed": 1, "max_tokens": 150, "n": 3,
        });
        let several = running.post(CHAT, &several).json()["choices"].as_array().unwrap().clone();
        assert_eq!(several.len(), 3);
        for choice in several {
            let (functions, reason) = called(&[choice]);
            assert_eq!((functions.len(), &reason), (1, &json!("tool_calls")), "{functions:?}");
        }
        let pattern = json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}});
        let unusable = json!([tool("paint", &pattern)]);
        let body = json!({"messages": messages(), "tools": unusable, "tool_choice": "required"});
        for stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = stream.into();
            let refused = running.post(CHAT, &body).refused(400);
            assert!(refused["message"].as_str().unwrap().contains("the tool \"paint\""), "{refused}");
        }
    }
}

#[test]
fn thoughts_are_told_apart_where_that_is_wanted() {
    let said = "<think>\nHm.\n</think>\n\nYes.";
    let body = json!({"messages": messages(), "max_tokens": 200});
    let apart = says(said, Settings { separate_reasoning: true, ..settings() });
    let message = apart.post(CHAT, &body).json()["choices"][0]["message"].clone();
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("Hm."), &json!("Yes.")));
    let chunks: Vec<Value> = apart.stream(CHAT, body.clone()).collect();
    let of = |field: &str| -> String {
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][field].as_str()).collect()
    };
    assert_eq!((of("reasoning_content"), of("content")), ("Hm.".to_owned(), "Yes.".to_owned()));
    let together = says(said, settings());
    let message = together.post(CHAT, &body).json()["choices"][0]["message"].clone();
    assert_eq!((&message["content"], message.get("reasoning_content")), (&json!(said), None));
}
