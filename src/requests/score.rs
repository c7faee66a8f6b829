//! Given texts scored instead of drawn: log-probabilities of completions behind prompts.
//!
//! ```text
//!   prompt + completion ── one prefill ──> log p(t1 | prompt), log p(t2 | prompt t1), …      the prompt's prefix from the cache
//! ```
//!
//! They are to the bit what sampling reports for the same tokens, whatever runs beside them.

use std::sync::Arc;

use minisgl_core::sampling::{PromptLogprobs, SamplingParams};

use crate::request::{Completion, GenerateRequest, Given, Prompt, RequestError, TokenLogprobs};

/// A completion to be scored.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreRequest {
    /// What comes before.
    pub prompt: Prompt,
    /// What is scored.
    pub completion: Given,
    /// Give the most probable tokens at each position too, so many.
    pub top: u32,
}

impl ScoreRequest {
    /// A completion's score, without alternatives.
    pub fn new(prompt: Prompt, completion: Given) -> Self {
        ScoreRequest { prompt, completion, top: 0 }
    }

    /// Of token ids.
    pub fn tokens(prompt: impl Into<Vec<u32>>, completion: impl Into<Vec<u32>>) -> Self {
        Self::new(Prompt::Tokens(prompt.into()), Given::Tokens(completion.into()))
    }

    /// Of texts.
    pub fn text(prompt: impl Into<String>, completion: impl Into<String>) -> Self {
        Self::new(Prompt::Text(prompt.into()), Given::Text(completion.into()))
    }
}

/// The request that draws nothing and has the completion scored.
impl From<ScoreRequest> for GenerateRequest {
    fn from(request: ScoreRequest) -> Self {
        let ScoreRequest { prompt, completion, top } = request;
        let prompt_logprobs = Some(PromptLogprobs { from: 0, top });
        let sampling = SamplingParams { max_tokens: 0, prompt_logprobs, ..SamplingParams::default() };
        GenerateRequest { given: Some(completion), sampling, ..GenerateRequest::new(prompt) }
    }
}

/// What came of a [`ScoreRequest`].
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The completion's tokens.
    pub token_ids: Vec<u32>,
    /// Of each of them, in their order.
    pub logprobs: Vec<TokenLogprobs>,
    /// Tokens before the completion.
    pub prompt_tokens: u32,
    /// How many of them the prefix cache held.
    pub cached_tokens: u32,
    /// Why there is no score; then there are no tokens.
    pub error: Option<RequestError>,
}

impl Score {
    /// The completion's log-probability: the sum over its tokens. That of no tokens is 0, and not the -0 that an empty sum is.
    pub fn logprob(&self) -> f64 {
        self.logprobs.iter().fold(0.0, |sum, token| sum + f64::from(token.logprob))
    }
}

impl From<Completion> for Score {
    fn from(completion: Completion) -> Self {
        let mut ids = completion.prompt_token_ids.unwrap_or_default();
        let logprobs = match completion.error {
            None => completion.prompt_logprobs.map(Arc::unwrap_or_clone).unwrap_or_default(),
            Some(_) => Vec::new(),
        };
        let token_ids = ids.split_off(ids.len().saturating_sub(logprobs.len()));
        Score {
            prompt_tokens: completion.prompt_tokens.saturating_sub(token_ids.len() as u32),
            token_ids,
            logprobs,
            cached_tokens: completion.cached_tokens,
            error: completion.error,
        }
    }
}
