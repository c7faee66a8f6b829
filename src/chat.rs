//! The checkpoint's chat template: a Jinja program that turns a conversation into a prompt.
//!
//! Templates are written for Python's Jinja2 and call methods of Python's strings and dictionaries; minijinja has no
//! methods of its own, so those that templates use are defined here, as Python defines them.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind, from_args};
use minijinja::{Environment, ErrorKind, State, context};
use serde::Serialize;

use crate::error::Error;
use crate::request::{ChatPrompt, Message, RequestError};

const NAME: &str = "chat";

/// A compiled template and the special tokens that it may mention.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`; `None` where there is neither.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that does not compile.
    pub fn open(folder: &Path) -> Result<Option<Self>, Error> {
        let config_path = folder.join("tokenizer_config.json");
        let template_path = folder.join("chat_template.jinja");
        let mut config = serde_json::Value::Null;
        if config_path.exists() {
            let text = read(&config_path)?;
            config = serde_json::from_str(&text).map_err(|error| unusable(&config_path, error))?;
        }
        let (source, path) = match template_path.exists() {
            true => (read(&template_path)?, template_path),
            false => match template_in(&config) {
                Some(source) => (source.to_owned(), config_path),
                None => return Ok(None),
            },
        };
        let environment = compile(source).map_err(|error| unusable(&path, error))?;
        let token = |name: &str| special_token(&config[name]).to_owned();
        Ok(Some(ChatTemplate { environment, bos_token: token("bos_token"), eos_token: token("eos_token") }))
    }

    /// The prompt that a conversation becomes.
    ///
    /// # Errors
    /// What the template itself raises, or a construct that it trips over; a final message that can't be gone on with.
    pub fn render(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        if !prompt.continue_final_message {
            return self.render_messages(prompt, &prompt.messages);
        }
        let refused = |reason: &str| RequestError::ChatTemplate(reason.to_owned());
        if prompt.add_generation_prompt {
            return Err(refused("continue_final_message needs add_generation_prompt to be false"));
        }
        let (messages, continued) = marked(&prompt.messages).ok_or_else(|| {
            refused("continue_final_message is set, but the final message has no text to go on with")
        })?;
        let rendered = self.render_messages(prompt, &messages)?;
        cut_at_mark(rendered, &continued).ok_or_else(|| {
            refused(
                "continue_final_message is set, but the template does not print the final message as it is",
            )
        })
    }

    fn render_messages(&self, prompt: &ChatPrompt, messages: &[Message]) -> Result<String, RequestError> {
        let (bos_token, eos_token) = (&self.bos_token, &self.eos_token);
        let ChatPrompt { tools, documents, add_generation_prompt, .. } = prompt;
        let named = context! { messages => Serde(messages), tools => Serde(tools), documents => Serde(documents),
        bos_token, eos_token, add_generation_prompt };
        let values = context! { ..named, ..Value::from(Serde(&prompt.kwargs)) };
        let refused = |error: minijinja::Error| {
            RequestError::ChatTemplate(error.detail().map_or_else(|| error.to_string(), str::to_owned))
        };
        self.environment.get_template(NAME).and_then(|template| template.render(values)).map_err(refused)
    }
}

/// What marks the end of the final message's content while it is rendered. The space shows whether the template strips.
const MARK: &str = "END_OF_FINAL_MESSAGE ";

/// The messages with the mark behind the final one's last text, and that text.
fn marked(messages: &[Message]) -> Option<(Vec<Message>, String)> {
    let (last, before) = messages.split_last()?;
    let mut content = last.fields().get("content")?.clone();
    let text = match &mut content {
        serde_json::Value::String(text) => text,
        serde_json::Value::Array(parts) => parts.iter_mut().rev().find_map(|part| {
            let serde_json::Value::String(text) = part.get_mut("text")? else { return None };
            Some(text)
        })?,
        _ => return None,
    };
    let continued = text.clone();
    text.push_str(MARK);
    let messages = before.iter().cloned().chain([last.clone().with("content", content)]).collect();
    Some((messages, continued))
}

/// What was rendered up to the mark; white space at the end of the message is gone if the template strips it.
fn cut_at_mark(mut rendered: String, continued: &str) -> Option<String> {
    let at = rendered.rfind(MARK.trim_end()).filter(|_| rendered.contains(continued.trim()))?;
    let as_given = rendered[at..].starts_with(MARK);
    rendered.truncate(at);
    if !as_given {
        rendered.truncate(rendered.trim_end().len());
    }
    Some(rendered)
}

/// The template in a tokenizer_config.json: a string, or a list of named ones of which `default` counts.
fn template_in(config: &serde_json::Value) -> Option<&str> {
    let template = &config["chat_template"];
    let named = template.as_array().and_then(|list| list.iter().find(|entry| entry["name"] == "default"));
    template.as_str().or_else(|| named?["template"].as_str())
}

