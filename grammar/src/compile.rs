//! Grammars to constraints, within bounds.
//!
//! A grammar that was compiled a short while ago is copied instead: files of requests mostly have one schema for all.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::thread;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use minisgl_core::constraint::Constraint;
use serde_json::Value;

use crate::calls::Calls;
use crate::error::GrammarError;
use crate::follower::{Follower, Parser};
use crate::vocabulary::Vocabulary;
use crate::workers::{Workers, locked};

/// Bytes of a grammar's text at most.
const BYTES_MAX: usize = 64 << 10;
/// Brackets within each other.
const DEPTH_MAX: usize = 100;
/// White space between two parts of a JSON text at most: a model that is at a loss would write it for ever.
const WHITE_SPACE: &str = r"[ \n\r\t]{1,64}";
/// Of the thread that compiles. What is not touched takes no memory.
const STACK_BYTES: usize = 256 << 20;
/// Grammars kept for the next that are the same.
const KEPT: usize = 32;
/// What is said of a grammar that can't be used, at most.
const CAUSE_MAX: usize = 300;

/// Work of compiling a grammar and of finding a mask: some tens of milliseconds each at most.
fn limits() -> ParserLimits {
    ParserLimits {
        max_lexer_states: 20_000,
        max_grammar_size: 100_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Makes constraints over a model's vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    lost_at_the_beginning: Vec<u32>,
    workers: Arc<Workers>,
    /// The newest last.
    kept: Mutex<VecDeque<(Source, Parser)>>,
}

/// A grammar's form and text.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    what: &'static str,
    text: String,
}

impl Grammars {
    /// Prepares a vocabulary, which takes a second for 150,000 tokens; masks are found by so many threads.
    ///
    /// # Errors
    /// A vocabulary that makes no trie, or threads that the system does not give.
    pub fn new(vocabulary: &Vocabulary, threads: usize) -> Result<Self, GrammarError> {
        let unusable = |error: &dyn std::fmt::Display| GrammarError::Vocabulary(error.to_string());
        let mut factory = ParserFactory::new_simple(&vocabulary.trie()?).map_err(|error| unusable(&error))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Grammars {
            factory,
            lost_at_the_beginning: vocabulary.lost_at_the_beginning(),
            workers: Arc::new(Workers::new(threads).map_err(|error| unusable(&error))?),
            kept: Mutex::default(),
        })
    }

    /// JSON that a schema describes.
    ///
    /// # Errors
    /// A schema that can't be used.
    pub fn json_schema(&self, schema: &Value) -> Result<Arc<dyn Constraint>, GrammarError> {
        self.constraint("JSON schema", schema.to_string(), |_| {
            let whitespace_pattern = Some(WHITE_SPACE.to_owned());
            let options = JsonCompileOptions { whitespace_pattern, ..JsonCompileOptions::default() };
            TopLevelGrammar::from_json_schema(written(schema, options))
        })
    }

    /// Calls of functions, as a model writes them: their arguments with the white space of Python's `json.dumps`, by which models are
    /// trained.
    ///
    /// # Errors
    /// No functions, or one whose arguments' schema can't be used.
    pub fn calls(&self, calls: &Calls<'_>) -> Result<Arc<dyn Constraint>, GrammarError> {
        let options = || JsonCompileOptions {
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
            whitespace_flexible: false,
            ..JsonCompileOptions::default()
        };
        let lark = calls.lark(|schema| written(schema, options()));
        let whole = self.constraint("tools", lark, |text| TopLevelGrammar::from_lark(text.to_owned()));
        whole.map_err(|error| {
            // Whose fault it is.
            let at_fault = calls.functions.iter().find_map(|function| {
                let cause = match error {
                    GrammarError::Unusable { .. } => self.json_schema(function.arguments).err(),
                    // Found before any work, and so is this: there may be thousands of functions.
                    _ => check_size("JSON schema", &function.arguments.to_string()).err(),
                }?;
                Some(GrammarError::Function { name: shortened(function.name), cause: Box::new(cause) })
            });
            at_fault.unwrap_or(error)
        })
    }

    /// Text that a regular expression matches as a whole, in the syntax of Rust's regex crate.
    ///
    /// # Errors
    /// An expression that can't be used.
    pub fn regex(&self, regex: &str) -> Result<Arc<dyn Constraint>, GrammarError> {
        self.constraint("regular expression", regex.to_owned(), TopLevelGrammar::from_regex)
    }

    /// Text that a grammar derives, in llguidance's form of Lark's syntax.
    ///
    /// # Errors
    /// A grammar that can't be used.
    pub fn lark(&self, grammar: &str) -> Result<Arc<dyn Constraint>, GrammarError> {
        self.constraint("grammar", grammar.to_owned(), |text| TopLevelGrammar::from_lark(text.to_owned()))
    }

    /// One of these texts.
    ///
    /// # Errors
    /// None, or texts that can't be used.
    pub fn choice(&self, texts: &[String]) -> Result<Arc<dyn Constraint>, GrammarError> {
        if texts.is_empty() || texts.iter().any(String::is_empty) {
            return Err(GrammarError::NoChoice);
        }
        let alternatives: Vec<String> = texts.iter().map(|text| escaped(text)).collect();
        self.constraint("choice", alternatives.join("|"), TopLevelGrammar::from_regex)
    }

    fn constraint(
        &self,
        what: &'static str,
        text: String,
        grammar: impl FnOnce(&str) -> TopLevelGrammar + Send,
    ) -> Result<Arc<dyn Constraint>, GrammarError> {
        check_size(what, &text)?;
        let source = Source { what, text };
        let parser = match self.kept(&source) {
            Some(parser) => parser,
            None => self.compile(source, grammar)?,
        };
        Ok(Arc::new(Follower::new(parser, self.workers.clone())))
    }

    fn kept(&self, source: &Source) -> Option<Parser> {
        let mut kept = locked(&self.kept);
        let at = kept.iter().position(|(other, _)| other == source)?;
        let found = kept.remove(at)?;
        let parser = found.1.fork();
        kept.push_back(found);
        Some(parser)
    }

    fn compile(
        &self,
        source: Source,
        grammar: impl FnOnce(&str) -> TopLevelGrammar + Send,
    ) -> Result<Parser, GrammarError> {
        let unusable = |cause: String| GrammarError::Unusable { what: source.what, cause: shortened(&cause) };
        let parser = on_deep_stack(|| {
            let parser = self.factory.create_parser(grammar(&source.text));
            let parser = parser.map_err(|error| format!("{error:#}"))?;
            Parser::new(Matcher::new(Ok(parser)), &self.lost_at_the_beginning)
        });
        let parser = parser.map_err(unusable)?;
        let mut kept = locked(&self.kept);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((source, parser.fork()));
        Ok(parser)
    }
}

