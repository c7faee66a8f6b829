//! What may be asked of an engine: text that is drawn, held to a grammar or to tools, scored, judged or embedded.

pub mod compiler;
pub mod embed;
pub mod grammar;
pub mod request;
pub mod rerank;
pub mod score;
pub mod streaming;
pub mod tools;
