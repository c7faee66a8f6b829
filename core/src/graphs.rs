//! Recorded decode steps, one for each of a few row counts.
//!
//! A decode step is many small kernels, and launching them one by one takes the host longer than the device. So a step
//! of each size is recorded once, on dummy rows, and a batch is padded with dummy rows to the next size up and
//! replayed. A recorded step reads everything that varies from fixed buffers on the device: header, rows, plan, pages.
//!
//! ```text
//!   sizes   1  2  4  8  16  24  32 … limit         5 rows ──> the step of 8, rows 5, 6 and 7 dummies
//! ```
//!
//! Invariant: sizes ascend and end with the limit, so every decode step of at most that many rows has one.

use alloc::vec::Vec;

use crate::backend::{Device, Model};
use crate::batch::{Batch, StepShape};
use crate::config::Limits;
use crate::resident::Resident;

/// See the module.
pub(crate) struct DecodeGraphs<G> {
    /// The sizes, and what was recorded for each.
    steps: Vec<(u32, G)>,
}

/// The row counts to record: 1, 2, 4, 8, 16, then every 8 up to the limit, and the limit itself.
fn sizes(limit: u32) -> impl Iterator<Item = u32> {
    let small = [1, 2, 4, 8].into_iter();
    small.chain((16..limit).step_by(8)).filter(move |size| *size < limit).chain((limit > 0).then_some(limit))
}

impl<G> DecodeGraphs<G> {
    /// Records a step of every size. `staging` is pinned memory for a packed batch.
    pub fn capture<B: Device<Graph = G>, M: Model<B>>(
        backend: &mut B,
        model: &mut M,
        resident: &Resident<B::Buffer>,
        limits: &Limits,
        staging: &mut B::Pinned,
    ) -> Result<Self, CaptureError<B::Error>> {
        let limit = limits.graph_rows.min(limits.running);
        let mut steps = Vec::with_capacity(sizes(limit).count());
        let batch = Batch::new(limits);
        for rows in sizes(limit) {
            let graph = record(backend, model, resident, &batch, rows, staging);
            steps.push((rows, graph.map_err(|source| CaptureError { rows, source })?));
        }
        Ok(DecodeGraphs { steps })
    }

    /// The smallest recorded step that holds so many rows, and its size.
    pub fn fitting(&self, rows: u32) -> Option<(u32, &G)> {
        let at = self.steps.partition_point(|(size, _)| *size < rows);
        self.steps.get(at).map(|(size, graph)| (*size, graph))
    }
}

/// Recording failed.
pub(crate) struct CaptureError<E> {
    pub rows: u32,
    pub source: E,
}

/// Records a step that holds dummy rows alone; before that it is run, where the device asks for it.
fn record<B: Device, M: Model<B>>(
    backend: &mut B,
    model: &mut M,
    resident: &Resident<B::Buffer>,
    batch: &Batch,
    rows: u32,
    staging: &mut B::Pinned,
) -> Result<B::Graph, B::Error> {
    let step = resident.send(backend, model, batch, StepShape::decode(rows), 0, staging)?;
    if backend.warm_up_before_capture() {
        model.forward(backend, &step, resident.tokens)?;
    }
    backend.synchronize()?;
    backend.begin_capture()?;
    model.forward(backend, &step, resident.tokens)?;
    backend.end_capture()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_double_up_to_16_then_go_by_8_and_end_with_the_limit() {
        let up_to = |limit| sizes(limit).collect::<Vec<_>>();
        assert_eq!(up_to(0), []);
        assert_eq!(up_to(1), [1]);
        assert_eq!(up_to(3), [1, 2, 3]);
        assert_eq!(up_to(8), [1, 2, 4, 8]);
        assert_eq!(up_to(16), [1, 2, 4, 8, 16]);
        assert_eq!(up_to(37), [1, 2, 4, 8, 16, 24, 32, 37]);
        assert_eq!(up_to(40), [1, 2, 4, 8, 16, 24, 32, 40]);
    }

    #[test]
    fn a_batch_takes_the_smallest_step_that_holds_it() {
        let graphs = DecodeGraphs { steps: sizes(24).map(|size| (size, ())).collect() };
        let size = |rows| graphs.fitting(rows).map(|(size, ())| size);
        assert_eq!([size(1), size(3), size(9), size(24)], [Some(1), Some(4), Some(16), Some(24)]);
        assert_eq!(size(25), None);
    }
}
