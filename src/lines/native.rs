//! Lines of our own format.

use serde::Serialize;
use serde_json::value::RawValue;

use super::error::LineError;
use super::{BadLine, Header, Origin, RequestLine, append, one_request};
use crate::SamplingParams;
use crate::openai::{Fields, ModelName, Prompts};
use crate::request::{Completion, FinishReason, TokenLogprobs};

/// Reads a request; what it leaves out is as in `sampling`.
///
/// # Errors
/// What is wrong with it.
pub fn parse(
    mut fields: Fields<'_>,
    mut header: Header,
    sampling: &SamplingParams,
    model: &ModelName,
) -> Result<RequestLine, BadLine> {
    header.id = fields.raw("id").map(RawValue::to_owned);
    let request = match &header.id {
        None => Err(LineError::NoId { field: "id" }),
        Some(_) => one_request(fields, Prompts::Any, sampling, model).map_err(LineError::from),
    };
    match request {
        Ok((request, asked)) => {
            header.model = asked.unwrap_or(header.model);
            Ok(RequestLine { header, request })
        }
        Err(error) => Err(BadLine { header, error }),
    }
}

#[derive(Serialize)]
struct Done<'a> {
    id: &'a Option<Box<RawValue>>,
    line: u64,
    fingerprint: String,
    token_ids: &'a [u32],
    /// Null where the model has no tokenizer.
    text: Option<&'a str>,
    finish_reason: FinishReason,
    usage: Usage,
    /// One entry a token, where asked for: `{"logprob": …, "top": [[token_id, logprob], …]}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [TokenLogprobs]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<&'a str>,
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

/// Appends what came of a request.
pub fn write_result(out: &mut Vec<u8>, header: &Header, origin: Origin, completion: &Completion) {
    if let Some(error) = &completion.error {
        return write_error(out, header, origin, error);
    }
    let done = Done {
        id: &header.id,
        line: origin.line,
        fingerprint: origin.fingerprint_text(),
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
    };
    append(out, &done);
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
