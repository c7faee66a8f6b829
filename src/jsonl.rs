//! Requests and results as lines of JSON.
//!
//! ```text
//!   in   {"id": 7, "prompt": "Once", "max_tokens": 20, "logprobs": 2}
//!   out  {"id":7,"token_ids":[…],"text":"…","finish_reason":"length","usage":{…},"logprobs":[…]}
//!        {"id":7,"line":3,"error":"top_p is 2; …"}
//! ```
//!
//! A field that is not known is an error, not ignored: a misspelt `max_token` should not cost a night's run.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::request::{ChatPrompt, Completion, FinishReason, GenerateRequest, Message, Prompt, TokenLogprobs};
use crate::{RequestError, SamplingParams};

/// A request line.
#[derive(Clone, Debug)]
pub struct RequestLine {
    /// The caller's name for it, any JSON value but null.
    pub id: Value,
    /// What it asks for.
    pub request: GenerateRequest,
}

/// A line that is no request.
#[derive(Clone, Debug, PartialEq)]
pub struct BadLine {
    /// Its id, as far as it could be read; else null.
    pub id: Value,
    /// What is wrong with it.
    pub error: String,
}

/// Reads a request line; what it leaves out is as in `default`.
///
/// # Errors
/// What is wrong with the line.
pub fn parse(line: &[u8], default: &SamplingParams) -> Result<RequestLine, BadLine> {
    let not_json = |error| BadLine { id: Value::Null, error: format!("not valid JSON: {error}") };
    let value: Value = serde_json::from_slice(line).map_err(not_json)?;
    let Value::Object(fields) = value else {
        return Err(BadLine { id: Value::Null, error: "not a JSON object".to_owned() });
    };
    let id = fields.get("id").cloned().unwrap_or_default();
    match request(Fields(fields), default) {
        Ok(request) => Ok(RequestLine { id, request }),
        Err(error) => Err(BadLine { id, error }),
    }
}

fn request(mut fields: Fields, default: &SamplingParams) -> Result<GenerateRequest, String> {
    if fields.take::<Value>("id")?.is_none() {
        return Err("the request has no id; give it one, any JSON value but null".to_owned());
    }
    let sampling = SamplingParams {
        temperature: fields.take("temperature")?.unwrap_or(default.temperature),
        top_k: fields.take("top_k")?.unwrap_or(default.top_k),
        top_p: fields.take("top_p")?.unwrap_or(default.top_p),
        min_p: fields.take("min_p")?.unwrap_or(default.min_p),
        seed: fields.take("seed")?.unwrap_or(default.seed),
        max_tokens: fields.take("max_tokens")?.unwrap_or(default.max_tokens),
        ignore_eos: fields.take("ignore_eos")?.unwrap_or(default.ignore_eos),
        logprobs: fields.take("logprobs")?.or(default.logprobs),
    };
    let stop = match fields.take("stop")? {
        None => Vec::new(),
        Some(Stop::One(text)) => vec![text],
        Some(Stop::Many(texts)) => texts,
    };
    let text: Option<String> = fields.take("prompt")?;
    let ids: Option<Vec<u32>> = fields.take("prompt_token_ids")?;
    let messages: Option<Vec<Message>> = fields.take("messages")?;
    let prompt = match (text, ids, messages) {
        (Some(text), None, None) => Prompt::Text(text),
        (None, Some(ids), None) => Prompt::Tokens(ids),
        (None, None, Some(messages)) => Prompt::Chat(ChatPrompt::new(messages)),
        _ => return Err("give exactly one of prompt, prompt_token_ids and messages".to_owned()),
    };
    match fields.0.keys().next() {
        Some(name) => Err(format!("there is no field {name:?}; remove or correct it")),
        None => Ok(GenerateRequest { prompt, sampling, stop }),
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// What a line holds and nobody has taken yet.
struct Fields(serde_json::Map<String, Value>);

impl Fields {
    /// A field's value; `None` if it is absent or null. The error names the field.
    fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, String> {
        let value = self.0.remove(name).unwrap_or_default();
        serde_json::from_value(value).map_err(|error| format!("{name}: {error}"))
    }
}

/// A result line.
#[derive(Serialize)]
#[serde(untagged)]
pub enum ResultLine<'a> {
    /// A request that ran.
    Done {
        /// The request's id.
        id: &'a Value,
        /// The tokens drawn.
        token_ids: &'a [u32],
        /// Their text; null where the model has no tokenizer.
        text: Option<&'a str>,
        /// Why it ended.
        finish_reason: FinishReason,
        /// Counts.
        usage: Usage,
        /// One entry a token, where asked for: `{"logprob": …, "top": [[token_id, logprob], …]}`.
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<&'a [TokenLogprobs]>,
        /// What the caller should know though it ran.
        #[serde(skip_serializing_if = "Option::is_none")]
        warning: Option<&'a str>,
    },
    /// A line that did not.
    Failed {
        /// Its id, null where it could not be read.
        id: &'a Value,
        /// Its number in the input, from 1.
        line: u64,
        /// What is wrong with it.
        error: String,
    },
}

/// Tokens of a request.
#[derive(Serialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Drawn.
    pub completion_tokens: u32,
    /// Of the prompt, held by the prefix cache.
    pub cached_tokens: u32,
}

impl<'a> ResultLine<'a> {
    /// What came of the request in `line`.
    pub fn new(id: &'a Value, line: u64, completion: &'a Completion) -> Self {
        match &completion.error {
            Some(error) => Self::failed(id, line, error),
            None => ResultLine::Done {
                id,
                token_ids: &completion.token_ids,
                text: completion.text.as_deref(),
                finish_reason: completion.finish_reason,
                usage: Usage {
                    prompt_tokens: completion.prompt_tokens,
                    completion_tokens: completion.token_ids.len() as u32,
                    cached_tokens: completion.cached_tokens,
                },
                logprobs: completion.logprobs.as_deref(),
                warning: completion.warning.as_deref(),
            },
        }
    }

    fn failed(id: &'a Value, line: u64, error: &RequestError) -> Self {
        ResultLine::Failed { id, line, error: format!("line {line}: {error}") }
    }

    /// A line that is no request.
    pub fn bad(bad: &'a BadLine, line: u64) -> Self {
        ResultLine::Failed { id: &bad.id, line, error: format!("line {line}: {}", bad.error) }
    }
}
