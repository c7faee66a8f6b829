//! A message's role and content as a template takes them.
//!
//! Requests follow OpenAI's forms: content is a text, a list of parts, or null beside tool calls, and a tool call's
//! arguments are JSON in a text. Templates differ in which of these they know. So each template is tried out once on
//! small conversations, and what it doesn't know is handed to it in the form that it does:
//!
//! | the template loses or refuses | it gets instead |
//! |---|---|
//! | a list of text parts | their texts, joined by newlines |
//! | a text | a list of one part |
//! | null beside tool calls | an empty text |
//! | the role `developer` | `system`, whose newer name that is in OpenAI's API |
//! | arguments as JSON in a text (prints them quoted twice, or fails) | the value that the text holds |
//!
//! What a template knows is passed on untouched, as transformers does.

use serde_json::{Value, json};

use crate::request::Message;

/// Types of parts that are no text, in the requests of the field's APIs.
const MEDIA: [&str; 11] = [
    "image",
    "image_url",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
    "input_video",
    "file",
    "input_file",
];

/// What a template can't take as requests give it.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    joins_parts: bool,
    wraps_texts: bool,
    empties_null: bool,
    renames_developer: bool,
    parses_arguments: bool,
}

impl Content {
    /// Tries a template out: `render` gives what it makes of a conversation, where it takes it.
    pub fn of_template(render: impl Fn(Vec<Message>) -> Option<String>) -> Self {
        let shows = |messages: Vec<Message>| {
            let rendered = render(messages).unwrap_or_default();
            // A list printed as such, in Python's form, shows its keys too.
            rendered.contains(WORD) && !rendered.contains("'type'")
        };
        let (text, parts) = (json!(WORD), json!([{"type": "text", "text": WORD}]));
        let user = |content: &Value| shows(vec![message(json!({"role": "user", "content": content}))]);
        let first = |role: &str, content: &Value| {
            let user = message(json!({"role": "user", "content": ""}));
            shows(vec![message(json!({"role": role, "content": content})), user])
        };
        let system = |content: &Value| first("system", content);
        let takes_text = user(&text);
        let takes_parts = user(&parts) && (system(&parts) || !system(&text));

        let called =
            |content: &Value, arguments: &Value| render(with_tool_call(content.clone(), arguments.clone()));
        let (null, empty) = (Value::Null, json!(""));
        let object = json!({WORD: 1});
        let json_text = json!(object.to_string());
        let takes =
            |content: &Value| [&object, &json_text].iter().any(|form| called(content, form).is_some());
        let empties_null = takes(&empty) && !takes(&null);
        let content = if empties_null { &empty } else { &null };
        let quoted_twice = format!("\\\"{WORD}");
        let as_text = called(content, &json_text).filter(|rendered| !rendered.contains(&quoted_twice));
        let as_object = called(content, &object).filter(|rendered| rendered.contains(WORD));
        Content {
            joins_parts: takes_text && !takes_parts,
            wraps_texts: takes_parts && !takes_text,
            empties_null,
            renames_developer: !first("developer", &text) && !first("developer", &parts),
            parses_arguments: as_text.is_none() && as_object.is_some(),
        }
    }

    /// The messages in the forms that the template takes.
    ///
    /// # Errors
    /// A part that is no text.
    pub fn fit(&self, messages: &[Message]) -> Result<Vec<Message>, String> {
        messages.iter().enumerate().map(|(at, message)| self.fit_one(at, message)).collect()
    }

    fn fit_one(&self, at: usize, message: &Message) -> Result<Message, String> {
        let mut fitted = message.clone();
        match message.fields().get("content") {
            Some(Value::Array(parts)) => {
                if let Some((place, kind)) = parts.iter().enumerate().find_map(media) {
                    return Err(format!(
                        "messages[{at}].content[{place}] is a part of type {kind:?}, and the model reads text alone; \
                         leave the part out"
                    ));
                }
                if self.joins_parts
                    && let Some(text) = joined(parts)
                {
                    fitted = fitted.with("content", text);
                }
            }
            Some(Value::String(text)) if self.wraps_texts => {
                fitted = fitted.with("content", json!([{"type": "text", "text": text}]));
            }
            Some(Value::Null) if self.empties_null => fitted = fitted.with("content", ""),
            _ => {}
        }
        if self.renames_developer && message.fields().get("role") == Some(&json!("developer")) {
            fitted = fitted.with("role", "system");
        }
        if self.parses_arguments
            && let Some(calls) = message.fields().get("tool_calls")
        {
            fitted = fitted.with("tool_calls", with_parsed_arguments(calls.clone()));
        }
        Ok(fitted)
    }
}

/// A word that no template holds.
const WORD: &str = "zxcontentxz";

fn message(fields: Value) -> Message {
    serde_json::from_value(fields).expect("the fields above have a role")
}

/// A conversation in which the assistant called a tool.
fn with_tool_call(content: Value, arguments: Value) -> Vec<Message> {
    let call = json!({
        "id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": arguments},
    });
    vec![
        message(json!({"role": "user", "content": "?"})),
        message(json!({"role": "assistant", "content": content, "tool_calls": [call]})),
        message(json!({"role": "tool", "tool_call_id": "call00001", "name": "look_up", "content": "1"})),
    ]
}

fn media((place, part): (usize, &Value)) -> Option<(usize, &str)> {
    let kind = part["type"].as_str()?;
    MEDIA.contains(&kind).then_some((place, kind))
}

/// The texts of parts that are texts all of them.
fn joined(parts: &[Value]) -> Option<String> {
    let text = |part: &Value| part.as_str().or(part["text"].as_str()).map(str::to_owned);
    Some(parts.iter().map(text).collect::<Option<Vec<_>>>()?.join("\n"))
}

/// Arguments that are JSON in a text become what it holds; others stay.
fn with_parsed_arguments(mut calls: Value) -> Value {
    for call in calls.as_array_mut().into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
        {
            *arguments = parsed;
        }
    }
    calls
}
