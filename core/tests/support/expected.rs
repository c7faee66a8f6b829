//! The hashing model's definition, and what a request gives when it runs alone: plain arithmetic, no engine.
//!
//! ```text
//!   kv[p]    = mix(kv[p - 1], token p, p)          so a wrong page below p spoils everything above it
//!   next     = fold of all kv[0..=p], and the seed, modulo the vocabulary
//! ```
//!
//! With the seed [`FAILING`] some contexts have no next token, as if the logits were not numbers; with [`REPEATING`] tokens are
//! few.

use minisgl_core::request::FinishReason;
use minisgl_core::sampling::{NO_TOKEN, SamplingParams};
use minisgl_core::tensor::splitmix64;

/// Tokens of the hashing model: few, so that prefixes repeat and sequences end early.
pub const VOCAB: u32 = 13;

/// The hashing model's end-of-sequence token.
pub const EOS: u32 = 7;

/// The seed whose requests find no token in one of 16 contexts.
pub const FAILING: u64 = 3;

/// The seed whose requests draw two tokens alone, so that what they drew before comes again.
pub const REPEATING: u64 = 2;

/// What the cache holds for a token, given what it holds for the one before.
pub fn kv(before: u32, token: u32, position: u32) -> u32 {
    splitmix64(u64::from(before) << 32 | u64::from(token) << 20 ^ u64::from(position)) as u32
}

/// Attention: all of the cache goes in.
pub fn attend(state: u32, kv: u32) -> u32 {
    state.rotate_left(5).wrapping_mul(0x9E37_79B1) ^ kv
}

/// Values of a hidden state.
pub const HIDDEN: usize = 3;

/// What attention gives as values, exactly; the last one is no number where the seed's requests find no token.
pub fn hidden(state: u32, seed: u64) -> [f32; HIDDEN] {
    let number = if draw(state, seed) == NO_TOKEN { f32::NAN } else { 0.5 };
    [(state >> 16) as f32, (state & 0xFFFF) as f32, number]
}

/// And back.
pub fn state(hidden: [f32; HIDDEN]) -> u32 {
    (hidden[0] as u32) << 16 | hidden[1] as u32
}

/// A prompt's embedding.
pub fn embedding(prompt: &[u32], seed: u64, window: u32) -> [f32; HIDDEN] {
    let mut cache: Vec<u32> = Vec::new();
    for (position, token) in (0..).zip(prompt) {
        cache.push(kv(cache.last().copied().unwrap_or(0), *token, position));
    }
    let first = cache.len().saturating_sub(window as usize);
    hidden(cache[first..].iter().copied().fold(0, attend), seed)
}

/// The token drawn.
pub fn draw(state: u32, seed: u64) -> u32 {
    if seed == FAILING && state.is_multiple_of(16) {
        return NO_TOKEN;
    }
    let tokens = if seed == REPEATING { 2 } else { VOCAB };
    (splitmix64(u64::from(state) ^ seed.rotate_left(17)) % u64::from(tokens)) as u32
}

/// The log-probability of a token, drawn or given.
pub fn logprob(state: u32, seed: u64, token: u32) -> f32 {
    if draw(state, seed) == NO_TOKEN { f32::NAN } else { -((state % 4096 * VOCAB + token) as f32) }
}

/// That of each token but the first.
pub fn logprobs(tokens: &[u32], seed: u64, window: u32) -> Vec<f32> {
    let mut cache = Vec::new();
    let pairs = (0..).zip(tokens.windows(2));
    let mut score = |(position, pair): (u32, &[u32])| {
        cache.push(kv(cache.last().copied().unwrap_or(0), pair[0], position));
        let first = cache.len().saturating_sub(window as usize);
        logprob(cache[first..].iter().copied().fold(0, attend), seed, pair[1])
    };
    pairs.map(&mut score).collect()
}

/// The token drawn where not all are allowed: the next one that is.
pub fn draw_allowed(state: u32, seed: u64, mask: u32) -> u32 {
    match draw(state, seed) {
        NO_TOKEN => NO_TOKEN,
        first => {
            let next = (first..VOCAB).chain(0..first).find(|token| mask >> token & 1 == 1);
            next.unwrap_or(NO_TOKEN)
        }
    }
}