/// A schema whose texts are written so, unless it says itself how they are.
fn written(schema: &Value, options: JsonCompileOptions) -> Value {
    let mut schema = schema.clone();
    if let Some(fields) = schema.as_object_mut()
        && !fields.contains_key("x-guidance")
    {
        options.apply_to(&mut schema);
    }
    schema
}

/// Does what recurses as deep as a grammar goes.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("minisgl-grammar".to_owned()).stack_size(STACK_BYTES);
        match thread.spawn_scoped(scope, work) {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err("the compiler panicked".to_owned())),
            Err(error) => Err(format!("no thread to compile it: {error}")),
        }
    })
}

fn check_size(what: &'static str, text: &str) -> Result<(), GrammarError> {
    let (bytes, max) = (text.len(), BYTES_MAX);
    if bytes > max {
        return Err(GrammarError::TooLong { what, bytes, max });
    }
    let mut depth = 0usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEPTH_MAX {
            return Err(GrammarError::TooDeep { what, max: DEPTH_MAX });
        }
    }
    Ok(())
}

/// A regular expression that matches a text alone.
fn escaped(text: &str) -> String {
    let escape = |c: char| match c {
        c if c.is_ascii_punctuation() || c.is_control() => format!("\\x{{{:x}}}", u32::from(c)),
        c => c.to_string(),
    };
    text.chars().map(escape).collect()
}

/// The beginning of what is said, in a line.
fn shortened(cause: &str) -> String {
    // What is said of a panic has a backtrace.
    let cause = cause.split("<backtrace>").next().unwrap_or_default().replace("<non-verbose/>", "");
    let cause = cause.split_whitespace().collect::<Vec<_>>().join(" ");
    match cause.char_indices().nth(CAUSE_MAX) {
        Some((at, _)) => format!("{}…", &cause[..at]),
        None => cause,
    }
}
