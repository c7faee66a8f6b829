//! A row of the report: a case's times beside what the device allows and what others need.

use minisgl_cuda::Cuda;

use crate::case::{Case, Cold, PerfError};
use crate::ceiling::Ceilings;
use crate::timer::{PerfOptions, Timing, perf_cuda};

/// Calls that a graph holds at most, where more are recorded so that their buffers outgrow the cache.
const CALLS_MAX: usize = 200;
/// Buffers in rotation must exceed the L2 cache this many times to be called cold.
const CACHE_TIMES: f64 = 2.0;
/// Bytes that the buffers in rotation may take together.
const ROTATION_BYTES: f64 = 8e9;

/// A case, timed.
#[derive(Clone, Debug)]
pub struct Row {
    /// Name of the family.
    pub family: &'static str,
    /// The shape.
    pub shape: String,
    /// Bytes that a call must move.
    pub bytes: f64,
    /// Operations that a call must do.
    pub flops: f64,
    /// Did every call find its buffers out of the cache?
    pub cold: bool,
    /// In a graph; `None` where none was asked for.
    pub graph: Option<Timing>,
    /// As plain launches.
    pub plain: Timing,
    /// Somebody else's time for the same, in a graph where ours is.
    pub baseline: Option<(&'static str, Timing)>,
}

impl Row {
    /// The time that counts: in a graph, where there is one.
    pub fn timing(&self) -> Timing {
        self.graph.unwrap_or(self.plain)
    }

    /// GB a second.
    pub fn gb_s(&self) -> f64 {
        self.bytes / (self.timing().mean_ms * 1e6)
    }

    /// TFLOP a second.
    pub fn tflop_s(&self) -> f64 {
        self.flops / (self.timing().mean_ms * 1e9)
    }

    /// Which part of the time is the least that the measured ceilings allow, in percent; `None` where a case moves and
    /// multiplies nothing.
    pub fn ceiling_percent(&self, ceilings: &Ceilings) -> Option<f64> {
        let read_s = self.bytes / ceilings.read_bytes_s;
        let matmul_s = ceilings.matmul_flop_s.map_or(0.0, |rate| self.flops / rate);
        let least_ms = read_s.max(matmul_s) * 1e3;
        (least_ms > 0.0).then(|| 100.0 * least_ms / self.timing().mean_ms)
    }

    /// How many times the baseline's speed is reached.
    pub fn speed(&self) -> Option<f64> {
        self.baseline.map(|(_, timing)| timing.mean_ms / self.timing().mean_ms)
    }
}

/// Sets a case up, checks its result, and times it.
///
/// # Errors
/// A wrong result, and whatever the device reports.
pub fn run(cuda: &mut Cuda, case: &Case, cold: Cold, options: &PerfOptions) -> Result<Row, PerfError> {
    let mark = cuda.mark();
    let row = run_here(cuda, case, cold, options);
    let freed = cuda.free_after(mark);
    // Where both failed, the first says why.
    let row = row?;
    freed?;
    Ok(row)
}

fn run_here(cuda: &mut Cuda, case: &Case, cold: Cold, options: &PerfOptions) -> Result<Row, PerfError> {
    let cache = cuda.properties().l2_bytes as f64 * CACHE_TIMES;
    let wanted = (cache / case.bytes.max(1.0)).ceil().max(2.0);
    let affordable = (ROTATION_BYTES / case.bytes.max(1.0)).max(1.0);
    let copies = match cold {
        Cold::Yes => wanted.min(affordable).min(CALLS_MAX as f64) as usize,
        Cold::No => 1,
    };
    let mut run = (case.setup)(cuda, copies)?;
    (run.call)(cuda.launcher(), 0)?;
    if let Some(complaint) = (run.check)(cuda)? {
        return Err(PerfError::Wrong { family: case.family, shape: case.shape.clone(), complaint });
    }
    let recorded = PerfOptions {
        // Enough calls that none finds its buffers where the last replay left them.
        graph_repetitions: options.graph_repetitions.max(copies as u32),
        ..*options
    };
    let in_graph = options.graph_repetitions > 0;
    let plain = perf_cuda(cuda, &PerfOptions { graph_repetitions: 0, ..*options }, &mut run.call)?;
    let graph = if in_graph { Some(perf_cuda(cuda, &recorded, &mut run.call)?) } else { None };
    let baseline = match &mut run.baseline {
        Some((name, call)) => {
            let options = if in_graph { &recorded } else { options };
            Some((*name, perf_cuda(cuda, options, call)?))
        }
        None => None,
    };
    Ok(Row {
        family: case.family,
        shape: case.shape.clone(),
        bytes: case.bytes,
        flops: case.flops,
        cold: copies as f64 * case.bytes >= cache,
        graph,
        plain,
        baseline,
    })
}