/// What a constraint says of the next token.
#[derive(Clone, Copy, Debug)]
pub enum Allowed {
    /// Bit i: token i.
    Mask(u32),
    Nothing,
    Unknown,
}

/// What the constraint of a seed says after an output: at the beginning it allows something.
pub fn allowed(seed: u32, output: &[u32]) -> Allowed {
    let hash = output.iter().fold(seed, |hash, token| attend(hash, kv(hash, *token, 0)));
    match splitmix64(u64::from(hash)) {
        _ if output.is_empty() => Allowed::Mask(1 << (hash % VOCAB) | hash & ((1 << VOCAB) - 1)),
        end if end % 24 == 0 => Allowed::Nothing,
        end if end % 24 == 1 => Allowed::Unknown,
        bits => Allowed::Mask(1 << (hash % VOCAB) | (bits >> 40) as u32 & ((1 << VOCAB) - 1)),
    }
}

/// A request's tokens when nothing runs beside it, and why it ends. `len_max` bounds prompt and output together.
pub fn alone(prompt: &[u32], params: &SamplingParams, len_max: u32) -> (Vec<u32>, FinishReason) {
    alone_within(prompt, params, &[], len_max, u32::MAX, None)
}

/// The same with stop tokens, where a token sees so many positions, and a constraint of some seed allows what it allows.
pub fn alone_within(
    prompt: &[u32],
    params: &SamplingParams,
    stop: &[u32],
    len_max: u32,
    window: u32,
    rule: Option<u32>,
) -> (Vec<u32>, FinishReason) {
    alone_allowing(prompt, params, stop, len_max, window, rule, &[])
}

/// The same where these tokens alone may be drawn; all, where there are none.
pub fn alone_allowing(
    prompt: &[u32],
    params: &SamplingParams,
    stop: &[u32],
    len_max: u32,
    window: u32,
    rule: Option<u32>,
    ids: &[u32],
) -> (Vec<u32>, FinishReason) {
    let ids_mask = match ids {
        [] => u32::MAX,
        // An embedding comes of hidden states.
        _ if params.embed.is_some() => u32::MAX,
        _ => ids.iter().fold(0, |mask, id| mask | 1 << id),
    };
    let mut cache = Vec::new();
    let mut push = |token: u32, mask: u32| {
        let position = cache.len() as u32;
        cache.push(kv(cache.last().copied().unwrap_or(0), token, position));
        let first = cache.len().saturating_sub(window as usize);
        draw_allowed(cache[first..].iter().copied().fold(0, attend), params.seed, mask)
    };
    let allowed = |output: &[u32]| match rule.map_or(Allowed::Mask(u32::MAX), |seed| allowed(seed, output)) {
        Allowed::Mask(mask) => Allowed::Mask(mask & ids_mask),
        end => end,
    };
    let mut output = Vec::new();
    let Allowed::Mask(mask) = allowed(&output) else { unreachable!("something may come first") };
    let mut next = 0;
    for &token in prompt {
        next = push(token, mask);
    }
    loop {
        if params.max_tokens == 0 {
            // Hidden states are no numbers either.
            let has_result = params.embed.is_none() || next != NO_TOKEN;
            return (output, if has_result { FinishReason::Length } else { FinishReason::NotNumbers });
        }
        if next == NO_TOKEN {
            let Allowed::Mask(mask) = allowed(&output) else { unreachable!("it had a row") };
            let is_none_left = mask & ((1 << VOCAB) - 1) == 0;
            return (output, if is_none_left { FinishReason::NoTokenLeft } else { FinishReason::NotNumbers });
        }
        output.push(next);
        if next == EOS && !params.ignore_eos {
            return (output, FinishReason::Eos);
        }
        if stop.contains(&next) {
            return (output, FinishReason::Stop);
        }
        if output.len() as u32 == params.max_tokens || (prompt.len() + output.len()) as u32 == len_max {
            return (output, FinishReason::Length);
        }
        match allowed(&output) {
            Allowed::Mask(mask) => next = push(next, mask),
            Allowed::Nothing => return (output, FinishReason::Complete),
            Allowed::Unknown => return (output, FinishReason::ConstraintFailed),
        }
    }
}
