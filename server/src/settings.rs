//! How the service behaves, beside what the engine is built with.

use std::time::Duration;

use minisgl::openai::ModelName;
use minisgl::{SamplingParams, ToolFormat};

/// All settings of the service.
#[derive(Clone, Debug)]
pub struct Settings {
    /// By which names requests may call the model.
    pub model: ModelName,
    /// Sampling that a request leaves out. Its seed and its number of tokens are not used: a request without a seed gets a
    /// random one, and see [`Settings::text_tokens`].
    pub sampling: SamplingParams,
    /// Output tokens of `/v1/completions` where a request does not say, as in OpenAI's API; a conversation's answer may
    /// then be as long as the engine allows.
    pub text_tokens: u32,
    /// Requests that may wait beside those that run; more are refused with status 429.
    pub queued_max: usize,
    /// Bytes of a request's body.
    pub body_bytes_max: usize,
    /// Connections at once; more wait to be accepted.
    pub connections_max: usize,
    /// How long a request's header may take to come, and how long a connection may idle between two requests.
    pub header_timeout: Duration,
    /// How long a request's body may take to come.
    pub body_timeout: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub write_timeout: Duration,
    /// How long requests may go on once the service is told to end.
    pub drain: Duration,
    /// Keys that clients may present; none: no key is asked for.
    pub api_keys: Vec<String>,
    /// Web pages of these origins may use the service.
    pub cors_origins: Vec<String>,
    /// How often an engine that failed is built anew.
    pub rebuilds_max: u32,
    /// How the model writes calls of tools; `None`: as its chat template shows.
    pub tool_format: Option<ToolFormat>,
    /// Tell what a model thinks between `<think>` and `</think>` from its answer.
    pub separate_reasoning: bool,
}

impl Settings {
    /// What is customary, for a model of these names.
    pub fn new(model: ModelName) -> Self {
        Settings {
            model,
            sampling: SamplingParams::default(),
            text_tokens: 16,
            queued_max: 1024,
            body_bytes_max: 8 << 20,
            connections_max: 8192,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            drain: Duration::from_secs(30),
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            rebuilds_max: 3,
            tool_format: None,
            separate_reasoning: false,
        }
    }
}
