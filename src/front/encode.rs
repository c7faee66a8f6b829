//! Prompts to token ids, on threads of their own: a chat template and a tokenizer take a millisecond or a second, and
//! neither the engine nor the caller waits for them.
//!
//! ```text
//!   text, conversation ──> by turns of the sessions ──> thread 1 … n: render, encode ──> the engine's thread
//!                                                                        └── refused ──> the request's end
//! ```
//!
//! Requests may overtake each other here by as many as there are threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use minisgl_core::request::SubmitError;
use minisgl_core::sampling::SamplingParams;

use super::engine::Ready;
use super::fair::Waiting;
use super::handle::Shared;
use super::output::Output;
use crate::grammar::Grammar;
use crate::request::{Given, Prompt, RequestError, TokenRules};

/// A request that is to be encoded.
pub struct Job {
    pub prompt: Prompt,
    pub given: Option<Given>,
    pub params: SamplingParams,
    pub rules: TokenRules,
    pub grammar: Option<Arc<Grammar>>,
    pub outputs: Vec<Output>,
}

impl Waiting for Job {
    fn session(&self) -> u64 {
        self.outputs.first().map_or(0, |output| output.session())
    }
}

impl Job {
    /// The request, ready for the engine; `None` if it has ended here, or goes on to be compiled.
    pub fn encode(self, shared: &Shared) -> Option<Ready> {
        if self.outputs.iter().all(|output| output.is_unwanted()) {
            return Some(Ready::new(Vec::new(), None, self.params, self.outputs));
        }
        // A tokenizer is a program of others', and a file of the user's makes it.
        let room = self.params.max_tokens.min(1);
        let encode = || -> Result<_, RequestError> {
            let rules = shared.text.rules(self.rules)?;
            let prompt = shared.encode(self.prompt, room)?;
            if self.given.is_some() && prompt.is_empty() {
                // What is scored follows something: the first token would have no probability.
                return Err(SubmitError::EmptyPrompt.into());
            }
            let given = self.given.map(|given| shared.encode_given(given, room)).transpose()?;
            Ok((prompt, given, rules))
        };
        let encoded = catch_unwind(AssertUnwindSafe(encode));
        let encoded = encoded.unwrap_or_else(|_| Err(RequestError::Encode("it panicked".to_owned())));
        match encoded {
            Ok((prompt, given, rules)) => {
                let ready = Ready { rules, ..Ready::new(prompt, given, self.params, self.outputs) };
                shared.constrained(self.grammar, ready)
            }
            Err(error) => {
                self.outputs.into_iter().for_each(|output| output.reject(error.clone()));
                None
            }
        }
    }
}
