//! Recorded decode steps, one for each of a few row counts.
//!
//! A decode step is many small kernels, and launching them one by one takes the host longer than the device. So a step
//! of each size is recorded once, and a batch is padded with dummy rows to the next size up and
//! replayed. A recorded step reads everything that varies from fixed buffers on the device: header, rows, plan, pages.
//!
//! ```text
//!   sizes   1  2  4  8  16  24 … 256  264 … 512  528 … 1024  1056 … 2048  2112 … limit
//!   apart         double   8          8          16          32           64
//!
//!   5 rows ──> the step of 8, rows 5, 6 and 7 dummies
//! ```
//!
//! Invariants: sizes ascend and end with the limit, so every decode step of at most that many rows has one. From 200 rows on
//! less than 4% of a step is padding; below, kernels work on tiles of 16 rows and more anyway.

use alloc::vec::Vec;

use crate::backend::{Model, Sampler};
use crate::batch::{Batch, StepShape};
use crate::config::Limits;
use crate::executor::RecordError;
use crate::resident::Resident;

/// See the module.
pub(crate) struct DecodeGraphs<G> {
    /// The sizes, and what was recorded for each.
    steps: Vec<(u32, G)>,
}

/// The row counts to record: 1, 2, 4, 8, then ever wider apart, at most by a 32nd of their power of two, and the limit.
fn sizes(limit: u32) -> impl Iterator<Item = u32> {
    let next = |size: &u32| match *size {
        size @ ..8 => Some(2 * size),
        size => size.checked_add(8.max((1 << size.ilog2()) / 32)),
    };
    let below = core::iter::successors(Some(1), next).take_while(move |size| *size < limit);
    below.chain((limit > 0).then_some(limit))
}

/// Row counts that are recorded at most.
fn limit(limits: &Limits) -> u32 {
    limits.graph_rows.min(limits.running)
}

/// The counts of the smallest recorded step that holds a batch of these counts; they themselves, if none does.
pub(crate) fn padded(counts: StepShape, limits: &Limits) -> StepShape {
    match counts.is_decode() && counts.decode_rows <= limit(limits) {
        true => {
            sizes(limit(limits)).find(|size| *size >= counts.decode_rows).map_or(counts, StepShape::decode)
        }
        false => counts,
    }
}

impl<G> DecodeGraphs<G> {
    /// None yet.
    pub fn none() -> Self {
        DecodeGraphs { steps: Vec::new() }
    }

    /// Records a step of every size. `staging` is pinned memory for a packed batch.
    pub fn capture<B: Sampler<Graph = G>, M: Model<B>>(
        backend: &mut B,
        model: &mut M,
        resident: &mut Resident<B::Buffer>,
        limits: &Limits,
        staging: &mut B::Pinned,
    ) -> Result<Self, RecordError<B::Error>> {
        let limit = limit(limits);
        let count = sizes(limit).count();
        if limit > 0 && backend.warm_up_before_capture() {
            let batch = Batch::new(limits);
            run(backend, model, resident, &batch, limit, staging).map_err(|source| RecordError {
                rows: limit,
                recorded: 0,
                count,
                source,
            })?;
        }
        let mut steps = Vec::with_capacity(count);
        for rows in sizes(limit) {
            let graph = record(backend, model, resident, rows);
            let recorded = steps.len();
            steps.push((rows, graph.map_err(|source| RecordError { rows, recorded, count, source })?));
        }
        Ok(DecodeGraphs { steps })
    }

    /// What was recorded for steps of these counts.
    pub fn of(&self, shape: StepShape) -> Option<&G> {
        let size = shape.is_decode().then_some(shape.decode_rows)?;
        let at = self.steps.binary_search_by_key(&size, |(size, _)| *size).ok()?;
        self.steps.get(at).map(|(_, graph)| graph)
    }
}

/// Runs a step that holds dummy rows alone.
fn run<B: Sampler, M: Model<B>>(
    backend: &mut B,
    model: &mut M,
    resident: &mut Resident<B::Buffer>,
    batch: &Batch,
    rows: u32,
    staging: &mut B::Pinned,
) -> Result<(), B::Error> {
    let step = resident.send(backend, model, batch, StepShape::decode(rows), 0, staging)?;
    resident.run(backend, model, &step, true)?;
    backend.synchronize()
}

/// Records a step of so many rows, whatever they are. A recording that fails is ended all the same.
fn record<B: Sampler, M: Model<B>>(
    backend: &mut B,
    model: &mut M,
    resident: &Resident<B::Buffer>,
    rows: u32,
) -> Result<B::Graph, B::Error> {
    let step = resident.step(StepShape::decode(rows));
    backend.begin_capture()?;
    let enqueued = resident.run(backend, model, &step, true);
    let graph = backend.end_capture();
    enqueued.and(graph)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_double_up_to_8_then_go_by_8_and_more_and_end_with_the_limit() {
        let up_to = |limit| sizes(limit).collect::<Vec<_>>();
        assert_eq!(up_to(0), []);
        assert_eq!(up_to(1), [1]);
        assert_eq!(up_to(3), [1, 2, 3]);
        assert_eq!(up_to(8), [1, 2, 4, 8]);
        assert_eq!(up_to(16), [1, 2, 4, 8, 16]);
        assert_eq!(up_to(37), [1, 2, 4, 8, 16, 24, 32, 37]);
        assert_eq!(up_to(40), [1, 2, 4, 8, 16, 24, 32, 40]);
        assert!(up_to(2200).ends_with(&[2016, 2048, 2112, 2176, 2200]));
    }

    fn limits(graph_rows: u32) -> Limits {
        let (running, queued, sequence, prefill_tokens) = (8192, 1, 64, 64);
        Limits { running, queued, sequence, prefill_tokens, page_size: 16, pages: 8, graph_rows }
    }

    #[test]
    fn less_than_a_25th_of_a_step_is_padding_and_few_sizes_do() {
        let steps = sizes(4096).count();
        assert!(steps <= 170, "{steps} sizes");
        for rows in 200..=4096 {
            let size = padded(StepShape::decode(rows), &limits(4096)).decode_rows;
            assert!((size - rows) * 25 < size, "{} of {size} rows", size - rows);
        }
    }

    #[test]
    fn a_batch_is_padded_to_the_smallest_step_that_holds_it_and_that_is_recorded() {
        let graphs = DecodeGraphs { steps: sizes(24).map(|size| (size, ())).collect() };
        let size = |rows| padded(StepShape::decode(rows), &limits(24));
        assert_eq!([1, 3, 9, 24, 25].map(|rows| size(rows).decode_rows), [1, 4, 16, 24, 25]);
        assert!((1..=24).all(|rows| graphs.of(size(rows)).is_some()));
        assert_eq!(graphs.of(size(25)), None);
        let mixed = StepShape { prefill_rows: 1, tokens: 20, ..StepShape::decode(3) };
        assert_eq!((padded(mixed, &limits(24)), graphs.of(mixed)), (mixed, None));
    }
}
