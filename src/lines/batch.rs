//! Lines of OpenAI's Batch API: the request in an envelope, the answer in another, as its API would give it.
//!
//! | | what it is |
//! |---|---|
//! | `response` with status 200 | a `chat.completion`, a `text_completion`, or a list of `embedding`s, one for each input |
//! | `response` with another status | there is none, `body.error` says why; the status is the service's ([`status`]) |
//! | `error` | something else stopped it |

use serde::Serialize;
use serde_json::value::RawValue;

use super::error::LineError;
use super::outcome::{ID_PREFIX, Origin};
use super::{
    BadLine, Format, Header, LineDefaults, REQUESTS_MAX, RequestLine, append, embeddings, one_request,
    requests,
};
use crate::openai::{
    Answer, ChatChoice, ChatLogprobs, Embeddings, Encoding, ErrorBody, ErrorObject, FieldError, Fields,
    INVALID_REQUEST, OutputFormat, PromptLogprobs, Prompts, Said, TextChoice, TextLogprobs, Usage,
    created_now, finish_reason, read, shown, status,
};
use crate::request::{ChatPrompt, Completion, GenerateRequest, Prompt, RequestError};
use crate::tools::ToolFormat;

/// Is it an envelope, whole or not?
pub fn is_batch(fields: &Fields<'_>) -> bool {
    fields.has("custom_id") || fields.has("url") && fields.has("body")
}

/// Reads a request.
///
/// # Errors
/// What is wrong with it.
pub fn parse(
    mut fields: Fields<'_>,
    mut header: Header,
    defaults: LineDefaults<'_>,
) -> Result<RequestLine, BadLine> {
    header.format = Format::Chat;
    header.id = fields.raw("custom_id").map(RawValue::to_owned);
    match request(fields, &mut header, defaults) {
        Ok((request, beside)) => Ok(RequestLine { header, request, beside }),
        Err(error) => Err(BadLine { header, error }),
    }
}

fn request(
    mut fields: Fields<'_>,
    header: &mut Header,
    defaults: LineDefaults<'_>,
) -> Result<(GenerateRequest, Vec<GenerateRequest>), LineError> {
    fields.check_once()?;
    if header.id.is_none() {
        return Err(LineError::NoId { field: "custom_id" });
    }
    method(&mut fields)?;
    header.format = url(&mut fields)?;
    let missing = FieldError::Missing { field: "body", fix: "give the request there, as an object" };
    let body = fields.raw("body").ok_or(missing)?;
    fields.finish()?;
    let body: Fields<'_> = read("body", body, "the fields of a request, as an object")?;
    let (request, beside, asked) = match header.format {
        Format::Text => {
            let (requests, asked) = requests(body, Prompts::Text, defaults)?;
            let (first, others) = first_of(requests, "prompt")?;
            (first, others, asked)
        }
        Format::Embeddings(_) => {
            let ((requests, encoding), asked) = embeddings(body, "input", defaults)?;
            header.format = Format::Embeddings(encoding);
            let (first, others) = first_of(requests, "input")?;
            (first, others, asked)
        }
        _ => {
            let (request, asked) = one_request(body, Prompts::Chat, defaults)?;
            (request, Vec::new(), asked)
        }
    };
    if let Some(name) = asked {
        header.model = name;
    }
    header.has_tools = matches!(&request.prompt, Prompt::Chat(ChatPrompt { tools: Some(_), .. }));
    Ok((request, beside))
}

/// The first of what a body asks for in a field, and the others.
fn first_of(
    mut requests: impl ExactSizeIterator<Item = GenerateRequest>,
    field: &'static str,
) -> Result<(GenerateRequest, Vec<GenerateRequest>), FieldError> {
    let count = requests.len();
    match requests.next() {
        Some(first) if count <= REQUESTS_MAX => Ok((first, requests.collect())),
        _ => Err(FieldError::Unsupported {
            field,
            value: format!("a list of {count}"),
            fix: format!("give 1 to {REQUESTS_MAX} in a line"),
        }),
    }
}

fn method(fields: &mut Fields<'_>) -> Result<(), FieldError> {
    match fields.text("method")? {
        Some(method) if method != "POST" => {
            let value = shown(&format!("{method:?}"));
            Err(FieldError::Unsupported { field: "method", value, fix: "it must be \"POST\"".to_owned() })
        }
        _ => Ok(()),
    }
}

fn url(fields: &mut Fields<'_>) -> Result<Format, FieldError> {
    const FIX: &str = "it must be \"/v1/chat/completions\", \"/v1/completions\" or \"/v1/embeddings\"";
    match fields.text("url")?.as_deref() {
        Some("/v1/chat/completions") => Ok(Format::Chat),
        Some("/v1/completions") => Ok(Format::Text),
        Some("/v1/embeddings") => Ok(Format::Embeddings(Encoding::default())),
        Some(url) => {
            let value = shown(&format!("{url:?}"));
            Err(FieldError::Unsupported { field: "url", value, fix: FIX.to_owned() })
        }
        None => Err(FieldError::Missing { field: "url", fix: FIX }),
    }
}

/// The envelope of an answer.
#[derive(Serialize)]
struct Line<'a, B> {
    id: String,
    custom_id: &'a Option<Box<RawValue>>,
    response: Option<Response<B>>,
    error: Option<Stopped<'a>>,
}

