//! The API: what its requests ask for, and how their answers look.

pub mod asked;
pub mod body;
pub mod completions;
pub mod embeddings;
pub mod error;
pub mod heading;
pub mod large_bodies;
pub mod models;
pub mod output;
pub mod stream;
pub mod tokenize;
