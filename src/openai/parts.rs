//! An output's text in its parts: what the model thinks, what it says, which tools it calls.
//!
//! ```text
//!   <think>Hm.</think>\n\nLet me look.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>
//!          Reasoning      Text            Call
//! ```
//!
//! Text comes piece by piece, as tokens do, and is passed on as soon as it can't be the beginning of a tag. A call is passed
//! on when it is whole. The parts do not depend on how the text is cut into pieces.
//!
//! Invariant: what is neither a tag, nor a call, nor white space beside one or at the beginning, comes out once and in order; a call that can't
//! be read comes out as the text that it is.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::answer::{ChatMessage, FunctionCall, ToolCall};
use crate::request::Completion;
use crate::tools::{CALL, CALL_END, PYTHON_TAG, THINK, THINK_END, ToolFormat};

/// A part of an output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputPart {
    /// More of what the model thinks.
    Reasoning(String),
    /// More of what it says.
    Text(String),
    /// A call.
    Call(FunctionCall),
}

/// What a model is known to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputFormat {
    /// Calls, where the request has tools.
    pub tools: Option<ToolFormat>,
    /// Is what it thinks told apart, and does the prompt end within it?
    pub reasoning: Option<bool>,
}

impl OutputFormat {
    /// Is all text what the model says?
    pub fn is_plain(&self) -> bool {
        *self == OutputFormat::default()
    }
}

/// Cuts an output into its parts.
#[derive(Debug)]
pub struct OutputParser {
    tools: Option<ToolFormat>,
    state: State,
    /// Text that is not passed on yet.
    held: String,
    /// Something was said since the last tag, or since the beginning: white space counts.
    begun: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// What comes first may be what the model thinks.
    Start,
    Reasoning,
    Text,
    /// Within `<tool_call>`.
    Call,
    /// The whole output is a call, it seems.
    BareCall,
}

impl OutputParser {
    /// Of an output that begins now.
    pub fn new(format: OutputFormat) -> Self {
        let state = match format.reasoning {
            Some(true) => State::Reasoning,
            Some(false) => State::Start,
            None => State::Text,
        };
        OutputParser { tools: format.tools, state, held: String::new(), begun: format.is_plain() }
    }

    /// Takes the next piece of text; what is certain goes to `out`.
    pub fn push(&mut self, text: &str, out: &mut Vec<OutputPart>) {
        self.held.push_str(text);
        while self.advance(out) {}
    }

    /// The text is over: the rest goes to `out`.
    pub fn finish(&mut self, out: &mut Vec<OutputPart>) {
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::Reasoning if rest.trim().is_empty() => {}
            State::Reasoning => out.push(OutputPart::Reasoning(rest.trim_end().to_owned())),
            State::BareCall => match bare_calls(&rest) {
                Some(calls) => out.extend(calls.into_iter().map(OutputPart::Call)),
                None => self.text(&rest, out),
            },
            State::Call => self.text(&format!("{CALL}{rest}"), out),
            State::Start | State::Text => self.text(&rest, out),
        }
    }

    /// Passes on what can be; true where there may be more.
    fn advance(&mut self, out: &mut Vec<OutputPart>) -> bool {
        match self.state {
            State::Start => {
                let begins = self.held.trim_start();
                if begins.is_empty() || (begins.len() < THINK.len() && THINK.starts_with(begins)) {
                    return false;
                }
                self.state = match begins.strip_prefix(THINK) {
                    Some(rest) => {
                        self.held = rest.to_owned();
                        State::Reasoning
                    }
                    None => State::Text,
                };
                true
            }
            State::Reasoning => self.advance_reasoning(out),
            State::Text => self.advance_text(out),
            State::Call => match self.held.find(CALL_END) {
                Some(at) => {
                    match call(self.held[..at].trim()) {
                        Some(call) => {
                            self.begun = false;
                            out.push(OutputPart::Call(call));
                        }
                        None => self.text(&format!("{CALL}{}", &self.held[..at + CALL_END.len()]), out),
                    }
                    self.held.drain(..at + CALL_END.len());
                    self.state = State::Text;
                    true
                }
                None => false,
            },
            State::BareCall => false,
        }
    }

    /// White space before the first word does not count.
    fn skip_blank(&mut self) {
        if !self.begun {
            let blank = self.held.len() - self.held.trim_start().len();
            self.held.drain(..blank);
        }
    }

    fn advance_reasoning(&mut self, out: &mut Vec<OutputPart>) -> bool {
        self.skip_blank();
        let end = self.held.find(THINK_END);
        let sure = match end {
            Some(at) => self.held[..at].trim_end().len(),
            None => certain(&self.held, THINK_END),
        };
        if sure > 0 {
            self.begun = true;
            out.push(OutputPart::Reasoning(self.held[..sure].to_owned()));
        }
        self.held.drain(..end.map_or(sure, |at| at + THINK_END.len()));
        if end.is_some() {
            self.begun = false;
            self.state = State::Text;
        }
        end.is_some()
    }

    fn advance_text(&mut self, out: &mut Vec<OutputPart>) -> bool {
        self.skip_blank();
        match self.tools {
            Some(ToolFormat::Qwen3) => {
                if let Some(at) = self.held.find(CALL) {
                    let said = self.held[..at].trim_end().to_owned();
                    self.text(&said, out);
                    self.held.drain(..at + CALL.len());
                    self.state = State::Call;
                    return true;
                }
                let sure = certain(&self.held, CALL);
                let said: String = self.held.drain(..sure).collect();
                self.text(&said, out);
            }
            Some(ToolFormat::Llama3) if !self.begun => {
                if PYTHON_TAG.starts_with(&*self.held) {
                    return false;
                }
                let behind = self.held.strip_prefix(PYTHON_TAG).map(str::trim_start);
                if behind.is_some_and(str::is_empty) {
                    return false;
                }
                match behind.unwrap_or(&self.held).starts_with('{') {
                    true => self.state = State::BareCall,
                    false => self.begun = true,
                }
                return true;
            }
            _ => {
                let said = std::mem::take(&mut self.held);
                self.text(&said, out);
            }
        }
        false
    }

    fn text(&mut self, text: &str, out: &mut Vec<OutputPart>) {
        if !text.is_empty() {
            self.begun = true;
            out.push(OutputPart::Text(text.to_owned()));
        }
    }
}

