//! Which token a row may have drawn: core's definition of sampling, in f64 and by sorting.

use minisgl_core::batch::Row;
use minisgl_core::sampling::token_uniform;

/// How far two scores may lie apart for either to win: f32 arithmetic and the device's logarithm.
const TIE: f64 = 2e-5;
/// How much of the mass the device's fixed-point sums may misjudge.
const MASS: f64 = 5e-4;

/// What is wrong with `token`, which `row` drew from `logits` `[vocab]`; `None` if nothing is.
pub fn complaint(row: &Row, logits: &[f32], token: u32) -> Option<String> {
    if logits.iter().any(|logit| !logit.is_finite()) {
        return Some(format!("slot {} has logits that are not finite", row.slot));
    }
    let right = match row.temperature {
        0.0 => most_probable(logits) == Some(token as usize),
        _ => [0.0, -MASS, MASS].into_iter().any(|shift| wins(row, logits, shift, token as usize)),
    };
    (!right).then(|| format!("slot {} drew token {token}, which its logits do not give", row.slot))
}

/// The lowest id among those of the largest logit.
fn most_probable(logits: &[f32]) -> Option<usize> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == largest)
}

/// Has `token` the best score, or one as good, among what the filters keep? `top_p` is moved by `shift`.
fn wins(row: &Row, logits: &[f32], shift: f64, token: usize) -> bool {
    let z = |logit: f32| f64::from(logit) / f64::from(row.temperature);
    let least = least_kept(row, logits.iter().map(|logit| z(*logit)).collect(), shift);
    let seed = u64::from(row.seed_low) | u64::from(row.seed_high) << 32;
    let score = |id: usize| {
        let u = f64::from(token_uniform(seed, row.kv_len, id as u32));
        (z(logits[id]) >= least).then(|| z(logits[id]) - (-u.ln()).ln())
    };
    let best = (0..logits.len()).filter_map(score).fold(f64::NEG_INFINITY, f64::max);
    token < logits.len() && score(token).is_some_and(|score| score >= best - TIE * (1.0 + best.abs()))
}

/// The least z that top-k, top-p and min-p keep.
fn least_kept(row: &Row, mut z: Vec<f64>, shift: f64) -> f64 {
    z.sort_unstable_by(|a, b| b.total_cmp(a));
    let (top, count) = (z[0], row.top_k as usize);
    let mut least = if (1..z.len()).contains(&count) { z[count - 1] } else { f64::NEG_INFINITY };
    if row.top_p < 1.0 {
        let mass = |z: f64| (z - top).exp();
        let kept = || z.iter().copied().filter(|z| *z >= least);
        let target = (f64::from(row.top_p) + shift).clamp(0.0, 1.0) * kept().map(mass).sum::<f64>();
        let mut sum = 0.0;
        let reached = kept().find(|z| {
            sum += mass(*z);
            sum >= target
        });
        least = reached.unwrap_or(least);
    }
    if row.min_p > 0.0 {
        least = least.max(top + f64::from(row.min_p).ln() - 1e-6);
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 4.0, 2.0, 4.0];

    #[test]
    fn a_greedy_row_draws_the_first_of_the_most_probable() {
        let row = Row::default();
        assert_eq!(complaint(&row, &LOGITS, 1), None);
        assert!(complaint(&row, &LOGITS, 3).is_some());
        assert!(complaint(&row, &[f32::NAN, 0.0], 1).is_some());
    }

    #[test]
    fn filters_leave_the_most_probable() {
        let row = Row { temperature: 1.0, top_p: 1.0, ..Row::default() };
        let least = |row: Row| least_kept(&row, LOGITS.map(f64::from).to_vec(), 0.0);
        assert_eq!(least(row), f64::NEG_INFINITY);
        assert_eq!(least(Row { top_k: 3, ..row }), 2.0);
        assert_eq!(least(Row { top_p: 0.8, ..row }), 4.0);
        assert_eq!(least(Row { top_p: 0.95, ..row }), 2.0);
        assert!((least(Row { min_p: 0.5, ..row }) - (4.0 - 2f64.ln())).abs() < 1e-5);
    }

    #[test]
    fn exactly_one_of_different_logits_is_drawn() {
        let row = Row { temperature: 0.6, top_p: 1.0, seed_low: 7, kv_len: 3, ..Row::default() };
        let drawn = (0..4).filter(|token| complaint(&row, &LOGITS, *token).is_none()).count();
        assert_eq!(drawn, 1);
        assert!(complaint(&row, &LOGITS, 4).is_some());
    }
}
