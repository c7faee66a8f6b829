//! What an answer says of itself, whole or in chunks, and the words that both have.

use std::sync::Arc;

use minisgl::Completion;
use minisgl::openai::{created_now, finish_reason};

use crate::app::App;
use crate::asked::Asked;
use crate::random::random_id;

/// What an answer says of itself, whole or in chunks.
#[derive(Clone, Debug)]
pub struct Heading {
    /// Of the answer.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// As the request calls it.
    pub model: Arc<str>,
}

impl Heading {
    /// Of an answer whose id begins so.
    pub fn new(app: &App, asked: &Asked, prefix: &str) -> Heading {
        let model = asked.body.model.as_ref().unwrap_or(app.settings.model.first()).clone();
        Heading { id: random_id(prefix), created: created_now(), model }
    }
}

/// A call gets a name by which its result is told.
pub fn call_name() -> String {
    random_id("call")
}

/// Why an output ended, in the API's words.
pub fn end_of(completion: &Completion, called: bool) -> &'static str {
    match finish_reason(completion.finish_reason) {
        Some("stop") | None if called => "tool_calls",
        Some(reason) => reason,
        None => "stop",
    }
}
