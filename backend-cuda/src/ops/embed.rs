//! The two ends of a step: launches of `embed.cu`.

use minisgl_core::backend::Step;

use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::module::Modules;

const TAKE_BLOCKS: u32 = 32;
const TAKE_THREADS: u32 = 256;
const UPDATE_BLOCKS: u32 = 8;
const UPDATE_THREADS: u32 = 256;
const ROW_THREADS: u32 = 128;

/// The kernels.
#[derive(Debug)]
pub struct Ends {
    take_batch: Kernel,
    begin_step: Kernel,
    embed: Kernel,
    final_norm: Kernel,
}

impl Ends {
    /// Looks the kernels up.
    pub fn new(modules: &Modules) -> Result<Ends, CudaError> {
        Ok(Ends {
            take_batch: modules.kernel("embed", "take_batch", 0)?,
            begin_step: modules.kernel("embed", "begin_step", 0)?,
            embed: modules.kernel("embed", "embed", 0)?,
            final_norm: modules.kernel("embed", "final_norm", 0)?,
        })
    }

    pub(super) fn take_batch_grid() -> Grid {
        Grid::new(TAKE_BLOCKS, TAKE_THREADS)
    }

    pub(super) fn begin_step_grid() -> Grid {
        Grid::new(UPDATE_BLOCKS, UPDATE_THREADS).dependent()
    }

    /// A block a row: a token's, or a sampled row's.
    pub(super) fn row_grid(rows: u32) -> Grid {
        Grid::new(rows, ROW_THREADS).dependent()
    }

    /// `batch` becomes the one of the two that wait in `halves` whose turn it is, behind everything that was launched before.
    pub fn take_batch(
        &self,
        launcher: &Launcher,
        halves: Buffer,
        turn: Buffer,
        batch: Buffer,
    ) -> Result<(), CudaError> {
        let half_quads = (halves.elements() / 2 / 4) as u32;
        launcher.launch(&self.take_batch, Self::take_batch_grid(), [&halves, &half_quads, &turn, &batch])
    }

    /// Applies the batch's updates of the page table, the slots and their rules, behind everything that was launched before.
    pub fn begin_step(&self, launcher: &Launcher, step: &Step<Buffer>) -> Result<(), CudaError> {
        let updates_offset = step.layout.updates as u32;
        launcher.launch(
            &self.begin_step,
            Self::begin_step_grid(),
            [&step.batch, &updates_offset, &step.page_table, &step.slots, &step.rules],
        )
    }

    /// `residual[t] = table[id of t]`, `history[location of t] = id of t`, and the partial sums of its squares, `[tokens, ceil(hidden / 64)]` f32.
    pub fn embed(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        table: Address,
        hidden: u32,
        residual: Buffer,
        sumsq: Address,
    ) -> Result<(), CudaError> {
        let tokens_offset = step.layout.tokens as u32;
        launcher.launch(
            &self.embed,
            Self::row_grid(step.shape.tokens),
            [
                &step.batch,
                &tokens_offset,
                &step.token_pool,
                &table,
                &hidden,
                &residual,
                &sumsq,
                &step.history,
            ],
        )
    }

    /// `out[r] = rms_norm(residual[last token of r]) * weight` for the sampled rows.
    #[allow(clippy::too_many_arguments)]
    pub fn final_norm(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        residual: Buffer,
        weight: Address,
        hidden: u32,
        eps: f32,
        out: Buffer,
    ) -> Result<(), CudaError> {
        let rows_offset = step.layout.rows as u32;
        launcher.launch(
            &self.final_norm,
            Self::row_grid(step.shape.samples),
            [&step.batch, &rows_offset, &residual, &weight, &hidden, &eps, &out],
        )
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::{HOPPER, PORTABLE};

    use super::*;
    use crate::declared::threads_of;

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for set in [HOPPER, PORTABLE] {
            let threads =
                ["take_batch", "begin_step", "embed", "final_norm"].map(|name| threads_of(set, name));
            assert_eq!(threads, [TAKE_THREADS, UPDATE_THREADS, ROW_THREADS, ROW_THREADS]);
        }
    }
}