/// A special token: a string, or an object that describes it.
fn special_token(value: &serde_json::Value) -> &str {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default()
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|error| unusable(path, error))
}

fn unusable(path: &Path, error: impl ToString) -> Error {
    Error::TokenizerFile { path: path.to_owned(), reason: error.to_string() }
}

fn compile(source: String) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(python_method);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", to_json);
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it: a space after each comma and colon, nothing
/// escaped for HTML.
fn to_json(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, OneLine)),
        Some(width) => {
            let indent = " ".repeat(width);
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty))
        }
    };
    written.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Python's separators.
struct OneLine;

impl serde_json::ser::Formatter for OneLine {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// Methods of Python's `str` and `dict`.
fn python_method(
    _: &mut State,
    this: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    match (this.as_str(), this.kind()) {
        (Some(text), _) => string_method(text, method, args),
        (None, ValueKind::Map) => map_method(this, method, args),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    Ok(match method {
        "startswith" => affix(args, |affix| text.starts_with(affix))?,
        "endswith" => affix(args, |affix| text.ends_with(affix))?,
        "strip" => {
            let set = set_of(args)?;
            Value::from(text.trim_matches(&set))
        }
        "lstrip" => {
            let set = set_of(args)?;
            Value::from(text.trim_start_matches(&set))
        }
        "rstrip" => {
            let set = set_of(args)?;
            Value::from(text.trim_end_matches(&set))
        }
        "split" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            split(text, separator, most)?
        }
        "replace" => {
            let (from, to): (&str, &str) = from_args(args)?;
            Value::from(text.replace(from, to))
        }
        "find" => {
            let (needle,): (&str,) = from_args(args)?;
            let characters = |at: usize| text[..at].chars().count() as i64;
            Value::from(text.find(needle).map_or(-1, characters))
        }
        "count" => {
            let (needle,): (&str,) = from_args(args)?;
            Value::from(text.matches(needle).count())
        }
        "upper" => no_arguments(args, text.to_uppercase())?,
        "lower" => no_arguments(args, text.to_lowercase())?,
        "splitlines" => no_arguments(args, text.lines().map(Value::from).collect::<Vec<_>>())?,
        _ => return Err(ErrorKind::UnknownMethod.into()),
    })
}

fn map_method(map: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    if method == "get" {
        let (key, default): (Value, Option<Value>) = from_args(args)?;
        let value = map.get_item(&key)?;
        return Ok(if value.is_undefined() { default.unwrap_or(Value::from(())) } else { value });
    }
    let keys: Vec<Value> = map.try_iter()?.collect();
    let value = |key: &Value| map.get_item(key);
    match method {
        "keys" => no_arguments(args, keys),
        "values" => no_arguments(args, keys.iter().map(value).collect::<Result<Vec<_>, _>>()?),
        "items" => {
            let pair = |key: &Value| Ok(Value::from(vec![key.clone(), value(key)?]));
            no_arguments(args, keys.iter().map(pair).collect::<Result<Vec<_>, minijinja::Error>>()?)
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn no_arguments(args: &[Value], result: impl Into<Value>) -> Result<Value, minijinja::Error> {
    let () = from_args(args)?;
    Ok(result.into())
}

/// `startswith` and `endswith` take one text, or a tuple of which any may match.
fn affix(args: &[Value], matches: impl Fn(&str) -> bool) -> Result<Value, minijinja::Error> {
    let (affix,): (Value,) = from_args(args)?;
    let found = match affix.as_str() {
        Some(affix) => matches(affix),
        None => affix.try_iter()?.any(|affix| affix.as_str().is_some_and(&matches)),
    };
    Ok(Value::from(found))
}

/// The characters that `strip` removes: those given, else white space.
fn set_of(args: &[Value]) -> Result<impl Fn(char) -> bool + use<>, minijinja::Error> {
    let (set,): (Option<String>,) = from_args(args)?;
    Ok(move |c: char| set.as_ref().map_or(c.is_whitespace(), |set| set.contains(c)))
}

/// `split`: at each separator, at most `most` times; without one, at runs of white space.
fn split(text: &str, separator: Option<&str>, most: Option<i64>) -> Result<Value, minijinja::Error> {
    let parts = match most.and_then(|most| usize::try_from(most).ok()) {
        None => usize::MAX,
        Some(most) => most.saturating_add(1),
    };
    let Some(separator) = separator else {
        return Ok(split_at_space(text, parts).into_iter().map(Value::from).collect());
    };
    if separator.is_empty() {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "split: the separator is empty"));
    }
    Ok(text.splitn(parts, separator).map(Value::from).collect())
}

fn split_at_space(text: &str, parts: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = match words.len() + 1 < parts {
            true => rest.find(char::is_whitespace).unwrap_or(rest.len()),
            false => rest.len(),
        };
        words.push(&rest[..end]);
        rest = rest[end..].trim_start();
    }
    words
}
