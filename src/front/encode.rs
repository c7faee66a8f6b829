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

use super::fair::Waiting;
use super::output::Output;
use super::ready::Ready;
use crate::grammar::Grammar;
use crate::request::{Given, Prompt, RequestError, TokenRules};
use crate::tokenizer::Text;

/// Makes a model's tokens of texts.
pub struct Encoder {
    pub text: Arc<Text>,
    /// Tokens of the longest sequence.
    pub longest: usize,
}

impl Encoder {
    /// The tokens of a prompt. One that is much too long to leave room for `room` tokens is refused without.
    fn prompt(&self, prompt: Prompt, room: u32) -> Result<Vec<u32>, RequestError> {
        self.text.encode_within(prompt, self.longest.saturating_sub(room as usize))
    }

    /// Likewise of what is given behind a prompt.
    fn given(&self, given: Given, room: u32) -> Result<Vec<u32>, RequestError> {
        self.text.encode_given(given, self.longest.saturating_sub(room as usize))
    }
}

/// A request that is to be encoded.
pub struct ToEncode {
    pub prompt: Prompt,
    pub given: Option<Given>,
    pub params: SamplingParams,
    pub rules: TokenRules,
    pub grammar: Option<Arc<Grammar>>,
    pub outputs: Vec<Output>,
}

impl Waiting for ToEncode {
    fn session(&self) -> u64 {
        self.outputs.first().map_or(0, |output| output.session().id)
    }
}

impl ToEncode {
    /// The request with its tokens, and its grammar if it is to be compiled; `None` if it has ended here.
    pub fn encode(self, encoder: &Encoder) -> Option<(Option<Arc<Grammar>>, Ready)> {
        if self.outputs.iter().all(|output| output.is_unwanted()) {
            return Some((None, Ready::new(Vec::new(), None, self.params, self.outputs)));
        }
        // A tokenizer is a program of others', and a file of the user's makes it.
        let room = self.params.max_tokens.min(1);
        let encode = || -> Result<_, RequestError> {
            let rules = encoder.text.rules(self.rules)?;
            let prompt = encoder.prompt(self.prompt, room)?;
            if self.given.is_some() && prompt.is_empty() {
                // What is scored follows something: the first token would have no probability.
                return Err(SubmitError::EmptyPrompt.into());
            }
            let given = self.given.map(|given| encoder.given(given, room)).transpose()?;
            Ok((prompt, given, rules))
        };
        let encoded = catch_unwind(AssertUnwindSafe(encode));
        let encoded = encoded.unwrap_or_else(|_| Err(RequestError::Encode("it panicked".to_owned())));
        match encoded {
            Ok((prompt, given, rules)) => {
                let ready = Ready { rules, ..Ready::new(prompt, given, self.params, self.outputs) };
                Some((self.grammar, ready))
            }
            Err(error) => {
                self.outputs.into_iter().for_each(|output| output.reject(error.clone()));
                None
            }
        }
    }
}