/// An output in its parts, each kind put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// What the model says.
    pub text: String,
    /// What it thinks, where that is told apart.
    pub reasoning: String,
    /// What it calls.
    pub calls: Vec<FunctionCall>,
}

impl Said {
    /// A whole output.
    pub fn of(completion: &Completion, format: OutputFormat) -> Self {
        let (mut parser, mut out) = (OutputParser::new(format), Vec::new());
        parser.push(completion.text.as_deref().unwrap_or_default(), &mut out);
        parser.finish(&mut out);
        let mut said = Said::default();
        for part in out {
            match part {
                OutputPart::Text(text) => said.text.push_str(&text),
                OutputPart::Reasoning(text) => said.reasoning.push_str(&text),
                OutputPart::Call(call) => said.calls.push(call),
            }
        }
        said
    }

    /// The calls, each with a name by which a message with its result tells which it is of.
    pub fn named_calls(&self, mut name: impl FnMut(usize) -> String) -> Vec<ToolCall> {
        let named =
            |(number, function): (usize, &FunctionCall)| ToolCall::new(name(number), function.clone());
        self.calls.iter().enumerate().map(named).collect()
    }

    /// Why it ended, where the API's word for its end alone is `reason`.
    pub fn finish_reason(&self, reason: &'static str) -> &'static str {
        if reason == "stop" && !self.calls.is_empty() { "tool_calls" } else { reason }
    }

    /// The message; its calls have these names.
    pub fn message<'a>(&'a self, calls: &'a [ToolCall]) -> ChatMessage<'a> {
        let silent = self.text.is_empty() && !calls.is_empty();
        ChatMessage {
            content: (!silent).then_some(self.text.as_str()),
            tool_calls: calls,
            reasoning_content: (!self.reasoning.is_empty()).then_some(self.reasoning.as_str()),
            ..ChatMessage::text("")
        }
    }
}

/// How many bytes of a text can't belong to `tag` or to white space before it.
fn certain(text: &str, tag: &str) -> usize {
    let begun = (1..tag.len().min(text.len() + 1)).rev().find(|len| text.ends_with(&tag[..*len]));
    text[..text.len() - begun.unwrap_or(0)].trim_end().len()
}

/// A call as models write it.
#[derive(Deserialize)]
struct Written<'a> {
    name: String,
    #[serde(borrow, alias = "parameters")]
    arguments: Option<&'a RawValue>,
}

impl Written<'_> {
    fn call(self) -> FunctionCall {
        let arguments = match self.arguments {
            // Some models write their JSON as a text.
            Some(raw) => serde_json::from_str(raw.get()).unwrap_or_else(|_| raw.get().to_owned()),
            None => "{}".to_owned(),
        };
        FunctionCall { name: self.name, arguments }
    }
}

fn call(json: &str) -> Option<FunctionCall> {
    serde_json::from_str(json).ok().map(Written::call)
}

