//! A request's tokens depend on the request alone: some requests of a run again, each by itself, and compared.

use serde::Serialize;

use crate::error::Error;
use crate::llm::Llm;
use crate::request::{Completion, GenerateRequest};

/// Whether requests run alone give the tokens that they gave in company.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Requests run alone.
    pub requests: usize,
    /// Those whose tokens differ.
    pub different: Vec<usize>,
}

/// Runs `count` of the requests alone, spread evenly over all, and compares their tokens with those of `together`, which has all
/// samples of each.
///
/// # Errors
/// A failed step.
pub fn verify(
    llm: &mut Llm,
    requests: &[GenerateRequest],
    together: &[Completion],
    count: usize,
) -> Result<Verification, Error> {
    let count = count.min(requests.len());
    let mut different = Vec::new();
    for i in 0..count {
        let index = i * requests.len() / count;
        llm.clear_prefix_cache();
        let alone = llm.generate(&requests[index..=index])?;
        let before: usize = requests[..index].iter().map(|request| request.samples as usize).sum();
        let tokens = |one: &Completion| one.token_ids.clone();
        if !alone.iter().map(tokens).eq(together.iter().skip(before).take(alone.len()).map(tokens)) {
            different.push(index);
        }
    }
    Ok(Verification { requests: count, different })
}
