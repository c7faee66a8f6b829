//! How a token is drawn: the definition that every backend follows, so that each draws the same token.
//!
//! Given the logits `l` of a row (f32, or widened to f32; -0 and 0 are equals) and its parameters:
//!
//! - If the row has a [mask](crate::constraint), `l_i` is minus infinity for each token i that the mask does not allow, here and
//!   in log-probabilities.
//!
//! 0. If an `l_i` is NaN, or the largest is not finite, there is no token: [`NO_TOKEN`], and the request fails. Single
//!    logits of minus infinity are as good as any: they are never drawn.
//! 1. Temperature 0 is greedy: the token is `argmax l`, the lowest id among equals; no random numbers, no filters. So is
//!    one below [`TEMPERATURE_MIN`], which reaches no backend: see [`SamplingParams::drawing_temperature`].
//! 2. Otherwise `z_i = l_i / temperature`.
//! 3. `top_k > 0` keeps `z_i >= ` the k-th largest z (counted with repetition); equals of the k-th all stay.
//! 4. `top_p < 1` keeps, of those, `z_i >= t` for the largest `t` whose kept tokens hold at least `top_p` of the mass
//!    `exp(z_i)` that step 3 left; equals of the last one all stay.
//! 5. `min_p > 0` keeps `z_i >= max z + ln(min_p)`: at least `min_p` times as probable as the most probable.
//! 6. The token is `argmax (z_i + g_i)` over what is kept, the lowest id among equals, where
//!    `g_i = -ln(-ln u_i)` is a Gumbel variate: this draws from the softmax of the kept z (the Gumbel-max trick,
//!    Gumbel 1954) without summing it.
//!
//! `u_i` is [`uniform`] of word `i % 4` of [`philox`] at counter `(i / 4, position, 0, 0)`, keyed by the request's
//! seed; `position` is that of the token drawn. So a token depends on its request's seed and position alone, never on
//! the batch, the step or the device.
//!
//! The logits of a request that asks for it are edited first, as [`crate::rules`] says; `l` are the edited ones.
//!
//! Log-probabilities are those of `softmax(l)`: behind the edits, before temperature and filters.

use bytemuck::{Pod, Zeroable};

use crate::embedding::Embed;
use crate::sampling_limits::PENALTY_MAX;
pub use crate::sampling_limits::{SamplingError, TOP_LOGPROBS_MAX};
use crate::tensor::splitmix64;

/// In a step's tokens: the row's logits are not numbers, so no token could be drawn. The token pool gets 0 then, so
/// that a step launched meanwhile finds a token there.
pub const NO_TOKEN: u32 = u32::MAX;

/// The least temperature that tokens are drawn with. At this one a logit that lies 0.001 below another is e^100 times
/// less probable; far below it, logits divided by it are infinite.
pub const TEMPERATURE_MIN: f32 = 1e-5;

/// How a request's tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0, or anything below [`TEMPERATURE_MIN`], is greedy; higher is flatter.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the most probable tokens that hold this mass, in (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this many times as probable as the most probable, in [0, 1].
    pub min_p: f32,
    /// Above 1, tokens that the prompt or the output has are less probable: positive logits are divided by it, negative ones
    /// multiplied. Above 0.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens that the output has, in [-2, 2].
    pub presence_penalty: f32,
    /// Taken off for each time that the output has the token, in [-2, 2].
    pub frequency_penalty: f32,
    /// The same seed draws the same tokens.
    pub seed: u64,
    /// Output tokens at least: what would end it is not drawn before.
    pub min_tokens: u32,
    /// Output tokens at most; 0 where the prompt's log-probabilities, or its embedding, are all that is wanted.
    pub max_tokens: u32,
    /// Go on past end-of-sequence tokens.
    pub ignore_eos: bool,
    /// `Some(k)`: give the log-probability of each token drawn and of the k most probable ones, k <= 20.
    pub logprobs: Option<u32>,
    /// Give log-probabilities of the prompt's own tokens.
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Give the prompt's embedding, and nothing else.
    pub embed: Option<Embed>,
}

/// Which tokens of a prompt are scored, and what is told of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLogprobs {
    /// Position of the first one. A prompt's first token follows nothing and has no log-probability: 0 is taken as 1. Where it lies
    /// behind the prompt, none is scored.
    pub from: u32,
    /// Give those of the k most probable tokens too, k <= 20.
    pub top: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams::DEFAULT
    }
}

