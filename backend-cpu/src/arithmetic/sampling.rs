//! Tokens and log-probabilities out of a row of logits, by the definition in [`minisgl_core::sampling`]. What a GPU draws is judged by
//! [`cut`] and [`score`], too.
//!
//! Every filter keeps the tokens above a cut, so a row is drawn in two steps: find the largest of the three cuts, then
//! take the best score among the tokens not below it. Nothing is sorted: cuts are found by selection, which halves
//! the candidates each time; and of the scores only those are computed whose upper bound beats the best one yet.

use minisgl_core::sampling::{NO_TOKEN, RowLogprobs, SlotState, TOP_LOGPROBS_MAX, philox, uniform};

use crate::simd::largest;

/// Ids whose bounds are computed together.
const BLOCK: usize = 64;

/// Takes the logits of all tokens that a mask does not allow as minus infinity.
pub fn forbid(logits: &mut [f32], mask: &[u32]) {
    for (logits, bits) in logits.chunks_mut(32).zip(mask) {
        let forbidden = logits.iter_mut().enumerate().filter(|(i, _)| bits >> i & 1 == 0);
        forbidden.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
    }
}

/// The token of a slot's row at `position`, [`NO_TOKEN`] where the logits are not numbers; `scratch` is as long as `logits`.
pub fn draw(logits: &[f32], slot: &SlotState, position: u32, scratch: &mut [f32]) -> u32 {
    let top = argmax(logits);
    let any_nan = logits.iter().fold(false, |any, logit| any | logit.is_nan());
    if any_nan || !logits[top as usize].is_finite() {
        return NO_TOKEN;
    }
    if slot.temperature == 0.0 {
        return top;
    }
    let cut = cut(logits, slot, logits[top as usize], scratch);
    gumbel_max(logits, slot, position, cut, top)
}

/// The lowest id of the largest logit.
pub fn argmax(logits: &[f32]) -> u32 {
    let largest = largest(logits);
    logits.iter().position(|&logit| logit == largest).unwrap_or(0) as u32
}

/// The least z that the slot's filters keep; `top` is the largest logit.
pub fn cut(logits: &[f32], slot: &SlotState, top: f32, scratch: &mut [f32]) -> f32 {
    let top = top / slot.temperature;
    let mut cut = f32::NEG_INFINITY;
    let top_k = slot.top_k as usize;
    if (0 < top_k && top_k < logits.len()) || slot.top_p < 1.0 {
        for (z, logit) in scratch.iter_mut().zip(logits) {
            *z = logit / slot.temperature;
        }
        let mut kept = &mut scratch[..logits.len()];
        if 0 < top_k && top_k < kept.len() {
            let (_, kth, _) = kept.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
            cut = *kth;
            kept = keep_equals(kept, top_k);
        }
        if slot.top_p < 1.0 {
            cut = cut.max(mass_cut(kept, top, f64::from(slot.top_p)));
        }
    }
    if slot.min_p > 0.0 { cut.max(top + slot.min_p.ln()) } else { cut }
}

/// The first `k` of a selection, and behind them the equals of the k-th.
fn keep_equals(z: &mut [f32], k: usize) -> &mut [f32] {
    let kth = z[k - 1];
    let mut len = k;
    for i in k..z.len() {
        if z[i] == kth {
            z.swap(i, len);
            len += 1;
        }
    }
    &mut z[..len]
}

/// The largest t whose `z >= t` hold at least the share `top_p` of the mass `exp(z)`.
fn mass_cut(z: &mut [f32], top: f32, top_p: f64) -> f32 {
    let mass = |z: &[f32]| z.iter().map(|&z| (f64::from(z) - f64::from(top)).exp()).sum::<f64>();
    let target = top_p * mass(z);
    let (mut candidates, mut above) = (z, 0.0);
    while candidates.len() > 1 {
        // The upper half holds the boundary, or all of it lies above.
        let half = candidates.len() / 2;
        candidates.select_nth_unstable_by(half, |a, b| b.total_cmp(a));
        let (upper, lower) = candidates.split_at_mut(half);
        let upper_mass = mass(upper);
        if above + upper_mass >= target {
            candidates = upper;
        } else {
            above += upper_mass;
            candidates = lower;
        }
    }
    candidates[0]
}

