//! Outputs drawn at random from what masks allow: each is what its grammar describes, whatever the grammar and the vocabulary.

use std::cell::Cell;
use std::sync::{Arc, LazyLock};

use minisgl_core::constraint::{Constraint, ConstraintState, mask_words};
use minisgl_grammar::{CallOf, Calls, GrammarError, Grammars, Thought, TokenText, Vocabulary};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

/// Each byte is a token, then some pieces of texts, a special token and the end of a sequence.
const PIECES: [&str; 14] =
    ["{\"", "\":", "\",", "true", "null", "ab", "the ", " the", "\": \"", "\"}", "00", "é", "<tool>", "]}"];
const SPECIAL: u32 = 256 + PIECES.len() as u32;
const EOS: u32 = SPECIAL + 1;
const VOCAB: u32 = EOS + 8;

fn token(id: u32) -> Vec<u8> {
    match id {
        0..256 => vec![id as u8],
        SPECIAL.. => Vec::new(),
        id => PIECES[id as usize - 256].as_bytes().to_vec(),
    }
}

fn vocabulary() -> Vocabulary {
    let tokens: Vec<Vec<u8>> = (0..VOCAB).map(token).collect();
    Vocabulary::new(VOCAB, &[EOS], |id| match id {
        SPECIAL => TokenText::Special(b"<|call|>"),
        EOS => TokenText::Special(b"<|end|>"),
        _ if id > EOS => TokenText::Nothing,
        id => TokenText::Bytes(&tokens[id as usize]),
    })
}

fn grammars() -> &'static Grammars {
    static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(&vocabulary(), 2).unwrap());
    &GRAMMARS
}

/// What came of drawing tokens.
struct Drawn {
    bytes: Vec<u8>,
    ids: Vec<u32>,
    /// It came to an end.
    is_whole: bool,
}

impl Drawn {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.bytes).unwrap()
    }
}

/// Draws what the mask allows: at random at first, later what comes to an end.
fn draw(constraint: &dyn Constraint, mut random: impl FnMut(usize) -> usize) -> Drawn {
    let mut drawn = Drawn { bytes: Vec::new(), ids: Vec::new(), is_whole: false };
    for step in 0..600 {
        constraint.wait();
        match constraint.state() {
            ConstraintState::Ready => {}
            ConstraintState::Complete => {
                drawn.is_whole = true;
                break;
            }
            state => panic!("{state:?} after {:?}", String::from_utf8_lossy(&drawn.bytes)),
        }
        let mut mask = vec![0; mask_words(VOCAB)];
        constraint.write_mask(&mut mask);
        let allowed: Vec<u32> =
            (0..32 * mask.len() as u32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        assert!(!allowed.is_empty() && allowed.iter().all(|id| *id <= EOS), "{allowed:?}");
        let ending = [EOS, u32::from(b'"'), u32::from(b'}'), u32::from(b']')];
        let ending = ending.into_iter().find(|id| step >= 40 && allowed.contains(id));
        let id = ending.unwrap_or(allowed[random(allowed.len())]);
        if id == EOS {
            drawn.is_whole = true;
            break;
        }
        drawn.bytes.extend(token(id));
        drawn.ids.push(id);
        constraint.accept(id);
    }
    drawn
}

fn seeded(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    }
}

fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({"type": "integer"})),
        (-50..50i64, 0..100i64).prop_map(|(least, more)| {
            json!({"type": "integer", "minimum": least, "maximum": least + more})
        }),
        (-50..50i64).prop_map(|least| json!({"type": "number", "minimum": least, "maximum": least + 9})),
        Just(json!({"type": "boolean"})),
        Just(json!({"type": "null"})),
        Just(json!({"type": "string"})),
        (0..4u32, 0..9u32).prop_map(|(least, more)| {
            json!({"type": "string", "minLength": least, "maxLength": least + more})
        }),
        Just(json!({"type": "string", "pattern": "^[a-c]{2,5}x?$"})),
        Just(json!({"enum": ["red", 7, null, "grün"]})),
        Just(json!({"const": {"a": [1, "b"]}})),
        Just(json!({"type": "string", "format": "date"})),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            (inner.clone(), 0..3u32, 0..3u32).prop_map(|(items, least, more)| {
                json!({"type": "array", "items": items, "minItems": least, "maxItems": least + more})
            }),
            (prop::collection::vec(inner.clone(), 1..4), any::<u8>()).prop_map(|(fields, required)| {
                let names = || (0..fields.len()).map(|i| format!("f{i}"));
                let properties: serde_json::Map<_, _> = names().zip(fields.clone()).collect();
                let required: Vec<_> = names().enumerate().filter(|(i, _)| required >> i & 1 == 1).collect();
                let required: Vec<_> = required.into_iter().map(|(_, name)| name).collect();
                json!({"type": "object", "properties": properties, "required": required,
                       "additionalProperties": false})
            }),
            prop::collection::vec(inner, 1..3).prop_map(|any| json!({"anyOf": any})),
        ]
    })
}

