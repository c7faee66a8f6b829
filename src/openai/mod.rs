//! OpenAI's API as data: what its requests ask for and what its answers hold, for Batch files and the service alike.
//!
//! ```text
//!   JSON object ── Fields ──> Body (prompts, sampling, stop texts) ── … ──> Completion ──> Answer, ErrorBody
//!                     ├──> EmbedBody (prompts, dimensions) ── … ──> Completion ──> Embeddings
//!                     └── what is left, misspelt or can't be served ──> FieldError, which names the field
//! ```
//!
//! Names of vLLM's are taken where OpenAI has none (`top_k`, `min_p`, `ignore_eos`, `chat_template_kwargs`, …).

mod answer;
mod body;
mod embeddings;
mod error;
mod fields;
mod logprobs;
mod model_name;
mod parts;
mod rest;
mod structured;
mod tools;

pub use answer::{
    Answer, ChatChoice, ChatMessage, ErrorBody, ErrorObject, FunctionCall, INVALID_REQUEST, PromptTokens,
    TextChoice, ToolCall, Usage, created_now, finish_reason,
};
pub use body::{Body, Prompts};
pub use embeddings::{EmbedBody, Embeddings, Encoding, Vector};
pub use error::{FieldError, ObjectError, status};
pub use fields::{Fields, Whole};
pub use logprobs::{ChatLogprobs, PromptLogprobs, TextLogprobs};
pub use model_name::ModelName;
pub use parts::{OutputFormat, OutputParser, OutputPart, Said};

pub(crate) use body::given;
pub(crate) use error::shown;
pub(crate) use fields::read;
pub(crate) use rest::{Only, check_only};