#[derive(Serialize)]
struct Response<B> {
    status_code: u16,
    request_id: String,
    body: B,
}

#[derive(Serialize)]
struct Stopped<'a> {
    code: &'a str,
    message: &'a str,
}

/// The first error of a line's requests; and which of them has it, from 0, where there are several.
fn failed(completions: &[Completion]) -> Option<(&RequestError, Option<usize>)> {
    let (at, error) =
        completions.iter().enumerate().find_map(|(at, completion)| Some((at, completion.error.as_ref()?)))?;
    let begun = |completions: &[Completion]| completions.iter().filter(|one| one.sample == 0).count();
    let number = begun(&completions[..=at]).saturating_sub(1);
    Some((error, (begun(completions) > 1).then_some(number)))
}

/// Appends what came of a request's samples.
pub fn write_result(
    out: &mut Vec<u8>,
    header: &Header,
    origin: Origin,
    completions: &[Completion],
    tools: Option<ToolFormat>,
    token_bytes: &dyn Fn(u32) -> Option<Vec<u8>>,
) {
    if let Some((error, at)) = failed(completions) {
        let (status, r#type) = status(error);
        let message = match (at, header.format) {
            (None, _) => error.to_string(),
            (Some(at), Format::Embeddings(_)) => format!("input {at}: {error}"),
            (Some(at), _) => format!("prompt {at}: {error}"),
        };
        let error = ErrorObject { message: &message, r#type, param: None, code: None };
        return write_response(out, header, origin, status, ErrorBody { error });
    }
    let reasons = completions.iter().map(|completion| finish_reason(completion.finish_reason));
    let Some(reasons) = reasons.collect::<Option<Vec<_>>>() else {
        return write_failure(out, header, origin, "the request was aborted");
    };
    let ended = (0..).zip(completions).zip(reasons);
    match header.format {
        Format::Text => {
            let choices = ended.map(|((index, completion), finish_reason)| TextChoice {
                index,
                text: completion.text.as_deref().unwrap_or_default(),
                logprobs: TextLogprobs::new(completion, token_bytes),
                prompt_logprobs: PromptLogprobs::new(completion, token_bytes),
                finish_reason,
            });
            let choices = choices.collect();
            let answer = answer(header, origin, ("cmpl", "text_completion"), completions, choices);
            write_response(out, header, origin, 200, answer);
        }
        Format::Embeddings(encoding) => {
            let answer = Embeddings::new(&header.model, encoding, completions);
            write_response(out, header, origin, 200, answer);
        }
        Format::Chat | Format::Native | Format::Score | Format::Rerank | Format::Embed(_) => {
            let tools = tools.filter(|_| header.has_tools);
            let said = |completion| Said::of(completion, OutputFormat { tools, reasoning: None });
            let mut count = 0;
            let called = |said: Said| {
                let calls = said.named_calls(|number| format!("call-{}-{}", origin.name(), count + number));
                count += calls.len();
                (said, calls)
            };
            let said: Vec<_> = completions.iter().map(said).map(called).collect();
            let choices = ended.zip(&said).map(|(((index, completion), reason), (said, calls))| ChatChoice {
                index,
                message: said.message(calls),
                logprobs: ChatLogprobs::new(completion, token_bytes),
                finish_reason: said.finish_reason(reason),
            });
            let choices = choices.collect();
            let mut answer = answer(header, origin, ("chatcmpl", "chat.completion"), completions, choices);
            answer.prompt_logprobs =
                completions.first().and_then(|first| PromptLogprobs::new(first, token_bytes));
            write_response(out, header, origin, 200, answer);
        }
    }
}

/// Appends why a line is no request.
pub fn write_bad(out: &mut Vec<u8>, bad: &BadLine, origin: Origin) {
    let BadLine { header, error } = bad;
    let error = ErrorObject {
        message: &error.to_string(),
        r#type: INVALID_REQUEST,
        param: error.field(),
        code: error.code(),
    };
    write_response(out, header, origin, 400, ErrorBody { error });
}

/// Appends what stopped a request from outside.
pub fn write_failure(out: &mut Vec<u8>, header: &Header, origin: Origin, reason: &str) {
    let error = Some(Stopped { code: "request_stopped", message: reason });
    append(out, &Line::<()> { id: id(origin), custom_id: &header.id, response: None, error });
}

fn write_response(
    out: &mut Vec<u8>,
    header: &Header,
    origin: Origin,
    status_code: u16,
    body: impl Serialize,
) {
    let response = Some(Response { status_code, request_id: format!("req_{}", origin.name()), body });
    append(out, &Line { id: id(origin), custom_id: &header.id, response, error: None });
}

fn id(origin: Origin) -> String {
    format!("{ID_PREFIX}{}", origin.name())
}

fn answer<'a, C>(
    header: &'a Header,
    origin: Origin,
    (prefix, object): (&str, &'static str),
    completions: &[Completion],
    choices: Vec<C>,
) -> Answer<'a, C> {
    Answer {
        id: format!("{prefix}-{}", origin.name()),
        object,
        created: created_now(),
        model: &header.model,
        choices,
        usage: Usage::of(completions),
        prompt_logprobs: None,
    }
}
