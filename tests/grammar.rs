//! Constrained output through the public API: what comes out is what was asked for, and the same whatever runs beside it.

mod common;

use std::sync::Arc;

use common::{Scratch, greedy, small};
use minisgl::lines::{self, Defaults};
use minisgl::openai::{ModelName, OutputFormat, OutputParser, OutputPart};
use minisgl::{
    BackendChoice, Completion, FinishReason, Function, GenerateRequest, Grammar, KernelSet, LlmBuilder,
    Prompt, RequestError, SamplingParams, Speculation, TokenRules, ToolCalls, ToolFormat,
};
use serde_json::{Value, json};

fn schemas() -> [Value; 5] {
    [
        json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
               "required": ["name", "age"], "additionalProperties": false}),
        json!({"type": "array", "items": {"enum": ["red", "green", 7, null]}, "minItems": 1, "maxItems": 6}),
        json!({"type": "string", "pattern": "^[a-f0-9]{4,8}$"}),
        json!({"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": -5, "maximum": 5000}]}),
        json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "additionalProperties": false,
               "properties": {"left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}, "value": {"type": "integer"}},
               "required": ["left"]}}}),
    ]
}

/// Two tools of short arguments, of which one is called at least.
fn calls(format: ToolFormat) -> ToolCalls {
    let function = |name: &str, parameters| Function { name: name.to_owned(), parameters };
    let functions = vec![
        function(
            "count",
            json!({"type": "object", "properties": {"to": {"type": "integer", "minimum": 1, "maximum": 99}},
                                 "required": ["to"], "additionalProperties": false}),
        ),
        function(
            "pa\"int",
            json!({"type": "object", "properties": {"in": {"enum": ["red", "grün"]}}, "required": ["in"],
                                  "additionalProperties": false}),
        ),
    ];
    ToolCalls { functions, format: Some(format), required: true, parallel: true }
}

/// Is an output calls, one or more and nothing else, each of a tool and with arguments that are valid?
fn is_calls(text: &str, calls: &ToolCalls) -> bool {
    let (mut parser, mut out) =
        (OutputParser::new(OutputFormat { tools: calls.format, reasoning: None }), Vec::new());
    parser.push(text, &mut out);
    parser.finish(&mut out);
    let is_valid = |function: &Function, arguments: &str| {
        serde_json::from_str(arguments).is_ok_and(|value| jsonschema::is_valid(&function.parameters, &value))
    };
    let is_call = |part: &OutputPart| match part {
        OutputPart::Call(call) => {
            calls.functions.iter().any(|one| one.name == call.name && is_valid(one, &call.arguments))
        }
        OutputPart::Text(_) | OutputPart::Reasoning(_) => false,
    };
    !out.is_empty() && out.iter().all(is_call)
}

/// Grammars of all kinds, greedy and drawn, short and long, and every third request without any.
fn requests() -> Vec<GenerateRequest> {
    let grammars: Vec<Grammar> = schemas()
        .into_iter()
        .map(Grammar::JsonSchema)
        .chain([
            Grammar::JsonObject,
            Grammar::Regex(r"\d{3}-\d{4}( ext \d+)?".to_owned()),
            Grammar::Lark("start: (\"yes\" | \"no\") (\", \" /[a-z]+/)*".to_owned()),
            Grammar::Choice(["north", "north-east", "größer"].map(str::to_owned).to_vec()),
            Grammar::Calls(calls(ToolFormat::Qwen3)),
            Grammar::Calls(calls(ToolFormat::Llama3)),
        ])
        .collect();
    (0..36)
        .map(|i: u32| {
            let sampling = SamplingParams {
                temperature: [0.0, 1.0, 3.0][i as usize % 3],
                top_k: [0, 30][i as usize / 3 % 2],
                top_p: [1.0, 0.8][i as usize / 5 % 2],
                seed: u64::from(i),
                max_tokens: 5 + i * 3,
                ..SamplingParams::default()
            };
            let prompt: Vec<u32> = (0..1 + i * 7 % 90).map(|j| (i / 4 * 13 + j * 5) % 250).collect();
            let request = GenerateRequest::tokens(prompt).sampling(sampling);
            match i % 3 {
                2 => request,
                _ => request.grammar(grammars[i as usize % grammars.len()].clone()),
            }
        })
        .collect()
}

