//! Text to token ids and back, as the checkpoint's own files say.
//!
//! ```text
//!   tokenizer.json          ──> encode, decode
//!   chat_template.jinja     ──> messages ──> text        (or `chat_template` in tokenizer_config.json)
//! ```
//!
//! Both are optional: a checkpoint without them still takes and gives token ids.

use std::path::Path;

use crate::chat::ChatTemplate;
use crate::error::Error;
use crate::request::{ChatPrompt, Prompt, RequestError};
use crate::token_bytes::token_bytes;

/// The text side of a checkpoint.
#[derive(Default)]
pub struct Text {
    tokenizer: Option<tokenizers::Tokenizer>,
    template: Option<ChatTemplate>,
}

impl Text {
    /// Reads what there is in a checkpoint's folder.
    ///
    /// # Errors
    /// A file that is there but cannot be read.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer.json");
        let tokenizer = match path.exists() {
            false => None,
            true => Some(
                tokenizers::Tokenizer::from_file(&path)
                    .map_err(|error| Error::TokenizerFile { path, reason: error.to_string() })?,
            ),
        };
        Ok(Text { tokenizer, template: ChatTemplate::open(folder)? })
    }

    /// Is there a tokenizer?
    pub fn has_tokenizer(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// The tokens of a prompt.
    ///
    /// # Errors
    /// A text or a conversation that the checkpoint has no files for, or that they refuse.
    pub fn encode(&self, prompt: Prompt) -> Result<Vec<u32>, RequestError> {
        match prompt {
            Prompt::Tokens(ids) => Ok(ids),
            Prompt::Text(text) => self.encode_text(&text, true, "a text prompt"),
            // The template writes every special token itself.
            Prompt::Chat(chat) => self.encode_text(&self.render(&chat)?, false, "a conversation"),
        }
    }

    fn encode_text(&self, text: &str, special: bool, what: &'static str) -> Result<Vec<u32>, RequestError> {
        let tokenizer = self.tokenizer.as_ref().ok_or(RequestError::NoTokenizer { what })?;
        let encoding =
            tokenizer.encode_fast(text, special).map_err(|error| RequestError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text that a conversation becomes.
    ///
    /// # Errors
    /// No template, or one that refuses these messages.
    pub fn render(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        self.template.as_ref().ok_or(RequestError::NoChatTemplate)?.render(prompt)
    }

    /// The bytes that a token stands for, special or not; `None` without a tokenizer, or where it has no such token.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        token_bytes(self.tokenizer.as_ref()?, id)
    }

    /// The text of tokens, special ones left out; incomplete characters become U+FFFD. `None` without a tokenizer.
    pub fn decode(&self, ids: &[u32]) -> Option<String> {
        self.tokenizer.as_ref()?.decode(ids, true).ok()
    }
}
