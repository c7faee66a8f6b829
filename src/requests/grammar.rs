//! What a request may ask of its text.

use serde_json::Value;

use crate::tools::ToolCalls;

/// What an output is to be. It holds from the first token on; an end-of-sequence token is drawn only where the text is whole, and
/// where nothing may follow, the output ends by itself ([`FinishReason::Stop`](crate::FinishReason::Stop)). An output that
/// `max_tokens` cuts off is the beginning of such a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema(Value),
    /// Text that a regular expression matches as a whole, in the syntax of Rust's regex crate.
    Regex(String),
    /// Text that a grammar derives: Lark's syntax as llguidance takes it.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Calls of tools, as the model writes them. What it thinks may come first: where the prompt ends within a thought, and where
    /// `<think>` is a token of the model's and the prompt has not thought for it.
    Calls(ToolCalls),
}