/// How the tokens of a slot are drawn, as it lies on the device from when a request takes the slot: 64 bytes, all of them in use,
/// in the same order in `kernels/cuda/step/slot.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct SlotState {
    /// 0 takes the most probable token; never between 0 and [`TEMPERATURE_MIN`].
    pub temperature: f32,
    /// 0 keeps every token.
    pub top_k: u32,
    /// 1 keeps every token.
    pub top_p: f32,
    /// 0 keeps every token.
    pub min_p: f32,
    /// Low word of the request's seed.
    pub seed_low: u32,
    /// High word of the request's seed.
    pub seed_high: u32,
    /// 1 where logits are edited ([`crate::rules`]), else 0: and then nothing below is looked at.
    pub edits: u32,
    /// 1 is none.
    pub repetition: f32,
    /// 0 is none.
    pub presence: f32,
    /// 0 is none.
    pub frequency: f32,
    /// Tokens of the prompt; what lies behind it is output.
    pub prompt_len: u32,
    /// Positions below it may not have a token that ends the output.
    pub endings_from: u32,
    /// Biases in the slot's region of rules.
    pub biases: u32,
    /// Tokens there that would end the output.
    pub endings: u32,
    /// Bad words there.
    pub bad_words: u32,
    /// Zero; makes the state 64 bytes.
    pub reserved: u32,
}

/// Words of a [`SlotState`].
pub const SLOT_STATE_WORDS: usize = size_of::<SlotState>() / 4;

/// Greedy: what a slot has that nobody has taken.
impl Default for SlotState {
    fn default() -> Self {
        SamplingParams::default().slot_state(0)
    }
}

impl SlotState {
    /// Is there a penalty?
    pub fn penalizes(&self) -> bool {
        self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0
    }

    /// The request's seed.
    pub fn seed(&self) -> u64 {
        u64::from(self.seed_high) << 32 | u64::from(self.seed_low)
    }
}

impl SamplingParams {
    /// Greedy, 128 tokens at most.
    pub const DEFAULT: SamplingParams = SamplingParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
        min_tokens: 0,
        max_tokens: 128,
        ignore_eos: false,
        logprobs: None,
        prompt_logprobs: None,
        embed: None,
    };

    /// Checks every parameter's range.
    pub fn check(&self) -> Result<(), SamplingError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(SamplingError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplingError::TopP(self.top_p));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(SamplingError::MinP(self.min_p));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(SamplingError::RepetitionPenalty(self.repetition_penalty));
        }
        let penalties = -PENALTY_MAX..=PENALTY_MAX;
        if !penalties.contains(&self.presence_penalty) {
            return Err(SamplingError::PresencePenalty(self.presence_penalty));
        }
        if !penalties.contains(&self.frequency_penalty) {
            return Err(SamplingError::FrequencyPenalty(self.frequency_penalty));
        }
        let wants_numbers = self.logprobs.is_some() || self.prompt_logprobs.is_some();
        if self.embed.is_some() && (self.max_tokens > 0 || wants_numbers) {
            return Err(SamplingError::EmbedAlone);
        }
        if self.max_tokens == 0 && self.prompt_logprobs.is_none() && self.embed.is_none() {
            return Err(SamplingError::MaxTokens);
        }
        if self.min_tokens > self.max_tokens {
            return Err(SamplingError::MinTokens { min: self.min_tokens, max: self.max_tokens });
        }
        let too_many = |k: &u32| *k as usize > TOP_LOGPROBS_MAX;
        if let Some(k) = self.logprobs.filter(too_many) {
            return Err(SamplingError::Logprobs(k));
        }
        match self.prompt_logprobs.map(|asked| asked.top).filter(too_many) {
            Some(k) => Err(SamplingError::PromptLogprobs(k)),
            None => Ok(()),
        }
    }

    /// Those of a sample, from 0, where a prompt has several: they differ in their seeds, and the prompt is scored with the first
    /// alone.
    pub fn of_sample(&self, sample: u32) -> SamplingParams {
        let unscored = |asked| PromptLogprobs { from: u32::MAX, ..asked };
        let prompt_logprobs = match sample {
            0 => self.prompt_logprobs,
            _ => self.prompt_logprobs.map(unscored),
        };
        SamplingParams { seed: sample_seed(self.seed, sample), prompt_logprobs, ..*self }
    }

    /// What the device keeps of them for a slot whose prompt has so many tokens; [`crate::rules::Rules::apply`] adds to it.
    pub fn slot_state(&self, prompt_len: u32) -> SlotState {
        let mut state = SlotState {
            temperature: self.drawing_temperature(),
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed_low: self.seed as u32,
            seed_high: (self.seed >> 32) as u32,
            edits: 0,
            repetition: self.repetition_penalty,
            presence: self.presence_penalty,
            frequency: self.frequency_penalty,
            prompt_len,
            endings_from: prompt_len.saturating_add(self.min_tokens),
            biases: 0,
            endings: 0,
            bad_words: 0,
            reserved: 0,
        };
        state.edits = u32::from(state.penalizes());
        state
    }

    /// The temperature as backends see it: 0 where it is too small to divide by.
    pub fn drawing_temperature(&self) -> f32 {
        if self.temperature < TEMPERATURE_MIN { 0.0 } else { self.temperature }
    }
}

