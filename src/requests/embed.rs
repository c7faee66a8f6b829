//! Texts as points: prompts' embeddings, one prefill each and nothing drawn.
//!
//! ```text
//!   prompt ── one prefill ──> hidden state of its last token ── the first `dimensions` of it, scaled to length 1 ──> embedding
//! ```
//!
//! Models for it, like Qwen3-Embedding, have a tokenizer that ends each text with a token of its own; a prompt of token ids must
//! bring it along. Bits depend on the prompt alone, whatever runs beside it.

use minisgl_core::embedding::Embed;
use minisgl_core::sampling::SamplingParams;

use crate::request::{Completion, GenerateRequest, Prompt, RequestError};

/// A prompt to be embedded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbedRequest {
    /// What is embedded.
    pub prompt: Prompt,
    /// How many values the embedding is to have; `None`: all.
    pub dimensions: Option<u32>,
}

impl EmbedRequest {
    /// All values.
    pub fn new(prompt: Prompt) -> Self {
        EmbedRequest { prompt, dimensions: None }
    }

    /// Of token ids.
    pub fn tokens(ids: impl Into<Vec<u32>>) -> Self {
        Self::new(Prompt::Tokens(ids.into()))
    }

    /// Of a text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(Prompt::Text(text.into()))
    }

    /// Sets how many values it is to have.
    pub fn dimensions(mut self, dimensions: u32) -> Self {
        self.dimensions = Some(dimensions);
        self
    }
}

/// The request that draws nothing and has its prompt embedded.
impl From<EmbedRequest> for GenerateRequest {
    fn from(request: EmbedRequest) -> Self {
        let EmbedRequest { prompt, dimensions } = request;
        let embed = Some(Embed { dimensions });
        let sampling = SamplingParams { max_tokens: 0, embed, ..SamplingParams::default() };
        GenerateRequest::new(prompt).sampling(sampling)
    }
}

/// What came of an [`EmbedRequest`].
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Of length 1, unless the checkpoint's files leave that out.
    pub values: Vec<f32>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// How many of them the prefix cache held.
    pub cached_tokens: u32,
    /// Why there is none; then there are no values.
    pub error: Option<RequestError>,
}

impl From<Completion> for Embedding {
    fn from(completion: Completion) -> Self {
        Embedding {
            values: completion.embedding.unwrap_or_default(),
            prompt_tokens: completion.prompt_tokens,
            cached_tokens: completion.cached_tokens,
            error: completion.error,
        }
    }
}
