//! A checkpoint's chat templates: Jinja programs that turn a conversation into a prompt.
//!
//! ```text
//!   chat_template.jinja, additional_chat_templates/NAME.jinja      templates by name ──┐
//!   else tokenizer_config.json: chat_template, one or several; else chat_template.json │ compiled
//!                                                                                      ▼
//!   ChatPrompt ── choose ──> content as the template takes it ──> mark the end ──> rendered ──> cut at the mark ──> prompt
//!                 (jinja.rs, python.rs, json.rs: as Jinja2 does)   (content.rs)    (ending.rs, where the final message goes on)
//! ```
//!
//! What comes out is what Hugging Face transformers' `apply_chat_template` gives, to the byte. A template that does not
//! compile fails the requests that need it, not the model.

mod content;
mod ending;
mod jinja;
mod json;
mod python;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::value::{Serde, Value};
use minijinja::{Environment, context};

use self::content::Content;
use crate::error::Error;
use crate::request::{ChatPrompt, JsonObject, Message, RequestError};
use crate::tokenizer::config::{TokenizerConfig, read, read_json};

const DEFAULT: &str = "default";
/// The template that is meant for requests with tools.
const TOOL_USE: &str = "tool_use";

/// Fields of [`ChatPrompt`] that the template knows by these names.
const OWN_VARIABLES: [&str; 5] =
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"];

/// The templates of a checkpoint and the special tokens that they may mention.
pub struct ChatTemplates {
    environment: Environment<'static>,
    /// By name: how the template takes a message's content, or why it can't be used.
    named: BTreeMap<String, Result<Content, String>>,
    special_tokens: JsonObject,
    warnings: Vec<String>,
}

impl ChatTemplates {
    /// Reads and compiles the templates there are; none makes every rendering [`RequestError::NoChatTemplate`].
    ///
    /// # Errors
    /// A file that is there but cannot be read.
    pub fn open(folder: &Path, config: &TokenizerConfig) -> Result<Self, Error> {
        let mut templates = ChatTemplates {
            environment: jinja::environment(),
            named: BTreeMap::new(),
            special_tokens: config.special_tokens.clone(),
            warnings: Vec::new(),
        };
        let mut sources = in_files(folder)?;
        if sources.is_empty() {
            let (value, path) = in_json(folder, config)?;
            match named(&value) {
                Some(found) => {
                    sources = found.into_iter().map(|(name, source)| (name, source, path.clone())).collect();
                }
                None => templates.warnings.push(format!(
                    "{}: chat_template is neither a text nor a list of named texts; requests with messages will fail",
                    path.display()
                )),
            }
        }
        for (name, source, path) in sources {
            templates.add(name, &source, &path);
        }
        Ok(templates)
    }

    fn add(&mut self, name: String, source: &str, path: &Path) {
        let compiled = self.environment.add_template_owned(name.clone(), jinja::as_minijinja(source));
        let fault = match compiled {
            Err(error) => Some(format!("does not compile: {error}")),
            // One that does not end with a word will with nothing.
            Ok(()) => {
                let word = ChatPrompt::new([Message::new("user", "word")]);
                let tried = self.render_by(&name, &word.messages, &word);
                tried.err().filter(jinja::is_endless).map(|error| format!("does not end: {error}"))
            }
        };
        let usable = match fault {
            None => Ok(Content::of_template(|messages| self.try_out(&name, messages))),
            Some(fault) => {
                let reason = format!("{}: the chat template {name:?} {fault}", path.display());
                self.warnings.push(format!("{reason}; requests with messages that need it will fail"));
                Err(reason)
            }
        };
        self.named.insert(name, usable);
    }

    /// What the user should hear at the start.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The prompt that a conversation becomes.
    ///
    /// # Errors
    /// No template, or one that does not compile; what the template itself raises or trips over; content that is no
    /// text; a final message that can't be gone on with.
    pub fn render(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        let (name, content) = self.choose(prompt.tools.is_some())?;
        if let Some(variable) = OWN_VARIABLES.iter().find(|name| prompt.kwargs.contains_key(**name)) {
            return Err(refused(format!(
                "chat_template_kwargs holds {variable}, which is a field of its own: put it beside messages"
            )));
        }
        let messages = content.fit(&prompt.messages).map_err(refused)?;
        if !prompt.continue_final_message {
            return self.render_by(name, &messages, prompt).map_err(|error| refused(jinja::reason(&error)));
        }
        if prompt.add_generation_prompt {
            return Err(refused("continue_final_message needs add_generation_prompt to be false"));
        }
        let (messages, continued) = ending::mark(&messages)
            .ok_or_else(|| refused("continue_final_message: the final message has no text to go on with"))?;
        let rendered = self.render_by(name, &messages, prompt);
        let rendered = rendered.map_err(|error| refused(jinja::reason(&error)))?;
        ending::cut(rendered, &continued).ok_or_else(|| {
            refused("continue_final_message: the chat template does not print the final message as it is")
        })
    }

