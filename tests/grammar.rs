//! Constrained output through the public API: what comes out is what was asked for, and the same whatever runs beside it.

mod common;

use common::{Scratch, greedy, small};
use minisgl::lines::{self, Defaults};
use minisgl::openai::ModelName;
use minisgl::{
    Completion, FinishReason, GenerateRequest, Grammar, LlmBuilder, RequestError, SamplingParams, Speculation,
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
    let is_right = match request.grammar.as_ref().unwrap() {
        Grammar::JsonObject => json().is_object(),
        Grammar::JsonSchema(schema) => jsonschema::is_valid(schema, &json()),
        Grammar::Regex(expression) => matches(expression),
        Grammar::Lark(_) => matches("(yes|no)(, [a-z]+)*"),
        Grammar::Choice(texts) => texts.iter().any(|one| one == text),
    };
    assert!(is_right, "{text:?} of {:?}", request.grammar);
}

fn run(builder: LlmBuilder) -> Vec<Completion> {
    let mut llm = builder.build().unwrap();
    let completions = llm.generate(&requests()).unwrap();
    llm.check();
    completions
}

#[test]
fn every_output_is_what_its_grammar_describes_and_the_same_whatever_runs_beside_it() {
    let folder = Scratch::with_text();
    let builder = || small(folder.path());
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
        assert_eq!(parse(fields), Ok(grammar), "{fields}");
    }
    for (fields, named) in [
        (r#""response_format": {"type": "xml"}"#, "response_format"),
        (r#""response_format": {}"#, "response_format.type"),
        (r#""response_format": {"type": "json_schema"}"#, "response_format.json_schema"),
        (r#""response_format": {"type": "json_object", "schema": 1}"#, "schema"),
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