/// The seed of a prompt's sample, from 0: the first has the request's own. Neighbouring requests often have neighbouring seeds, so
/// those of the others lie anywhere.
pub fn sample_seed(seed: u64, sample: u32) -> u64 {
    match sample {
        0 => seed,
        _ => splitmix64(seed ^ splitmix64(u64::from(sample))),
    }
}

/// The seed of a prompt of a request that has several, from 0: as for samples, the first has the request's own, and those of the others
/// lie anywhere, but not where samples' do.
pub fn prompt_seed(seed: u64, prompt: u32) -> u64 {
    match prompt {
        0 => seed,
        _ => splitmix64(seed ^ splitmix64(1 << 32 | u64::from(prompt))),
    }
}

/// Philox4x32 with 7 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): a keyed bijection
/// of counters whose outputs pass BigCrush from 7 rounds on.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..7 {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        [c0, c1, c2, c3] = [(p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// A random word as a fraction strictly between 0 and 1: the middle of one of 2^23 equal steps, exact in f32.
pub fn uniform(word: u32) -> f32 {
    ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0)
}

/// The random fraction of token `id` at `position` for a request with this seed.
pub fn token_uniform(seed: u64, position: u32, id: u32) -> f32 {
    let words = philox([id / 4, position, 0, 0], [seed as u32, (seed >> 32) as u32]);
    uniform(words[(id % 4) as usize])
}

/// Log-probabilities of one row, as they come back from the device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct RowLogprobs {
    /// Of the token drawn, or given.
    pub token: f32,
    /// How many of the arrays' entries are filled.
    pub len: u32,
    /// The most probable tokens, most probable first, the lower id first among equals.
    pub ids: [u32; TOP_LOGPROBS_MAX],
    /// Their log-probabilities.
    pub logprobs: [f32; TOP_LOGPROBS_MAX],
}

/// Words of a [`RowLogprobs`].
pub const LOGPROB_WORDS: usize = size_of::<RowLogprobs>() / 4;

impl RowLogprobs {
    /// The most probable tokens with their log-probabilities.
    pub fn top(&self) -> impl Iterator<Item = (u32, f32)> + '_ {
        self.ids.iter().copied().zip(self.logprobs.iter().copied()).take(self.len as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_neighbouring_requests_have_seeds_of_their_own() {
        let mut seeds: alloc::vec::Vec<u64> =
            (0..64).flat_map(|seed| (0..64).map(move |sample| sample_seed(seed, sample))).collect();
        assert!((0..64).all(|seed| sample_seed(seed, 0) == seed));
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 64 * 64);
        // Nor with prompts of the same requests.
        seeds.extend((0..64).flat_map(|seed| (1..64).map(move |prompt| prompt_seed(seed, prompt))));
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 64 * 64 + 64 * 63);
        assert!((0..64).all(|seed| prompt_seed(seed, 0) == seed));
    }

    #[test]
    fn a_temperature_too_small_to_divide_by_is_greedy() {
        let drawing =
            |temperature| SamplingParams { temperature, ..SamplingParams::default() }.drawing_temperature();
        for tiny in [0.0, 1e-45, 1e-39, f32::MIN_POSITIVE, 9.9e-6] {
            assert_eq!(drawing(tiny), 0.0);
        }
        for usual in [TEMPERATURE_MIN, 0.6, 5.0] {
            assert_eq!(drawing(usual), usual);
        }
        assert!((f32::MAX * 1e-30 / TEMPERATURE_MIN).is_finite(), "logits up to 1e8 stay finite");
    }

    /// Known answers for seven rounds, from the Random123 distribution's kat_vectors.
    #[test]
    fn philox_gives_the_published_words() {
        assert_eq!(philox([0; 4], [0; 2]), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
        let all = u32::MAX;
        assert_eq!(philox([all; 4], [all; 2]), [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0x4dfc_caba, 0x190a_87f0, 0xc47362ba, 0xb6b5_242a]
        );
    }

    #[test]
    fn a_fraction_lies_strictly_between_0_and_1() {
        assert!(uniform(0) > 0.0);
        assert!(uniform(u32::MAX) < 1.0);
    }
}
