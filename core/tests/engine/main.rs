//! The engine's promises, one by one, through its public API.

mod cache;
mod constraints;
mod drafts;
mod memory;
mod requests;
mod samples;
mod steps;
#[path = "../support/mod.rs"]
mod support;

use minisgl_core::config::Limits;
use minisgl_core::sampling::SamplingParams;

use support::expected::{VOCAB, alone};

/// A prompt of so many tokens that no other `text` begins with.
fn prompt(text: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| if i == 0 { text } else { (i * 5 + text) % VOCAB }).collect()
}

/// What requests give alone under these limits.
fn expected_tokens(requests: &[(Vec<u32>, SamplingParams)], limits: &Limits) -> Vec<Vec<u32>> {
    requests.iter().map(|(prompt, params)| alone(prompt, params, limits.sequence).0).collect()
}

fn tokens(outcomes: Vec<support::Outcome>) -> Vec<Vec<u32>> {
    outcomes.into_iter().map(|outcome| outcome.tokens).collect()
}
