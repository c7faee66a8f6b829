//! Offline throughput, measured: requests run to their end, and what the run says of the engine.
//!
//! ```text
//!   Plan ── warm-up ──> measure ──> RunReport   (x runs) ──> BenchReport ──> table, JSON, trace
//!                          └──> verify: some requests again, each alone: the same tokens?
//! ```
//!
//! Every run starts with an empty prefix cache, and every request has a seed of its own; so runs draw the same tokens,
//! and a hash of them tells whether a change of settings changed the output.

mod floor;
mod measure;
mod report;
mod requests;
mod run_report;
mod summary;
mod trace;
mod verify;

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

pub use floor::{Costs, Floor, Work};
pub use report::{BenchReport, EngineReport, WorkloadReport};
pub use requests::{Requests, RequestsError};
pub use run_report::{FloorReport, HostReport, Idle, PhaseReport, RunReport};
pub use summary::{Percentiles, Spread};
pub use verify::Verification;

use crate::error::Error;
use crate::gauge::Ceilings;
use crate::llm::Llm;
use crate::request::{GenerateRequest, RequestError, SamplingParams};
use crate::workload::{Lengths, Source, Workload};
use measure::{Measurement, measure};

/// What to measure, and where results go.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The requests.
    pub requests: Requests,
    /// How tokens are drawn; length and seed are each request's own, and what else a file's requests say.
    pub sampling: SamplingParams,
    /// Timed runs.
    pub runs: usize,
    /// Run the whole workload once before the clock starts.
    pub warm_up: bool,
    /// Requests to run again alone; 0 for none.
    pub verify: usize,
    /// Bytes a second that the floor is computed with, instead of what is measured.
    pub bytes_per_s: Option<f64>,
    /// Operations a second that the floor is computed with, instead of what is measured.
    pub flop_per_s: Option<f64>,
    /// Where the report goes as JSON.
    pub json: Option<PathBuf>,
    /// Where the last run's timeline goes.
    pub trace: Option<PathBuf>,
}

/// How far a timed run has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Which run, counted from 1.
    pub run: usize,
    /// Output tokens so far.
    pub tokens: u64,
    /// Output tokens that the workload asks for.
    pub of: u64,
}

/// Why there is no result.
#[derive(Debug, Error)]
pub enum BenchError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] Error),
    /// The file of requests.
    #[error(transparent)]
    Requests(#[from] RequestsError),
    /// A request that the engine refuses.
    #[error("request {index} of the workload can't run: {error}")]
    Rejected {
        /// Which one.
        index: usize,
        /// Why.
        error: RequestError,
    },
    /// A result that can't be written.
    #[error("{} can't be written: {source}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The table can't be printed.
    #[error("the report can't be printed: {0}")]
    Print(#[source] io::Error),
}

/// Runs a plan: prints a table for each run to `out` as it ends, writes the files asked for, returns the report.
/// `on_step` is told after each step of a timed run how far it has come.
///
/// # Errors
/// See [`BenchError`].
pub fn run(
    llm: &mut Llm,
    plan: &Plan,
    out: &mut dyn Write,
    on_step: &mut dyn FnMut(Progress),
) -> Result<BenchReport, BenchError> {
    let json = plan.json.as_deref().map(Output::create).transpose()?;
    let timeline = plan.trace.as_deref().map(Output::create).transpose()?;
    let info = llm.info().clone();
    let requests = plan.requests.take(llm, &plan.sampling)?;
    let workload = plan.requests.describe(&requests, &plan.sampling);
    print(out, format_args!("{workload}\n"))?;
    warm_up(llm, plan, &requests)?;

    let ceilings = ceilings(llm, plan)?;
    let costs = Costs::new(&info.dims, info.weight_bytes, info.kv_bytes_per_token());
    let mut runs = Vec::with_capacity(plan.runs);
    let mut last: Option<Measurement> = None;
    for run in 1..=plan.runs {
        let of = workload.output_tokens;
        let mut measurement = measure(llm, &requests, &mut |tokens| on_step(Progress { run, tokens, of }))?;
        let report = RunReport::new(&mut measurement, &costs, ceilings);
        print(out, format_args!("{report}"))?;
        runs.push(report);
        last = Some(measurement);
    }
    let device_state = llm.device_state();
    let together = last.as_ref().map_or(&[][..], |run| &run.completions);
    let verification = match plan.verify {
        0 => None,
        count => Some(verify::verify(llm, &requests, together, count)?),
    };
    let rates: Vec<f64> = runs.iter().map(|run| run.tokens_per_s).collect();
    let report = BenchReport {
        command: std::env::args().collect(),
        unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        engine: EngineReport::new(&info),
        model: info.model,
        backend: info.backend,
        device: info.device,
        workload,
        costs,
        same_output: runs.windows(2).all(|pair| pair[0].output_hash == pair[1].output_hash),
        runs,
        tokens_per_s: Spread::of(&rates),
        verification,
        device_state,
    };
    print(out, format_args!("{report}"))?;
    if let Some(timeline) = timeline {
        let steps = last.as_ref().map_or(&[][..], |run| &run.steps);
        timeline.write(|file| trace::write(steps, file))?;
    }
    if let Some(json) = json {
        json.write(|file| serde_json::to_writer_pretty(file, &report).map_err(io::Error::from))?;
    }
    Ok(report)
}

/// As told, else as measured; `None` without a bandwidth.
fn ceilings(llm: &mut Llm, plan: &Plan) -> Result<Option<Ceilings>, Error> {
    let measured = match (plan.bytes_per_s, plan.flop_per_s) {
        (Some(_), Some(_)) => None,
        _ => llm.ceilings()?,
    };
    let bytes_per_s = plan.bytes_per_s.or(measured.map(|ceilings| ceilings.bytes_per_s));
    let flop_per_s = plan.flop_per_s.or(measured.and_then(|ceilings| ceilings.flop_per_s));
    Ok(bytes_per_s.map(|bytes_per_s| Ceilings { bytes_per_s, flop_per_s }))
}

/// Touches everything once: a short generation always, the whole workload where asked for.
fn warm_up(llm: &mut Llm, plan: &Plan, requests: &[GenerateRequest]) -> Result<(), BenchError> {
    let short = Lengths::up_to(8);
    let seed = plan.requests.seed();
    let workload = Workload { source: Source::Pcg, seed, requests: 8, input: short.clone(), output: short };
    let short = requests::drawn(&workload, llm.info().vocab, &plan.sampling);
    measure(llm, &short, &mut |_| {})?;
    if plan.warm_up {
        measure(llm, requests, &mut |_| {})?;
    }
    Ok(())
}

/// A file for results, created before anything runs: a long benchmark is not lost to a mistyped path.
struct Output<'a> {
    path: &'a Path,
    file: BufWriter<File>,
}

impl<'a> Output<'a> {
    fn create(path: &'a Path) -> Result<Self, BenchError> {
        match File::create(path) {
            Ok(file) => Ok(Output { path, file: BufWriter::new(file) }),
            Err(source) => Err(BenchError::Write { path: path.to_owned(), source }),
        }
    }

    fn write(
        mut self,
        content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> Result<(), BenchError> {
        let written = content(&mut self.file).and_then(|()| self.file.flush());
        written.map_err(|source| BenchError::Write { path: self.path.to_owned(), source })
    }
}

fn print(out: &mut dyn Write, text: fmt::Arguments<'_>) -> Result<(), BenchError> {
    out.write_fmt(text).and_then(|()| out.flush()).map_err(BenchError::Print)
}
