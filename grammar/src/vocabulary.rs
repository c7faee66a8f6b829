//! A vocabulary as llguidance takes it: the bytes of every token, in a trie.
//!
//! ```text
//!   id           0 …          151,643           …           vocab
//!   text tokens  their bytes
//!   special      FF, then the name: no text that is UTF-8 reaches it, a Lark grammar does by name
//!   others       nothing: never allowed
//! ```
//!
//! Invariant: the text that a tokenizer makes of the tokens drawn is their bytes in a row. Where it strips a space from a text's
//! beginning ([`Vocabulary::strips_first_space`]), that is so because no first token begins with one.

use std::panic::catch_unwind;
use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

use crate::error::GrammarError;

/// Longer tokens exceed the trie's depth; there are some of white space.
const TOKEN_BYTES_MAX: usize = 1000;

/// What a token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenText<'a> {
    /// These bytes of a text, part of a character maybe.
    Bytes(&'a [u8]),
    /// No text; it has a name.
    Special(&'a [u8]),
    /// Nothing: the id is no token.
    Nothing,
}

/// See the module.
pub struct Vocabulary {
    /// `[vocab]`.
    words: Vec<Vec<u8>>,
    eos: Vec<u32>,
    /// A space at the beginning of a text gets lost.
    pub strips_first_space: bool,
}

impl Vocabulary {
    /// A vocabulary of so many ids, those of the model, and the tokens that end a sequence.
    pub fn new<'a>(size: u32, eos: &[u32], text: impl Fn(u32) -> TokenText<'a>) -> Self {
        let word = |id| match text(id) {
            // A byte that is in no text, and marks special tokens.
            TokenText::Bytes(bytes) if bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
            TokenText::Bytes(bytes) if bytes.len() > TOKEN_BYTES_MAX => Vec::new(),
            TokenText::Bytes(bytes) => bytes.to_vec(),
            TokenText::Special(name) => [&[TokTrie::SPECIAL_TOKEN_MARKER], name].concat(),
            TokenText::Nothing => Vec::new(),
        };
        let eos = eos.iter().copied().filter(|id| *id < size).collect();
        Vocabulary { words: (0..size).map(word).collect(), eos, strips_first_space: false }
    }

    /// Bit `id % 32` of word `id / 32`: the token begins with a space, which a text's beginning loses.
    pub(crate) fn lost_at_the_beginning(&self) -> Vec<u32> {
        let mut mask = vec![0; self.words.len().div_ceil(32)];
        let lost = |word: &Vec<u8>| self.strips_first_space && word.first() == Some(&b' ');
        for (id, _) in self.words.iter().enumerate().filter(|(_, word)| lost(word)) {
            mask[id / 32] |= 1 << (id % 32);
        }
        mask
    }

    /// The trie; takes some tenths of a second for 150,000 tokens.
    pub(crate) fn trie(&self) -> Result<TokEnv, GrammarError> {
        let size = self.words.len() as u32;
        let first_eos = self.eos.first().copied().unwrap_or(INVALID_TOKEN);
        let built = catch_unwind(|| {
            let trie = TokTrie::from(&TokRxInfo::new(size, first_eos), &self.words);
            if self.eos.is_empty() { trie } else { trie.with_eos_tokens(&self.eos) }
        });
        let trie = built.map_err(|_| GrammarError::Vocabulary("its tokens make no trie".to_owned()))?;
        Ok(Arc::new(ApproximateTokEnv::new(trie)))
    }
}
