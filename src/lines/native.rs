//! Lines of our own format.

use serde::Serialize;
use serde_json::value::RawValue;

use super::error::LineError;
use super::outcome::Origin;
use super::{
    Asked, BadLine, Format, Header, LineDefaults, RequestLine, append, embeddings, one_request, several,
};
use crate::grammar::Grammar;
use crate::openai::{Encoding, FieldError, Fields, Only, PromptLogprobs, Prompts, Vector, check_only, given};
use crate::request::{Completion, FinishReason, GenerateRequest, Given, TokenLogprobs};
use crate::rerank::{Relevance, answers};
use crate::score::{Score, ScoreRequest};
use crate::{SamplingParams, ToolCalls};

/// Reads a request.
///
/// # Errors
/// What is wrong with it.
pub fn parse(
    mut fields: Fields<'_>,
    mut header: Header,
    defaults: LineDefaults<'_>,
) -> Result<RequestLine, BadLine> {
    header.id = fields.raw("id").map(RawValue::to_owned);
    if header.id.is_some() && fields.gives("embed") {
        header.format = Format::Embed(Encoding::default());
        return match one_embedding(fields, defaults) {
            Ok(((request, encoding), asked)) => {
                header.format = Format::Embed(encoding);
                header.model = asked.unwrap_or(header.model);
                Ok(RequestLine { header, request, beside: Vec::new() })
            }
            Err(error) => Err(BadLine { header, error: error.into() }),
        };
    }
    let request = match (&header.id, given(&mut fields)) {
        (None, _) => Err(LineError::NoId { field: "id" }),
        (Some(_), Err(error)) => Err(error.into()),
        (Some(_), Ok(None)) if fields.gives("document") => {
            header.format = Format::Rerank;
            judgement(fields, defaults).map_err(LineError::from)
        }
        (Some(_), Ok(None)) => one_request(fields, Prompts::Any, defaults).map_err(LineError::from),
        (Some(_), Ok(Some(completion))) => {
            header.format = Format::Score;
            score(fields, completion, defaults).map_err(LineError::from)
        }
    };
    match request {
        Ok((request, asked)) => {
            header.model = asked.unwrap_or(header.model);
            let (request, beside) = match header.format {
                Format::Rerank => {
                    let [yes, no] = answers(&request.prompt);
                    (yes.into(), vec![no.into()])
                }
                _ => (request, Vec::new()),
            };
            Ok(RequestLine { header, request, beside })
        }
        Err(error) => Err(BadLine { header, error }),
    }
}

/// The request of a line with something to embed, and how the embedding is written.
fn one_embedding(fields: Fields<'_>, defaults: LineDefaults<'_>) -> Asked<(GenerateRequest, Encoding)> {
    let ((mut requests, encoding), model) = embeddings(fields, "embed", defaults)?;
    match (requests.len(), requests.next()) {
        (1, Some(request)) => Ok(((request, encoding), model)),
        (count, _) => Err(several("embed", count)),
    }
}

/// The request of a line with a completion: nothing is drawn, and `logprobs` counts the alternatives.
fn score(mut fields: Fields<'_>, completion: Given, defaults: LineDefaults<'_>) -> Asked {
    check_only(&mut fields, OF_DRAWN)?;
    let own = SamplingParams { logprobs: None, ..defaults.sampling };
    let (request, model) = one_request(fields, Prompts::Any, LineDefaults { sampling: own, ..defaults })?;
    if matches!(request.grammar.as_deref(), Some(Grammar::Calls(ToolCalls { required: true, .. }))) {
        return Err(FieldError::Unsupported {
            field: "tool_choice",
            value: "a call".to_owned(),
            fix: format!("{NOTHING_DRAWN}; leave it out"),
        });
    }
    let top = request.sampling.logprobs.unwrap_or(0);
    let score = ScoreRequest { top, ..ScoreRequest::new(request.prompt, completion) };
    Ok((score.into(), model))
}

