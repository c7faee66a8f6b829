//! Templates and tokenizers against what Hugging Face's own libraries make of them (scripts/text-reference).

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::Scratch;
use minisgl::{ChatPrompt, JsonObject, Message, Prompt, Text};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn reference<T: DeserializeOwned>(name: &str) -> T {
    let text = fs::read_to_string(format!("tests/fixtures/text-reference/{name}")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// What scripts/fetch-text-fixtures brought; where it did not, that is said, and the test is over.
fn fetched(name: &str) -> Option<PathBuf> {
    let path = Path::new("target/text").join(name);
    if !path.exists() {
        common::skipped(&format!("{} is not there; scripts/fetch-text-fixtures brings it", path.display()));
        return None;
    }
    Some(path)
}

/// The conversation of a case: `messages`, and `variables` of which some are fields of their own.
fn prompt(case: &Value) -> ChatPrompt {
    let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
    let mut kwargs: JsonObject = serde_json::from_value(case["variables"].clone()).unwrap();
    let mut list = |name: &str| kwargs.remove(name).and_then(|value| serde_json::from_value(value).unwrap());
    let (tools, documents) = (list("tools"), list("documents"));
    let mut flag = |name: &str| kwargs.remove(name).map(|flag| flag == true);
    let continue_final_message = flag("continue_final_message").unwrap_or(false);
    let add_generation_prompt = flag("add_generation_prompt").unwrap_or(!continue_final_message);
    ChatPrompt { messages, tools, documents, kwargs, add_generation_prompt, continue_final_message }
}

/// What our rendering gives; none where it refuses.
fn rendered(text: &Text, case: &Value) -> Result<String, String> {
    text.render(&prompt(case)).map_err(|error| error.to_string())
}

/// Asserts that all cases came out as expected, and shows those that did not.
fn assert_all(cases: &[Value], outcome: impl Fn(&Value) -> Result<String, String>) {
    let mut wrong = Vec::new();
    for case in cases {
        let outcome = outcome(case);
        if outcome.as_ref().ok().map(String::as_str) != case["expected"].as_str() {
            wrong.push(format!(
                "{}\n  expected {}\n  is       {outcome:?}",
                case["template"], case["expected"]
            ));
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn every_construct_of_templates_renders_as_in_transformers() {
    let cases: Vec<Value> = reference("jinja.json");
    assert!(cases.len() > 500);
    assert_all(&cases, |case| rendered(&with_template(case["template"].as_str().unwrap()), case));
}

/// The text side of a checkpoint that has a template and two special tokens.
fn with_template(source: &str) -> Text {
    let scratch = Scratch::new();
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null});
    scratch.write("tokenizer_config.json", config.to_string());
    scratch.write("chat_template.jinja", source);
    Text::open(scratch.path()).unwrap()
}

#[test]
fn templates_of_well_known_models_render_as_in_transformers() {
    let Some(folder) = fetched("templates") else { return };
    let Value::Object(mut reference) = reference::<Value>("templates.json") else { panic!("not an object") };
    let conversations = reference.remove("conversations").unwrap();
    let Some(Value::Array(cases)) = reference.remove("renderings") else { panic!("no list") };
    let mut texts: BTreeMap<String, Text> = BTreeMap::new();
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let source = || fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        texts.entry(name.to_owned()).or_insert_with(|| with_template(&source()));
    }
    assert!(texts.len() > 15 && cases.len() > 300);
    // Templates print the day; the expected values hold another one.
    let today = |format: &str| {
        with_template(&format!("{{{{ strftime_now('{format}') }}}}")).render(&ChatPrompt::new([])).unwrap()
    };
    let days =
        [("%Y-%m-%d", "2001-02-03"), ("%d %b %Y", "03 Feb 2001")].map(|(format, day)| (today(format), day));
    assert_all(&cases, |case| {
        let conversation = &conversations[case["conversation"].as_str().unwrap()];
        let text = rendered(&texts[case["template"].as_str().unwrap()], conversation)?;
        Ok(days.iter().fold(text, |text, (today, day)| text.replace(today, day)))
    });
}

/// Encodes each text, decodes each row of tokens, and compares both with what transformers gave.
fn tokens_are_those_of_transformers(name: &str) {
    let Some(folder) = fetched(name) else { return };
    let text = Text::open(&folder).unwrap();
    let cases: Vec<Value> = reference(&format!("{name}.json"));
    assert!(cases.iter().filter(|case| case["text"].is_string()).count() >= 300);
    let most = text.max_token_bytes().unwrap();
    for case in &cases {
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        if let Some(given) = case["text"].as_str() {
            assert_eq!(text.encode(Prompt::Text(given.to_owned())).unwrap(), ids, "{given:?}");
            assert!(given.len() <= ids.len() * most, "{given:?} has too few tokens for its length");
        }
        let decoded = case["decoded"].as_str().or(case["text"].as_str()).unwrap();
        assert_eq!(text.decode(&ids).unwrap(), decoded, "{ids:?}");
    }
}

#[test]
fn qwen3s_tokens_are_those_of_transformers() {
    tokens_are_those_of_transformers("qwen3");
}

#[test]
fn a_sentencepiece_models_tokens_are_those_of_transformers() {
    tokens_are_those_of_transformers("llama2");
}

#[test]
fn qwen3s_template_turns_thinking_off_and_its_tokens_are_single_ones() {
    let Some(folder) = fetched("qwen3") else { return };
    let text = Text::open(&folder).unwrap();
    assert_eq!((text.eos(), text.warnings()), (Some(151_645), &[][..]));
    let mut prompt = ChatPrompt::new([Message::new("user", "Hi")]);
    assert_eq!(text.render(&prompt).unwrap(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    prompt.kwargs.insert("enable_thinking".to_owned(), json!(false));
    let rendered = text.render(&prompt).unwrap();
    assert!(rendered.ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"), "{rendered}");
    let ids = text.encode(Prompt::Chat(prompt)).unwrap();
    assert_eq!(ids[..3], [151_644, 872, 198]);
    assert_eq!(ids[ids.len() - 4..], [151_667, 271, 151_668, 271]);
    assert_eq!(text.token_bytes(151_644).unwrap(), b"<|im_start|>");
    assert_eq!(text.decode(&ids).unwrap(), "user\nHi\nassistant\n<think>\n\n</think>\n\n");
}
