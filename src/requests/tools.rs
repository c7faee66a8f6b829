//! Tools that a model may call: how it writes a call, and what calls its output is held to.
//!
//! ```text
//!   Qwen3     <tool_call>
//!             {"name": "f", "arguments": {…}}
//!             </tool_call>                         anywhere in the text, several in lines of their own
//!   Llama 3   {"name": "f", "parameters": {…}}     and nothing else, several behind semicolons
//! ```
//!
//! Models are trained to write calls so, and [`OutputParser`](crate::openai::OutputParser) reads them so.

use std::str::FromStr;

use serde_json::Value;

/// Around what a model thinks.
pub(crate) const THINK: &str = "<think>";
pub(crate) const THINK_END: &str = "</think>";
/// Around a call of Qwen3's.
pub(crate) const CALL: &str = "<tool_call>";
pub(crate) const CALL_END: &str = "</tool_call>";
/// What Llama 3 may write before calls.
pub(crate) const PYTHON_TAG: &str = "<|python_tag|>";

/// How a model writes calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Qwen3 (and Hermes) do, anywhere in the text.
    Qwen3,
    /// `{"name": …, "parameters": {…}}` and nothing else, several behind semicolons, as Llama 3 does.
    Llama3,
}

impl FromStr for ToolFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "qwen3" => Ok(ToolFormat::Qwen3),
            "llama3" => Ok(ToolFormat::Llama3),
            _ => Err(format!("{text} is no format of tool calls; use qwen3 or llama3")),
        }
    }
}

impl ToolFormat {
    /// The format that a prompt with a tool in it tells the model to use.
    pub(crate) fn told_by(prompt: &str) -> Option<Self> {
        match () {
            () if prompt.contains(CALL) => Some(ToolFormat::Qwen3),
            () if prompt.contains(r#""parameters": dictionary"#) => Some(ToolFormat::Llama3),
            () => None,
        }
    }

    /// What stands in front of the arguments of a function's call.
    #[cfg(feature = "grammar")]
    pub(crate) fn before_arguments(self, name: &str) -> String {
        let name = Value::from(name);
        match self {
            ToolFormat::Qwen3 => format!("{CALL}\n{{\"name\": {name}, \"arguments\": "),
            ToolFormat::Llama3 => format!("{{\"name\": {name}, \"parameters\": "),
        }
    }

    /// What stands behind them.
    #[cfg(feature = "grammar")]
    pub(crate) fn behind_arguments(self) -> &'static str {
        match self {
            ToolFormat::Qwen3 => "}\n</tool_call>",
            ToolFormat::Llama3 => "}",
        }
    }

    /// What a call begins with that stands in a text; `None`: calls are the whole output.
    #[cfg(feature = "grammar")]
    pub(crate) fn opening(self) -> Option<&'static str> {
        match self {
            ToolFormat::Qwen3 => Some(CALL),
            ToolFormat::Llama3 => None,
        }
    }

    /// Between two calls.
    #[cfg(feature = "grammar")]
    pub(crate) fn between_calls(self) -> &'static str {
        match self {
            ToolFormat::Qwen3 => "\n",
            ToolFormat::Llama3 => "; ",
        }
    }
}

/// A function that a model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// As calls name it.
    pub name: String,
    /// The JSON schema of its arguments, which are an object.
    pub parameters: Value,
}

/// Calls of tools that an output is held to: each is of one of these functions, with arguments that its schema describes.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCalls {
    /// Those that may be called.
    pub functions: Vec<Function>,
    /// How the model writes calls; `None`: as its chat template shows.
    pub format: Option<ToolFormat>,
    /// The output is calls, at least one, and nothing else but what the model thinks before. If not, it is text, in which
    /// calls may be.
    pub required: bool,
    /// There may be more than one.
    pub parallel: bool,
}
