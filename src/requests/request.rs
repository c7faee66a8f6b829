//! What a user asks for and what comes back: requests, events, completions.
//!
//! ```text
//!   GenerateRequest ── submit ──> tag ──> Token, Token, …, Finished(Completion)
//!                                 └─────> Finished(Completion with `error`)      where it cannot run
//! ```
//!
//! Every request gets exactly one `Finished`, unless a step of the device fails first.

use std::sync::Arc;
use std::time::Duration;

use minisgl_core::sampling::RowLogprobs;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::grammar::Grammar;

pub use minisgl_core::batch::StepShape;
pub use minisgl_core::embedding::Embed;
pub use minisgl_core::request::SubmitError;
pub use minisgl_core::sampling::{
    PromptLogprobs, SamplingError, SamplingParams, TOP_LOGPROBS_MAX, prompt_seed, sample_seed,
};
pub use minisgl_core::stats::Load;

/// One message of a conversation: a JSON object, handed to the checkpoint's chat template as it is. Beside `role` and
/// `content` (a text, or a list of parts like `{"type": "text", "text": "…"}`) it has what else the template knows:
/// `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, …
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "JsonObject", into = "JsonObject")]
pub struct Message(JsonObject);

/// A JSON object, its keys in the order in which they were written.
pub type JsonObject = serde_json::Map<String, serde_json::Value>;

impl Message {
    /// A text said by `role`: `system`, `user`, `assistant`, or what else the template knows.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = JsonObject::new();
        fields.insert("role".to_owned(), role.into().into());
        fields.insert("content".to_owned(), content.into().into());
        Message(fields)
    }

    /// Sets a field.
    pub fn with(mut self, field: impl Into<String>, value: impl Into<serde_json::Value>) -> Self {
        self.0.insert(field.into(), value.into());
        self
    }

    /// All its fields.
    pub fn fields(&self) -> &JsonObject {
        &self.0
    }
}

impl TryFrom<JsonObject> for Message {
    type Error = NoRole;

    fn try_from(fields: JsonObject) -> Result<Self, NoRole> {
        match fields.get("role") {
            Some(serde_json::Value::String(_)) => Ok(Message(fields)),
            _ => Err(NoRole),
        }
    }
}

impl From<Message> for JsonObject {
    fn from(message: Message) -> Self {
        message.0
    }
}

/// A message that does not say whose it is.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a message has no role; give it one as a text, like \"user\"")]
pub struct NoRole;

/// A conversation, and what the chat template makes a prompt of it with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatPrompt {
    /// What was said so far.
    pub messages: Vec<Message>,
    /// Tools that the model may call, as the template wants them: mostly `{"type": "function", "function": {…}}`.
    pub tools: Option<Vec<serde_json::Value>>,
    /// Documents that the answer may rest on, for templates that know them.
    pub documents: Option<Vec<serde_json::Value>>,
    /// Further variables of the template, like `enable_thinking`.
    pub kwargs: JsonObject,
    /// End with what begins an answer of the assistant.
    pub add_generation_prompt: bool,
    /// End right behind the content of the final message, so that the output goes on with it. Needs
    /// `add_generation_prompt` to be false.
    pub continue_final_message: bool,
}

impl ChatPrompt {
    /// A conversation that the assistant answers.
    pub fn new(messages: impl Into<Vec<Message>>) -> Self {
        ChatPrompt {
            messages: messages.into(),
            tools: None,
            documents: None,
            kwargs: JsonObject::new(),
            add_generation_prompt: true,
            continue_final_message: false,
        }
    }

    /// A conversation whose final message the output goes on with.
    pub fn continuing(messages: impl Into<Vec<Message>>) -> Self {
        let add_generation_prompt = false;
        ChatPrompt { add_generation_prompt, continue_final_message: true, ..Self::new(messages) }
    }
}

/// What to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// Text, encoded by the checkpoint's tokenizer.
    Text(String),
    /// A conversation, rendered by the checkpoint's chat template.
    Chat(ChatPrompt),
    /// A document to be judged, as a Qwen3-Reranker is asked: [`Llm::rerank`](crate::Llm::rerank) scores its answers behind it.
    Rerank(RerankRequest),
}

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

/// Bytes of a request's stop texts at most, together.
pub const STOP_BYTES_MAX: usize = 4096;

/// Samples that may be asked for of a prompt; how many can run together is the engine's to say.
pub const SAMPLES_MAX: u32 = 1 << 16;

/// Tokens behind a prompt that nobody draws.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Given {
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// Text, encoded on its own and without special tokens.
    Text(String),
}

/// A document to be judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RerankRequest {
    /// What the query is for, in a sentence.
    pub instruction: String,
    /// What is looked for.
    pub query: String,
    /// Where it may be found.
    pub document: String,
}

impl RerankRequest {
    /// A document that may answer a search in the web: the model's usual instruction.
    pub fn new(query: impl Into<String>, document: impl Into<String>) -> Self {
        RerankRequest {
            instruction: "Given a web search query, retrieve relevant passages that answer the query"
                .to_owned(),
            query: query.into(),
            document: document.into(),
        }
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

/// Why a request can't run, or go on. It concerns that request alone; others go on.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum RequestError {
    /// The engine refuses it.
    #[error(transparent)]
    Refused(#[from] SubmitError),
    /// Text without a tokenizer.
    #[error(
        "{what} needs a tokenizer, and the model has none: put its tokenizer.json beside config.json, \
         or give the prompt as token ids (prompt_token_ids) without stop texts and grammars"
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

/// What happens during a run.
#[derive(Clone, Debug)]
pub enum StreamEvent<'a> {
    /// A request has another token.
    Token {
        /// Whose: its place among the requests.
        index: usize,
        /// Which of its samples.
        sample: u32,
        /// Its id.
        token: u32,
        /// Text that became certain with it: empty while a character, or what may be a stop text, is incomplete.
        text: &'a str,
        /// Where the request asks for them.
        logprobs: Option<&'a TokenLogprobs>,
    },
    /// A request, or one of its samples, ended.
    Finished {
        /// Whose.
        index: usize,
        /// Text that became certain with the end: with that of the tokens before, it makes the completion's text.
        text: &'a str,
        /// All that came of it.
        completion: Completion,
    },
    /// A step completed.
    Step(StepTiming),
}

/// What a call that completes a step spent its time on beside work of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BesideWork {
    /// Waiting for the device.
    pub waiting: Duration,
    /// In driver calls.
    pub driver: Duration,
}

/// A completed step: what ran, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepTiming {
    /// Which engine ran it, of those behind one queue, counted from 0.
    pub engine: u32,
    /// Its rows and tokens, padding included.
    pub shape: StepShape,
    /// Tokens that it drew and that came to the host with it.
    pub output_tokens: u32,
    /// What all engines together had on their hands when it was over, as far as they had told.
    pub load: Load,
    /// Milliseconds from the engine's first step to this one's start, by the device's clock.
    pub start_ms: f64,
    /// Milliseconds it took on the device.
    pub gpu_ms: f32,
    /// From the start of the session to when the host turned to the call that completed it.
    pub host_start: Duration,
    /// How long that call took, waiting included.
    pub host_time: Duration,
    /// How much of it was spent waiting for the device, and in its driver; `None` where the host is the device.
    pub beside_work: Option<BesideWork>,
}

/// What a stream's callback wants next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    #[default]
    Continue,
    /// Abort the request that the event is about, all its samples.
    AbortRequest,
    /// Abort every request, those not pulled yet included, and return.
    AbortAll,
}
