//! How far sampling parameters and rules may go, and what one beyond it says.

use thiserror::Error;

/// How many alternatives' log-probabilities a request may ask for.
pub const TOP_LOGPROBS_MAX: usize = 20;
/// Tokens whose logits a request may bias.
pub const BIASES_MAX: usize = 1024;
/// Tokens that may end a request's output, the model's own included.
pub const ENDINGS_MAX: usize = 256;
/// Words of a request's bad words: one for each token, one for each word, and one.
pub const BAD_WORD_WORDS_MAX: usize = 1024;
/// The largest bias, either way.
pub const BIAS_MAX: f32 = 100.0;
/// The largest presence and frequency penalty, either way.
pub const PENALTY_MAX: f32 = 2.0;

/// A sampling parameter out of its range.
#[derive(Clone, Copy, Debug, Error, PartialEq)]
pub enum SamplingError {
    /// NaN, infinite or negative.
    #[error("temperature is {0}; it must be a finite number, 0 (greedy) or above")]
    Temperature(f32),
    /// Outside (0, 1].
    #[error("top_p is {0}; it must be above 0 and at most 1 (1 keeps every token)")]
    TopP(f32),
    /// Outside [0, 1].
    #[error("min_p is {0}; it must lie between 0 (keeps every token) and 1")]
    MinP(f32),
    /// Zero, negative or no number.
    #[error("repetition_penalty is {0}; it must be a finite number above 0 (1 is none)")]
    RepetitionPenalty(f32),
    /// Outside [-2, 2].
    #[error("presence_penalty is {0}; it must lie between -{PENALTY_MAX} and {PENALTY_MAX} (0 is none)")]
    PresencePenalty(f32),
    /// Outside [-2, 2].
    #[error("frequency_penalty is {0}; it must lie between -{PENALTY_MAX} and {PENALTY_MAX} (0 is none)")]
    FrequencyPenalty(f32),
    /// No token would come out.
    #[error(
        "max_tokens is 0; ask for at least 1 token, or for the prompt's log-probabilities (prompt_logprobs)"
    )]
    MaxTokens,
    /// An embedding and something drawn or scored.
    #[error(
        "a prompt's embedding comes alone; set max_tokens to 0 and leave logprobs and prompt_logprobs out, or ask in two \
         requests"
    )]
    EmbedAlone,
    /// More values of an embedding than there are, or none.
    #[error(
        "dimensions is {asked}; it must lie between 1 and {most}, the values of this model's hidden states"
    )]
    Dimensions {
        /// As asked for.
        asked: u32,
        /// What there are.
        most: u32,
    },
    /// More at least than at most.
    #[error("min_tokens is {min}, above max_tokens, which is {max}; lower it or raise max_tokens")]
    MinTokens {
        /// At least.
        min: u32,
        /// At most.
        max: u32,
    },
    /// A bias out of its range.
    #[error("logit_bias of token {id} is {bias}; it must lie between -{BIAS_MAX} and {BIAS_MAX}")]
    Bias {
        /// The token.
        id: u32,
        /// Its bias.
        bias: f32,
    },
    /// Two biases of one token.
    #[error("logit_bias names token {0} twice; name it once")]
    BiasTwice(u32),
    /// More biases than a slot has memory for.
    #[error("logit_bias has {0} tokens; at most {BIASES_MAX} can be biased")]
    Biases(usize),
    /// More stop tokens than a slot has memory for.
    #[error(
        "{0} tokens would end the output (stop_token_ids, and those of the model); there can be {ENDINGS_MAX} at most"
    )]
    StopTokens(usize),
    /// A bad word of no tokens.
    #[error("a bad word is empty; leave it out, or give at least one character")]
    EmptyBadWord,
    /// More bad words than a slot has memory for.
    #[error(
        "bad_words are {words} sequences of {tokens} tokens in all (each word counts with and without a space before it); \
         sequences and tokens together may be {} at most",
        BAD_WORD_WORDS_MAX - 1
    )]
    BadWords {
        /// Sequences of tokens.
        words: usize,
        /// Tokens of all.
        tokens: usize,
    },
    /// No token that may be drawn.
    #[error("allowed_token_ids is empty; name a token at least, or leave it out")]
    NothingAllowed,
    /// A token that the model does not have.
    #[error("token id {id} in {field} is outside the vocabulary of {vocab} tokens")]
    RuleOutsideVocabulary {
        /// What names it.
        field: &'static str,
        /// The id.
        id: u32,
        /// Ids lie below it.
        vocab: u32,
    },
    /// Too many alternatives.
    #[error("logprobs is {0}; at most {TOP_LOGPROBS_MAX} alternatives can be given")]
    Logprobs(u32),
    /// Too many alternatives for the prompt's tokens.
    #[error("prompt_logprobs is {0}; at most {TOP_LOGPROBS_MAX} alternatives can be given")]
    PromptLogprobs(u32),
}

impl SamplingError {
    /// The field of a request that it is about, by OpenAI's or vLLM's name.
    pub fn field(&self) -> &'static str {
        match self {
            SamplingError::Temperature(_) => "temperature",
            SamplingError::TopP(_) => "top_p",
            SamplingError::MinP(_) => "min_p",
            SamplingError::RepetitionPenalty(_) => "repetition_penalty",
            SamplingError::PresencePenalty(_) => "presence_penalty",
            SamplingError::FrequencyPenalty(_) => "frequency_penalty",
            SamplingError::MinTokens { .. } => "min_tokens",
            SamplingError::MaxTokens | SamplingError::EmbedAlone => "max_tokens",
            SamplingError::Bias { .. } | SamplingError::BiasTwice(_) | SamplingError::Biases(_) => {
                "logit_bias"
            }
            SamplingError::StopTokens(_) => "stop_token_ids",
            SamplingError::EmptyBadWord | SamplingError::BadWords { .. } => "bad_words",
            SamplingError::NothingAllowed => "allowed_token_ids",
            SamplingError::RuleOutsideVocabulary { field, .. } => field,
            SamplingError::Logprobs(_) => "logprobs",
            SamplingError::PromptLogprobs(_) => "prompt_logprobs",
            SamplingError::Dimensions { .. } => "dimensions",
        }
    }
}
