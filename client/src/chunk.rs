//! What an event of a completion's stream says, from whichever service it comes.
//!
//! ```text
//!   {"choices": [{"delta": {"content": "Hel"}, …}]}         chat           ┐
//!   {"choices": [{"text": "Hel", "token_ids": [9], …}]}     completions    ├ a chunk
//!   {"choices": [], "usage": {…}}                           the last one   ┘
//!   {"error": {"message": …}}                               a failure on the way
//!   [DONE]                                                  the end
//! ```
//!
//! Fields that are not used here may be there or not, and be anything.

use serde::Deserialize;
use serde_json::Value;

/// An event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// More of the answer.
    Chunk(Chunk),
    /// Nothing comes behind it.
    Done,
}

/// Why an event is no part of an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEvent {
    /// The service says that it failed.
    #[error("the service broke off: {0}")]
    Failed(String),
    /// It is no JSON of a chunk's form.
    #[error("an event of its stream is no chunk of a completion: {0}")]
    NoChunk(String),
}

/// A part of the answer. Several choices of one request are taken together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// Of the answer.
    pub text: String,
    /// What the model thinks, where the service tells it from the answer.
    pub reasoning: String,
    /// How many tokens came, where the service says which they are.
    pub tokens: Option<u64>,
    /// Why the output ended, if it did.
    pub finish_reason: Option<String>,
    /// The request's tokens, in its last chunk.
    pub usage: Option<Usage>,
}

impl Chunk {
    /// Does it bring output? A role alone, an end or the usage is none.
    fn has_output(&self) -> bool {
        !self.text.is_empty() || !self.reasoning.is_empty() || self.tokens.is_some_and(|tokens| tokens > 0)
    }
}

/// Counts the tokens that a stream's chunks bring: one where it has output, unless the service says which tokens come. Text
/// that such a service sends without tokens (held back until it was certain) brings none.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenCount {
    tells: bool,
}

impl TokenCount {
    /// Those of the stream's next chunk.
    pub fn next(&mut self, chunk: &Chunk) -> u64 {
        self.tells |= chunk.tokens.is_some();
        match self.tells {
            true => chunk.tokens.unwrap_or(0),
            false => u64::from(chunk.has_output()),
        }
    }
}

/// Tokens of a request, as the service counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Of the prompt.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Of the output.
    #[serde(default)]
    pub completion_tokens: u64,
    /// More of the prompt's, where the service tells.
    #[serde(default)]
    prompt_tokens_details: Option<PromptTokens>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
struct PromptTokens {
    cached_tokens: Option<u64>,
}

impl Usage {
    /// Tokens of the prompt that the service had computed before.
    pub fn cached_tokens(&self) -> u64 {
        self.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0)
    }
}

/// Reads an event's data.
///
/// # Errors
/// A failure that the service tells, or what is no chunk.
pub fn read(data: &[u8]) -> Result<Event, BadEvent> {
    #[derive(Deserialize)]
    struct Json {
        #[serde(default)]
        choices: Vec<Choice>,
        usage: Option<Usage>,
        error: Option<Value>,
    }
    #[derive(Deserialize)]
    struct Choice {
        text: Option<String>,
        delta: Option<Delta>,
        token_ids: Option<Vec<u32>>,
        finish_reason: Option<String>,
    }
    #[derive(Default, Deserialize)]
    struct Delta {
        content: Option<String>,
        reasoning_content: Option<String>,
    }

    if data.trim_ascii() == b"[DONE]" {
        return Ok(Event::Done);
    }
    let json: Json = serde_json::from_slice(data).map_err(|error| BadEvent::NoChunk(error.to_string()))?;
    if let Some(error) = json.error {
        return Err(BadEvent::Failed(message_of(&error)));
    }
    let mut chunk = Chunk { usage: json.usage, ..Chunk::default() };
    for choice in json.choices {
        let delta = choice.delta.unwrap_or_default();
        chunk.text.extend([choice.text, delta.content].into_iter().flatten());
        chunk.reasoning.extend(delta.reasoning_content);
        if let Some(ids) = choice.token_ids {
            *chunk.tokens.get_or_insert(0) += ids.len() as u64;
        }
        chunk.finish_reason = choice.finish_reason.or(chunk.finish_reason);
    }
    Ok(Event::Chunk(chunk))
}

