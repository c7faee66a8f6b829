//! The least time a run could take on a device: the bytes it must read and the operations it must do, over what the
//! device reaches at best.
//!
//! ```text
//!   decode   reads   context of every row x KV bytes a token      once a step and row, as far as the window reaches
//!                    weights, head included                       once a step of decode rows alone
//!                    experts that a row chose                     likewise, each once, as they were counted
//!   prefill  does    2 operations a weight and token              layers alone; the head sees one token a prompt
//!                    4 x heads x head_dim x layers                a token and token attended to
//! ```
//!
//! Decode is taken to be bound by bytes and prefill by operations, and the two not to overlap. In a step of both, decode rows
//! count as the keys and values that they read: the weights are the prompts'. What else a step does (activations, sampling,
//! launching) counts as nothing, so no run reaches the floor.

use minisgl_core::backend::Dims;
use minisgl_core::stats::{ExpertsRead, Stats};
use serde::Serialize;

use crate::diagnostics::Ceilings;
use crate::info::ExpertsInfo;
use crate::workload::Item;

/// What a model costs, by unit of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Costs {
    /// Bytes of weights that every decode step reads: all but experts.
    pub weight_bytes_per_step: u64,
    /// Bytes of an expert; 0 where there are none.
    pub expert_bytes: u64,
    /// Bytes of keys and values of a token, over all layers.
    pub kv_bytes_per_token: u64,
    /// Operations of all layers' matrices for a token.
    pub flop_per_token: u64,
    /// Operations of all layers' attention for a token and one token attended to.
    pub flop_per_context: u64,
}

impl Costs {
    /// The costs of a decoder with `weight_bytes` of weights that a step reads, all experts included, and whose tokens are
    /// multiplied with `active_weights` elements of its layers; bytes are as the device stores them.
    pub fn new(
        dims: &Dims,
        active_weights: u64,
        weight_bytes: u64,
        experts: Option<ExpertsInfo>,
        kv_bytes_per_token: u64,
    ) -> Self {
        Costs {
            weight_bytes_per_step: weight_bytes - experts.map_or(0, |experts| experts.all_bytes()),
            expert_bytes: experts.map_or(0, |experts| experts.bytes),
            kv_bytes_per_token,
            flop_per_token: 2 * active_weights,
            flop_per_context: 4 * u64::from(dims.layers) * dims.q_width() as u64,
        }
    }

    /// What a run that is counted in `stats` and `experts` had to read and do.
    pub fn work(&self, stats: &Stats, experts: &ExpertsRead) -> Work {
        Work {
            kv_bytes: stats.decode_context * self.kv_bytes_per_token,
            weight_bytes: stats.decode_steps * self.weight_bytes_per_step
                + experts.experts * self.expert_bytes,
            prefill_flop: stats.prefill_tokens * self.flop_per_token
                + stats.prefill_context * self.flop_per_context,
        }
    }
}

/// What the scheduler counts when all requests decode together: token 1 comes from prefill, and the step that draws token
/// i + 1 attends to the prompt and i tokens, as far as the window reaches.
pub fn together(items: &[Item], window: Option<u32>) -> Stats {
    let window = window.map_or(u64::MAX, u64::from);
    let up_to = |n: u64| {
        let inside = n.min(window);
        inside * (inside + 1) / 2 + (n - inside) * window.min(n)
    };
    let mut stats = Stats::default();
    for item in items {
        let (prompt, decoded) = (item.prompt.len() as u64, u64::from(item.output_tokens.saturating_sub(1)));
        stats.prefill_tokens += prompt;
        stats.prefill_context += up_to(prompt);
        stats.decode_context += up_to(prompt + decoded) - up_to(prompt);
        stats.decode_steps = stats.decode_steps.max(decoded);
    }
    stats
}

/// The experts that these decode steps read, if every choice is as likely as any other.
pub fn experts_read_together(items: &[Item], experts: &ExpertsInfo) -> ExpertsRead {
    let mut lengths: Vec<u64> =
        items.iter().map(|item| u64::from(item.output_tokens.saturating_sub(1))).collect();
    lengths.sort_unstable();
    let (mut read, mut begin) = (0.0, 0);
    for (ended, length) in lengths.iter().enumerate() {
        read += (length - begin) as f64 * experts.read_by((lengths.len() - ended) as u64);
        begin = *length;
    }
    let layers = u64::from(experts.layers);
    ExpertsRead { layers: begin * layers, experts: (read * layers as f64) as u64 }
}

