//! Which token a row may have drawn on a GPU: the CPU's sampler says what the filters keep and how that is scored, and here is by how much
//! a device may be off.

use minisgl_core::sampling::{SlotState, token_uniform};
use minisgl_cpu::sampling::{argmax, cut, score};

/// How far two scores may lie apart for either to win: the device's logarithm.
const TIE: f32 = 2e-5;
/// How much of the mass the device's fixed-point sums may misjudge.
const MASS: f32 = 5e-4;
/// How far below the cut, relative to it, a device may cut, whose filters compare logits that are not divided.
const BELOW: f32 = 1e-6;

/// What is wrong with `token`, drawn as `slot` says at `position` from `logits` `[vocab]`; `None` if nothing is.
pub fn complaint(slot: &SlotState, position: u32, logits: &[f32], token: u32) -> Option<String> {
    if logits.iter().any(|logit| !logit.is_finite()) {
        return Some("its logits are not finite".to_owned());
    }
    let right = match slot.temperature {
        0.0 => argmax(logits) == token,
        _ => [0.0, -MASS, MASS].into_iter().any(|shift| {
            let top_p = if slot.top_p < 1.0 { (slot.top_p + shift).clamp(0.0, 1.0) } else { slot.top_p };
            wins(&SlotState { top_p, ..*slot }, position, logits, token)
        }),
    };
    (!right).then(|| format!("token {token} was drawn, which the logits do not give"))
}

/// Has `token` the best score, or one as good, among what the filters keep?
fn wins(slot: &SlotState, position: u32, logits: &[f32], token: u32) -> bool {
    let top = logits[argmax(logits) as usize];
    let of_all = cut(logits, slot, top, &mut vec![0.0; logits.len()]);
    let least = of_all - BELOW * (1.0 + of_all.abs());
    let score = |id: u32, logit: f32| {
        let kept = logit / slot.temperature >= least;
        kept.then(|| score(logit, slot, token_uniform(slot.seed(), position, id)))
    };
    let best =
        (0..).zip(logits).filter_map(|(id, logit)| score(id, *logit)).fold(f32::NEG_INFINITY, f32::max);
    let own = logits.get(token as usize).and_then(|logit| score(token, *logit));
    own.is_some_and(|score| score >= best - TIE * (1.0 + best.abs()))
}

#[cfg(test)]
mod tests {
    use minisgl_core::tensor::splitmix64;
    use minisgl_cpu::sampling::draw;

    use super::*;

    const LOGITS: [f32; 4] = [1.0, 4.0, 2.0, 4.0];

    #[test]
    fn a_greedy_slot_draws_the_first_of_the_most_probable() {
        let slot = SlotState::default();
        assert_eq!(complaint(&slot, 0, &LOGITS, 1), None);
        assert!(complaint(&slot, 0, &LOGITS, 3).is_some());
        assert!(complaint(&slot, 0, &[f32::NAN, 0.0], 1).is_some());
        assert!(complaint(&slot, 0, &LOGITS, 4).is_some());
    }

    /// Of logits that lie a step of f16 apart at least, as a device has them.
    #[test]
    fn with_every_filter_what_the_cpu_draws_is_right_and_nothing_else() {
        for draw_of in 0..500 {
            let random = |i: u64, below: u64| splitmix64(draw_of << 16 | i) % below;
            let vocab = [4, 33, 64, 200][random(0, 4) as usize];
            let mut logits: Vec<f32> = (0..vocab).map(|i| i as f32 / 16.0 - 6.0).collect();
            (1..logits.len()).for_each(|i| logits.swap(i, random(100 + i as u64, i as u64 + 1) as usize));
            let slot = SlotState {
                temperature: [0.0, 0.6, 1.0, 1.7][random(1, 4) as usize],
                top_k: [0, 1, 5, 400][random(2, 4) as usize],
                top_p: [1.0, 0.05, 0.5, 0.9][random(3, 4) as usize],
                min_p: [0.0, 0.02, 0.3, 1.0][random(4, 4) as usize],
                seed_low: random(5, 1 << 32) as u32,
                ..SlotState::default()
            };
            let drawn = draw(&logits, &slot, 3, &mut vec![0.0; vocab]);
            assert_eq!(complaint(&slot, 3, &logits, drawn), None, "{slot:?}");
            let right = (0..=vocab as u32).filter(|token| complaint(&slot, 3, &logits, *token).is_none());
            assert!(right.count() <= 1 + usize::from(slot.top_p < 1.0), "{slot:?}");
        }
    }
}