/// The prompt of a line with a document.
fn judgement(mut fields: Fields<'_>, defaults: LineDefaults<'_>) -> Asked {
    const RELEVANCE_ALONE: &str = "a judgement has its relevance alone";
    check_only(&mut fields, OF_DRAWN)?;
    check_only(
        &mut fields,
        &[("logprobs", &["false"], RELEVANCE_ALONE), ("top_logprobs", &["0"], RELEVANCE_ALONE)],
    )?;
    one_request(fields, Prompts::Judged, defaults)
}

const NOTHING_DRAWN: &str = "what a line gives is scored, and nothing drawn behind it";

/// Fields that say what is drawn, when that ends, or what is told of the prompt. Those that say how it is drawn from its
/// probabilities (`temperature`, `seed`, …) don't change these.
const OF_DRAWN: &[Only] = &[
    ("allowed_token_ids", &[], NOTHING_DRAWN),
    ("bad_words", &["[]"], NOTHING_DRAWN),
    ("best_of", &["1"], NOTHING_DRAWN),
    ("frequency_penalty", &["0"], NOTHING_DRAWN),
    ("include_stop_str_in_output", &["false"], NOTHING_DRAWN),
    ("logit_bias", &["{}"], NOTHING_DRAWN),
    ("max_completion_tokens", &["0"], NOTHING_DRAWN),
    ("max_tokens", &["0"], NOTHING_DRAWN),
    ("min_tokens", &["0"], NOTHING_DRAWN),
    ("n", &["1"], NOTHING_DRAWN),
    ("presence_penalty", &["0"], NOTHING_DRAWN),
    ("prompt_logprobs", &[], "the completion alone is scored, and logprobs counts the alternatives"),
    ("repetition_penalty", &["1"], NOTHING_DRAWN),
    ("response_format", &[r#"{"type": "text"}"#], NOTHING_DRAWN),
    ("stop", &["[]"], NOTHING_DRAWN),
    ("stop_token_ids", &["[]"], NOTHING_DRAWN),
    ("structured_outputs", &[], NOTHING_DRAWN),
];

#[derive(Serialize)]
struct Done<'a> {
    id: &'a Option<Box<RawValue>>,
    line: u64,
    fingerprint: String,
    /// Of the one output that there is, or else of each.
    #[serde(flatten)]
    output: Option<Output<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    outputs: Option<Vec<Output<'a>>>,
    usage: Usage,
    /// Of the prompt's tokens, where asked for, in vLLM's form.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<&'a str>,
}

#[derive(Serialize)]
struct Output<'a> {
    token_ids: &'a [u32],
    /// Null where the model has no tokenizer.
    text: Option<&'a str>,
    finish_reason: FinishReason,
    /// One entry a token, where asked for: `{"logprob": …, "top": [[token_id, logprob], …]}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [TokenLogprobs]>,
}

impl<'a> Output<'a> {
    fn of(completion: &'a Completion) -> Self {
        Output {
            token_ids: &completion.token_ids,
            text: completion.text.as_deref(),
            finish_reason: completion.finish_reason,
            logprobs: completion.logprobs.as_deref(),
        }
    }
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    cached_tokens: u32,
}

#[derive(Serialize)]
struct Failed<'a> {
    id: &'a Option<Box<RawValue>>,
    line: u64,
    fingerprint: String,
    error: String,
}

/// Appends what came of a request's samples.
pub fn write_result(
    out: &mut Vec<u8>,
    header: &Header,
    origin: Origin,
    completions: &[Completion],
    token_bytes: &dyn Fn(u32) -> Option<Vec<u8>>,
) {
    let [first, others @ ..] = completions else { return };
    if let Some(error) = completions.iter().find_map(|completion| completion.error.as_ref()) {
        return write_error(out, header, origin, error);
    }
    let is_alone = others.is_empty();
    let done = Done {
        id: &header.id,
        line: origin.line,
        fingerprint: origin.fingerprint_text(),
        output: is_alone.then(|| Output::of(first)),
        outputs: (!is_alone).then(|| completions.iter().map(Output::of).collect()),
        usage: Usage {
            prompt_tokens: first.prompt_tokens,
            completion_tokens: completions.iter().map(|one| one.token_ids.len() as u32).sum(),
            cached_tokens: first.cached_tokens,
        },
        prompt_logprobs: PromptLogprobs::new(first, token_bytes),
        warning: first.warning.as_deref(),
    };
    append(out, &done);
}

