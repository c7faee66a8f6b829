//! What a request asks for: the fields that native lines, Batch lines and the service's requests share.
//!
//! ```text
//!   prompt | prompt_token_ids | messages, tools, …      ──> Prompts
//!   max_tokens, temperature, top_k, …, seed, logprobs   ──> SamplingParams     else as Defaults say
//!   n                                                   ──> samples of each prompt
//!   stop, include_stop_str_in_output                    ──> stop texts
//!   logit_bias, bad_words, allowed_token_ids, …         ──> TokenRules
//!   completion | completion_token_ids                   ──> Given              in native lines
//!   response_format | structured_outputs | tool_choice  ──> Grammar
//!   model                                               ──> must be the one that runs
//!   the rest                                            ──> taken where it changes nothing, else an error
//! ```
//!
//! A field that is not known is an error, not ignored: a misspelt `max_token` should not cost a night's run. Who can serve
//! more than a line can (`stream`, `echo`, …) takes those fields before.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::error::{FieldError, shown};
use super::fields::{Fields, Whole, cause, read, wrong};
use super::model_name::ModelName;
use super::rest::{CHAT_FIELDS, check_rest, take_all_known};
use super::structured::grammar;
use super::tools::tool_calls;
use crate::SamplingParams;
use crate::grammar::Grammar;
use crate::request::{
    ChatPrompt, GenerateRequest, Given, JsonObject, Message, Prompt, PromptLogprobs, RerankRequest,
    TOP_LOGPROBS_MAX, TokenRules, prompt_seed,
};
use crate::tools::ToolCalls;

/// Outputs of a prompt at most, as in OpenAI's API.
const SAMPLES_MAX: i64 = 128;

/// Which prompts a body may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prompts {
    /// A native line: any.
    Any,
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
    /// A native line with a document that is judged by a query.
    Judged,
}

/// What a body asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Body {
    /// What to go on from: one prompt, or several in a body of `/v1/completions`.
    pub prompts: Vec<Prompt>,
    /// The field that they came in.
    pub prompt_field: &'static str,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Outputs of each prompt.
    pub samples: u32,
    /// Texts that end the output.
    pub stop: Vec<String>,
    /// Let the output's text end with what ended it.
    pub include_stop: bool,
    /// What it says of single tokens.
    pub rules: TokenRules,
    /// What the output is to be.
    pub grammar: Option<Grammar>,
    /// The field that says so.
    pub grammar_field: Option<&'static str>,
    /// The name by which it calls the model.
    pub model: Option<Arc<str>>,
}

impl Body {
    /// Reads what a request asks for; sampling that it leaves out is as in `default`. Fields that the caller knows how to
    /// serve and has taken are not looked at.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn read(
        mut fields: Fields<'_>,
        prompts: Prompts,
        default: &SamplingParams,
        model: &ModelName,
    ) -> Result<Body, FieldError> {
        fields.check_once()?;
        let model = name_of(model, &mut fields)?;
        let sampling = sampling(&mut fields, default)?;
        let samples = samples(&mut fields)?;
        let stop = stop(&mut fields)?;
        let include_stop = fields.flag("include_stop_str_in_output")?.unwrap_or(false);
        let rules = rules(&mut fields)?;
        let grammar = grammar(&mut fields)?;
        let (prompt_field, mut prompts) = match prompt(&mut fields, prompts) {
            Err(FieldError::Prompt { field, right }) => return Err(without_prompt(fields, field, right)),
            found => found?,
        };
        let calls = tool_calls(&mut fields, &mut prompts)?;
        let (grammar_field, grammar) = one_of(grammar, calls)?.unzip();
        check_rest(fields, &prompts)?;
        Ok(Body {
            prompts,
            prompt_field,
            sampling,
            samples,
            stop,
            include_stop,
            rules,
            grammar,
            grammar_field,
            model,
        })
    }

    /// The requests that it makes, one for each prompt, with the seeds that [`prompt_seed`] gives.
    pub fn requests(self) -> impl ExactSizeIterator<Item = GenerateRequest> {
        let Body { prompts, sampling, samples, stop, include_stop, rules, grammar, .. } = self;
        let grammar = grammar.map(Arc::new);
        prompts.into_iter().enumerate().map(move |(number, prompt)| GenerateRequest {
            sampling: SamplingParams { seed: prompt_seed(sampling.seed, number as u32), ..sampling },
            samples,
            stop: stop.clone(),
            include_stop,
            rules: rules.clone(),
            grammar: grammar.clone(),
            ..GenerateRequest::new(prompt)
        })
    }
}

