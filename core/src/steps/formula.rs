//! A device that is a formula: what its steps take, for plans and tests without one.
//!
//! A step takes what [`StepCosts`] say, and decode rows the time in which memory brings their keys and values.

use crate::batch::Batch;
use crate::costs::StepCosts;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Formula {
    /// As measured when an engine is built.
    pub costs: StepCosts,
    /// Milliseconds of a token that a decode row attends to.
    pub context_ms: f64,
    /// Of a row behind the first 256.
    pub further_row_ms: f64,
    /// Of the logits and the draw of a row beside prompts.
    pub sample_ms: f64,
    /// Of decode attention at least.
    pub attention_least_ms: f64,
}

impl Formula {
    /// Milliseconds that a step takes.
    pub fn step_ms(&self, batch: &Batch) -> f64 {
        let shape = batch.shape();
        let (decoded, prefilled) = batch.rows().split_at(shape.decode_rows as usize);
        let context: u64 = decoded.iter().map(|row| u64::from(row.kv_len)).sum();
        let attention = match decoded {
            [] => 0.0,
            _ => self.attention_least_ms.max(context as f64 * self.context_ms),
        };
        let pairs: f64 = prefilled
            .iter()
            .map(|row| f64::from(row.tokens) * (f64::from(row.position + row.kv_len) / 2.0))
            .sum();
        let StepCosts { decode, mixed, attention: of_prompts } = self.costs;
        let (rows, samples) = (shape.tokens.min(256), f64::from(shape.samples));
        match shape.is_decode() {
            true => {
                f64::from(decode.at(rows)) + f64::from(shape.tokens - rows) * self.further_row_ms + attention
            }
            false => {
                let products = f64::from(mixed.at(shape.tokens) + of_prompts.fixed_ms);
                products + samples * self.sample_ms + attention + pairs * f64::from(of_prompts.token_ms)
            }
        }
    }
}
