//! How a row's logits are edited before a token is drawn from them: the definition that every backend follows.
//!
//! ```text
//!   sequence   0 …… prompt_len …… kv_len │ the token to be drawn
//!              |<-- prompt --->|<- output ->|          read from the token history, which lies beside the KV pages
//! ```
//!
//! In this order, and only where a logit is finite: what is no number stays what it is.
//!
//! 1. Minus infinity, which is never drawn: tokens that would end the output (end-of-sequence and stop tokens) while it has
//!    fewer than `min_tokens`; the last token of a bad word (a sequence of tokens) where the output ends with those before it.
//! 2. [`biased`]: `logit_bias` of a token is added.
//! 3. [`penalized`]: tokens of the prompt and the output lose by `repetition_penalty` (Keskar et al., "CTRL", 2019), those of
//!    the output by `presence_penalty`, and by `frequency_penalty` once for each time they came up.
//!
//! Steps 2 and 3 each round to the device's type of logits, and saturate at [`LOGIT_MAX`]: penalties alone make no infinity.
//! A draft counts like any token for the rows behind it.
//!
//! [`Rules`] is what a request says of single tokens; its words lie in the slot's region on the device:
//!
//! ```text
//!   0              2 biases     + endings     + bad_words + 1
//!   | id, bias, …  | id, id, …  | offset, …   | tokens of the bad words, one behind the other … |
//! ```
//!
//! Bad word i is the tokens from offset i up to offset i + 1; where there are none, there are no offsets.
//!
//! The tokens that may be drawn at all, where a request names them, have no words there: they are a
//! [mask](crate::constraint), which is applied before any edit.

use alloc::vec::Vec;
use core::iter::once;

use crate::sampling::SlotState;
use crate::sampling_limits::SamplingError;
pub use crate::sampling_limits::{BAD_WORD_WORDS_MAX, BIAS_MAX, BIASES_MAX, ENDINGS_MAX, PENALTY_MAX};

/// Words of a slot's region.
pub const RULE_WORDS: usize = 2 * BIASES_MAX + ENDINGS_MAX + BAD_WORD_WORDS_MAX;

/// The largest finite f16: an edited logit's bound, either way, whatever type the device has.
pub const LOGIT_MAX: f32 = 65504.0;

/// What a request says of single tokens. It never changes once the request is taken in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// By id, each once.
    biases: Vec<(u32, f32)>,
    stop: Vec<u32>,
    /// Where each bad word ends in `bad_tokens`.
    bad_ends: Vec<u32>,
    bad_tokens: Vec<u32>,
    /// The tokens that may be drawn: the words of a mask that allow any, ascending, each behind its index. `None`: all.
    allowed: Option<Vec<(u32, u32)>>,
}

/// Rules that ask for nothing.
pub(crate) static NO_RULES: Rules = Rules {
    biases: Vec::new(),
    stop: Vec::new(),
    bad_ends: Vec::new(),
    bad_tokens: Vec::new(),
    allowed: None,
};

