//! What becomes of a row's hidden state: a token that is drawn by its rules, or an embedding. Definitions that every backend follows.

pub mod constraint;
pub mod embedding;
pub mod rules;
pub mod sampling;
pub(crate) mod sampling_limits;