fn regex() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        "[a-e]{1,3}",
        Just("\\d".to_owned()),
        Just("[^a-z]".to_owned()),
        Just("\\w+".to_owned()),
        Just("é?".to_owned()),
        Just("\\.".to_owned()),
        Just("/".to_owned()),
    ];
    leaf.prop_recursive(4, 16, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(|parts| parts.concat()),
            prop::collection::vec(inner.clone(), 1..4).prop_map(|parts| format!("(?:{})", parts.join("|"))),
            (inner.clone(), 0..3u32, 0..3u32)
                .prop_map(|(part, least, more)| format!("(?:{part}){{{least},{}}}", least + more)),
            inner.prop_map(|part| format!("(?:{part})*")),
        ]
    })
}

fn cases() -> ProptestConfig {
    ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() }
}

/// How calls are written.
struct Style {
    before: &'static str,
    behind: &'static str,
    between: &'static str,
    opening: Option<&'static str>,
}

const STYLES: [Style; 2] = [
    Style { before: "<tool>\n{\"f", behind: "}\n</tool>", between: "\n", opening: Some("<tool>") },
    Style { before: "{\"f", behind: "}", between: "; ", opening: None },
];

/// What calls of the second style may have before them.
const TAG: &str = "<|tag|>";
/// And what a thought before it stands between.
const THOUGHT_TAGS: (&str, &str) = ("<t>", "</t>");

impl Style {
    /// In front of the arguments of function `i`.
    fn before(&self, i: usize) -> String {
        format!("{}{i}\": ", self.before)
    }

    fn calls<'a>(
        &'a self,
        schemas: &'a [Value],
        required: bool,
        parallel: bool,
        thought: Option<Thought<'a>>,
    ) -> Calls<'a> {
        let of = |(i, arguments)| CallOf { name: "f", before: self.before(i), arguments };
        let Style { behind, between, opening, .. } = *self;
        let functions = schemas.iter().enumerate().map(of).collect();
        Calls {
            functions,
            behind,
            between,
            opening,
            tag: TAG,
            thought_tags: THOUGHT_TAGS,
            required,
            parallel,
            thought,
        }
    }

    /// Checks that a whole output is what it may be; gives how many calls are in it.
    fn check(&self, text: &str, schemas: &[Value], calls: &Calls<'_>) -> usize {
        let answer = match calls.thought {
            Some(Thought { begin: None, end }) => {
                text.split_once(end).unwrap_or_else(|| panic!("no thought in {text:?}")).1
            }
            Some(Thought { begin: Some(begin), end }) if calls.required && text.starts_with(begin) => {
                text.split_once(end).unwrap().1
            }
            _ => text,
        };
        let mut rest = if answer.len() < text.len() { answer.trim_start_matches('\n') } else { answer };
        let mut found = 0;
        loop {
            let at = match (calls.required, self.opening) {
                (false, Some(opening)) => rest.find(opening),
                (_, None) if !calls.required && !rest.starts_with('{') => None,
                _ => (!rest.is_empty()).then_some(0),
            };
            let Some(at) = at else { break };
            let call = &rest[at..];
            let function = (0..schemas.len()).find(|i| call.starts_with(&self.before(*i)));
            let function = function.unwrap_or_else(|| panic!("no call: {call:?} in {text:?}"));
            let json = &call[self.before(function).len()..];
            let mut values = serde_json::Deserializer::from_str(json).into_iter::<Value>();
            let arguments = values.next().unwrap().unwrap();
            assert!(
                jsonschema::is_valid(&schemas[function], &arguments),
                "{arguments} of {}",
                schemas[function]
            );
            rest = json[values.byte_offset()..].strip_prefix(self.behind).unwrap();
            if calls.required || self.opening.is_none() {
                rest = rest.strip_prefix(self.between).unwrap_or(rest);
            }
            found += 1;
        }
        assert!(found >= usize::from(calls.required), "no call in {text:?}");
        assert!(calls.parallel || found <= 1, "{found} calls in {text:?}");
        found
    }
}