/// Calls one behind the other, with semicolons between them or not.
fn bare_calls(text: &str) -> Option<Vec<FunctionCall>> {
    let mut rest = text.trim_start_matches(PYTHON_TAG).trim();
    let mut calls = Vec::new();
    while !rest.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<Written<'_>>();
        calls.push(stream.next()?.ok()?.call());
        rest = rest[stream.byte_offset()..].trim_start().trim_start_matches(';').trim_start();
    }
    (!calls.is_empty()).then_some(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN3: OutputFormat = OutputFormat { tools: Some(ToolFormat::Qwen3), reasoning: None };
    const LLAMA3: OutputFormat = OutputFormat { tools: Some(ToolFormat::Llama3), reasoning: None };
    const THINKS: OutputFormat = OutputFormat { tools: Some(ToolFormat::Qwen3), reasoning: Some(false) };

    /// The parts of a text given in pieces of so many characters, neighbours of a kind put together.
    fn in_pieces(text: &str, format: OutputFormat, size: usize) -> Vec<OutputPart> {
        let (mut parser, mut out) = (OutputParser::new(format), Vec::new());
        let characters: Vec<char> = text.chars().collect();
        for piece in characters.chunks(size) {
            parser.push(&piece.iter().collect::<String>(), &mut out);
        }
        parser.finish(&mut out);
        let mut joined: Vec<OutputPart> = Vec::new();
        for part in out {
            match (joined.last_mut(), part) {
                (Some(OutputPart::Text(text)), OutputPart::Text(more)) => text.push_str(&more),
                (Some(OutputPart::Reasoning(text)), OutputPart::Reasoning(more)) => text.push_str(&more),
                (_, part) => joined.push(part),
            }
        }
        joined
    }

    #[track_caller]
    fn check(text: &str, format: OutputFormat, expected: &[OutputPart]) {
        for size in [1, 2, 3, 7, 1000] {
            assert_eq!(in_pieces(text, format, size), expected, "in pieces of {size}: {text:?}");
        }
    }

    fn text(text: &str) -> OutputPart {
        OutputPart::Text(text.to_owned())
    }

    fn thought(text: &str) -> OutputPart {
        OutputPart::Reasoning(text.to_owned())
    }

    fn called(name: &str, arguments: &str) -> OutputPart {
        OutputPart::Call(FunctionCall { name: name.to_owned(), arguments: arguments.to_owned() })
    }

    #[test]
    fn calls_are_told_from_text_however_it_is_cut() {
        let call = r#"<tool_call>
{"name": "weather", "arguments": {"city": "Köln", "days": 1.0}}
</tool_call>"#;
        let weather = || called("weather", r#"{"city": "Köln", "days": 1.0}"#);
        check(call, QWEN3, &[weather()]);
        check(&format!("Let me see.\n\n{call}\n{call}"), QWEN3, &[text("Let me see."), weather(), weather()]);
        check(&format!("{call}\nDone. "), QWEN3, &[weather(), text("Done. ")]);
        check("a < b <tool_c> <tool_call", QWEN3, &[text("a < b <tool_c> <tool_call")]);
    }

    #[test]
    fn a_call_that_can_not_be_read_is_text() {
        for broken in [
            "<tool_call>{\"name\": 3}</tool_call> so",
            "<tool_call>\n{\"name\": \"f\", \"arg",
            "<tool_call></tool_call>",
        ] {
            check(broken, QWEN3, &[text(broken)]);
        }
        for broken in [r#"{"a": 1}"#, r#"{"name": "f", "parameters": {}} and more"#, "{", "{}"] {
            check(broken, LLAMA3, &[text(broken)]);
        }
    }

    #[test]
    fn llama_calls_are_the_whole_output() {
        let (a, b) = (r#"{"name": "f", "parameters": {"x": [1, 2]}}"#, r#"{"name": "g", "parameters": {}}"#);
        let expected = [called("f", r#"{"x": [1, 2]}"#), called("g", "{}")];
        check(a, LLAMA3, &expected[..1]);
        check(&format!("<|python_tag|>{a}"), LLAMA3, &expected[..1]);
        check(&format!("\n<|python_tag|> \n{a}; {b}\n"), LLAMA3, &expected);
        check(&format!(" {a}; {b}"), LLAMA3, &expected);
        check("Hello {\"name\"", LLAMA3, &[text("Hello {\"name\"")]);
        for said in ["<|python", "<|python_tag|>", "<|python_tag|> \n", "<|python_tag|>search.call(\"{}\")"] {
            check(said, LLAMA3, &[text(said)]);
        }
    }

    #[test]
    fn thoughts_are_told_from_the_answer() {
        check("<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", THINKS, &[thought("Hm.\n\nSo."), text("Yes.\n")]);
        check("<think>\n\n</think>\n\nYes.", THINKS, &[text("Yes.")]);
        check("No thought </think>", THINKS, &[text("No thought </think>")]);
        check("<think>cut off </thi", THINKS, &[thought("cut off </thi")]);
        let within = OutputFormat { reasoning: Some(true), ..THINKS };
        check("Hm.</think>Yes", within, &[thought("Hm."), text("Yes")]);
        let call = r#"<think>Hm</think><tool_call>{"name": "f", "arguments": "{\"x\": 1}"}</tool_call>"#;
        check(call, THINKS, &[thought("Hm"), called("f", r#"{"x": 1}"#)]);
    }

    #[test]
    fn plain_text_is_passed_on_at_once_and_whole() {
        let mut out = Vec::new();
        let mut parser = OutputParser::new(OutputFormat::default());
        parser.push(" \n<tool_call>", &mut out);
        assert_eq!(out, [text(" \n<tool_call>")]);
        // With tools all but what may be the beginning of a tag.
        let (mut parser, mut out) = (OutputParser::new(QWEN3), Vec::new());
        parser.push("Hello there <tool", &mut out);
        assert_eq!(out, [text("Hello there")]);
    }
}
