//! What a request goes on from: tokens, a text, a conversation, a document to be judged.

use serde::{Deserialize, Serialize};
use thiserror::Error;

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