#[test]
fn many_functions_are_too_long_together_and_one_that_is_too_long_is_told_so() {
    let object = json!({"type": "object"});
    let refused = |schemas: &[Value]| grammars().calls(&STYLES[0].calls(schemas, true, true, None)).map(drop);
    assert!(matches!(refused(&vec![object.clone(); 5000]), Err(GrammarError::TooLong { .. })));
    let long = json!({"type": "object", "description": "x".repeat(70_000)});
    let named = refused(&[object, long]);
    let Err(GrammarError::Function { cause, .. }) = named else { panic!("{named:?}") };
    assert_eq!(fate(Err(*cause)), Fate::TooLong);
}

#[test]
fn texts_and_calls_in_them_are_told_apart_as_they_come() {
    let schemas = [
        json!({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false}),
    ];
    let follows = |style: &Style, required: bool, parallel: bool, text: &str| {
        let constraint = grammars().calls(&style.calls(&schemas, required, parallel, None)).unwrap();
        for byte in text.bytes() {
            constraint.wait();
            let mut mask = vec![0; mask_words(VOCAB)];
            if constraint.state() != ConstraintState::Ready {
                return false;
            }
            constraint.write_mask(&mut mask);
            if mask[byte as usize / 32] >> (byte % 32) & 1 == 0 {
                return false;
            }
            constraint.accept(u32::from(byte));
        }
        constraint.wait();
        let mut mask = vec![0; mask_words(VOCAB)];
        match constraint.state() {
            ConstraintState::Complete => true,
            ConstraintState::Ready => {
                constraint.write_mask(&mut mask);
                mask[EOS as usize / 32] >> (EOS % 32) & 1 == 1
            }
            state => panic!("{state:?}"),
        }
    };
    let [tags, bare] = &STYLES;
    let call = "<tool>\n{\"f0\": {\"a\": 1}}\n</tool>";
    let two = format!("{call}\n{call}");
    for (style, text, required, parallel, is) in [
        (tags, call, true, false, true),
        (tags, two.as_str(), true, true, true),
        (tags, two.as_str(), true, false, false),
        (tags, "Let me see.", true, true, false),
        (bare, "\u{a0}{}", false, true, false),
        (tags, "Let me see. <to", false, true, true),
        (tags, &format!("Let me see. {call}"), false, false, true),
        (tags, &format!("Let me see. {two} So."), false, true, true),
        (tags, &format!("Let me see. {two}"), false, false, false),
        (tags, "Let me see. <tool>{}", false, true, false),
        (tags, "<tool>\n{\"f1\": {", false, true, false),
        (bare, "{\"f0\": {\"a\": 1}}; {\"f0\": {\"a\": 1}}", true, true, true),
        (bare, "{\"f0\": {\"a\": 1}}; ", true, false, false),
        (bare, "Hello {", false, true, true),
        (bare, "{\"f0\": {\"a\": 1}}", false, true, true),
        (bare, "{}", false, true, false),
        // Read as calls, whose arguments nobody held to their schema.
        (bare, "<|tag|>{}", false, true, false),
        (bare, "<|tag|> \n{\"f0\": {\"a\": 2}}", false, true, false),
        (bare, "<t></t>{\"f0\": {\"a\": 2}}", false, true, false),
        (bare, "<t>Hm\n</t>\n{}", false, true, false),
        (bare, "<t>Hm</t> <|tag|> {}", false, true, false),
        (bare, "<t>Hm</t> So {}", false, true, true),
        (bare, "<t>{}", false, true, true),
        (bare, "<|tag|>", false, true, true),
        (bare, "<|tag|> for {}", false, true, true),
        (bare, "<|ta {}", false, true, true),
        (bare, "Hello", true, true, false),
    ] {
        assert_eq!(
            follows(style, required, parallel, text),
            is,
            "{text:?}, required: {required}, parallel: {parallel}"
        );
    }
}

