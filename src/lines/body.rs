//! What a request asks for: the fields that native lines and the bodies of Batch lines share.
//!
//! ```text
//!   prompt | prompt_token_ids | messages, tools, …      ──> Prompt
//!   max_tokens, temperature, top_k, …, seed, logprobs   ──> SamplingParams     else as Defaults say
//!   stop                                                ──> stop texts
//!   model                                               ──> must be the one that runs
//!   the rest                                            ──> taken where it changes nothing, else an error
//! ```
//!
//! A field that is not known is an error, not ignored: a misspelt `max_token` should not cost a night's run.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::ModelName;
use super::error::{LineError, shown};
use super::fields::{Fields, Whole, cause, read, wrong};
use super::rest::check_rest;
use crate::SamplingParams;
use crate::request::{ChatPrompt, GenerateRequest, JsonObject, Message, Prompt, TOP_LOGPROBS_MAX};

/// Which prompts a body may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prompts {
    /// A native line: any.
    Any,
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// Reads a request out of a body, and the name by which it calls `model`; sampling that it leaves out is as in `default`.
///
/// # Errors
/// The first field that is wrong.
pub fn request(
    mut fields: Fields<'_>,
    prompts: Prompts,
    default: &SamplingParams,
    model: &ModelName,
) -> Result<(GenerateRequest, Option<Arc<str>>), LineError> {
    fields.check_once()?;
    let name = name_of(model, &mut fields)?;
    let sampling = sampling(&mut fields, default)?;
    let stop = stop(&mut fields)?;
    let prompt = prompt(&mut fields, prompts)?;
    check_rest(fields, &prompt)?;
    Ok((GenerateRequest { prompt, sampling, stop }, name))
}

/// `model` must be the one that runs.
fn name_of(model: &ModelName, fields: &mut Fields<'_>) -> Result<Option<Arc<str>>, LineError> {
    let Some(asked) = fields.text("model")? else { return Ok(None) };
    match model.find(&asked) {
        Some(name) => Ok(Some(name.clone())),
        None => Err(LineError::Model { asked: shown(&asked), loaded: model.first().to_string() }),
    }
}

fn sampling(fields: &mut Fields<'_>, default: &SamplingParams) -> Result<SamplingParams, LineError> {
    Ok(SamplingParams {
        temperature: fields.number("temperature")?.unwrap_or(default.temperature),
        top_k: top_k(fields)?.unwrap_or(default.top_k),
        top_p: fields.number("top_p")?.unwrap_or(default.top_p),
        min_p: fields.number("min_p")?.unwrap_or(default.min_p),
        seed: seed(fields)?.unwrap_or(default.seed),
        max_tokens: max_tokens(fields)?.unwrap_or(default.max_tokens),
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(default.ignore_eos),
        logprobs: logprobs(fields)?.unwrap_or(default.logprobs),
    })
}

/// -1 is vLLM's word for all tokens.
fn top_k(fields: &mut Fields<'_>) -> Result<Option<u32>, LineError> {
    let top_k = fields.whole("top_k", -1, "a whole number from 1 on, or 0 or -1 for all tokens")?;
    Ok(top_k.map(|k| k.max(0) as u32))
}

/// -1 is vLLM's word for no seed; other negative ones are as good as any, each a seed of its own.
fn seed(fields: &mut Fields<'_>) -> Result<Option<u64>, LineError> {
    const EXPECTED: &str = "a whole number of 64 bits";
    let Some(value) = fields.raw("seed") else { return Ok(None) };
    match read("seed", value, EXPECTED)? {
        Whole(-1) => Ok(None),
        Whole(seed) if (i128::from(i64::MIN)..=u64::MAX.into()).contains(&seed) => Ok(Some(seed as u64)),
        Whole(_) => Err(wrong("seed", value, EXPECTED)),
    }
}

/// By OpenAI's older or newer name. More than any sequence holds is as many as it holds.
fn max_tokens(fields: &mut Fields<'_>) -> Result<Option<u32>, LineError> {
    const EXPECTED: &str = "a whole number from 1 on";
    let older = fields.whole("max_tokens", 1, EXPECTED)?;
    let newer = fields.whole("max_completion_tokens", 1, EXPECTED)?;
    match (older, newer) {
        (Some(older), Some(newer)) if older != newer => Err(LineError::Contradiction {
            field: "max_tokens",
            value: older.to_string(),
            other: "max_completion_tokens",
            fix: "give one of them",
        }),
        _ => Ok(older.or(newer).map(|tokens| tokens as u32)),
    }
}

/// A count of alternatives, or OpenAI's pair: `logprobs` says whether, `top_logprobs` how many.
fn logprobs(fields: &mut Fields<'_>) -> Result<Option<Option<u32>>, LineError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Asked {
        Whether(bool),
        Count(Whole),
    }
    const EXPECTED: &str = "true, false, or a whole number up to 20";
    let Some(value) = fields.raw("logprobs") else {
        return match top_logprobs(fields)? {
            None | Some(0) => Ok(None),
            Some(_) => Err(LineError::Missing { field: "logprobs", fix: "top_logprobs needs it to be true" }),
        };
    };
    let asked = match read("logprobs", value, EXPECTED)? {
        Asked::Whether(true) => return Ok(Some(Some(top_logprobs(fields)?.unwrap_or(0)))),
        Asked::Whether(false) => None,
        Asked::Count(Whole(k)) if (0..=TOP_LOGPROBS_MAX as i128).contains(&k) => Some(k as u32),
        Asked::Count(_) => return Err(wrong("logprobs", value, EXPECTED)),
    };
    match top_logprobs(fields)? {
        Some(top) if top != asked.unwrap_or(0) => Err(LineError::Contradiction {
            field: "logprobs",
            value: shown(value.get()),
            other: "top_logprobs",
            fix: "let logprobs be true, or leave top_logprobs out",
        }),
        _ => Ok(Some(asked)),
    }
}