/// An output is held to one thing, which a field asks for.
fn one_of(
    grammar: Option<(&'static str, Grammar)>,
    calls: Option<ToolCalls>,
) -> Result<Option<(&'static str, Grammar)>, FieldError> {
    match (grammar, calls) {
        (Some(_), Some(calls)) => Err(FieldError::Contradiction {
            field: "response_format",
            value: "a format".to_owned(),
            other: if calls.required { "tool_choice" } else { "tools" },
            fix: "leave one of them out (structured_outputs is a format, too), or let no tool be strict and leave \
                  parallel_tool_calls out",
        }),
        (grammar, calls) => Ok(grammar.or(calls.map(|calls| ("tools", Grammar::Calls(calls))))),
    }
}

/// `model` must be the one that runs.
pub fn name_of(model: &ModelName, fields: &mut Fields<'_>) -> Result<Option<Arc<str>>, FieldError> {
    let Some(asked) = fields.text("model")? else { return Ok(None) };
    match model.find(&asked) {
        Some(name) => Ok(Some(name.clone())),
        None => Err(FieldError::Model { asked: shown(&asked), loaded: model.first().to_string() }),
    }
}

fn sampling(fields: &mut Fields<'_>, default: &SamplingParams) -> Result<SamplingParams, FieldError> {
    let prompt_logprobs = prompt_logprobs(fields)?.or(default.prompt_logprobs);
    Ok(SamplingParams {
        temperature: fields.number("temperature")?.unwrap_or(default.temperature),
        top_k: top_k(fields)?.unwrap_or(default.top_k),
        top_p: fields.number("top_p")?.unwrap_or(default.top_p),
        min_p: fields.number("min_p")?.unwrap_or(default.min_p),
        repetition_penalty: fields.number("repetition_penalty")?.unwrap_or(default.repetition_penalty),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(default.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(default.frequency_penalty),
        seed: seed(fields)?.unwrap_or(default.seed),
        min_tokens: min_tokens(fields)?.unwrap_or(default.min_tokens),
        max_tokens: max_tokens(fields, prompt_logprobs.is_some())?.unwrap_or(default.max_tokens),
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(default.ignore_eos),
        logprobs: logprobs(fields)?.unwrap_or(default.logprobs),
        prompt_logprobs,
        embed: default.embed,
    })
}

/// `n`, and `best_of` where it asks for no more.
fn samples(fields: &mut Fields<'_>) -> Result<u32, FieldError> {
    let samples = fields.whole("n", 1, "a whole number from 1 to 128")?.unwrap_or(1);
    if samples > SAMPLES_MAX {
        let fix = "at most 128 outputs of a prompt are given".to_owned();
        return Err(FieldError::Unsupported { field: "n", value: samples.to_string(), fix });
    }
    match fields.whole("best_of", 1, "a whole number from 1 on")? {
        Some(best_of) if best_of != samples => {
            let fix = "all outputs are given, so it must be as n".to_owned();
            Err(FieldError::Unsupported { field: "best_of", value: best_of.to_string(), fix })
        }
        _ => Ok(samples as u32),
    }
}

/// -1 is vLLM's word for all tokens.
fn top_k(fields: &mut Fields<'_>) -> Result<Option<u32>, FieldError> {
    let top_k = fields.whole("top_k", -1, "a whole number from 1 on, or 0 or -1 for all tokens")?;
    Ok(top_k.map(|k| k.max(0) as u32))
}

/// -1 is vLLM's word for no seed; other negative ones are as good as any, each a seed of its own.
fn seed(fields: &mut Fields<'_>) -> Result<Option<u64>, FieldError> {
    const EXPECTED: &str = "a whole number of 64 bits";
    let Some(value) = fields.raw("seed") else { return Ok(None) };
    match read("seed", value, EXPECTED)? {
        Whole(-1) => Ok(None),
        Whole(seed) if (i128::from(i64::MIN)..=u64::MAX.into()).contains(&seed) => Ok(Some(seed as u64)),
        Whole(_) => Err(wrong("seed", value, EXPECTED)),
    }
}

fn min_tokens(fields: &mut Fields<'_>) -> Result<Option<u32>, FieldError> {
    let tokens = fields.whole("min_tokens", 0, "a whole number from 0 on")?;
    Ok(tokens.map(|tokens| tokens as u32))
}

/// By OpenAI's older or newer name. More than any sequence holds is as many as it holds; none will do where the prompt is
/// scored.
fn max_tokens(fields: &mut Fields<'_>, scored: bool) -> Result<Option<u32>, FieldError> {
    let (least, expected) = match scored {
        true => (0, "a whole number"),
        false => (1, "a whole number from 1 on"),
    };
    let older = fields.whole("max_tokens", least, expected)?;
    let newer = fields.whole("max_completion_tokens", least, expected)?;
    match (older, newer) {
        (Some(older), Some(newer)) if older != newer => Err(FieldError::Contradiction {
            field: "max_tokens",
            value: older.to_string(),
            other: "max_completion_tokens",
            fix: "give one of them",
        }),
        _ => Ok(older.or(newer).map(|tokens| tokens as u32)),
    }
}

/// A count of alternatives, or OpenAI's pair: `logprobs` says whether, `top_logprobs` how many.
fn logprobs(fields: &mut Fields<'_>) -> Result<Option<Option<u32>>, FieldError> {
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
            Some(_) => {
                Err(FieldError::Missing { field: "logprobs", fix: "top_logprobs needs it to be true" })
            }
        };
    };
    let asked = match read("logprobs", value, EXPECTED)? {
        Asked::Whether(true) => return Ok(Some(Some(top_logprobs(fields)?.unwrap_or(0)))),
        Asked::Whether(false) => None,
        Asked::Count(Whole(k)) if (0..=TOP_LOGPROBS_MAX as i128).contains(&k) => Some(k as u32),
        Asked::Count(_) => return Err(wrong("logprobs", value, EXPECTED)),
    };
    match top_logprobs(fields)? {
        Some(top) if top != asked.unwrap_or(0) => Err(FieldError::Contradiction {
            field: "logprobs",
            value: shown(value.get()),
            other: "top_logprobs",
            fix: "let logprobs be true, or leave top_logprobs out",
        }),
        _ => Ok(Some(asked)),
    }
}

