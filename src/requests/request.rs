//! What a user asks for and what comes back: requests, events, completions.
//!
//! ```text
//!   GenerateRequest ── submit ──> tag ──> Token, Token, …, Finished(Completion)
//!                                 └─────> Finished(Completion with `error`)      where it cannot run
//! ```
//!
//! Every request gets exactly one `Finished`, unless a step of the device fails first.

mod completion;
mod error;
mod event;
mod prompt;

use std::sync::Arc;

use crate::grammar::Grammar;

pub use completion::{Completion, FinishReason, TokenLogprobs};
pub use error::RequestError;
pub use event::{BesideWork, Flow, StepTiming, StreamEvent};
pub use minisgl_core::batch::StepShape;
pub use minisgl_core::embedding::Embed;
pub use minisgl_core::request::SubmitError;
pub use minisgl_core::sampling::{
    PromptLogprobs, SamplingError, SamplingParams, TOP_LOGPROBS_MAX, prompt_seed, sample_seed,
};
pub use minisgl_core::stats::Load;
pub use prompt::{ChatPrompt, Given, JsonObject, Message, NoRole, Prompt, RerankRequest};

/// Bytes of a request's stop texts at most, together.
pub const STOP_BYTES_MAX: usize = 4096;

/// Samples that may be asked for of a prompt; how many can run together is the engine's to say.
pub const SAMPLES_MAX: u32 = 1 << 16;

/// A prompt and how to continue it.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// What to go on from.
    pub prompt: Prompt,
    /// How tokens are drawn, and how many.
    pub sampling: SamplingParams,
    /// Outputs, each a sample of its own, at least 1 and at most [`SAMPLES_MAX`]. Sample i draws with the seed [`sample_seed`] of the request's and i, so the
    /// first draws what it would draw alone. They run as a group: the prompt is computed once, and its pages are held once.
    pub samples: u32,
    /// Texts that end the output, of [`STOP_BYTES_MAX`] bytes together at most; it is cut before the first one found. They need the
    /// checkpoint's tokenizer.
    pub stop: Vec<String>,
    /// Let the text end with what ended it: the stop text, or the stop token's text.
    pub include_stop: bool,
    /// Biases, stop tokens, bad words, allowed tokens.
    pub rules: TokenRules,
    /// What the output is to be; a schema may be large, and many requests may have the same. It needs the checkpoint's tokenizer.
    pub grammar: Option<Arc<Grammar>>,
    /// What the output begins with, given rather than drawn. Where the prompt is to be scored, this alone is.
    pub given: Option<Given>,
}

impl GenerateRequest {
    /// A request with default sampling: greedy, at most 128 tokens.
    pub fn new(prompt: Prompt) -> Self {
        GenerateRequest {
            prompt,
            sampling: SamplingParams::default(),
            samples: 1,
            stop: Vec::new(),
            include_stop: false,
            rules: TokenRules::default(),
            grammar: None,
            given: None,
        }
    }

    /// Continues token ids.
    pub fn tokens(ids: impl Into<Vec<u32>>) -> Self {
        Self::new(Prompt::Tokens(ids.into()))
    }

    /// Continues a text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(Prompt::Text(text.into()))
    }

    /// Answers a conversation.
    pub fn chat(messages: impl Into<Vec<Message>>) -> Self {
        Self::new(Prompt::Chat(ChatPrompt::new(messages)))
    }

    /// Sets how tokens are drawn.
    pub fn sampling(mut self, sampling: SamplingParams) -> Self {
        self.sampling = sampling;
        self
    }

    /// Sets how many outputs there are to be.
    pub fn samples(mut self, samples: u32) -> Self {
        self.samples = samples;
        self
    }

    /// Sets what the output is to be.
    pub fn grammar(mut self, grammar: impl Into<Arc<Grammar>>) -> Self {
        self.grammar = Some(grammar.into());
        self
    }

    /// Output tokens of all samples at most.
    pub fn output_tokens_max(&self) -> u64 {
        u64::from(self.samples) * u64::from(self.sampling.max_tokens)
    }

    /// Adds a text that ends the output.
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stop.push(text.into());
        self
    }

    /// Sets what it says of single tokens.
    pub fn rules(mut self, rules: TokenRules) -> Self {
        self.rules = rules;
        self
    }
}

/// What a request says of single tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenRules {
    /// What is added to the logits of tokens, in [-100, 100]; 1024 tokens at most.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that end the output, as the last of its tokens. Their text is not part of it.
    pub stop_token_ids: Vec<u32>,
    /// Texts that the output may not have, at its beginning or behind a space: where all but the last of such a text's tokens
    /// have come up, the last one can't be drawn. They need the checkpoint's tokenizer.
    pub bad_words: Vec<String>,
    /// The only tokens that may be drawn, one at least; `None`: all. An end-of-sequence token that is not among them is not drawn.
    pub allowed_token_ids: Option<Arc<[u32]>>,
}
