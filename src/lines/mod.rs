//! Requests and results as lines of JSON, in two formats; a line says itself which it has.
//!
//! ```text
//!   native  {"id": 7, "prompt": "Once", "max_tokens": 20, "logprobs": 2}
//!        -> {"id":7,"line":1,"fingerprint":"…","token_ids":[…],"text":"…","finish_reason":"length","usage":{…},"logprobs":[…]}
//!        or {"id":7,"line":1,"fingerprint":"…","outputs":[{"token_ids":[…],"text":"…","finish_reason":"eos"},…],"usage":{…}}   with "n"
//!        or {"id":7,"line":1,"fingerprint":"…","error":"line 1: top_p is 2; …"}
//!
//!           {"id": 8, "prompt": "Once", "completion": " upon"}
//!        -> {"id":8,"line":2,"fingerprint":"…","token_ids":[…],"logprob":-1.5,"logprobs":[…],"usage":{…}}
//!
//!           {"id": 9, "query": "Which moon?", "document": "Phobos is one."}
//!        -> {"id":9,"line":3,"fingerprint":"…","relevance":0.98,"usage":{…}}
//!
//!           {"id": 10, "embed": "Once upon"}
//!        -> {"id":10,"line":4,"fingerprint":"…","embedding":[…],"usage":{…}}
//!
//!   Batch   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{…}]}}
//!        -> {"id":"batch_req_1-…","custom_id":"a","response":{"status_code":200,"request_id":"…","body":{…}},"error":null}
//!        or {"id":"batch_req_1-…","custom_id":"a","response":{"status_code":400,…,"body":{"error":{…}}},"error":null}
//! ```
//!
//! Batch lines are those of OpenAI's Batch API, results as its output and error files have them: a request that is refused
//! is answered with status 400 and an error body, and `error` is for what was no answer at all.
//!
//! Invariants: an id is the JSON text that stood in the request, to the letter; it is never parsed. A result line begins
//! with `{"id":`, by which a line that was cut off is told from something else.

mod batch;
mod error;
mod native;
mod outcome;

use std::sync::Arc;

use serde_json::value::RawValue;

pub use error::LineError;
pub use outcome::{Origin, Outcome, read_result};

use crate::openai::{Body, EmbedBody, Encoding, FieldError, Fields, ModelName, Prompts};
use crate::request::{Completion, GenerateRequest};
use crate::{SamplingParams, ToolFormat};

/// What lines leave out.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// A line without a seed gets `sampling.seed` plus its number.
    pub sampling: SamplingParams,
    /// The names of the model that runs: a line may name it.
    pub model: ModelName,
}

/// What one line leaves out.
#[derive(Clone, Copy)]
struct LineDefaults<'a> {
    sampling: SamplingParams,
    model: &'a ModelName,
}

/// Requests that one line makes at most: as many prompts as OpenAI's API takes at once.
pub const REQUESTS_MAX: usize = 2048;

/// A request line.
#[derive(Clone, Debug)]
pub struct RequestLine {
    /// What its result needs.
    pub header: Header,
    /// What it asks for.
    pub request: GenerateRequest,
    /// What is asked beside it for the same result: a judgement has two answers, a list of prompts choices or an embedding each.
    /// There are fewer than [`REQUESTS_MAX`].
    pub beside: Vec<GenerateRequest>,
}

/// A line that is no request.
#[derive(Clone, Debug)]
pub struct BadLine {
    /// What its result needs, as far as it could be read.
    pub header: Header,
    /// What is wrong with it.
    pub error: LineError,
}

impl BadLine {
    /// A line of more than `max` bytes, which nobody has looked at.
    pub fn too_long(max: usize, defaults: &Defaults) -> Self {
        BadLine { header: Header::unknown(defaults), error: LineError::TooLong { max } }
    }
}

/// What is kept of a line while its request runs, so that the result can be written.
#[derive(Clone, Debug)]
pub struct Header {
    format: Format,
    id: Option<Box<RawValue>>,
    /// As the request names it.
    model: Arc<str>,
    /// The model may call tools.
    has_tools: bool,
}

impl Header {
    /// Of a line that nothing is known of.
    fn unknown(defaults: &Defaults) -> Self {
        let model = defaults.model.first().clone();
        Header { format: Format::Native, id: None, model, has_tools: false }
    }

    /// The id, as the JSON text that stood in the line; `null` where it could not be read.
    pub fn id(&self) -> &str {
        self.id.as_ref().map_or("null", |id| id.get())
    }
}

/// How a result is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Native,
    /// Of a native line with a completion.
    Score,
    /// Of a native line with a document to be judged.
    Rerank,
    /// Of a native line with something to embed.
    Embed(Encoding),
    Chat,
    Text,
    Embeddings(Encoding),
}

/// Is there nothing on a line?
pub fn is_blank(line: &[u8]) -> bool {
    without_bom(line).trim_ascii().is_empty()
}