#[derive(Serialize)]
struct Scored<'a> {
    id: &'a Option<Box<RawValue>>,
    line: u64,
    fingerprint: String,
    /// Of the completion.
    token_ids: &'a [u32],
    /// The sum over its tokens.
    logprob: f64,
    logprobs: &'a [TokenLogprobs],
    usage: Usage,
}

/// Appends the score of a completion.
pub fn write_score(out: &mut Vec<u8>, header: &Header, origin: Origin, completions: &[Completion]) {
    let [completion, ..] = completions else { return };
    if let Some(error) = &completion.error {
        return write_error(out, header, origin, error);
    }
    let score = Score::from(completion.clone());
    let scored = Scored {
        id: &header.id,
        line: origin.line,
        fingerprint: origin.fingerprint_text(),
        token_ids: &score.token_ids,
        logprob: score.logprob(),
        logprobs: &score.logprobs,
        usage: Usage {
            prompt_tokens: score.prompt_tokens,
            completion_tokens: score.token_ids.len() as u32,
            cached_tokens: score.cached_tokens,
        },
    };
    append(out, &scored);
}

#[derive(Serialize)]
struct Judged<'a> {
    id: &'a Option<Box<RawValue>>,
    line: u64,
    fingerprint: String,
    /// From 0 to 1.
    relevance: f64,
    usage: Usage,
}

/// Appends the relevance of a document, by the scores of both answers.
pub fn write_relevance(
    out: &mut Vec<u8>,
    header: &Header,
    origin: Origin,
    completions: &[Completion],
    token_bytes: &dyn Fn(u32) -> Option<Vec<u8>>,
) {
    match Relevance::of_answers(completions, token_bytes) {
        Ok(Relevance { relevance, prompt_tokens, cached_tokens }) => {
            let usage = Usage { prompt_tokens, completion_tokens: 0, cached_tokens };
            let fingerprint = origin.fingerprint_text();
            append(out, &Judged { id: &header.id, line: origin.line, fingerprint, relevance, usage });
        }
        Err(error) => write_error(out, header, origin, &error),
    }
}

#[derive(Serialize)]
struct Embedded<'a> {
    id: &'a Option<Box<RawValue>>,
    line: u64,
    fingerprint: String,
    embedding: Vector<'a>,
    usage: Usage,
}

/// Appends the embedding of a prompt.
pub fn write_embedding(
    out: &mut Vec<u8>,
    header: &Header,
    origin: Origin,
    completions: &[Completion],
    encoding: Encoding,
) {
    let [completion, ..] = completions else { return };
    if let Some(error) = &completion.error {
        return write_error(out, header, origin, error);
    }
    let embedded = Embedded {
        id: &header.id,
        line: origin.line,
        fingerprint: origin.fingerprint_text(),
        embedding: Vector::of(completion, encoding),
        usage: Usage {
            prompt_tokens: completion.prompt_tokens,
            completion_tokens: 0,
            cached_tokens: completion.cached_tokens,
        },
    };
    append(out, &embedded);
}

/// Appends why a line has no result.
pub fn write_error(out: &mut Vec<u8>, header: &Header, origin: Origin, error: &dyn std::fmt::Display) {
    let failed = Failed {
        id: &header.id,
        line: origin.line,
        fingerprint: origin.fingerprint_text(),
        error: format!("line {}: {error}", origin.line),
    };
    append(out, &failed);
}