impl Rules {
    /// Biases by token; tokens that end the output, as its last one; sequences of tokens that may not come up in it.
    ///
    /// # Errors
    /// A bias out of its range or of a token that has one already; an empty bad word; too many of them.
    pub fn new(
        mut biases: Vec<(u32, f32)>,
        mut stop: Vec<u32>,
        bad_words: &[Vec<u32>],
    ) -> Result<Rules, SamplingError> {
        if biases.len() > BIASES_MAX {
            return Err(SamplingError::Biases(biases.len()));
        }
        if let Some(&(id, bias)) = biases.iter().find(|(_, bias)| !(-BIAS_MAX..=BIAS_MAX).contains(bias)) {
            return Err(SamplingError::Bias { id, bias });
        }
        biases.sort_unstable_by_key(|(id, _)| *id);
        if let Some(pair) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(SamplingError::BiasTwice(pair[0].0));
        }
        stop.sort_unstable();
        stop.dedup();
        if stop.len() > ENDINGS_MAX {
            return Err(SamplingError::StopTokens(stop.len()));
        }
        if bad_words.iter().any(Vec::is_empty) {
            return Err(SamplingError::EmptyBadWord);
        }
        let bad_tokens: Vec<u32> = bad_words.concat();
        if bad_tokens.len() + bad_words.len() + 1 > BAD_WORD_WORDS_MAX {
            return Err(SamplingError::BadWords { words: bad_words.len(), tokens: bad_tokens.len() });
        }
        let mut end = 0;
        let bad_ends = bad_words.iter().map(|word| {
            end += word.len() as u32;
            end
        });
        Ok(Rules { biases, stop, bad_ends: bad_ends.collect(), bad_tokens, allowed: None })
    }

    /// The same, with the only tokens that may be drawn.
    ///
    /// # Errors
    /// None of them.
    pub fn allowing(self, mut ids: Vec<u32>) -> Result<Rules, SamplingError> {
        ids.sort_unstable();
        let words = ids.chunk_by(|one, other| one / 32 == other / 32);
        let words = words.map(|ids| (ids[0] / 32, ids.iter().fold(0, |bits, id| bits | 1 << (id % 32))));
        match ids.is_empty() {
            true => Err(SamplingError::NothingAllowed),
            false => Ok(Rules { allowed: Some(words.collect()), ..self }),
        }
    }

    /// Do they ask for nothing?
    pub fn is_empty(&self) -> bool {
        self.biases.is_empty() && self.stop.is_empty() && !self.has_bad_words() && !self.narrows()
    }

    /// Tokens that end the output.
    pub fn stop(&self) -> &[u32] {
        &self.stop
    }

    /// May some tokens never be drawn, or not behind others?
    pub fn has_bad_words(&self) -> bool {
        !self.bad_ends.is_empty()
    }

    /// Do they name the only tokens that may be drawn?
    pub fn narrows(&self) -> bool {
        self.allowed.is_some()
    }

    /// Takes out of a [mask](crate::constraint) what they do not allow.
    pub fn narrow(&self, mask: &mut [u32]) {
        let Some(allowed) = &self.allowed else { return };
        let mut words = allowed.iter().peekable();
        for (i, word) in mask.iter_mut().enumerate() {
            *word &= words.next_if(|(at, _)| *at as usize == i).map_or(0, |(_, bits)| *bits);
        }
    }

    /// The bad words, each with at least one token.
    pub fn bad_words(&self) -> impl Iterator<Item = &[u32]> {
        let starts = once(0).chain(self.bad_ends.iter().copied());
        starts.zip(&self.bad_ends).map(|(start, end)| &self.bad_tokens[start as usize..*end as usize])
    }

    /// Must the device know which tokens the output has?
    pub fn reads_history(&self) -> bool {
        self.bad_tokens.len() > self.bad_ends.len()
    }

    /// Are all tokens of a vocabulary of so many?
    ///
    /// # Errors
    /// One that is not.
    pub fn check(&self, vocab: u32) -> Result<(), SamplingError> {
        let biased = self.biases.iter().map(|(id, _)| ("logit_bias", *id));
        let stop = self.stop.iter().map(|id| ("stop_token_ids", *id));
        let bad = self.bad_tokens.iter().map(|id| ("bad_words", *id));
        let largest = |words: &Vec<(u32, u32)>| words.last().map(|(at, bits)| 32 * at + bits.ilog2());
        let allowed = self.allowed.iter().filter_map(|words| Some(("allowed_token_ids", largest(words)?)));
        match biased.chain(stop).chain(bad).chain(allowed).find(|(_, id)| *id >= vocab) {
            Some((field, id)) => Err(SamplingError::RuleOutsideVocabulary { field, id, vocab }),
            None => Ok(()),
        }
    }

    /// Adds them to a slot's state, with the tokens that may not be drawn before the output has its least length.
    pub fn apply(&self, endings: usize, state: &mut SlotState) {
        state.biases = self.biases.len() as u32;
        state.endings = endings as u32;
        state.bad_words = self.bad_ends.len() as u32;
        state.edits |= u32::from(state.biases + state.endings + state.bad_words > 0);
    }

    /// The words of a slot's region.
    pub fn words<'a>(&'a self, endings: impl Iterator<Item = u32> + 'a) -> impl Iterator<Item = u32> + 'a {
        let biases = self.biases.iter().flat_map(|(id, bias)| [*id, bias.to_bits()]);
        let offsets = once(0).filter(|_| self.has_bad_words()).chain(self.bad_ends.iter().copied());
        biases.chain(endings).chain(offsets).chain(self.bad_tokens.iter().copied())
    }
}

/// The parts of a slot's region.
#[derive(Clone, Copy, Debug)]
pub struct RuleParts<'a> {
    /// Pairs of a token and the bits of its bias.
    pub biases: &'a [[u32; 2]],
    /// Tokens that would end the output.
    pub endings: &'a [u32],
    offsets: &'a [u32],
    bad_tokens: &'a [u32],
}

impl<'a> RuleParts<'a> {
    /// Of a slot whose state counts them.
    pub fn of(state: &SlotState, region: &'a [u32]) -> Self {
        let (biases, rest) = region.split_at(2 * state.biases as usize);
        let (endings, rest) = rest.split_at(state.endings as usize);
        let (offsets, bad_tokens) = match state.bad_words {
            0 => rest.split_at(0),
            words => rest.split_at(words as usize + 1),
        };
        RuleParts { biases: biases.as_chunks().0, endings, offsets, bad_tokens }
    }

    /// The bad words, each with at least one token.
    pub fn bad_words(&self) -> impl Iterator<Item = &'a [u32]> + '_ {
        self.offsets.windows(2).map(|ends| &self.bad_tokens[ends[0] as usize..ends[1] as usize])
    }
}

/// A finite logit with its token's bias.
pub fn biased(logit: f32, bias: f32) -> f32 {
    (logit + bias).clamp(-LOGIT_MAX, LOGIT_MAX)
}

