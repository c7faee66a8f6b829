//! A layer's experts; [`minisgl_core::spec::Experts`] has the definition.
//!
//! ```text
//!   x ── router ──> logits ── choose ──> each token's experts and their shares
//!        expert 0: its tokens' rows gathered ── gate, up ── down ──> share * what it gives, added to out
//!        expert 1: …
//! ```
//!
//! Experts take their turns in ascending order of their numbers, and one that no token chose is passed over. So what a token gets
//! is added in that order, whatever tokens are beside it. Padding tokens choose nobody. Ranks choose alike, for they have the same
//! logits. Each has a share of gate's and up's rows, and of down's: they bring together what down gets, and at the end the columns of `out`.

use minisgl_core::backend::{ExpertWeights, Purpose, Step};
use minisgl_core::batch;
use minisgl_core::config::Limits;
use minisgl_core::spec::{DecoderSpec, Dims, Experts, LayerSpec};
use minisgl_core::stats::ExpertsRead;

use crate::error::CpuError;
use crate::linear::{Rounds, gate_up};
use crate::matmul;
use crate::memory::{Buffer, Memory, floats};
use crate::weights::{Matrix, Weight};

/// In place of an expert's number: no further expert.
const NOBODY: u32 = u32::MAX;

/// What a layer's parts hand to each other, for as many tokens as a step may have.
#[derive(Clone, Copy, Debug)]
pub struct ExpertBuffers {
    /// `[tokens, experts]`.
    logits: Buffer,
    /// `[tokens, per_token]`: numbers of experts, ascending (words).
    chosen: Buffer,
    /// `[tokens, per_token]`: their shares.
    shares: Buffer,
    /// Tokens of the expert at hand (words).
    tokens: Buffer,
    /// `[tokens of the expert, hidden]`: what it gets.
    gathered: Buffer,
    /// `[tokens of the expert, hidden]`: what it gives, of a rank its share of the columns.
    given: Buffer,
}

impl ExpertBuffers {
    /// For a model; nothing where it has no experts.
    pub fn new(
        memory: &mut Memory,
        spec: &DecoderSpec,
        limits: &Limits,
    ) -> Result<Option<ExpertBuffers>, CpuError> {
        let layers = || spec.layers.iter().filter_map(LayerSpec::experts);
        let Some(count) = layers().map(|experts| experts.count).max() else { return Ok(None) };
        let per_token = layers().map(|experts| experts.per_token).max().unwrap_or(0);
        let mut alloc = |width: u32| memory.alloc(Purpose::Scratch, limits.step_tokens() * width as usize);
        Ok(Some(ExpertBuffers {
            logits: alloc(count)?,
            chosen: alloc(per_token)?,
            shares: alloc(per_token)?,
            tokens: alloc(1)?,
            gathered: alloc(spec.dims.hidden)?,
            given: alloc(spec.dims.hidden)?,
        }))
    }
}

/// All experts of a layer, over all tokens of a step: `out[t] = sum of share * expert(x[t])`.
#[derive(Clone, Copy, Debug)]
pub struct RunExperts {
    /// The step.
    pub step: Step<Buffer>,
    /// The layer's.
    pub experts: Experts,
    /// Likewise.
    pub weights: ExpertWeights<Weight>,
    /// `[tokens, hidden]`.
    pub x: Buffer,
    /// `[tokens, intermediate]`.
    pub activated: Buffer,
    /// `[tokens of an expert, intermediate of all ranks]`: what down gets; empty where there is one alone.
    pub joined: Buffer,
    /// `[tokens, share of hidden]`: a rank's columns of the sum; likewise.
    pub own: Buffer,
    /// `[tokens, hidden]`.
    pub out: Buffer,
    /// The rest of what it needs.
    pub buffers: ExpertBuffers,
}

