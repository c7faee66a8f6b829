//! What a request says of single tokens, with its bad words as tokens.
//!
//! A word is other tokens at the beginning of a text than behind a space, and neither may come up:
//!
//! ```text
//!   bad word  "cat"  ──>  [cat]   [Ġcat]
//! ```

use std::sync::Arc;

use minisgl_core::request::SubmitError;
use minisgl_core::rules::{BAD_WORD_WORDS_MAX, Rules};
use minisgl_core::sampling::SamplingError;

use super::Text;
use crate::request::{RequestError, TokenRules};

impl Text {
    /// The rules as the engine takes them; `None` where they ask for nothing.
    pub(crate) fn rules(&self, rules: TokenRules) -> Result<Option<Arc<Rules>>, RequestError> {
        let TokenRules { logit_bias, stop_token_ids, bad_words, allowed_token_ids } = rules;
        let bad_words = self.bad_words(&bad_words)?;
        let mut rules = Rules::new(logit_bias, stop_token_ids, &bad_words).map_err(refused)?;
        if let Some(ids) = allowed_token_ids {
            rules = rules.allowing(ids.to_vec()).map_err(refused)?;
        }
        Ok((!rules.is_empty()).then(|| Arc::new(rules)))
    }

    fn bad_words(&self, words: &[String]) -> Result<Vec<Vec<u32>>, RequestError> {
        // Too many of them, or too long ones, need not be encoded to be refused.
        let too_many = |tokens| refused(SamplingError::BadWords { words: words.len(), tokens });
        if words.len() >= BAD_WORD_WORDS_MAX {
            return Err(too_many(words.len()));
        }
        let mut all: Vec<Vec<u32>> = Vec::with_capacity(2 * words.len());
        for word in words.iter().map(|word| word.trim_start()) {
            if word.is_empty() {
                return Err(refused(SamplingError::EmptyBadWord));
            }
            for text in [word.to_owned(), format!(" {word}")] {
                let tokens = self.encode_text(&text, false, BAD_WORD_WORDS_MAX, "a bad word");
                let tokens = tokens.map_err(|error| match error {
                    RequestError::TextTooLong { limit, .. } => too_many(limit),
                    other => other,
                })?;
                if !all.contains(&tokens) {
                    all.push(tokens);
                }
            }
        }
        Ok(all)
    }
}

fn refused(error: SamplingError) -> RequestError {
    SubmitError::from(error).into()
}
