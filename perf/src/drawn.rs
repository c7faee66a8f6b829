//! Which token a row may have drawn: core's definition of sampling, in f64 and by sorting. The GPU's tests and `perf-cuda` judge by it,
//! so each of the definition's filters is here, too.

use minisgl_core::sampling::{SlotState, token_uniform};

/// How far two scores may lie apart for either to win: f32 arithmetic and the device's logarithm.
const TIE: f64 = 2e-5;
/// How much of the mass the device's fixed-point sums may misjudge.
const MASS: f64 = 5e-4;

/// What is wrong with `token`, drawn as `slot` says at `position` from `logits` `[vocab]`; `None` if nothing is.
pub fn complaint(slot: &SlotState, position: u32, logits: &[f32], token: u32) -> Option<String> {
    if logits.iter().any(|logit| !logit.is_finite()) {
        return Some("its logits are not finite".to_owned());
    }
    let right = match slot.temperature {
        0.0 => most_probable(logits) == Some(token as usize),
        _ => [0.0, -MASS, MASS].into_iter().any(|shift| wins(slot, position, logits, shift, token as usize)),
    };
    (!right).then(|| format!("token {token} was drawn, which the logits do not give"))
}

/// The lowest id among those of the largest logit.
fn most_probable(logits: &[f32]) -> Option<usize> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == largest)
}

/// Has `token` the best score, or one as good, among what the filters keep? `top_p` is moved by `shift`.
fn wins(slot: &SlotState, position: u32, logits: &[f32], shift: f64, token: usize) -> bool {
    let z = |logit: f32| f64::from(logit) / f64::from(slot.temperature);
    let least = least_kept(slot, logits.iter().map(|logit| z(*logit)).collect(), shift);
    let score = |id: usize| {
        let u = f64::from(token_uniform(slot.seed(), position, id as u32));
        (z(logits[id]) >= least).then(|| z(logits[id]) - (-u.ln()).ln())
    };
    let best = (0..logits.len()).filter_map(score).fold(f64::NEG_INFINITY, f64::max);
    token < logits.len() && score(token).is_some_and(|score| score >= best - TIE * (1.0 + best.abs()))
}

/// The least z that top-k, top-p and min-p keep.
fn least_kept(slot: &SlotState, mut z: Vec<f64>, shift: f64) -> f64 {
    z.sort_unstable_by(|a, b| b.total_cmp(a));
    let (top, count) = (z[0], slot.top_k as usize);
    let mut least = if (1..z.len()).contains(&count) { z[count - 1] } else { f64::NEG_INFINITY };
    if slot.top_p < 1.0 {
        let mass = |z: f64| (z - top).exp();
        let kept = || z.iter().copied().filter(|z| *z >= least);
        let target = (f64::from(slot.top_p) + shift).clamp(0.0, 1.0) * kept().map(mass).sum::<f64>();
        let mut sum = 0.0;
        let reached = kept().find(|z| {
            sum += mass(*z);
            sum >= target
        });
        least = reached.unwrap_or(least);
    }
    if slot.min_p > 0.0 {
        least = least.max(top + f64::from(slot.min_p).ln() - 1e-6);
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 4.0, 2.0, 4.0];

    #[test]
    fn a_greedy_slot_draws_the_first_of_the_most_probable() {
        let slot = SlotState::default();
        assert_eq!(complaint(&slot, 0, &LOGITS, 1), None);
        assert!(complaint(&slot, 0, &LOGITS, 3).is_some());
        assert!(complaint(&slot, 0, &[f32::NAN, 0.0], 1).is_some());
    }

    #[test]
    fn filters_leave_the_most_probable() {
        let slot = SlotState { temperature: 1.0, ..SlotState::default() };
        let least = |slot: SlotState| least_kept(&slot, LOGITS.map(f64::from).to_vec(), 0.0);
        assert_eq!(least(slot), f64::NEG_INFINITY);
        assert_eq!(least(SlotState { top_k: 3, ..slot }), 2.0);
        assert_eq!(least(SlotState { top_p: 0.8, ..slot }), 4.0);
        assert_eq!(least(SlotState { top_p: 0.95, ..slot }), 2.0);
        assert!((least(SlotState { min_p: 0.5, ..slot }) - (4.0 - 2f64.ln())).abs() < 1e-5);
    }

    #[test]
    fn exactly_one_of_different_logits_is_drawn() {
        let slot = SlotState { temperature: 0.6, seed_low: 7, ..SlotState::default() };
        let drawn = (0..4).filter(|token| complaint(&slot, 3, &LOGITS, *token).is_none()).count();
        assert_eq!(drawn, 1);
        assert!(complaint(&slot, 0, &LOGITS, 4).is_some());
    }
}
