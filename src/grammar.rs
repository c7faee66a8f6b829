//! Constrained output: what a request may ask of its text, and who turns that into a constraint on tokens.
//!
//! The work is `minisgl-grammar`'s, behind the feature `grammar`. Its vocabulary is made of the tokenizer's, and its threads
//! start, when the first request asks for it.

use std::sync::Arc;
#[cfg(feature = "grammar")]
use std::sync::OnceLock;

use minisgl_core::constraint::Constraint;
#[cfg(feature = "grammar")]
use minisgl_grammar::{GrammarError, Grammars, TokenText, Vocabulary};
use serde_json::Value;

use crate::request::RequestError;
use crate::tokenizer::Text;

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
}

/// The tokens of a model.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    /// Ids lie below it.
    pub vocab: u32,
    /// Those that end a sequence.
    pub eos: Vec<u32>,
}

/// Makes constraints for an engine's model.
pub struct Compiler {
    text: Arc<Text>,
    tokens: Tokens,
    #[cfg(feature = "grammar")]
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

impl Compiler {
    /// For a model of these tokens.
    pub fn new(text: Arc<Text>, tokens: Tokens) -> Self {
        Compiler {
            text,
            tokens,
            #[cfg(feature = "grammar")]
            grammars: OnceLock::new(),
        }
    }

    /// A constraint of its own for a request. Takes as long as the grammar takes, some seconds at most, and longer the first time.
    ///
    /// # Errors
    /// A grammar, or a tokenizer, that can't be used.
    #[cfg(feature = "grammar")]
    pub fn compile(&self, grammar: &Grammar) -> Result<Arc<dyn Constraint>, RequestError> {
        let grammars = self.grammars.get_or_init(|| self.open());
        let compiled = grammars.as_ref().map_err(Clone::clone).and_then(|grammars| match grammar {
            Grammar::JsonObject => grammars.json_schema(&serde_json::json!({"type": "object"})),
            Grammar::JsonSchema(schema) => grammars.json_schema(schema),
            Grammar::Regex(expression) => grammars.regex(expression),
            Grammar::Lark(grammar) => grammars.lark(grammar),
            Grammar::Choice(texts) => grammars.choice(texts),
        });
        compiled.map_err(|error| RequestError::Grammar(error.to_string()))
    }

    /// There are none.
    #[cfg(not(feature = "grammar"))]
    pub fn compile(&self, _: &Grammar) -> Result<Arc<dyn Constraint>, RequestError> {
        let Compiler { text: _, tokens: _ } = self;
        Err(RequestError::Grammar(
            "this build has no constrained output; build it with the feature `grammar`".to_owned(),
        ))
    }

    #[cfg(feature = "grammar")]
    fn open(&self) -> Result<Grammars, GrammarError> {
        /// Masks of hundreds of rows are found beside a step by some threads.
        const THREADS_MAX: usize = 12;
        let pieces = self.text.pieces().filter(|pieces| pieces.row.is_some());
        let Some(pieces) = pieces else {
            return Err(GrammarError::Vocabulary("its text is not its tokens' bytes in a row".to_owned()));
        };
        let mut vocabulary =
            Vocabulary::new(self.tokens.vocab, &self.tokens.eos, |id| match pieces.get(id) {
                None | Some([]) => TokenText::Nothing,
                Some(name) if pieces.is_special(id) => TokenText::Special(name),
                Some(bytes) => TokenText::Bytes(bytes),
            });
        vocabulary.strips_first_space = pieces.row.is_some_and(|row| row.strips_first);
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Grammars::new(&vocabulary, (cores - 1).clamp(1, THREADS_MAX))
    }
}
