//! Constrained output: JSON schemas, regular expressions, grammars, choices and calls of tools, as the masks that the engine asks for.
//!
//! ```text
//!   tokenizer ── Vocabulary ──> Grammars ── compile ──> Follower, a request's Constraint
//!                                  │                       │ accept(token)        ^ state, mask
//!                                  └── workers (threads) <─┴── the next mask ─────┘
//! ```
//!
//! The work is llguidance's: a lexer of derivatives under an Earley parser, walked along a trie of the vocabulary's bytes. Here
//! it gets the vocabulary, limits, and threads: compiling takes as long as its caller waits, masks are found by workers, so that
//! the engine's thread only tells them tokens and copies what they found.
//!
//! Nothing that a grammar says may cost others much: its text is bounded in bytes and nesting, and llguidance counts the work of
//! compiling and of each mask. A grammar that exceeds a bound is an error of its own request.

mod calls;
mod compile;
mod error;
mod follower;
mod vocabulary;
mod workers;

pub use calls::{CallOf, Calls, Thought};
pub use compile::Grammars;
pub use error::GrammarError;
pub use vocabulary::{TokenText, Vocabulary};