fn check(request: &GenerateRequest, completion: &Completion) {
    assert_eq!(completion.error, None);
    let text = completion.text.as_deref().unwrap();
    if completion.finish_reason == FinishReason::Length {
        return;
    }
    let json = || serde_json::from_str::<Value>(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
    let matches =
        |expression: &str| regex::Regex::new(&format!("^(?:{expression})$")).unwrap().is_match(text);
    let is_right = match request.grammar.as_deref().unwrap() {
        Grammar::JsonObject => json().is_object(),
        Grammar::JsonSchema(schema) => jsonschema::is_valid(schema, &json()),
        Grammar::Regex(expression) => matches(expression),
        Grammar::Lark(_) => matches("(yes|no)(, [a-z]+)*"),
        Grammar::Choice(texts) => texts.iter().any(|one| one == text),
        Grammar::Calls(calls) => is_calls(text, calls),
    };
    assert!(is_right, "{text:?} of {:?}", request.grammar);
}

fn run(builder: LlmBuilder) -> Vec<Completion> {
    let mut llm = builder.build().unwrap();
    let completions = llm.generate(&requests()).unwrap();
    llm.check();
    completions
}

/// Engines that `on` makes of a checkpoint's.
fn assert_held_to_their_grammars(on: impl Fn(LlmBuilder) -> LlmBuilder) {
    let folder = Scratch::with_text();
    let builder = || on(small(folder.path()));
    let expected = run(builder());
    let constrained = requests().into_iter().zip(&expected).filter(|(request, _)| request.grammar.is_some());
    let mut whole = 0;
    for (request, completion) in constrained {
        check(&request, completion);
        whole += usize::from(completion.finish_reason != FinishReason::Length);
    }
    assert!(whole > 8, "{whole} came to an end");
    let ways = [
        builder().max_running(1).max_graph_batch(1),
        builder().overlap(false),
        builder().max_seq_len(Some(256)).num_pages(Some(24)),
        builder().max_prefill_tokens(16).prefix_cache(false),
        builder().speculation(Speculation::Always).max_graph_batch(0),
    ];
    for (way, builder) in ways.into_iter().enumerate() {
        for (i, (one, other)) in expected.iter().zip(run(builder)).enumerate() {
            let ends = (&other.token_ids, other.finish_reason);
            assert_eq!((&one.token_ids, one.finish_reason), ends, "request {i}, way {way}");
        }
    }
}

#[test]
fn every_output_is_what_its_grammar_describes_and_the_same_whatever_runs_beside_it() {
    assert_held_to_their_grammars(|builder| builder);
}

#[test]
#[ignore = "needs a GPU"]
fn so_it_is_on_a_gpu() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        assert_held_to_their_grammars(|builder| builder.backend(BackendChoice::Cuda).kernels(kernels));
    }
}

#[test]
fn allowed_tokens_narrow_what_a_grammar_allows() {
    let folder = Scratch::with_text();
    let ids: Vec<u32> = {
        let llm = small(folder.path()).build().unwrap();
        ["a", "c", "e", "7"].into_iter().flat_map(|letter| llm.encode(letter).unwrap()).collect()
    };
    assert_eq!(ids.len(), 4, "each is a token");
    let allowing = |ids: &[u32]| TokenRules { allowed_token_ids: Some(ids.into()), ..TokenRules::default() };
    let held = |seed| {
        let sampling = SamplingParams { temperature: 2.0, seed, max_tokens: 20, ..SamplingParams::default() };
        let request = GenerateRequest::tokens([5, 6]).sampling(sampling);
        request.grammar(Grammar::Regex("[a-z]{3,9}".to_owned()))
    };
    let mut all = requests();
    all.extend((0..6).map(|seed| held(seed).rules(allowing(&ids))));
    all.push(held(7).rules(allowing(&ids[3..])));
    let run = |builder: LlmBuilder| builder.build().unwrap().generate(&all).unwrap();
    let expected = run(small(folder.path()).max_running(1));
    let [narrowed @ .., impossible] = &expected[requests().len()..] else { panic!("{expected:?}") };
    for completion in narrowed {
        let text = completion.text.as_deref().unwrap();
        // No end-of-sequence token is among them, so the text ends where nothing may follow.
        assert_eq!((text.len(), completion.finish_reason), (9, FinishReason::Stop), "{text:?}");
        assert!(text.chars().all(|letter| "ace".contains(letter)), "{text:?}");
    }
    assert!(narrowed.iter().any(|one| one.text != narrowed[0].text));
    assert_eq!(impossible.error, Some(RequestError::NoTokenLeft));
    let few_pages = small(folder.path()).max_seq_len(Some(256)).num_pages(Some(24));
    for builder in [small(folder.path()), few_pages.overlap(false), small(folder.path()).tensor_parallel(2)] {
        for (one, other) in expected.iter().zip(run(builder)) {
            assert_eq!((&one.token_ids, one.finish_reason), (&other.token_ids, other.finish_reason));
        }
    }
}

