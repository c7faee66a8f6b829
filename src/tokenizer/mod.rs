//! Text to token ids and back, as the checkpoint's own files say.
//!
//! ```text
//!   tokenizer.json, tokenizer_config.json   ──> encode, decode         (file.rs, config.rs, pieces.rs)
//!   chat_template.jinja, …                  ──> ChatPrompt ──> text    (chat)
//! ```
//!
//! All are optional: a checkpoint without them still takes and gives token ids.

mod bound;
pub mod config;
pub mod detokenize;
mod file;
pub mod pieces;
mod rules;

use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::json;
use tokenizers::Tokenizer;

use self::config::TokenizerConfig;
use self::pieces::Pieces;
use crate::chat::ChatTemplates;
use crate::error::Error;
use crate::request::{ChatPrompt, Given, Message, Prompt, RequestError};
use crate::tools::ToolFormat;

/// The text side of a checkpoint: its tokenizer and its chat templates, each where it has one.
#[derive(Default)]
pub struct Text {
    codec: Option<Codec>,
    templates: Option<ChatTemplates>,
    eos: Option<u32>,
    warnings: Vec<String>,
    /// Known when it was asked for.
    tool_format: OnceLock<Option<ToolFormat>>,
}

/// A tokenizer, and what its tokens stand for.
struct Codec {
    tokenizer: Tokenizer,
    pieces: Pieces,
    max_token_bytes: Option<usize>,
}

impl Codec {
    fn new(tokenizer: Tokenizer) -> Result<Self, String> {
        let pieces = Pieces::of(&tokenizer)?;
        let max_token_bytes = bound::max_token_bytes(&tokenizer, &pieces);
        Ok(Codec { tokenizer, pieces, max_token_bytes })
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Text")
            .field("eos", &self.eos)
            .field("warnings", &self.warnings)
            .finish_non_exhaustive()
    }
}

impl Text {
    /// Reads what there is in a checkpoint's folder.
    ///
    /// # Errors
    /// A file that is there but cannot be read. A chat template that does not compile is none: see
    /// [`Text::warnings`].
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let config = TokenizerConfig::open(folder)?;
        let codec = file::open(folder, &config)?;
        let templates = ChatTemplates::open(folder, &config)?;
        let mut warnings = templates.warnings().to_vec();
        let mut eos = None;
        if let (Some(codec), Some(token)) = (&codec, config.eos_token()) {
            eos = codec.tokenizer.token_to_id(token);
            if eos.is_none() {
                let path = config.path.display();
                warnings.push(format!("{path}: eos_token is {token:?}, which is no token of tokenizer.json"));
            }
        }
        Ok(Text { codec, templates: Some(templates), eos, warnings, tool_format: OnceLock::new() })
    }

    /// Is there a tokenizer?
    pub fn has_tokenizer(&self) -> bool {
        self.codec.is_some()
    }

    /// What the user should hear at the start: files that are of no use, though the model runs.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The tokenizer's end-of-sequence token; the model's own configuration may name others.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The tokens of a prompt.
    ///
    /// # Errors
    /// A text or a conversation that the checkpoint has no files for, or that they refuse.
    pub fn encode(&self, prompt: Prompt) -> Result<Vec<u32>, RequestError> {
        self.encode_within(prompt, usize::MAX)
    }

    /// The tokens of a prompt, of which `most` can be used. A text that has more may be encoded all the same, or refused
    /// without: if it is much too long, only its beginning is looked at.
    ///
    /// # Errors
    /// As for [`Text::encode`], and a text that is too long.
    pub fn encode_within(&self, prompt: Prompt, most: usize) -> Result<Vec<u32>, RequestError> {
        match prompt {
            Prompt::Tokens(ids) => Ok(ids),
            Prompt::Text(text) => self.encode_text(&text, true, most, "a text prompt"),
            // The template writes every special token itself.
            Prompt::Chat(chat) => self.encode_text(&self.render(&chat)?, false, most, "a conversation"),
            Prompt::Rerank(request) => {
                let encode = |part: String| self.encode_text(&part, false, most, "a document to be judged");
                Ok(request.parts().map(encode).into_iter().collect::<Result<Vec<_>, _>>()?.concat())
            }
        }
    }

    /// The tokens of what is given behind a prompt.
    ///
    /// # Errors
    /// As for [`Text::encode_within`].
    pub fn encode_given(&self, given: Given, most: usize) -> Result<Vec<u32>, RequestError> {
        match given {
            Given::Tokens(ids) => Ok(ids),
            Given::Text(text) => self.encode_text(&text, false, most, "a text to be scored"),
        }
    }

    fn encode_text(
        &self,
        text: &str,
        special: bool,
        most: usize,
        what: &'static str,
    ) -> Result<Vec<u32>, RequestError> {
        let codec = self.codec.as_ref().ok_or(RequestError::NoTokenizer { what })?;
        let bound = codec.max_token_bytes.and_then(|bytes| most.checked_mul(bytes));
        if bound.is_some_and(|bound| text.len() > bound) || bound::is_longer(text, most, &codec.tokenizer) {
            return Err(RequestError::TextTooLong { bytes: text.len(), limit: most });
        }
        let encoding = codec.tokenizer.encode_fast(text, special);
        let encoding = encoding.map_err(|error| RequestError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A token stands for at most so many bytes of a prompt's text: one of more than that many times the tokens that fit
    /// is too long, whatever it says. `None` where there is no such bound.
    pub fn max_token_bytes(&self) -> Option<usize> {
        self.codec.as_ref()?.max_token_bytes
    }

    /// The text that a conversation becomes.
    ///
    /// # Errors
    /// No template, or one that refuses these messages.
    pub fn render(&self, prompt: &ChatPrompt) -> Result<String, RequestError> {
        self.templates.as_ref().ok_or(RequestError::NoChatTemplate)?.render(prompt)
    }

    /// How the model writes calls of tools, where its chat template shows that.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        *self.tool_format.get_or_init(|| {
            let function =
                json!({"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}});
            let mut prompt = ChatPrompt::new([Message::new("user", "?")]);
            prompt.tools = Some(vec![json!({"type": "function", "function": function})]);
            ToolFormat::told_by(&self.render(&prompt).ok()?)
        })
    }

    /// Is a text a token of its own, and no special one?
    #[cfg(feature = "grammar")]
    pub(crate) fn is_text_token(&self, text: &str) -> bool {
        let Some(codec) = &self.codec else { return false };
        codec.tokenizer.token_to_id(text).is_some_and(|id| !codec.pieces.is_special(id))
    }

    /// The bytes that a token stands for, which may be a part of a character; a special token's are its name's. `None`
    /// for an id that is no token, or without a tokenizer.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.pieces()?.get(id).map(<[u8]>::to_vec)
    }

    /// All tokens' bytes.
    pub(crate) fn pieces(&self) -> Option<&Pieces> {
        self.codec.as_ref().map(|codec| &codec.pieces)
    }

    /// The text of tokens as the tokenizer's own decoder gives it, all at once.
    pub(crate) fn decode_whole(&self, ids: &[u32]) -> String {
        let Some(codec) = &self.codec else { return String::new() };
        // Some decoders panic where nothing is left to decode.
        let is_text = |id: &u32| !codec.pieces.is_special(*id) && codec.tokenizer.id_to_token(*id).is_some();
        match ids.iter().any(is_text) {
            true => codec.tokenizer.decode(ids, true).unwrap_or_default(),
            false => String::new(),
        }
    }
}