#[test]
fn an_output_of_a_schema_is_valid() {
    let whole = Cell::new(0);
    let check = |(schema, seed): (Value, u64)| {
        let constraint = grammars().json_schema(&schema).unwrap();
        let drawn = draw(&*constraint, seeded(seed));
        if drawn.is_whole {
            whole.set(whole.get() + 1);
            let value: Value = serde_json::from_str(drawn.text()).unwrap();
            prop_assert!(jsonschema::is_valid(&schema, &value), "{} of {schema}", drawn.text());
        }
        Ok(())
    };
    TestRunner::new(cases()).run(&(schema(), any::<u64>()), check).unwrap();
    assert!(whole.get() >= 250, "{} of 300 outputs came to an end", whole.get());
}

#[test]
fn every_call_is_of_a_function_and_its_arguments_are_valid() {
    const WITHIN: Thought<'_> = Thought { begin: None, end: "</t>" };
    let thoughts = [None, Some(WITHIN), Some(Thought { begin: Some("<t>"), ..WITHIN })];
    let found = Cell::new(0);
    let check = |(schemas, style, thought, required, parallel, seed): (
        Vec<Value>,
        usize,
        usize,
        bool,
        bool,
        u64,
    )| {
        let of_object = |schema| json!({"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": false});
        let schemas: Vec<Value> = schemas.into_iter().map(of_object).collect();
        let calls = STYLES[style].calls(&schemas, required, parallel, thoughts[thought]);
        let drawn = draw(&*grammars().calls(&calls).unwrap(), seeded(seed));
        if drawn.is_whole {
            found.set(found.get() + STYLES[style].check(drawn.text(), &schemas, &calls));
        }
        Ok(())
    };
    let schemas = prop::collection::vec(schema(), 1..4);
    let asked = (schemas, 0..2usize, 0..3usize, any::<bool>(), any::<bool>(), any::<u64>());
    TestRunner::new(cases()).run(&asked, check).unwrap();
    // Drawn anew each time: 97 to 119 in nine runs.
    assert!(found.get() >= 50, "{} calls of 300 outputs", found.get());
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn an_output_of_a_regular_expression_matches_it(expression in regex(), seed: u64) {
        let whole = regex::Regex::new(&format!("^(?:{expression})$")).unwrap();
        match grammars().regex(&expression) {
            Err(GrammarError::Unusable { .. }) => prop_assert!(whole.is_match("")),
            Err(error) => panic!("{error}"),
            Ok(constraint) => {
                let drawn = draw(&*constraint, seeded(seed));
                prop_assert!(!drawn.is_whole || whole.is_match(drawn.text()), "{:?} of {expression}", drawn.text());
            }
        }
    }

    #[test]
    fn an_output_of_a_choice_is_one_of_its_texts(texts in prop::collection::vec("\\PC{1,6}", 1..6), seed: u64) {
        let drawn = draw(&*grammars().choice(&texts).unwrap(), seeded(seed));
        prop_assert!(drawn.is_whole && texts.iter().any(|text| text == drawn.text()), "{:?}", drawn.text());
    }
}

#[test]
fn requests_of_one_grammar_go_their_own_ways() {
    let grammars = grammars();
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    let constraints: Vec<Arc<dyn Constraint>> =
        (0..6).map(|_| grammars.json_schema(&schema).unwrap()).collect();
    let alone = |seed| draw(&*grammars.json_schema(&schema).unwrap(), seeded(seed)).ids;
    std::thread::scope(|scope| {
        for (seed, constraint) in (0..).zip(&constraints) {
            scope.spawn(move || assert_eq!(draw(&**constraint, seeded(seed)).ids, alone(seed)));
        }
    });
}

