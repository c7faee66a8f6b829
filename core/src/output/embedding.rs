//! What a model makes of a text as a whole: the definition that every backend follows.
//!
//! ```text
//!   prompt ── layers ──> residual stream [tokens, hidden] ── its last token ── final norm ──> [hidden] ── the first values of it
//! ```
//!
//! It is what the head would make logits of, at the prompt's last token; nothing is drawn, and a step that has no other rows to
//! sample has no use for the head. Its bits depend on the prompt alone, like a token's. Scaling it to length 1 is the caller's, for
//! not every model asks for it.

use crate::sampling_limits::SamplingError;

/// What is asked of a prompt's embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Embed {
    /// How many of its first values are wanted, for models that were trained to have most of what they say in those (Matryoshka
    /// representations, Kusupati et al., 2022); `None`: all.
    pub dimensions: Option<u32>,
}

impl Embed {
    /// Can a model whose hidden states have so many values give it?
    ///
    /// # Errors
    /// No dimension, or more than there are.
    pub fn check(&self, hidden: u32) -> Result<(), SamplingError> {
        match self.dimensions {
            Some(asked) if !(1..=hidden).contains(&asked) => {
                Err(SamplingError::Dimensions { asked, most: hidden })
            }
            _ => Ok(()),
        }
    }

    /// The values wanted, of all.
    pub fn of<'a>(&self, values: &'a [f32]) -> &'a [f32] {
        let count = self.dimensions.map_or(values.len(), |count| count as usize);
        &values[..count.min(values.len())]
    }
}