#[test]
fn a_grammar_that_can_not_be_used_is_its_requests_error_alone() {
    let mut llm = small(Scratch::with_text().path()).build().unwrap();
    let request = |grammar| GenerateRequest::tokens([1, 2]).sampling(greedy(20)).grammar(grammar);
    let unusable = [
        Grammar::Regex("(".to_owned()),
        Grammar::Regex("a".repeat(1 << 20)),
        Grammar::Lark("begin: \"a\"".to_owned()),
        Grammar::JsonSchema(json!({"type": "nonsense"})),
        Grammar::JsonSchema((0..300).fold(json!({}), |inner, _| json!({"type": "array", "items": inner}))),
        Grammar::Choice(Vec::new()),
    ];
    let mut all: Vec<_> = unusable.into_iter().map(request).collect();
    all.push(request(Grammar::Choice(vec!["so".to_owned()])));
    let mut completions = llm.generate(&all).unwrap();
    let last = completions.pop().unwrap();
    assert_eq!((last.text.as_deref(), last.finish_reason), (Some("so"), FinishReason::Stop));
    for completion in completions {
        assert_eq!(completion.finish_reason, FinishReason::Rejected);
        assert!(matches!(completion.error, Some(RequestError::Grammar(_))), "{:?}", completion.error);
    }
    let mut bare = common::builder("tiny-tied").build().unwrap();
    let error = bare.generate(&all[6..]).unwrap().remove(0).error;
    assert_eq!(error, Some(RequestError::NoTokenizer { what: "constrained output" }));
}

