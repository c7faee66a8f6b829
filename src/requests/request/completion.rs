//! What came of a request, and why it ended.

use std::sync::Arc;

use minisgl_core::sampling::RowLogprobs;
use serde::{Deserialize, Serialize};

use super::error::RequestError;

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// It has as many tokens as it may have.
    Length,
    /// It drew an end-of-sequence token, which is its last token.
    Eos,
    /// One of its stop texts came up, it drew one of its stop tokens, which is its last token, or its grammar allows nothing more.
    Stop,
    /// The caller aborted it.
    Abort,
    /// It never ran: see [`Completion::error`].
    Rejected,
    /// It ran and could not go on: see [`Completion::error`].
    Failed,
}

/// Log-probabilities at one token, behind penalties and biases where it was drawn, before temperature and filters.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenLogprobs {
    /// Of the token drawn, or given.
    pub logprob: f32,
    /// The most probable tokens and their log-probabilities, most probable first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    pub(crate) fn of(row: &RowLogprobs) -> Self {
        TokenLogprobs { logprob: row.token, top: row.top().collect() }
    }
}

/// What came of a request, or of one of its samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Which sample it is; 0 where there is one.
    pub sample: u32,
    /// The tokens drawn; an end-of-sequence token included.
    pub token_ids: Vec<u32>,
    /// The output as text, special tokens left out; `None` where the checkpoint has no tokenizer.
    pub text: Option<String>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The stop text that ended it, if one did.
    pub stop_text: Option<String>,
    /// Tokens of the prompt, and given ones behind it.
    pub prompt_tokens: u32,
    /// Their ids, where a session asks for them, or their log-probabilities are asked for.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// How many of them the prefix cache held.
    pub cached_tokens: u32,
    /// Output tokens it was allowed: `max_tokens`, or fewer where the sequence limit or the pool is reached first.
    pub max_tokens: u32,
    /// One entry a token, where asked for.
    pub logprobs: Option<Vec<TokenLogprobs>>,
    /// Of the prompt's last tokens, as many as there are entries, where asked for: of all but the first, or from a position on.
    /// Samples of a prompt share them.
    pub prompt_logprobs: Option<Arc<Vec<TokenLogprobs>>>,
    /// Of the prompt, where asked for.
    pub embedding: Option<Vec<f32>>,
    /// What the caller should know though the request ran: that `max_tokens` was clamped.
    pub warning: Option<String>,
    /// Why it was rejected, or failed.
    pub error: Option<RequestError>,
}

impl Completion {
    pub(crate) fn rejected(error: RequestError) -> Self {
        Completion {
            sample: 0,
            token_ids: Vec::new(),
            text: None,
            finish_reason: FinishReason::Rejected,
            stop_text: None,
            prompt_tokens: 0,
            prompt_token_ids: None,
            cached_tokens: 0,
            max_tokens: 0,
            logprobs: None,
            prompt_logprobs: None,
            embedding: None,
            warning: None,
            error: Some(error),
        }
    }
}