/// A finite logit of a token that the sequence has, `count` times in its output.
pub fn penalized(logit: f32, count: u32, state: &SlotState) -> f32 {
    let repeated = if logit > 0.0 { logit / state.repetition } else { logit * state.repetition };
    let present = if count > 0 { state.presence } else { 0.0 };
    (repeated - state.frequency * count as f32 - present).clamp(-LOGIT_MAX, LOGIT_MAX)
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;
    use crate::sampling::SamplingParams;

    #[test]
    fn a_region_gives_back_what_was_written() {
        let bad = [vec![7], vec![8, 9, 10], vec![11, 12]];
        let rules = Rules::new(vec![(5, -1.5), (2, 100.0)], vec![4, 3, 4], &bad).unwrap();
        let mut state = SamplingParams::default().slot_state(10);
        rules.apply(3, &mut state);
        let region: Vec<u32> = rules.words([1, 3, 4].into_iter()).collect();
        let parts = RuleParts::of(&state, &region);
        assert_eq!(parts.biases, [[2, 100f32.to_bits()], [5, (-1.5f32).to_bits()]]);
        assert_eq!(parts.endings, [1, 3, 4]);
        assert_eq!(parts.bad_words().collect::<Vec<_>>(), bad);
        assert_eq!(rules.bad_words().collect::<Vec<_>>(), bad);
        assert_eq!(rules.check(13), Ok(()));
        let field = "bad_words";
        assert_eq!(rules.check(12), Err(SamplingError::RuleOutsideVocabulary { field, id: 12, vocab: 12 }));
        assert_eq!(state.edits, 1);
        let rules = Rules::new(vec![(5, 1.0)], vec![], &[]).unwrap();
        assert_eq!(rules.words([1].into_iter()).count(), 3, "a bias, an ending, and no offset");
    }

    #[test]
    fn the_largest_rules_fill_a_region_and_no_more() {
        let biases = |count: usize| (0..count as u32).map(|id| (id, 1.0)).collect::<Vec<_>>();
        let largest = Rules::new(biases(BIASES_MAX), vec![], &[vec![1; BAD_WORD_WORDS_MAX - 2]]).unwrap();
        assert_eq!(largest.words(0..ENDINGS_MAX as u32).count(), RULE_WORDS);
        assert_eq!(Rules::new(biases(100_000), vec![], &[]), Err(SamplingError::Biases(100_000)));
        let words = vec![vec![1; 2]; 400];
        assert_eq!(
            Rules::new(vec![], vec![], &words),
            Err(SamplingError::BadWords { words: 400, tokens: 800 })
        );
        assert_eq!(Rules::new(vec![], (0..257).collect(), &[]), Err(SamplingError::StopTokens(257)));
        assert!(Rules::new(vec![], (0..256).chain(0..256).collect(), &[]).is_ok(), "256, each twice");
        assert_eq!(Rules::new(vec![], vec![], &[vec![]]), Err(SamplingError::EmptyBadWord));
        assert_eq!(Rules::new(vec![(1, 1.0), (1, 1.0)], vec![], &[]), Err(SamplingError::BiasTwice(1)));
        for bias in [f32::NAN, f32::INFINITY, 100.5, -101.0] {
            assert!(matches!(
                Rules::new(vec![(3, bias)], vec![], &[]),
                Err(SamplingError::Bias { id: 3, .. })
            ));
        }
    }

    #[test]
    fn allowed_tokens_narrow_a_mask_to_themselves_and_need_no_word_of_the_region() {
        let rules = Rules::default().allowing(vec![64, 3, 31, 3, 32]).unwrap();
        assert!(rules.narrows() && !rules.is_empty() && !rules.reads_history());
        let mut state = SamplingParams::default().slot_state(10);
        rules.apply(0, &mut state);
        assert_eq!((state.edits, rules.words([].into_iter()).count()), (0, 0));
        let mut mask = [u32::MAX; 4];
        rules.narrow(&mut mask);
        assert_eq!(mask, [1 << 3 | 1 << 31, 1, 1, 0]);
        let mut mask = [1 << 31 | 1 << 5, 0, u32::MAX];
        rules.narrow(&mut mask);
        assert_eq!(mask, [1 << 31, 0, 1]);
        let field = "allowed_token_ids";
        assert_eq!(rules.check(65), Ok(()));
        assert_eq!(rules.check(64), Err(SamplingError::RuleOutsideVocabulary { field, id: 64, vocab: 64 }));
        assert_eq!(Rules::default().allowing(vec![]), Err(SamplingError::NothingAllowed));
    }

    #[test]
    fn edits_at_their_ends_stay_finite() {
        let params = SamplingParams {
            repetition_penalty: f32::MIN_POSITIVE,
            presence_penalty: 2.0,
            frequency_penalty: 2.0,
            ..SamplingParams::default()
        };
        params.check().unwrap();
        let state = params.slot_state(0);
        assert_eq!(penalized(3.0, 0, &state), LOGIT_MAX);
        assert_eq!(penalized(0.0, u32::MAX, &state), -LOGIT_MAX, "a count beyond any sequence");
        assert_eq!(biased(LOGIT_MAX, 100.0), LOGIT_MAX);
        let state = SamplingParams { repetition_penalty: f32::MAX, ..params }.slot_state(0);
        assert_eq!((penalized(-3.0, 1, &state), penalized(0.0, 0, &state)), (-LOGIT_MAX, 0.0));
    }
}