/// Of the prompt's own tokens: a count of alternatives.
fn prompt_logprobs(fields: &mut Fields<'_>) -> Result<Option<PromptLogprobs>, FieldError> {
    const EXPECTED: &str = "a whole number up to 20";
    let Some(value) = fields.raw("prompt_logprobs") else { return Ok(None) };
    match read("prompt_logprobs", value, EXPECTED)? {
        Whole(k) if (0..=TOP_LOGPROBS_MAX as i128).contains(&k) => {
            Ok(Some(PromptLogprobs { from: 0, top: k as u32 }))
        }
        Whole(_) => Err(wrong("prompt_logprobs", value, EXPECTED)),
    }
}

fn top_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, FieldError> {
    const EXPECTED: &str = "a whole number up to 20";
    let Some(value) = fields.raw("top_logprobs") else { return Ok(None) };
    match read("top_logprobs", value, EXPECTED)? {
        Whole(k) if (0..=TOP_LOGPROBS_MAX as i128).contains(&k) => Ok(Some(k as u32)),
        Whole(_) => Err(wrong("top_logprobs", value, EXPECTED)),
    }
}

fn stop(fields: &mut Fields<'_>) -> Result<Vec<String>, FieldError> {
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

fn rules(fields: &mut Fields<'_>) -> Result<TokenRules, FieldError> {
    Ok(TokenRules {
        logit_bias: logit_bias(fields)?,
        stop_token_ids: ids(fields, "stop_token_ids")?.unwrap_or_default(),
        bad_words: fields.take("bad_words", "a list of texts")?.unwrap_or_default(),
        allowed_token_ids: ids(fields, "allowed_token_ids")?.map(Into::into),
    })
}

/// Biases by token id, which JSON writes as text.
fn logit_bias(fields: &mut Fields<'_>) -> Result<Vec<(u32, f32)>, FieldError> {
    const EXPECTED: &str = "an object with a number for each token id";
    let Some(value) = fields.raw("logit_bias") else { return Ok(Vec::new()) };
    let biases: BTreeMap<String, f32> = read("logit_bias", value, EXPECTED)?;
    let bias = |(id, bias): (String, f32)| Some((id.parse().ok()?, bias));
    biases.into_iter().map(bias).collect::<Option<_>>().ok_or_else(|| wrong("logit_bias", value, EXPECTED))
}

fn ids(fields: &mut Fields<'_>, name: &'static str) -> Result<Option<Vec<u32>>, FieldError> {
    let Some(value) = fields.raw(name) else { return Ok(None) };
    let ids: Vec<Whole> = read(name, value, TOKEN_IDS)?;
    token_ids(&ids).map(Some).ok_or_else(|| wrong(name, value, TOKEN_IDS))
}

/// The field that a prompt stands in, and what it says.
fn prompt(fields: &mut Fields<'_>, prompts: Prompts) -> Result<(&'static str, Vec<Prompt>), FieldError> {
    let text = fields.raw("prompt");
    let ids = fields.raw("prompt_token_ids");
    let messages = fields.raw("messages");
    match (text, ids, messages, prompts) {
        (Some(value), None, None, Prompts::Any | Prompts::Text) => {
            Ok(("prompt", text_prompts("prompt", value)?))
        }
        (None, Some(value), None, Prompts::Any | Prompts::Text) => {
            let ids: Vec<Whole> = read("prompt_token_ids", value, TOKEN_IDS)?;
            let ids = token_ids(&ids).ok_or_else(|| wrong("prompt_token_ids", value, TOKEN_IDS))?;
            Ok(("prompt_token_ids", vec![Prompt::Tokens(ids)]))
        }
        (None, None, Some(value), Prompts::Any | Prompts::Chat) => {
            Ok(("messages", vec![chat_prompt(value, fields)?]))
        }
        (None, None, None, Prompts::Judged) => Ok(("document", vec![Prompt::Rerank(judged(fields)?)])),
        (.., prompts) => Err(no_prompt(prompts)),
    }
}

/// What is wrong with a request that has no prompt: what it has in its place is a field that is not known.
fn without_prompt(mut fields: Fields<'_>, field: Option<&'static str>, right: &'static str) -> FieldError {
    if let Err(error) = tool_calls(&mut fields, &mut []) {
        return error;
    }
    take_all_known(&mut fields);
    fields.take_all(JUDGED);
    match fields.unknown() {
        Some((name, None)) => FieldError::Unknown { field: shown(&name), fix: format!("give {right}") },
        Some((name, near)) => FieldError::unknown(&name, near),
        None => FieldError::Prompt { field, right },
    }
}

fn no_prompt(prompts: Prompts) -> FieldError {
    let (field, right) = match prompts {
        Prompts::Any => (None, "exactly one of prompt, prompt_token_ids and messages"),
        Prompts::Text => (Some("prompt"), "exactly one of prompt and prompt_token_ids, and no messages"),
        Prompts::Chat => (Some("messages"), "messages, and no prompt"),
        Prompts::Judged => {
            (None, "exactly one of query with document, prompt, prompt_token_ids and messages")
        }
    };
    FieldError::Prompt { field, right }
}

/// What a document is judged by, the document, and how.
const JUDGED: [&str; 3] = ["query", "document", "instruction"];

/// A document, by what it is judged, and how.
fn judged(fields: &mut Fields<'_>) -> Result<RerankRequest, FieldError> {
    let [query, document, instruction] = JUDGED;
    let mut text = |field, fix| fields.text(field)?.ok_or(FieldError::Missing { field, fix });
    let query = text(query, "a document is judged by one")?;
    let request = RerankRequest::new(query, text(document, "give what the query is to judge")?);
    let instruction = fields.text(instruction)?.unwrap_or(request.instruction);
    Ok(RerankRequest { instruction, ..request })
}

const TOKEN_IDS: &str = "a list of token ids";

/// What is to be scored behind a prompt: a text, or its token ids.
pub fn given(fields: &mut Fields<'_>) -> Result<Option<Given>, FieldError> {
    const EXPECTED: &str = "a text or a list of token ids";
    let (name, value) = match (fields.raw("completion"), fields.raw("completion_token_ids")) {
        (None, None) => return Ok(None),
        (Some(value), None) => ("completion", value),
        (None, Some(value)) => ("completion_token_ids", value),
        (Some(value), Some(_)) => {
            return Err(FieldError::Contradiction {
                field: "completion",
                value: shown(value.get()),
                other: "completion_token_ids",
                fix: "give one of them",
            });
        }
    };
    let prompt = match text_prompts(name, value) {
        Ok(mut prompts) if prompts.len() == 1 => prompts.pop(),
        _ => None,
    };
    match prompt {
        Some(Prompt::Text(text)) => Ok(Some(Given::Text(text))),
        Some(Prompt::Tokens(ids)) => Ok(Some(Given::Tokens(ids))),
        _ => Err(wrong(name, value, EXPECTED)),
    }
}

/// A text, its token ids, or a list of such, in the field `name`.
pub fn text_prompts(name: &'static str, value: &RawValue) -> Result<Vec<Prompt>, FieldError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Text {
        One(String),
        Ids(Vec<Whole>),
        Texts(Vec<String>),
        IdLists(Vec<Vec<Whole>>),
    }
    const EXPECTED: &str = "a text or a list of token ids";
    let unfit = || wrong(name, value, EXPECTED);
    match read(name, value, EXPECTED)? {
        Text::One(text) => Ok(vec![Prompt::Text(text)]),
        Text::Ids(ids) => Ok(vec![Prompt::Tokens(token_ids(&ids).ok_or_else(unfit)?)]),
        Text::Texts(texts) => Ok(texts.into_iter().map(Prompt::Text).collect()),
        Text::IdLists(lists) => {
            let prompt = |ids: &Vec<Whole>| token_ids(ids).map(Prompt::Tokens);
            lists.iter().map(prompt).collect::<Option<_>>().ok_or_else(unfit)
        }
    }
}