/// What the largest of is drawn: `z + gumbel` of a logit, where the token's random fraction is `u`.
pub fn score(logit: f32, slot: &SlotState, u: f32) -> f32 {
    logit / slot.temperature - (-u.ln()).ln()
}

/// The token with the largest score among `z >= cut`.
fn gumbel_max(logits: &[f32], slot: &SlotState, position: u32, cut: f32, top: u32) -> u32 {
    let score = |id: u32, word: u32| score(logits[id as usize], slot, uniform(word));
    let mut best = (score(top, random_words(slot, position, top / 4)[top as usize % 4]), top);
    let mut words = [0u32; BLOCK];
    for (block, logits) in logits.chunks(BLOCK).enumerate() {
        let first = (block * BLOCK) as u32;
        for (i, words) in words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *words = random_words(slot, position, first / 4 + i as u32);
        }
        if !may_win(logits, &words, slot.temperature, best.0) {
            continue;
        }
        for ((id, word), logit) in (first..).zip(words).zip(logits) {
            let z = logit / slot.temperature;
            if z >= cut && z + gumbel_bound(word) >= best.0 {
                let score = score(id, word);
                if score > best.0 || (score == best.0 && id < best.1) {
                    best = (score, id);
                }
            }
        }
    }
    best.1
}

fn random_words(slot: &SlotState, position: u32, group: u32) -> [u32; 4] {
    philox([group, position, 0, 0], [slot.seed_low, slot.seed_high])
}

fn may_win(logits: &[f32], words: &[u32; BLOCK], temperature: f32, best: f32) -> bool {
    let wins = |(logit, word): (&f32, &u32)| logit / temperature + gumbel_bound(*word) >= best;
    logits.iter().zip(words).fold(false, |any, pair| any | wins(pair))
}

/// At least the Gumbel variate of a random word, without a logarithm.
///
/// With `w = 1 - u`: `-ln u >= w`, so the variate is at most `-ln w`; and the bits of a float, read as a number, lie
/// below its binary logarithm, because `m <= log2(1 + m)` for a mantissa m in [0, 1).
fn gumbel_bound(word: u32) -> f32 {
    let w = 1.0 - uniform(word);
    let log2_w = w.to_bits() as f32 * (1.0 / 8_388_608.0) - 127.0;
    1e-4 - std::f32::consts::LN_2 * log2_w
}

/// The log-probabilities of `token` and of the row's most probable tokens; `asked` is one more than how many of those.
pub fn logprobs(logits: &[f32], asked: u32, token: u32) -> RowLogprobs {
    let possible = logits.iter().filter(|logit| **logit > f32::NEG_INFINITY).count();
    let alternatives = (asked.saturating_sub(1) as usize).min(TOP_LOGPROBS_MAX).min(possible);
    let top = f64::from(logits[argmax(logits) as usize]);
    let mass: f64 = logits.iter().map(|&logit| (f64::from(logit) - top).exp()).sum();
    let logprob = |id: u32| (f64::from(logits[id as usize]) - top - mass.ln()) as f32;

    let mut out = RowLogprobs {
        token: logprob(token),
        len: alternatives as u32,
        ids: [0; TOP_LOGPROBS_MAX],
        logprobs: [0.0; TOP_LOGPROBS_MAX],
    };
    let mut len = 0;
    for (id, logit) in (0..).zip(logits) {
        // Earlier ids stay in front of their equals.
        let place = out.ids[..len].partition_point(|&other| logits[other as usize] >= *logit);
        if place < alternatives {
            len = (len + 1).min(alternatives);
            out.ids[place..len].rotate_right(1);
            out.ids[place] = id;
        }
    }
    for (logprob_out, id) in out.logprobs.iter_mut().zip(&out.ids[..len]) {
        *logprob_out = logprob(*id);
    }
    out
}
