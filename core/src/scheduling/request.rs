//! What goes into the scheduler and what comes out: requests and events.

use alloc::sync::Arc;

use thiserror::Error;

use crate::constraint::Constraint;
use crate::rules::Rules;
use crate::sampling::{RowLogprobs, SamplingError, SamplingParams};

/// A request's name inside the engine: an entry of the request table and which of its tenants is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    /// Entry of the request table.
    pub entry: u32,
    /// Counts the entry's tenants, so that an old ticket opens nothing.
    pub generation: u32,
}

/// A request as submitted.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Token ids of the prompt, at least one.
    pub prompt: &'a [u32],
    /// How its tokens are drawn.
    pub params: SamplingParams,
    /// What it says of single tokens.
    pub rules: Option<&'a Arc<Rules>>,
    /// What its output must obey; it has accepted no token yet.
    pub constraint: Option<&'a Arc<dyn Constraint>>,
}

impl<'a> Request<'a> {
    /// A request that says nothing of single tokens, and has no constraint.
    pub fn new(prompt: &'a [u32], params: SamplingParams) -> Self {
        Request { prompt, params, rules: None, constraint: None }
    }
}

/// A request taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// Its name in events.
    pub ticket: Ticket,
    /// Output tokens it may have at most: `max_tokens`, or fewer where the sequence limit or the pool ends it first.
    pub max_tokens: u32,
}

/// A request that was not taken in.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
pub enum SubmitError {
    /// Back-pressure: submit again after some steps.
    #[error(
        "the queue is full ({capacity} requests wait); run steps until one is admitted, then submit again"
    )]
    QueueFull {
        /// Requests that may wait.
        capacity: u32,
    },
    /// More samples of a prompt than can wait together.
    #[error(
        "{samples} samples of the prompt are asked for, and {limit} of its length can wait together; ask for fewer, or raise \
         max_queued"
    )]
    TooManySamples {
        /// As asked for.
        samples: usize,
        /// As many as can.
        limit: usize,
    },
    /// Nothing to go on from.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,
    /// No room for it, or for a single output token.
    #[error(
        "the prompt has {tokens} tokens, but at most {limit} can run and leave room for the output; \
         shorten it or raise the sequence limit (--max-seq-len) and the pool (--num-pages)"
    )]
    PromptTooLong {
        /// Of the prompt.
        tokens: usize,
        /// Longest prompt that can run.
        limit: u32,
    },
    /// An id that the model has no embedding for.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocab} tokens")]
    TokenOutsideVocabulary {
        /// The id.
        id: u32,
        /// Where in the prompt.
        position: usize,
        /// Ids lie below it.
        vocab: u32,
    },
    /// Nothing runs any more.
    #[error("the engine stopped when a step failed; build a new one to go on")]
    Stopped,
    /// A token or a score of a model that makes no logits.
    #[error(
        "the checkpoint has no output layer (lm_head.weight): it gives embeddings, and can neither draw nor score tokens; ask for \
         embeddings, or take the checkpoint that it was made of"
    )]
    NoHead,
    /// A parameter out of its range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// It has as many tokens as it may have.
    Length,
    /// It drew an end-of-sequence token, which is its last token.
    Eos,
    /// It drew one of its stop tokens, which is its last token.
    Stop,
    /// It was aborted.
    Abort,
    /// Its logits were not numbers, so that no further token could be drawn.
    NotNumbers,
    /// Its constraint allows nothing more: the output is complete.
    Complete,
    /// Its constraint could not tell what may come next.
    ConstraintFailed,
    /// No token is left: its constraint, its allowed tokens, its bad words and its least length together forbid all.
    NoTokenLeft,
}

/// What a step brought about.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// More of a prompt's tokens are scored: those behind the ones told of before, each once.
    PromptLogprobs {
        /// Whose.
        ticket: Ticket,
        /// Of each, in order.
        logprobs: &'a [RowLogprobs],
    },
    /// A prompt's embedding; the request ends with it.
    Embedding {
        /// Whose.
        ticket: Ticket,
        /// What was asked for of it, see [`crate::embedding`]; not scaled.
        values: &'a [f32],
    },
    /// A request has another token.
    Token {
        /// Whose.
        ticket: Ticket,
        /// Its id.
        token: u32,
        /// Where the request asked for them.
        logprobs: Option<&'a RowLogprobs>,
    },
    /// A request ended; its ticket is void from here on.
    Finished {
        /// Whose.
        ticket: Ticket,
        /// Why.
        reason: FinishReason,
        /// Prompt tokens that the prefix cache held when it was first admitted.
        cached_tokens: u32,
        /// All its output tokens, so that nobody need keep them meanwhile.
        tokens: &'a [u32],
    },
}