fn token_ids(ids: &[Whole]) -> Option<Vec<u32>> {
    ids.iter().map(|Whole(id)| u32::try_from(*id).ok()).collect()
}

fn chat_prompt(value: &RawValue, fields: &mut Fields<'_>) -> Result<Prompt, FieldError> {
    let messages = messages(value)?;
    let [tools, documents, kwargs, add, continue_final] = CHAT_FIELDS;
    let continue_final_message = fields.flag(continue_final)?.unwrap_or(false);
    let add_generation_prompt = fields.flag(add)?;
    if continue_final_message && add_generation_prompt == Some(true) {
        return Err(FieldError::Contradiction {
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

fn messages(value: &RawValue) -> Result<Vec<Message>, FieldError> {
    const EXPECTED: &str = "a list of messages, at least one";
    let list: Vec<&RawValue> = read("messages", value, EXPECTED)?;
    if list.is_empty() {
        return Err(wrong("messages", value, EXPECTED));
    }
    let message = |(at, value): (usize, &&RawValue)| {
        serde_json::from_str(value.get()).map_err(|error| FieldError::Unreadable {
            field: "messages",
            cause: format!("messages[{at}]: {}", cause(&error)),
        })
    };
    list.iter().enumerate().map(message).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_that_is_read_stands_in_the_tables_of_the_docs() {
        let mut fields = Fields::read("{}").unwrap();
        name_of(&ModelName::new("m"), &mut fields).unwrap();
        fields.flag("include_stop_str_in_output").unwrap();
        sampling(&mut fields, &SamplingParams::DEFAULT).unwrap();
        samples(&mut fields).unwrap();
        stop(&mut fields).unwrap();
        rules(&mut fields).unwrap();
        grammar(&mut fields).unwrap();
        prompt(&mut fields, Prompts::Any).unwrap_err();
        assert!(fields.names().contains(&"allowed_token_ids"));
        for (file, docs) in [
            ("serving.md", include_str!("../../docs/serving.md")),
            ("generate.md", include_str!("../../docs/generate.md")),
        ] {
            let tables: Vec<_> = docs.lines().filter(|line| line.starts_with('|')).collect();
            for name in fields.names() {
                let named = [format!("`{name}`"), format!("`\"{name}\": ")];
                let stands = tables.iter().any(|line| named.iter().any(|name| line.contains(name)));
                assert!(stands, "{name} is missing in docs/{file}");
            }
        }
    }
}