/// What a run must read and do, whatever the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Work {
    /// Keys and values that decode attention reads.
    pub kv_bytes: u64,
    /// Weights that decode steps read.
    pub weight_bytes: u64,
    /// Operations of prefill.
    pub prefill_flop: u64,
}

impl Work {
    /// Seconds that decode steps and prefill steps take at least; prefill counts as nothing where its ceiling is not known.
    pub fn floor(&self, ceilings: &Ceilings) -> Floor {
        let decode_s = (self.kv_bytes + self.weight_bytes) as f64 / ceilings.bytes_per_s;
        let prefill_s = ceilings.flop_per_s.map_or(0.0, |rate| self.prefill_flop as f64 / rate);
        Floor { decode_s, prefill_s, seconds: decode_s + prefill_s }
    }
}

/// The least time, by kind of step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// Seconds of decode steps.
    pub decode_s: f64,
    /// Seconds of prefill steps.
    pub prefill_s: f64,
    /// Both.
    pub seconds: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dims_of;
    use crate::workload::{Lengths, Source, Workload};

    const MODEL: &str = "qwen3-0.6b";

    fn stats_of_published_workload() -> Stats {
        let lengths = Lengths::new(100, 1024).unwrap();
        let workload = Workload {
            source: Source::Minisgl,
            seed: 0,
            requests: 256,
            input: lengths.clone(),
            output: lengths,
        };
        together(&workload.draw(dims_of(MODEL).vocab), None)
    }

    #[test]
    fn a_window_bounds_what_a_token_attends_to() {
        let item = Item { prompt: vec![1; 5], output_tokens: 4 };
        let count = |window| {
            let Stats { prefill_context, decode_context, .. } = together(std::slice::from_ref(&item), window);
            (prefill_context, decode_context)
        };
        assert_eq!(count(None), (1 + 2 + 3 + 4 + 5, 6 + 7 + 8));
        assert_eq!(count(Some(7)), (15, 6 + 7 + 7));
        assert_eq!(count(Some(3)), (1 + 2 + 3 + 3 + 3, 9));
    }

    #[test]
    fn experts_are_read_once_a_step_and_layer_by_all_rows_that_chose_them() {
        let experts = ExpertsInfo { layers: 3, count: 8, per_token: 2, bytes: 100 };
        let item = |output_tokens| Item { prompt: vec![1], output_tokens };
        let read = |items: &[Item]| experts_read_together(items, &experts);
        assert_eq!(read(&[item(5)]), ExpertsRead { layers: 12, experts: 4 * 3 * 2 });
        // Two rows for 4 steps, then one for 2: 8 (1 - (3/4)^2) is 3.5.
        assert_eq!(
            read(&[item(5), item(7), item(1)]),
            ExpertsRead { layers: 18, experts: 3 * (4 * 7 / 2 + 2 * 2) }
        );
        let costs = Costs::new(&dims_of(MODEL), 1000, 7 + 2400, Some(experts), 1);
        assert_eq!((costs.weight_bytes_per_step, costs.flop_per_token), (7, 2000));
        let stats = Stats { decode_steps: 6, ..Stats::default() };
        assert_eq!(costs.work(&stats, &ExpertsRead { layers: 18, experts: 54 }).weight_bytes, 6 * 7 + 5400);
    }

    #[test]
    fn the_floor_of_the_published_workload_on_an_h100_is_five_seconds() {
        let weights = 880_803_840 + 311_164_928; // layers, head
        let costs = Costs::new(&dims_of(MODEL), 440_401_920, weights, None, 114_688);
        assert_eq!(costs.flop_per_token, 880_803_840);
        let work = costs.work(&stats_of_published_workload(), &ExpertsRead::default());
        assert!((13.8e12..13.9e12).contains(&(work.kv_bytes as f64)), "{work:?}");
        assert_eq!(work.weight_bytes, 1023 * weights);
        assert!((0.13e15..0.14e15).contains(&(work.prefill_flop as f64)), "{work:?}");
        let floor = work.floor(&Ceilings { bytes_per_s: 3.11e12, flop_per_s: Some(786e12) });
        assert!((4.95..5.05).contains(&floor.seconds), "{floor:?}");
        assert_eq!(floor.seconds, floor.decode_s + floor.prefill_s);
        let without = work.floor(&Ceilings { bytes_per_s: 3.11e12, flop_per_s: None });
        assert_eq!(without.seconds, floor.decode_s);
    }
}