    /// The template for a request.
    fn choose(&self, with_tools: bool) -> Result<(&str, &Content), RequestError> {
        let found = with_tools.then(|| self.named.get_key_value(TOOL_USE)).flatten();
        match found.or_else(|| self.named.get_key_value(DEFAULT)) {
            Some((name, Ok(content))) => Ok((name, content)),
            Some((_, Err(reason))) => Err(RequestError::BrokenChatTemplate(reason.clone())),
            None if self.named.is_empty() => Err(RequestError::NoChatTemplate),
            None => {
                let names: Vec<&str> = self.named.keys().map(String::as_str).collect();
                let reason = format!("none of its chat templates ({}) is named default", names.join(", "));
                Err(RequestError::BrokenChatTemplate(reason))
            }
        }
    }

    fn render_by(
        &self,
        name: &str,
        messages: &[Message],
        prompt: &ChatPrompt,
    ) -> Result<String, minijinja::Error> {
        let ChatPrompt { tools, documents, kwargs, add_generation_prompt, .. } = prompt;
        let own = context! {
            messages => Serde(messages),
            tools => Serde(tools),
            documents => Serde(documents),
            add_generation_prompt,
        };
        // A variable of the request hides a special token of that name.
        let values =
            context! { ..own, ..Value::from(Serde(kwargs)), ..Value::from(Serde(&self.special_tokens)) };
        self.environment.get_template(name)?.render(values)
    }

    /// What a template makes of a conversation, where it makes anything of it.
    fn try_out(&self, name: &str, messages: Vec<Message>) -> Option<String> {
        let prompt = ChatPrompt::new(Vec::new());
        self.render_by(name, &messages, &prompt).ok()
    }
}

fn refused(reason: impl Into<String>) -> RequestError {
    RequestError::ChatTemplate(reason.into())
}

/// Templates that stand in files of their own: name, source, path.
fn in_files(folder: &Path) -> Result<Vec<(String, String, PathBuf)>, Error> {
    let mut found = Vec::new();
    let path = folder.join("chat_template.jinja");
    if let Some(source) = read(&path)? {
        found.push((DEFAULT.to_owned(), source, path));
    }
    let Ok(entries) = std::fs::read_dir(folder.join("additional_chat_templates")) else { return Ok(found) };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".jinja"));
        if let Some(name) = name.map(str::to_owned)
            && let Some(source) = read(&path)?
        {
            found.push((name, source, path));
        }
    }
    Ok(found)
}

/// `chat_template` of tokenizer_config.json, or of the file that processors once had for it, and where that is.
fn in_json(folder: &Path, config: &TokenizerConfig) -> Result<(serde_json::Value, PathBuf), Error> {
    if !config.chat_template.is_null() {
        return Ok((config.chat_template.clone(), config.path.clone()));
    }
    let path = folder.join("chat_template.json");
    let mut fields: JsonObject = read_json(&path)?.unwrap_or_default();
    Ok((fields.remove("chat_template").unwrap_or_default(), path))
}

/// A text, a list of named ones, or an object of them. `None`: something else.
fn named(value: &serde_json::Value) -> Option<Vec<(String, String)>> {
    use serde_json::Value::{Array, Null, Object, String};
    match value {
        Null => Some(Vec::new()),
        String(source) => Some(vec![(DEFAULT.to_owned(), source.clone())]),
        Array(list) => list.iter().map(|entry| text_of(&entry["name"], &entry["template"])).collect(),
        Object(named) => named.iter().map(|(name, source)| text_of(&String(name.clone()), source)).collect(),
        _ => None,
    }
}

fn text_of(name: &serde_json::Value, source: &serde_json::Value) -> Option<(String, String)> {
    Some((name.as_str()?.to_owned(), source.as_str()?.to_owned()))
}