/// Reads line `number` (from 1) of an input; white space around it, its end and a byte order mark don't count.
///
/// # Errors
/// What is wrong with the line.
pub fn parse(line: &[u8], number: u64, defaults: &Defaults) -> Result<RequestLine, BadLine> {
    let header = Header::unknown(defaults);
    let fields = match text(line).and_then(|text| Ok(Fields::read(text)?)) {
        Ok(fields) => fields,
        Err(error) => return Err(BadLine { header, error }),
    };
    let seed = defaults.sampling.seed.wrapping_add(number);
    let sampling = SamplingParams { seed, ..defaults.sampling };
    let defaults = LineDefaults { sampling, model: &defaults.model };
    match batch::is_batch(&fields) {
        true => batch::parse(fields, header, defaults),
        false => native::parse(fields, header, defaults),
    }
}

/// What is asked for, a request where nothing else is said, and the name by which it calls the model.
type Asked<T = GenerateRequest> = Result<(T, Option<Arc<str>>), FieldError>;

/// A request for each prompt of a body, and the name by which it calls the model.
fn requests(
    fields: Fields<'_>,
    prompts: Prompts,
    defaults: LineDefaults<'_>,
) -> Asked<impl ExactSizeIterator<Item = GenerateRequest> + use<>> {
    let body = Body::read(fields, prompts, &defaults.sampling, defaults.model)?;
    let model = body.model.clone();
    Ok((body.requests(), model))
}

/// The one request that a body makes.
fn one_request(fields: Fields<'_>, prompts: Prompts, defaults: LineDefaults<'_>) -> Asked {
    let (mut requests, model) = requests(fields, prompts, defaults)?;
    match (requests.len(), requests.next()) {
        (1, Some(request)) => Ok((request, model)),
        (count, _) => Err(several("prompt", count)),
    }
}

/// A request for each input of a body in the field `input`, to be embedded; and how embeddings are written.
fn embeddings(
    fields: Fields<'_>,
    input: &'static str,
    defaults: LineDefaults<'_>,
) -> Asked<(impl ExactSizeIterator<Item = GenerateRequest> + use<>, Encoding)> {
    let body = EmbedBody::read(fields, input, defaults.model)?;
    let (model, encoding) = (body.model.clone(), body.encoding);
    Ok(((body.requests(), encoding), model))
}

fn several(field: &'static str, count: usize) -> FieldError {
    FieldError::Unsupported {
        field,
        value: format!("a list of {count} prompts"),
        fix: "give each a line of its own".to_owned(),
    }
}

fn text(line: &[u8]) -> Result<&str, LineError> {
    let line = without_bom(line).trim_ascii();
    std::str::from_utf8(line).map_err(|error| LineError::NotUtf8 { at: error.valid_up_to() + 1 })
}

/// Tools on Windows begin a file with a byte order mark; files put together have one in the middle.
fn without_bom(line: &[u8]) -> &[u8] {
    line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line)
}

/// Appends the result line of a line all of whose requests came to their end: `completions` are theirs, in their order, and of each
/// its samples in theirs. `tools` is how the model writes calls of tools,
/// where that is known, and `token_bytes` gives the bytes that a token stands for.
pub fn write_result(
    out: &mut Vec<u8>,
    header: &Header,
    origin: Origin,
    completions: &[Completion],
    tools: Option<ToolFormat>,
    token_bytes: &dyn Fn(u32) -> Option<Vec<u8>>,
) {
    match header.format {
        Format::Native => native::write_result(out, header, origin, completions, token_bytes),
        Format::Score => native::write_score(out, header, origin, completions),
        Format::Rerank => native::write_relevance(out, header, origin, completions, token_bytes),
        Format::Embed(encoding) => native::write_embedding(out, header, origin, completions, encoding),
        Format::Chat | Format::Text | Format::Embeddings(_) => {
            batch::write_result(out, header, origin, completions, tools, token_bytes)
        }
    }
}

/// Appends the result line of a line that is no request.
pub fn write_bad(out: &mut Vec<u8>, bad: &BadLine, origin: Origin) {
    match bad.header.format {
        Format::Native | Format::Score | Format::Rerank | Format::Embed(_) => {
            native::write_error(out, &bad.header, origin, &bad.error)
        }
        Format::Chat | Format::Text | Format::Embeddings(_) => batch::write_bad(out, bad, origin),
    }
}

/// Appends the result line of a request that something else stopped, as `reason` says.
pub fn write_failure(out: &mut Vec<u8>, header: &Header, origin: Origin, reason: &str) {
    match header.format {
        Format::Native | Format::Score | Format::Rerank | Format::Embed(_) => {
            native::write_error(out, header, origin, &reason)
        }
        Format::Chat | Format::Text | Format::Embeddings(_) => {
            batch::write_failure(out, header, origin, reason)
        }
    }
}

/// Appends `line` as JSON, and ends the line.
fn append(out: &mut Vec<u8>, line: &impl serde::Serialize) {
    // Writing to memory can't fail, nor can values whose keys are all texts.
    let written = serde_json::to_writer(&mut *out, line);
    debug_assert!(written.is_ok());
    out.push(b'\n');
}
