//! What is wrong with a grammar.

use thiserror::Error;

/// A grammar that makes no constraint.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GrammarError {
    /// Too much text.
    #[error("the {what} has {bytes} bytes; at most {max} are taken")]
    TooLong {
        /// `JSON schema`, `regular expression`, …
        what: &'static str,
        /// Of its text.
        bytes: usize,
        /// That it may have.
        max: usize,
    },
    /// Too many brackets within each other.
    #[error("the {what} is nested more than {max} deep; make it flatter")]
    TooDeep {
        /// As above.
        what: &'static str,
        /// Levels that it may have.
        max: usize,
    },
    /// Nothing to choose from.
    #[error("the choice has no texts; give at least one, and none that is empty")]
    NoChoice,
    /// It can't be read, asks for what is not supported, or takes too much work.
    #[error("the {what} can't be used: {cause}")]
    Unusable {
        /// As above.
        what: &'static str,
        /// What llguidance says.
        cause: String,
    },
    /// A function whose calls can't be constrained.
    #[error("the parameters of the tool {name:?}: {cause}")]
    Function {
        /// Of the function.
        name: String,
        /// What is wrong with the schema of its arguments.
        cause: Box<GrammarError>,
    },
    /// The model's tokenizer is of no use for it.
    #[error("the model's tokenizer can't be constrained: {0}")]
    Vocabulary(String),
}