fn top_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, LineError> {
    const EXPECTED: &str = "a whole number up to 20";
    let Some(value) = fields.raw("top_logprobs") else { return Ok(None) };
    match read("top_logprobs", value, EXPECTED)? {
        Whole(k) if (0..=TOP_LOGPROBS_MAX as i128).contains(&k) => Ok(Some(k as u32)),
        Whole(_) => Err(wrong("top_logprobs", value, EXPECTED)),
    }
}

fn stop(fields: &mut Fields<'_>) -> Result<Vec<String>, LineError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stop {
        One(String),
        Many(Vec<String>),
    }
    Ok(match fields.take("stop", "a text or a list of texts")? {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::Many(texts)) => texts,
    })
}

fn prompt(fields: &mut Fields<'_>, prompts: Prompts) -> Result<Prompt, LineError> {
    let text = fields.raw("prompt");
    let ids = fields.raw("prompt_token_ids");
    let messages = fields.raw("messages");
    match (text, ids, messages, prompts) {
        (Some(value), None, None, Prompts::Any | Prompts::Text) => text_prompt(value),
        (None, Some(value), None, Prompts::Any | Prompts::Text) => {
            let ids: Vec<Whole> = read("prompt_token_ids", value, TOKEN_IDS)?;
            token_ids(&ids).ok_or_else(|| wrong("prompt_token_ids", value, TOKEN_IDS))
        }
        (None, None, Some(value), Prompts::Any | Prompts::Chat) => chat_prompt(value, fields),
        (.., Prompts::Any) => Err(LineError::Prompt("prompt, prompt_token_ids and messages")),
        (.., Prompts::Text) => Err(LineError::Prompt("prompt and prompt_token_ids, and no messages")),
        (.., Prompts::Chat) => Err(LineError::Prompt("messages, and no prompt")),
    }
}

const TOKEN_IDS: &str = "a list of token ids";

/// A text, its token ids, or a list of one of them.
fn text_prompt(value: &RawValue) -> Result<Prompt, LineError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Text {
        One(String),
        Ids(Vec<Whole>),
        Texts(Vec<String>),
        IdLists(Vec<Vec<Whole>>),
    }
    const EXPECTED: &str = "a text or a list of token ids";
    let several = |count: usize| LineError::Unsupported {
        field: "prompt",
        value: format!("a list of {count} prompts"),
        fix: "give each a line of its own".to_owned(),
    };
    match read("prompt", value, EXPECTED)? {
        Text::One(text) => Ok(Prompt::Text(text)),
        Text::Ids(ids) => token_ids(&ids).ok_or_else(|| wrong("prompt", value, EXPECTED)),
        Text::Texts(mut texts) => match texts.len() {
            1 => Ok(Prompt::Text(texts.swap_remove(0))),
            count => Err(several(count)),
        },
        Text::IdLists(lists) => match lists.as_slice() {
            [ids] => token_ids(ids).ok_or_else(|| wrong("prompt", value, EXPECTED)),
            _ => Err(several(lists.len())),
        },
    }
}

fn token_ids(ids: &[Whole]) -> Option<Prompt> {
    ids.iter().map(|Whole(id)| u32::try_from(*id).ok()).collect::<Option<_>>().map(Prompt::Tokens)
}

/// The fields that only conversations have, but `messages`.
pub const CHAT_FIELDS: [&str; 5] =
    ["tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"];

fn chat_prompt(value: &RawValue, fields: &mut Fields<'_>) -> Result<Prompt, LineError> {
    let messages = messages(value)?;
    let [tools, documents, kwargs, add, continue_final] = CHAT_FIELDS;
    let continue_final_message = fields.flag(continue_final)?.unwrap_or(false);
    let add_generation_prompt = fields.flag(add)?;
    if continue_final_message && add_generation_prompt == Some(true) {
        return Err(LineError::Contradiction {
            field: continue_final,
            value: "true".to_owned(),
            other: add,
            fix: "let one of them be false",
        });
    }
    Ok(Prompt::Chat(ChatPrompt {
        messages,
        tools: fields.take(tools, "a list of tools")?.filter(|tools: &Vec<_>| !tools.is_empty()),
        documents: fields.take(documents, "a list of documents")?,
        kwargs: fields.take::<JsonObject>(kwargs, "an object")?.unwrap_or_default(),
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
    }))
}

fn messages(value: &RawValue) -> Result<Vec<Message>, LineError> {
    const EXPECTED: &str = "a list of messages, at least one";
    let list: Vec<&RawValue> = read("messages", value, EXPECTED)?;
    if list.is_empty() {
        return Err(wrong("messages", value, EXPECTED));
    }
    let message = |(at, value): (usize, &&RawValue)| {
        serde_json::from_str(value.get()).map_err(|error| LineError::Unreadable {
            field: "messages",
            cause: format!("messages[{at}]: {}", cause(&error)),
        })
    };
    list.iter().enumerate().map(message).collect()
}