impl RunExperts {
    /// Tokens of slot `nobody` are padding; `rounded` is for what e4m3 matrices are applied to. Gives how many experts were
    /// read.
    pub fn run(
        &self,
        memory: &mut Memory,
        weights: &[Matrix],
        dims: &Dims,
        nobody: u32,
        rounded: Buffer,
        mut rounds: Rounds<'_>,
    ) -> Result<u64, CpuError> {
        let ExpertBuffers { logits, chosen, shares, tokens, gathered, given } = self.buffers;
        let RunExperts { step, x, activated, joined, own, out, .. } = *self;
        let buffers = [
            step.batch, x, activated, out, rounded, logits, chosen, shares, tokens, gathered, given, joined,
            own,
        ];
        let [words, x, activated, out, rounded, logits, chosen, shares, rows, gathered, given, joined, own] =
            memory.borrow(buffers)?;
        let Experts { count, per_token, intermediate, activation, .. } = self.experts;
        let (count, per_token, mlp) = (count as usize, per_token as usize, intermediate as usize);
        let ranks = rounds.link.as_ref().map_or(1, |link| link.rank().count as usize);
        let (hidden, whole_mlp) = (dims.hidden as usize, mlp * ranks);
        let width = hidden / ranks;
        let tokens = batch::packed_tokens(&step.layout, step.shape.tokens as usize, words);
        let (x, out) = (&floats(x)[..tokens.len() * hidden], &mut floats(out)[..tokens.len() * hidden]);
        let chosen = &mut chosen[..tokens.len() * per_token];
        let (shares, logits) = (floats(shares), &mut floats(logits)[..tokens.len() * count]);
        let [router, gate_ups, downs] =
            [self.weights.router, self.weights.gate_up, self.weights.down].map(|weight| &weights[weight.0]);

        matmul::linear(router.all(), rounds.inputs(router, x, floats(rounded))?, logits);
        let choices = chosen.chunks_mut(per_token).zip(shares.chunks_mut(per_token));
        for ((token, logits), (chosen, shares)) in tokens.iter().zip(logits.chunks(count)).zip(choices) {
            match token.slot == nobody {
                true => chosen.fill(NOBODY),
                false => choose(logits, self.experts.normalized, chosen, shares),
            }
        }
        let own = &mut floats(own)[..];
        let sums = if ranks > 1 { &mut own[..tokens.len() * width] } else { &mut out[..] };
        sums.fill(0.0);
        let mut read = 0;
        for expert in 0..count {
            let chosen = chosen.iter().enumerate().filter(|(_, chosen)| **chosen == expert as u32);
            let places = chosen.map(|(place, _)| place as u32);
            let found = rows.iter_mut().zip(places).map(|(row, place)| *row = place).count();
            if found == 0 {
                continue;
            }
            read += 1;
            let rows = || rows[..found].iter().map(|place| *place as usize);
            let (gathered, given) =
                (&mut floats(gathered)[..found * hidden], &mut floats(given)[..found * width]);
            let activated = &mut floats(activated)[..found * mlp];
            for (to, place) in gathered.chunks_mut(hidden).zip(rows()) {
                to.copy_from_slice(&x[place / per_token * hidden..][..hidden]);
            }
            let inputs = rounds.inputs(gate_ups, gathered, floats(rounded))?;
            gate_up(gate_ups.one_of(count, expert), activation, inputs, activated);
            let activated = match &mut rounds.link {
                None => &*activated,
                Some(link) => {
                    let joined = &mut floats(joined)[..found * whole_mlp];
                    link.join_columns(activated, whole_mlp, joined)?;
                    joined
                }
            };
            let inputs = rounds.inputs(downs, activated, floats(rounded))?;
            matmul::linear(downs.one_of(count, expert), inputs, given);
            for (given, place) in given.chunks(width).zip(rows()) {
                let sums = &mut sums[place / per_token * width..][..width];
                sums.iter_mut().zip(given).for_each(|(sum, given)| *sum += shares[place] * given);
            }
        }
        if let Some(link) = &mut rounds.link {
            link.join_columns(&own[..tokens.len() * width], hidden, out)?;
        }
        Ok(read)
    }
}

/// Counts what a layer of a step read.
pub fn count(step: &Step<Buffer>, read: u64, total: &mut ExpertsRead) {
    if step.shape.is_decode() {
        total.layers += 1;
        total.experts += read;
    }
}

/// The experts of the largest logits, as many as `chosen` has places, in ascending order, and their shares. Logits that are not
/// numbers choose some experts too, of shares that are none.
fn choose(logits: &[f32], normalized: bool, chosen: &mut [u32], shares: &mut [f32]) {
    for place in 0..chosen.len() {
        let (before, rest) = chosen.split_at_mut(place);
        let left = (0..logits.len()).filter(|expert| !before.contains(&(*expert as u32)));
        // The last of equal ones wins a maximum, so experts come in descending order. -0 is made 0.
        let best = left.rev().max_by(|a, b| (logits[*a] + 0.0).total_cmp(&(logits[*b] + 0.0)));
        rest[0] = best.map_or(NOBODY, |expert| expert as u32);
    }
    let largest = logits[chosen[0] as usize];
    chosen.sort_unstable();
    let weight = |logit: f32| (logit - largest).exp();
    let sum: f32 = match normalized {
        true => chosen.iter().map(|expert| weight(logits[*expert as usize])).sum(),
        false => logits.iter().map(|logit| weight(*logit)).sum(),
    };
    for (share, expert) in shares.iter_mut().zip(chosen) {
        *share = weight(logits[*expert as usize]) / sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen<const K: usize>(logits: &[f32], normalized: bool) -> ([u32; K], [f32; K]) {
        let (mut chosen, mut shares) = ([0; K], [0.0; K]);
        choose(logits, normalized, &mut chosen, &mut shares);
        (chosen, shares)
    }

    #[test]
    fn the_largest_logits_are_chosen_and_of_equal_ones_the_lower_experts() {
        assert_eq!(chosen::<2>(&[1.0, 3.0, 2.0, 3.0], true).0, [1, 3]);
        assert_eq!(chosen::<1>(&[1.0, 3.0, 2.0, 3.0], true).0, [1]);
        assert_eq!(chosen::<3>(&[2.0, 2.0, 5.0, 2.0, 2.0], true).0, [0, 1, 2]);
        assert_eq!(chosen::<1>(&[-0.0, 0.0], true).0, [0]);
        assert_eq!(chosen::<3>(&[0.5; 3], true).0, [0, 1, 2]);
    }

    #[test]
    fn shares_are_of_all_experts_or_of_the_chosen() {
        let logits = [0.0, 4.0_f32.ln(), 3.0_f32.ln(), f32::NEG_INFINITY];
        let close = |a: [f32; 2], b: [f32; 2]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(close(chosen(&logits, false).1, [0.5, 0.375]));
        assert!(close(chosen(&logits, true).1, [4.0 / 7.0, 3.0 / 7.0]));
        let far = [1000.0, -1000.0, 1000.0];
        assert!(close(chosen(&far, false).1, [0.5, 0.5]));
    }

    #[test]
    fn logits_that_are_not_numbers_choose_different_experts_of_no_share() {
        let (chosen, shares) = chosen::<2>(&[f32::NAN; 4], true);
        assert_eq!(chosen, [0, 1]);
        assert!(shares.iter().all(|share| share.is_nan()));
    }
}