/// What an answer that is no success says of itself: the message of OpenAI's form of errors, or its beginning.
pub fn error_message(body: &[u8]) -> String {
    const SHOWN: usize = 300;
    match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(fields)) => {
            message_of(fields.get("error").or(fields.get("detail")).unwrap_or(&Value::Object(fields.clone())))
        }
        _ => String::from_utf8_lossy(body).trim().chars().take(SHOWN).collect(),
    }
}

fn message_of(error: &Value) -> String {
    match error {
        Value::String(message) => message.clone(),
        error => error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunk(data: &str) -> Chunk {
        match read(data.as_bytes()).unwrap() {
            Event::Chunk(chunk) => chunk,
            Event::Done => panic!("{data} is an end"),
        }
    }

    #[test]
    fn chunks_of_both_apis_are_read_whatever_else_they_hold() {
        let text = chunk(
            r#"{"id": "a", "choices": [{"index": 0, "text": "Hi", "logprobs": null, "token_ids": [4, 5]}]}"#,
        );
        assert_eq!((text.text.as_str(), text.tokens), ("Hi", Some(2)));
        let chat = chunk(
            r#"{"choices": [{"delta": {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}}], "usage": null}"#,
        );
        assert_eq!((chat.text.as_str(), chat.reasoning.as_str(), chat.tokens), ("Hi", "hm", None));
        assert!(chat.has_output());
        let role =
            chunk(r#"{"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}"#);
        assert!(!role.has_output());
        let end = chunk(r#"{"choices": [{"delta": {}, "finish_reason": "length"}]}"#);
        assert_eq!((end.has_output(), end.finish_reason.as_deref()), (false, Some("length")));
        assert_eq!(read(b" [DONE]\n").unwrap(), Event::Done);
    }

    #[test]
    fn tokens_are_those_that_are_told_or_else_one_where_there_is_output() {
        let text = |tokens| Chunk { text: "a".to_owned(), tokens, ..Chunk::default() };
        let mut silent = TokenCount::default();
        let counts = [text(None), Chunk::default(), text(None)].map(|chunk| silent.next(&chunk));
        assert_eq!(counts, [1, 0, 1]);
        let mut telling = TokenCount::default();
        let counts =
            [Chunk::default(), text(Some(2)), text(None), text(Some(1))].map(|chunk| telling.next(&chunk));
        assert_eq!(counts, [0, 2, 0, 1]);
    }

    #[test]
    fn usage_comes_with_what_the_service_had_computed_before() {
        let usage = |data| chunk(data).usage.unwrap();
        let whole = usage(
            r#"{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}}"#,
        );
        assert_eq!((whole.prompt_tokens, whole.completion_tokens, whole.cached_tokens()), (9, 3, 8));
        let bare = usage(r#"{"usage": {"prompt_tokens": 9, "prompt_tokens_details": null}}"#);
        assert_eq!((bare.completion_tokens, bare.cached_tokens()), (0, 0));
    }

    #[test]
    fn failures_are_told_in_the_services_own_words() {
        for (data, expected) in [
            (r#"{"error": {"message": "out of pages", "type": "x"}}"#, "the service broke off: out of pages"),
            (r#"{"error": "gone"}"#, "the service broke off: gone"),
            ("[1]", "is no chunk of a completion"),
            ("{", "is no chunk of a completion"),
        ] {
            let error = read(data.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(error_message(br#"{"error": {"message": "no"}}"#), "no");
        assert_eq!(error_message(br#"{"detail": "Not Found"}"#), "Not Found");
        assert_eq!(error_message(b"  <html>gone</html> "), "<html>gone</html>");
        assert_eq!(error_message(&[b'x'; 1000]).len(), 300);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_bad_to_be_told_what_is_wrong(data in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&data);
            let _ = error_message(&data);
        }
    }
}