#[test]
fn lines_say_what_they_want_as_openai_and_vllm_do() {
    let defaults = Defaults { sampling: SamplingParams::default(), model: ModelName::new("m") };
    let parse = |fields: &str| {
        let native = format!(r#"{{"id": 1, "prompt": "a", {fields}}}"#);
        let batch =
            format!(r#"{{"custom_id": "1", "url": "/v1/completions", "body": {{"prompt": "a", {fields}}}}}"#);
        let [native, batch] = [native, batch].map(|line| {
            let parsed = lines::parse(line.as_bytes(), 1, &defaults);
            parsed.map(|line| line.request.grammar).map_err(|bad| bad.error.to_string())
        });
        assert_eq!(native, batch);
        native
    };
    let schema = json!({"type": "integer"});
    for (fields, grammar) in [
        (r#""response_format": {"type": "text"}"#, None),
        (r#""response_format": null, "structured_outputs": {}"#, None),
        (r#""response_format": {"type": "json_object"}"#, Some(Grammar::JsonObject)),
        (
            r#""response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {"type": "integer"}}}"#,
            Some(Grammar::JsonSchema(schema.clone())),
        ),
        (r#""structured_outputs": {"json": {"type": "integer"}}"#, Some(Grammar::JsonSchema(schema.clone()))),
        (r#""structured_outputs": {"json": "{\"type\": \"integer\"}"}"#, Some(Grammar::JsonSchema(schema))),
        (r#""structured_outputs": {"json_object": true}"#, Some(Grammar::JsonObject)),
        (r#""structured_outputs": {"regex": "a+"}"#, Some(Grammar::Regex("a+".to_owned()))),
        (r#""structured_outputs": {"choice": ["a"]}"#, Some(Grammar::Choice(vec!["a".to_owned()]))),
        (
            r#""structured_outputs": {"grammar": "start: \"a\""}"#,
            Some(Grammar::Lark("start: \"a\"".to_owned())),
        ),
    ] {
        assert_eq!(parse(fields), Ok(grammar.map(Arc::new)), "{fields}");
    }
    for (fields, named) in [
        (r#""response_format": {"type": "xml"}"#, "response_format"),
        (r#""response_format": {}"#, "response_format.type"),
        (r#""response_format": {"type": "json_schema"}"#, "response_format.json_schema"),
        (r#""response_format": {"type": "json_object", "schema": 1}"#, "schema"),
        (r#""response_format": {"type": "text", "type": "json_object"}"#, "type is given twice"),
        (r#""response_format": 7"#, "response_format"),
        (r#""structured_outputs": {"regex": "a", "choice": ["a"]}"#, "structured_outputs"),
        (r#""structured_outputs": {"regexp": "a"}"#, "regexp"),
        (r#""structured_outputs": {"json": "{"}"#, "structured_outputs.json"),
        (
            r#""structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}"#,
            "structured_outputs",
        ),
        (r#""guided_regex": "a""#, "structured_outputs"),
    ] {
        assert!(parse(fields).is_err_and(|error| error.contains(named)), "{fields}: {:?}", parse(fields));
    }
}

/// The fixtures' model, whose template tells it to write calls as Qwen3 does.
fn with_tools() -> Scratch {
    let folder = Scratch::with_text();
    let template = "{% for tool in tools %}{{ tool | tojson }} <tool_call>\n{% endfor %}\
                    {% for message in messages %}{{ message.content }}{% endfor %}";
    folder.write("chat_template.jinja", template);
    folder
}

/// Tools as requests give them, the second one with the schema that is asked for.
fn tools(parameters: &Value) -> Value {
    let count = json!({"type": "object", "properties": {"to": {"type": "integer"}}, "required": ["to"]});
    let tool = |name, parameters: &Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    json!([tool("count", &count), tool("paint", parameters)])
}

fn batch_line(fields: &Value) -> String {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 120});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    json!({"custom_id": "1", "url": "/v1/chat/completions", "body": body}).to_string()
}

#[test]
fn a_batch_line_that_asks_for_a_call_is_answered_with_one() {
    let paint = json!({"properties": {"in": {"enum": ["red", "grün"]}}, "required": ["in"], "additionalProperties": false});
    let named = json!({"type": "function", "function": {"name": "paint"}});
    let drawn =
        |seed: u64| json!({"tools": tools(&paint), "tool_choice": named, "temperature": 2.0, "seed": seed});
    let defaults = Defaults { sampling: SamplingParams::default(), model: ModelName::new("m") };
    let lines: Vec<_> =
        (0..6).map(|seed| lines::parse(batch_line(&drawn(seed)).as_bytes(), 1, &defaults).unwrap()).collect();
    let mut llm = small(with_tools().path()).build().unwrap();
    let requests: Vec<_> = lines.iter().map(|line| line.request.clone()).collect();
    let completions = llm.generate(&requests).unwrap();
    for (line, completion) in lines.iter().zip(&completions) {
        let origin = lines::Origin { line: 1, fingerprint: 7 };
        let mut out = Vec::new();
        let format = llm.handle().text().tool_format();
        lines::write_result(
            &mut out,
            &line.header,
            origin,
            std::slice::from_ref(completion),
            format,
            &|_| None,
        );
        let answer: Value = serde_json::from_slice(&out).unwrap();
        let choice = &answer["response"]["body"]["choices"][0];
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["content"]),
            (&json!("tool_calls"), &Value::Null)
        );
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!((calls.len(), &calls[0]["function"]["name"]), (1, &json!("paint")), "{answer}");
        let arguments = serde_json::from_str(calls[0]["function"]["arguments"].as_str().unwrap()).unwrap();
        assert!(jsonschema::is_valid(&paint, &arguments), "{arguments}");
    }
}

#[test]
fn what_a_request_says_of_calls_is_what_its_output_is_held_to() {
    let defaults = Defaults { sampling: SamplingParams::default(), model: ModelName::new("m") };
    let parse = |fields: &Value| lines::parse(batch_line(fields).as_bytes(), 1, &defaults);
    let any = json!({});
    let asked = |fields: Value| {
        let mut all = json!({"tools": tools(&any)});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let request = parse(&all).unwrap().request;
        let Prompt::Chat(chat) = request.prompt else { panic!("no conversation") };
        let held = request.grammar.map(|grammar| {
            let Grammar::Calls(calls) = &*grammar else { panic!("{grammar:?}") };
            let names: Vec<&str> = calls.functions.iter().map(|function| &*function.name).collect();
            (names.join(" "), calls.required, calls.parallel)
        });
        (chat.tools.is_some(), held)
    };
    let both = || "count paint".to_owned();
    let named = json!({"type": "function", "function": {"name": "paint"}});
    let mut strict = tools(&any);
    strict[1]["function"]["strict"] = true.into();
    for (fields, expected) in [
        (json!({}), (true, None)),
        (json!({"tool_choice": "auto", "parallel_tool_calls": true}), (true, None)),
        (json!({"tool_choice": "none"}), (false, None)),
        (json!({"tool_choice": "required"}), (true, Some((both(), true, true)))),
        (
            json!({"tool_choice": "required", "parallel_tool_calls": false}),
            (true, Some((both(), true, false))),
        ),
        (json!({"parallel_tool_calls": false}), (true, Some((both(), false, false)))),
        (json!({"tool_choice": named}), (true, Some(("paint".to_owned(), true, false)))),
        (json!({"tools": strict}), (true, Some((both(), false, true)))),
    ] {
        assert_eq!(asked(fields.clone()), expected, "{fields}");
    }
    let nameless = json!([{"type": "function", "function": {}}]);
    let other = json!({"type": "function", "function": {"name": "sing"}});
    for (fields, named) in [
        (json!({"tool_choice": "required"}), "the request has no tools"),
        (json!({"tool_choice": "sometimes", "tools": tools(&any)}), "tool_choice is \"sometimes\""),
        (json!({"tool_choice": other, "tools": tools(&any)}), "tool_choice is sing"),
        (json!({"tool_choice": "required", "tools": nameless}), "tools[0].function has no name"),
        (
            json!({"tool_choice": "required", "tools": tools(&json!({"type": "string"}))}),
            "tools[1].function.parameters",
        ),
        (json!({"tool_choice": "required", "tools": tools(&json!(7))}), "tools[1].function.parameters"),
        (
            json!({"tool_choice": "required", "tools": tools(&any), "response_format": {"type": "json_object"}}),
            "response_format is a format and tool_choice",
        ),
        (json!({"parallel_tool_calls": 1, "tools": tools(&any)}), "parallel_tool_calls is 1"),
    ] {
        let error = parse(&fields).unwrap_err().error.to_string();
        assert!(error.contains(named), "{fields}: {error}");
    }
}

#[test]
fn a_tool_that_can_not_be_held_to_its_schema_is_named() {
    let unusable = json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}});
    let calls = |format, parameters: &Value| {
        let good = Function { name: "good".to_owned(), parameters: json!({"type": "object"}) };
        let other = Function { name: "paint".to_owned(), parameters: parameters.clone() };
        let calls = ToolCalls { functions: vec![good, other], format, required: true, parallel: false };
        GenerateRequest::tokens([1, 2]).sampling(greedy(20)).grammar(Grammar::Calls(calls))
    };
    let mut llm = small(Scratch::with_text().path()).build().unwrap();
    let requests = [calls(Some(ToolFormat::Qwen3), &unusable), calls(None, &json!({"type": "object"}))];
    let errors: Vec<_> =
        llm.generate(&requests).unwrap().into_iter().map(|completion| completion.error.unwrap()).collect();
    assert!(errors[0].to_string().contains("the parameters of the tool \"paint\""), "{}", errors[0]);
    assert_eq!(errors[1], RequestError::NoToolFormat, "the template shows none");
}