#[test]
fn a_lark_grammar_names_special_tokens_and_holds_json() {
    let grammar = r#"start: <|call|> "f" %json {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false} <|call|>"#;
    let constraint = grammars().lark(grammar).unwrap();
    let drawn = draw(&*constraint, seeded(3));
    assert_eq!((drawn.ids.first(), drawn.ids.last()), (Some(&SPECIAL), Some(&SPECIAL)));
    let text = drawn.text();
    assert_eq!(serde_json::from_str::<Value>(text.strip_prefix('f').unwrap()).unwrap(), json!({"a": 1}));
}

#[test]
fn a_space_that_the_tokenizer_drops_is_not_drawn_first() {
    let mut vocabulary = vocabulary();
    vocabulary.strips_first_space = true;
    let grammars = Grammars::new(&vocabulary, 1).unwrap();
    for seed in 0..20 {
        let drawn = draw(&*grammars.regex(" ?the cat").unwrap(), seeded(seed));
        assert_eq!((drawn.text(), drawn.is_whole), ("the cat", true));
    }
    assert!(matches!(grammars.regex(" the"), Err(GrammarError::Unusable { .. })));
}

#[test]
fn a_grammar_that_allows_no_text_is_told_so() {
    let grammars = grammars();
    for result in [grammars.json_schema(&json!({"$ref": "#"})), grammars.lark("start: start")] {
        let error = result.map(drop).unwrap_err().to_string();
        assert!(error.ends_with("can't be used: no text is allowed by it"), "{error}");
    }
}

/// What comes of a grammar that means harm.
#[derive(Debug, PartialEq, Clone, Copy)]
enum Fate {
    TooLong,
    TooDeep,
    Unusable,
    /// It is taken, and its masks may be too much work.
    Taken,
}

fn fate(result: Result<Arc<dyn Constraint>, GrammarError>) -> Fate {
    match result {
        Ok(constraint) => {
            follow(&*constraint);
            Fate::Taken
        }
        Err(GrammarError::TooLong { .. }) => Fate::TooLong,
        Err(GrammarError::TooDeep { .. }) => Fate::TooDeep,
        Err(GrammarError::Unusable { .. }) => Fate::Unusable,
        Err(error) => panic!("{error}"),
    }
}

fn beginning(text: &str) -> String {
    text.chars().take(60).collect()
}

fn nested(open: &str, close: &str, depth: usize) -> String {
    open.repeat(depth) + "a" + &close.repeat(depth)
}

#[test]
fn a_hostile_expression_is_an_error_and_the_next_one_works() {
    let grammars = grammars();
    let alternatives: Vec<_> = (0..400).map(|i| format!("(?:.*{i}.*)")).collect();
    for (expression, expected) in [
        ("a".repeat(1 << 20), Fate::TooLong),
        ("(a|b)".repeat(200_000), Fate::TooLong),
        (nested("(", ")", 30_000), Fate::TooDeep),
        (nested("(", ")*", 99), Fate::Taken),
        ("(".repeat(99), Fate::Unusable),
        ("(?:(?:(?:(?:a{1,100}){1,100}){1,100}){1,100}){1,100}".to_owned(), Fate::Taken),
        ("a{1000000000}".to_owned(), Fate::Taken),
        ("(a|aa)*b(a|b){500}(a|b)*c".to_owned(), Fate::Taken),
        (alternatives.join("|"), Fate::Taken),
        ("[".to_owned(), Fate::Unusable),
        ("a**".to_owned(), Fate::Taken),
        ("\\p{Nothing}".to_owned(), Fate::Unusable),
        (String::new(), Fate::Taken),
        ("(?=a)b".to_owned(), Fate::Unusable),
        ("\\1".to_owned(), Fate::Unusable),
        ("\u{0}\u{7f}".to_owned(), Fate::Taken),
    ] {
        assert_eq!(fate(grammars.regex(&expression)), expected, "{}", beginning(&expression));
    }
    assert_eq!(draw(&*grammars.regex("so").unwrap(), seeded(1)).text(), "so");
}

