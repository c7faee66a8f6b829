//! Going on within the final message: the prompt ends right behind its content.
//!
//! Where a template puts the content can't be known, so a mark is put behind it, and what was rendered is cut there:
//!
//! ```text
//!   "Well,"  ──>  "Well,MARK "  ──rendered──>  "…assistant\nWell,MARK <|im_end|>\n"  ──cut──>  "…assistant\nWell,"
//! ```
//!
//! The space at the mark's end shows whether the template strips the content: then so is what stands before the mark.

use super::python;
use crate::request::Message;

const MARK: &str = "END_OF_THE_FINAL_MESSAGE ";

/// The messages with the mark behind the final one's last text, and that text.
pub fn mark(messages: &[Message]) -> Option<(Vec<Message>, String)> {
    let (last, before) = messages.split_last()?;
    let mut content = last.fields().get("content")?.clone();
    let text = match &mut content {
        serde_json::Value::String(text) => text,
        serde_json::Value::Array(parts) => {
            parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
                Some(serde_json::Value::String(text)) => Some(text),
                _ => None,
            })?
        }
        _ => return None,
    };
    let continued = text.clone();
    text.push_str(MARK);
    let messages = before.iter().cloned().chain([last.clone().with("content", content)]).collect();
    Some((messages, continued))
}

/// What was rendered up to the mark; `None` if the message is not in it.
pub fn cut(mut rendered: String, continued: &str) -> Option<String> {
    let at = rendered.rfind(MARK.trim_end())?;
    if !rendered.contains(continued.trim_matches(python::is_space)) {
        return None;
    }
    let as_given = rendered[at..].starts_with(MARK);
    rendered.truncate(at);
    if !as_given {
        rendered.truncate(rendered.trim_end_matches(python::is_space).len());
    }
    Some(rendered)
}
