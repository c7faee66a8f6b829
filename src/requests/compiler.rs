//! Constrained output: who turns what a request asks of its text into a constraint on tokens.
//!
//! The work is `minisgl-grammar`'s, behind the feature `grammar`. Its vocabulary is made of the tokenizer's, and its threads
//! start, when the first request asks for it.

use std::sync::Arc;
#[cfg(feature = "grammar")]
use std::sync::OnceLock;

use minisgl_core::constraint::Constraint;
#[cfg(feature = "grammar")]
use minisgl_grammar::{CallOf, Calls, GrammarError, Grammars, Thought, TokenText, Vocabulary};

use crate::grammar::Grammar;
use crate::request::RequestError;
use crate::tokenizer::Text;
#[cfg(feature = "grammar")]
use crate::tools::{Function, PYTHON_TAG, THINK, THINK_END, ToolCalls};

/// The tokens of a model.
#[derive(Clone, Debug, Default)]
#[cfg_attr(not(feature = "grammar"), expect(dead_code, reason = "constraints alone need them"))]
pub struct Tokens {
    /// Ids lie below it.
    pub vocab: u32,
    /// Those that end a sequence.
    pub eos: Vec<u32>,
}

/// Makes constraints for an engine's model.
#[cfg_attr(not(feature = "grammar"), expect(dead_code, reason = "without the feature it refuses"))]
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

    /// A constraint of its own for a request of these prompt tokens. Takes as long as the grammar takes, some seconds at most, and
    /// longer the first time.
    ///
    /// # Errors
    /// A grammar, or a tokenizer, that can't be used.
    #[cfg(feature = "grammar")]
    pub fn compile(&self, grammar: &Grammar, prompt: &[u32]) -> Result<Arc<dyn Constraint>, RequestError> {
        let unusable = |error: GrammarError| RequestError::Grammar(error.to_string());
        let grammars =
            self.grammars.get_or_init(|| self.open()).as_ref().map_err(|error| unusable(error.clone()))?;
        let compiled = match grammar {
            Grammar::JsonObject => grammars.json_schema(&serde_json::json!({"type": "object"})),
            Grammar::JsonSchema(schema) => grammars.json_schema(schema),
            Grammar::Regex(expression) => grammars.regex(expression),
            Grammar::Lark(grammar) => grammars.lark(grammar),
            Grammar::Choice(texts) => grammars.choice(texts),
            Grammar::Calls(calls) => grammars.calls(&self.calls(calls, prompt)?),
        };
        compiled.map_err(unusable)
    }

    /// There are none.
    #[cfg(not(feature = "grammar"))]
    pub fn compile(&self, _: &Grammar, _: &[u32]) -> Result<Arc<dyn Constraint>, RequestError> {
        Err(RequestError::Grammar(
            "this build has no constrained output; build it with the feature `grammar`".to_owned(),
        ))
    }

    /// Calls in the model's own form.
    #[cfg(feature = "grammar")]
    fn calls<'a>(&self, calls: &'a ToolCalls, prompt: &[u32]) -> Result<Calls<'a>, RequestError> {
        let ToolCalls { functions, format, required, parallel } = calls;
        let format = format.or_else(|| self.text.tool_format()).ok_or(RequestError::NoToolFormat)?;
        let of = |function: &'a Function| CallOf {
            name: &function.name,
            before: format.before_arguments(&function.name),
            arguments: &function.parameters,
        };
        Ok(Calls {
            functions: functions.iter().map(of).collect(),
            behind: format.behind_arguments(),
            between: format.between_calls(),
            opening: format.opening(),
            tag: PYTHON_TAG,
            thought_tags: (THINK, THINK_END),
            required: *required,
            parallel: *parallel,
            thought: self.thought(prompt),
        })
    }

    /// What the model thinks behind a prompt.
    #[cfg(feature = "grammar")]
    fn thought(&self, prompt: &[u32]) -> Option<Thought<'static>> {
        /// Tokens of a prompt's end that a tag and white space behind it take, at most.
        const END_TOKENS: usize = 16;
        let end = self.text.decode(&prompt[prompt.len().saturating_sub(END_TOKENS)..])?;
        let end = end.trim_end();
        match () {
            () if end.ends_with(THINK) => Some(Thought { begin: None, end: THINK_END }),
            () if end.ends_with(THINK_END) || !self.text.is_text_token(THINK) => None,
            () => Some(Thought { begin: Some(THINK), end: THINK_END }),
        }
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