#[test]
fn a_hostile_schema_is_an_error_and_the_next_one_works() {
    let grammars = grammars();
    let deep = (0..200).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}));
    let wide: serde_json::Map<_, _> =
        (0..3000).map(|i| (format!("field{i}"), json!({"type": "string"}))).collect();
    let all_of: Vec<_> = (0..60)
        .map(|i| {
            let number = json!({"type": "integer", "multipleOf": i + 2});
            json!({"anyOf": [{"type": "string", "minLength": i}, number]})
        })
        .collect();
    let chain: serde_json::Map<_, _> = (0..2000)
        .map(|i| (format!("d{i}"), json!({"allOf": [{"$ref": format!("#/$defs/d{}", i + 1)}]})))
        .collect();
    let circle = json!({"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}});
    let lists = json!({"type": "array", "maxItems": 1_000_000});
    for (schema, expected) in [
        (deep, Fate::TooDeep),
        (json!({"type": "object", "properties": wide}), Fate::TooLong),
        (json!({"allOf": all_of}), Fate::Unusable),
        (json!({"$ref": "#/$defs/d0", "$defs": chain}), Fate::TooLong),
        (json!({"$ref": "#"}), Fate::Unusable),
        (json!({"$ref": "http://example.com/schema"}), Fate::Unusable),
        (json!({"$defs": circle, "$ref": "#/$defs/a"}), Fate::Unusable),
        (json!({"type": "array", "minItems": 100_000_000, "items": {"type": "integer"}}), Fate::Taken),
        (json!({"type": "array", "maxItems": 1_000_000, "items": lists}), Fate::Taken),
        (json!({"type": "string", "maxLength": 1_000_000_000}), Fate::Taken),
        (json!({"type": "string", "pattern": "(a{1,1000}){1,1000}"}), Fate::Taken),
        (json!({"type": "integer", "multipleOf": 982_451_653, "minimum": 1}), Fate::Unusable),
        (json!({"type": "nonsense"}), Fate::Unusable),
        (json!({"enum": []}), Fate::Unusable),
        (json!({"not": {}}), Fate::Unusable),
        (json!(7), Fate::Unusable),
        (json!(false), Fate::Unusable),
        (json!([]), Fate::Unusable),
    ] {
        assert_eq!(fate(grammars.json_schema(&schema)), expected, "{}", beginning(&schema.to_string()));
    }
    assert_eq!(draw(&*grammars.regex("so").unwrap(), seeded(1)).text(), "so");
}

#[test]
fn a_hostile_grammar_is_an_error_and_the_next_one_works() {
    let grammars = grammars();
    for (grammar, expected) in [
        ("start: start start | \"a\"".to_owned(), Fate::Taken),
        ("start: a\na: b\nb: a".to_owned(), Fate::Unusable),
        ("start: ".to_owned() + &nested("((", "))", 10_000), Fate::TooDeep),
        ("start: \"a\" ".to_owned() + &"\"b\"? ".repeat(5000), Fate::Taken),
        ("start: /(/".to_owned(), Fate::Unusable),
        ("stop: \"a\"".to_owned(), Fate::Unusable),
        ("start: \"\"".to_owned(), Fate::Taken),
        (String::new(), Fate::Unusable),
        ("start: @other".to_owned(), Fate::Unusable),
        ("start: %json {".to_owned(), Fate::Unusable),
        ("start: x{1,1000000}\nx: \"a\"".to_owned(), Fate::Taken),
    ] {
        assert_eq!(fate(grammars.lark(&grammar)), expected, "{}", beginning(&grammar));
    }
    let many: Vec<String> = (0..20_000).map(|i| format!("choice {i}")).collect();
    for choice in [vec![], vec![String::new()], many] {
        assert!(grammars.choice(&choice).is_err());
    }
    assert_eq!(draw(&*grammars.regex("so").unwrap(), seeded(1)).text(), "so");
}

/// Draws some tokens; a mask that takes too much work fails the constraint, and nothing else.
fn follow(constraint: &dyn Constraint) {
    let mut random = seeded(5);
    for _ in 0..8 {
        constraint.wait();
        if constraint.state() != ConstraintState::Ready {
            return;
        }
        let mut mask = vec![0; mask_words(VOCAB)];
        constraint.write_mask(&mut mask);
        let allowed: Vec<u32> = (0..EOS).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        if allowed.is_empty() {
            return;
        }
        constraint.accept(allowed[random(allowed.len())]);
    }
}
