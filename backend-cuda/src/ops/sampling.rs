//! Drawing tokens and their log-probabilities on the device: launches of `sampling.cu`.
//!
//! `sample` is two kernels: the first edits logits and finds where each row's filters cut (and returns at once for a row
//! without any of it), the second draws. Neither sorts, and nothing comes back to the host but the tokens.

use minisgl_core::backend::{Purpose, Step};

use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};

const DRAW_THREADS: u32 = 256;
const ROW_THREADS: u32 = 1024;

/// Logits that a block of the drawing kernel looks at in a pass.
const DRAW_PASS: u64 = 2048;
/// Blocks that fill the device twice. More would find their row's best anew, and less often skip what cannot win.
const DRAW_BLOCKS: u64 = 2048;

/// The kernels and their scratch.
#[derive(Debug)]
pub struct Sampling {
    cut: Kernel,
    draw: Kernel,
    logprobs: Kernel,
    /// `[rows]` f32: the least logit that a row keeps.
    cuts: Address,
    /// `[rows]` u64: the best score so far with its id. Zero between steps.
    best: Address,
    /// `[rows]` u32: blocks that are done with the row. Zero between steps.
    arrived: Address,
}

impl Sampling {
    /// Looks the kernels up and allocates scratch for steps of up to `rows` sampled rows.
    pub fn new(gpu: &mut Gpu, rows: u32) -> Result<Sampling, CudaError> {
        let rows = rows as usize;
        let best = gpu.allocate(Purpose::Scratch, rows * 8)?;
        let arrived = gpu.allocate(Purpose::Scratch, rows * 4)?;
        gpu.zero(best, rows * 8)?;
        gpu.zero(arrived, rows * 4)?;
        Ok(Sampling {
            cut: gpu.modules().kernel("sampling", "sample_cut", 0)?,
            draw: gpu.modules().kernel("sampling", "sample_draw", 0)?,
            logprobs: gpu.modules().kernel("sampling", "logprobs", 0)?,
            cuts: gpu.allocate(Purpose::Scratch, rows * 4)?,
            best,
            arrived,
        })
    }

    pub(super) fn cut_grid(samples: u32) -> Grid {
        Grid::new(samples, ROW_THREADS).dependent()
    }

    /// Logits of a row that a block of the drawing kernel looks at.
    pub(super) fn chunk(samples: u32, vocab: u32) -> u32 {
        let logits_of_all = u64::from(samples) * u64::from(vocab);
        logits_of_all.div_ceil(DRAW_BLOCKS).next_multiple_of(DRAW_PASS) as u32
    }

    pub(super) fn draw_grid(samples: u32, vocab: u32) -> Grid {
        let blocks = vocab.div_ceil(Self::chunk(samples, vocab));
        Grid::new(blocks, DRAW_THREADS).rows(samples).dependent()
    }

    /// Edits `logits` `[samples, vocab]` f16 and draws a token for each sampled row, into `tokens[header.output + row]` and
    /// the token pool.
    pub fn sample(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        logits: Buffer,
        vocab: u32,
        tokens: Buffer,
    ) -> Result<(), CudaError> {
        let (samples, rows_offset) = (step.shape.samples, step.layout.rows as u32);
        let page_bits = step.page_size.trailing_zeros();
        launcher.launch(
            &self.cut,
            Self::cut_grid(samples),
            [
                &step.batch,
                &rows_offset,
                &step.slots,
                &logits,
                &vocab,
                &vocab,
                &self.cuts,
                &step.rules,
                &step.page_table,
                &step.table_width,
                &page_bits,
                &step.history,
                &step.masks,
            ],
        )?;
        let chunk = Self::chunk(samples, vocab);
        launcher.launch(
            &self.draw,
            Self::draw_grid(samples, vocab),
            [
                &step.batch,
                &rows_offset,
                &step.slots,
                &logits,
                &vocab,
                &vocab,
                &chunk,
                &self.cuts,
                &self.best,
                &self.arrived,
                &tokens,
                &step.token_pool,
            ],
        )
    }

    /// Writes a `RowLogprobs` to `out[header.output + row]` for each sampled row that asks for it, of the tokens drawn.
    pub fn logprobs(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        logits: Buffer,
        vocab: u32,
        tokens: Buffer,
        out: Buffer,
    ) -> Result<(), CudaError> {
        let rows_offset = step.layout.rows as u32;
        launcher.launch(
            &self.logprobs,
            Grid::new(step.shape.samples, ROW_THREADS),
            [&step.batch, &rows_offset, &logits, &vocab, &vocab, &tokens, &out],
        )
    }
}

#[cfg(test)]
mod tests {
    use minisgl_core::batch::{LAST_TOKEN, SlotUpdate};
    use minisgl_core::rules::RULE_WORDS;
    use minisgl_core::sampling::{NO_TOKEN, RowLogprobs, SlotState};
    use minisgl_kernels::{HOPPER, PORTABLE};

    use super::*;
    use crate::declared::{assert_declared, constant, threads_of};

    #[test]
    fn both_sides_declare_the_same() {
        assert_declared!(&["step/sampling.cu"], "RowLogprobs", RowLogprobs { token, len, ids, logprobs });
        assert_declared!(
            &["step/slot.cuh"],
            "SlotUpdate",
            SlotUpdate { slot, rules, rule_words, reserved, state }
        );
        assert_declared!(
            &["step/slot.cuh"],
            "SlotState",
            SlotState {
                temperature,
                top_k,
                top_p,
                min_p,
                seed_low,
                seed_high,
                edits,
                repetition,
                presence,
                frequency,
                prompt_len,
                endings_from,
                biases,
                endings,
                bad_words,
                reserved,
            }
        );
        assert_eq!(constant("step/slot.cuh", "RULE_WORDS") as usize, RULE_WORDS);
        assert_eq!(constant("step/batch.cuh", "LAST_TOKEN"), LAST_TOKEN);
        assert_eq!(constant("step/sampling.cu", "NO_TOKEN"), NO_TOKEN);
        for set in [HOPPER, PORTABLE] {
            let threads = ["sample_cut", "sample_draw", "logprobs"].map(|name| threads_of(set, name));
            assert_eq!(threads, [ROW_THREADS, DRAW_THREADS, ROW_THREADS]);
        }
    }
}
