//! Why a request can't run, each with what to do.

use minisgl_core::request::SubmitError;
use thiserror::Error;

use super::{SAMPLES_MAX, STOP_BYTES_MAX};

/// Why a request can't run, or go on. It concerns that request alone; others go on.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum RequestError {
    /// The engine refuses it.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// Text without a tokenizer.
    #[error(
        "{what} needs a tokenizer, and the model has none: put its tokenizer.json beside config.json \
         (transformers makes one of other files: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), or give the prompt as token \
         ids (prompt_token_ids) without stop texts and grammars"
    )]
    NoTokenizer {
        /// What was given: `a text prompt`, `a stop text`, …
        what: &'static str,
    },
    /// A conversation without a template.
    #[error(
        "chat messages need a chat template, and the model has none: put chat_template.jinja (or a \
         tokenizer_config.json with chat_template) beside config.json, or give the prompt as text"
    )]
    NoChatTemplate,
    /// A chat template that is of no use for any request.
    #[error("the model's chat template can't be used: {0}; give the prompt as text (prompt) or token ids")]
    BrokenChatTemplate(String),
    /// The template failed on these messages.
    #[error("the chat template refuses the messages: {0}")]
    ChatTemplate(String),
    /// The tokenizer failed on this text.
    #[error("the tokenizer cannot encode the prompt: {0}")]
    Encode(String),
    /// A text of more tokens than can be used; how many was not counted.
    #[error(
        "the prompt's text of {bytes} bytes has more than the {limit} tokens that leave room for an output token; \
         shorten it or raise the sequence limit (--max-seq-len)"
    )]
    TextTooLong {
        /// Of the text.
        bytes: usize,
        /// Tokens of the longest prompt that can run.
        limit: usize,
    },
    /// The model gave NaN or infinity.
    #[error(
        "the model's logits, or hidden states, are not numbers (NaN or infinite), so nothing came of them: its weights are damaged, or its \
         activations overflow; download the checkpoint again, or try --backend cpu, which computes in f32"
    )]
    NotNumbers,
    /// The engine that ran it failed; others go on.
    #[error(
        "the engine that ran the request failed: {cause}; the other engines go on, so submit it again, and restart the program \
         to have all engines back"
    )]
    EngineFailed {
        /// What failed.
        cause: String,
    },
    /// Calls of tools in a form that is not known.
    #[error(
        "the model's chat template shows no format of tool calls that is known (qwen3, llama3), so its output can't be held to \
         one; leave tools out, or let it choose (tool_choice \"auto\", no strict tools)"
    )]
    NoToolFormat,
    /// A grammar that can't be used.
    #[error("{0}")]
    Grammar(String),
    /// A grammar for which no mask could be found on the way.
    #[error(
        "its grammar takes more work to follow than is spent on a token; make it simpler (fewer alternatives, shorter repetitions)"
    )]
    GrammarFailed,
    /// What it says of its tokens forbids all of them.
    #[error(
        "no token is left to go on with: its grammar or allowed_token_ids allow none beside the others' and those that bad_words and \
         min_tokens forbid; drop one of them, or allow more tokens (the end-of-sequence token too, where the output may end)"
    )]
    NoTokenLeft,
    /// No output is asked for.
    #[error("{samples} samples are asked for; it must be at least one, and at most {SAMPLES_MAX}")]
    Samples {
        /// As asked for.
        samples: u32,
    },
    /// More stop texts than can be looked for at each token, which one thread does for all requests.
    #[error(
        "stop texts have {bytes} bytes together; at most {STOP_BYTES_MAX} can be looked for: shorten them, or give fewer"
    )]
    StopTexts {
        /// Of all of them.
        bytes: usize,
    },
    /// Embeddings that the checkpoint's files want made in another way.
    #[error("the model's embeddings can't be made: {0}")]
    Pooling(String),
    /// It would end every output at once.
    #[error("a stop text is empty; leave it out, or give at least one character")]
    EmptyStop,
}

impl RequestError {
    /// What kind of failure it is, in a few words: for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            RequestError::Refused(SubmitError::QueueFull { .. }) => "queue full",
            RequestError::Refused(SubmitError::TooManySamples { .. }) => "too many samples",
            RequestError::Refused(SubmitError::EmptyPrompt) => "empty prompt",
            RequestError::Refused(SubmitError::PromptTooLong { .. }) => "prompt too long",
            RequestError::Refused(SubmitError::TokenOutsideVocabulary { .. }) => {
                "token outside the vocabulary"
            }
            RequestError::Refused(SubmitError::Stopped) => "engine stopped",
            RequestError::Refused(SubmitError::NoHead) => "no output layer",
            RequestError::Refused(SubmitError::Sampling(_)) => "sampling parameter out of range",
            RequestError::NoTokenizer { .. } => "no tokenizer",
            RequestError::NoChatTemplate => "no chat template",
            RequestError::BrokenChatTemplate(_) => "broken chat template",
            RequestError::ChatTemplate(_) => "refused by the chat template",
            RequestError::Encode(_) => "not encodable",
            RequestError::TextTooLong { .. } => "prompt too long",
            RequestError::NotNumbers => "logits that are no numbers",
            RequestError::EngineFailed { .. } => "engine failed",
            RequestError::NoToolFormat => "no format of tool calls",
            RequestError::Grammar(_) => "unusable grammar",
            RequestError::GrammarFailed => "grammar too complex",
            RequestError::NoTokenLeft => "no token left",
            RequestError::Samples { .. } => "number of samples",
            RequestError::StopTexts { .. } => "too long stop texts",
            RequestError::Pooling(_) => "unsupported pooling",
            RequestError::EmptyStop => "empty stop text",
        }
    }
}
