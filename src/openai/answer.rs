//! What the API answers: a `chat.completion`, a `text_completion`, or an error.
//!
//! Invariant: without tool calls, reasoning and the prompt's log-probabilities, which are left out where there are none, every
//! field is one that the API declares, and every field that it requires is there.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::logprobs::{ChatLogprobs, PromptLogprobs, TextLogprobs};
use crate::request::{Completion, FinishReason};

/// A `chat.completion` or a `text_completion`.
#[derive(Debug, Serialize)]
pub struct Answer<'a, C> {
    /// Of the answer.
    pub id: String,
    /// Which of the two it is.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// As the request calls it.
    pub model: &'a str,
    /// One an output.
    pub choices: Vec<C>,
    /// Tokens in and out, over all choices.
    pub usage: Usage,
    /// Of a conversation's tokens, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
}

/// An output of a conversation.
#[derive(Debug, Serialize)]
pub struct ChatChoice<'a> {
    /// Its place.
    pub index: u32,
    /// What the assistant says.
    pub message: ChatMessage<'a>,
    /// Where they were asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: &'static str,
}

/// What the assistant says.
#[derive(Debug, Serialize)]
pub struct ChatMessage<'a> {
    /// `assistant`.
    pub role: &'static str,
    /// The text; null where there are tool calls alone.
    pub content: Option<&'a str>,
    /// Always null: nothing is refused in the API's sense.
    pub refusal: (),
    /// Calls of the request's tools.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub tool_calls: &'a [ToolCall],
    /// What the model thought before it answered, where that is told apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<&'a str>,
}

impl<'a> ChatMessage<'a> {
    /// A text and nothing else.
    pub fn text(content: &'a str) -> Self {
        ChatMessage {
            role: "assistant",
            content: Some(content),
            refusal: (),
            tool_calls: &[],
            reasoning_content: None,
        }
    }
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToolCall {
    /// By which a message with the tool's result names it.
    pub id: String,
    /// `function`.
    pub r#type: &'static str,
    /// What is called.
    pub function: FunctionCall,
}

impl ToolCall {
    /// A call by this name.
    pub fn new(id: String, function: FunctionCall) -> Self {
        ToolCall { id, r#type: "function", function }
    }
}

/// What is called, and with what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FunctionCall {
    /// The function's name.
    pub name: String,
    /// Its arguments: a JSON object as a text.
    pub arguments: String,
}

/// A continuation of a text.
#[derive(Debug, Serialize)]
pub struct TextChoice<'a> {
    /// Its place.
    pub index: u32,
    /// The output, behind the prompt where that is echoed.
    pub text: &'a str,
    /// Where they were asked for.
    pub logprobs: Option<TextLogprobs>,
    /// Of the prompt's tokens, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Why it ended.
    pub finish_reason: &'static str,
}

/// Tokens in and out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Of the prompts; one that has several outputs counts once.
    pub prompt_tokens: u32,
    /// Of the outputs.
    pub completion_tokens: u32,
    /// Both.
    pub total_tokens: u32,
    /// More about the prompts.
    pub prompt_tokens_details: PromptTokens,
}

/// More about the prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PromptTokens {
    /// Tokens that the prefix cache held.
    pub cached_tokens: u32,
}

impl Usage {
    /// Of outputs, those of each prompt together.
    pub fn of(completions: &[Completion]) -> Self {
        completions.iter().fold(Usage::default(), Usage::with)
    }

    /// One output more; its prompt counts where it is the prompt's first.
    pub fn with(mut self, completion: &Completion) -> Self {
        if completion.sample == 0 {
            self.prompt_tokens += completion.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += completion.cached_tokens;
        }
        self.completion_tokens += completion.token_ids.len() as u32;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
        self
    }
}

/// Why there is no answer.
#[derive(Debug, Serialize)]
pub struct ErrorBody<'a> {
    /// The object around it is the API's.
    pub error: ErrorObject<'a>,
}

/// An error.
#[derive(Debug, Serialize)]
pub struct ErrorObject<'a> {
    /// What is wrong and what to do.
    pub message: &'a str,
    /// Its kind: [`INVALID_REQUEST`], `server_error`, …
    pub r#type: &'a str,
    /// The field that it is about.
    pub param: Option<&'a str>,
    /// OpenAI's word for it, where it has one.
    pub code: Option<&'a str>,
}

/// The kind of errors that the request itself is to blame for.
pub const INVALID_REQUEST: &str = "invalid_request_error";

/// Seconds since 1970.
pub fn created_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// The API's word for an end; `None` where the request was aborted, rejected or failed.
pub fn finish_reason(reason: FinishReason) -> Option<&'static str> {
    match reason {
        FinishReason::Eos | FinishReason::Stop => Some("stop"),
        FinishReason::Length => Some("length"),
        FinishReason::Abort | FinishReason::Rejected | FinishReason::Failed => None,
    }
}
