//! Offline throughput, measured: requests run to their end, and what the run says of the engine.
//!
//! ```text
//!   Plan ── engine ── warm-up ──> measure ──> RunReport   (x runs)   (x repeat) ──> BenchReport ──> table, JSON, page, trace
//!                                    └── last ──> verify: some requests again, each alone: the same tokens?
//!                                         └──> ceilings: what the device reaches at best
//! ```
//!
//! Ceilings come last, since measuring them heats a GPU and leaves it with other clocks than it came with.
//!
//! Every run starts with an empty prefix cache, and every request has a seed of its own; so runs draw the same tokens,
//! and a hash of them tells whether a change of settings changed the output.

mod compare;
mod error;
mod floor;
mod list;
mod measure;
pub mod program;
mod report;
mod requests;
mod run_report;
pub mod sharegpt;
mod summary;
mod trace;
mod verify;

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

pub use compare::{CompareError, Comparison};
pub use error::BenchError;
pub use floor::{Costs, Floor, Work};
pub use list::{ListedModel, list_models};
pub use report::BenchReport;
pub use requests::{Requests, RequestsError, WorkloadReport};
pub use run_report::{FloorReport, HostReport, Idle, MixedReport, RunReport, StepsReport};
pub use summary::{Percentiles, Spread};
pub use verify::Verification;

use crate::diagnostics::Ceilings;
use crate::error::Error;
use crate::info::Info;
use crate::llm::Llm;
use crate::progress::Progress;
use crate::report::{Output, Setup, write_json, write_page};
use crate::request::{GenerateRequest, SamplingParams};
use crate::workload::{Lengths, Source, Workload};
use measure::{Measurement, measure};

/// What to measure, and where results go.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The requests.
    pub requests: Requests,
    /// A further prompt of so many tokens, which comes when the others have half of their output.
    pub late_prompt: Option<u32>,
    /// How tokens are drawn; length and seed are each request's own, and what else a file's requests say.
    pub sampling: SamplingParams,
    /// Timed runs of an engine.
    pub runs: usize,
    /// Engines, each built anew: what differs from start to start shows.
    pub repeat: usize,
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
    /// Where the report goes as a page.
    pub page: Option<PathBuf>,
    /// Where the last run's timeline goes.
    pub trace: Option<PathBuf>,
}

/// Runs a plan on engines that `open` builds: prints a table for each run to `out` as it ends, writes the files asked for,
/// returns the report. `on_step` is told after each step of a timed run how far it has come.
///
/// # Errors
/// See [`BenchError`].
pub fn run(
    open: &dyn Fn() -> Result<Llm, Error>,
    plan: &Plan,
    out: &mut dyn Write,
    on_step: &mut dyn FnMut(Progress),
) -> Result<BenchReport, BenchError> {
    plan.requests.check()?;
    let create = |path: &Option<PathBuf>| path.as_deref().map(Output::create).transpose();
    let (json, page, timeline) = (create(&plan.json)?, create(&plan.page)?, create(&plan.trace)?);
    let mut runs = Vec::with_capacity(plan.runs * plan.repeat);
    for engine in 1..plan.repeat {
        run_engine(&mut open()?, engine, plan, &mut runs, out, on_step)?;
    }
    let mut llm = open()?;
    let (requests, last) = run_engine(&mut llm, plan.repeat, plan, &mut runs, out, on_step)?;
    let together = last.as_ref().map_or(&[][..], |run| &run.completions);
    let verification = match plan.verify {
        0 => None,
        count => Some(verify::verify(&mut llm, &requests, together, count)?),
    };
    if let Some(ceilings) = ceilings(&mut llm, plan)? {
        runs.iter_mut().for_each(|run| run.set_ceilings(ceilings));
    }
    let workload = plan.requests.describe(&requests, &plan.sampling);
    let report = summarize(llm.info(), plan, workload, runs, verification);
    print(out, format_args!("{report}"))?;
    if let Some(timeline) = timeline {
        let steps = last.as_ref().map_or(&[][..], |run| &run.steps);
        timeline.write(|file| trace::write(steps, file))?;
    }
    if let Some(json) = json {
        json.write(|file| write_json(&report, file))?;
    }
    if let Some(page) = page {
        page.write(|file| write_page("offline-bench", &report, file))?;
    }
    Ok(report)
}

/// Runs the workload on an engine as often as planned; gives the requests and the last run.
fn run_engine(
    llm: &mut Llm,
    engine: usize,
    plan: &Plan,
    runs: &mut Vec<RunReport>,
    out: &mut dyn Write,
    on_step: &mut dyn FnMut(Progress),
) -> Result<(Vec<GenerateRequest>, Option<Measurement>), BenchError> {
    let info = llm.info().clone();
    let mut requests = plan.requests.take(llm, &plan.sampling)?;
    requests.extend(plan.late_prompt.map(|tokens| late_request(tokens, info.vocab)));
    match engine {
        1 => print(out, format_args!("{info}\n{}\n", plan.requests.describe(&requests, &plan.sampling)))?,
        _ => print(out, format_args!("Engine {engine} of {}\n", plan.repeat))?,
    }
    warm_up(llm, plan, &requests)?;

    let costs = costs(&info);
    let mut probe = llm.probe();
    let mut last = None;
    for run in 1..=plan.runs {
        let label = format!("run {run} of {}", plan.runs);
        let mut labelled = |progress| on_step(Progress { label: label.clone(), ..progress });
        let measurement = measure(llm, &requests, late(plan), probe.as_mut(), &mut labelled)?;
        let report = RunReport::new(engine, &measurement, &costs);
        print(out, format_args!("{report}"))?;
        runs.push(report);
        last = Some(measurement);
    }
    Ok((requests, last))
}

/// How many of the requests come late: the last ones.
fn late(plan: &Plan) -> usize {
    usize::from(plan.late_prompt.is_some())
}

/// One that others may have to wait for: a prompt of these tokens, and a token of output.
fn late_request(tokens: u32, vocab: u32) -> GenerateRequest {
    let prompt: Vec<u32> = (0..tokens).map(|i| i.wrapping_mul(7919) % vocab).collect();
    let sampling = SamplingParams { max_tokens: 1, ignore_eos: true, ..SamplingParams::default() };
    GenerateRequest::tokens(prompt).sampling(sampling)
}

/// What the model of an engine costs, by unit of work.
pub fn costs(info: &Info) -> Costs {
    Costs::new(
        &info.dims,
        info.active_weights,
        info.step_weight_bytes,
        info.experts,
        info.kv_bytes_per_token(),
    )
}

fn summarize(
    info: &Info,
    plan: &Plan,
    workload: WorkloadReport,
    runs: Vec<RunReport>,
    verification: Option<Verification>,
) -> BenchReport {
    let rates: Vec<f64> = runs.iter().map(|run| run.record.tokens_per_s).collect();
    let medians = rates.chunks(plan.runs).filter_map(Spread::of).map(|spread| spread.median);
    let medians: Vec<f64> = medians.collect();
    BenchReport {
        setup: Setup::new("offline-bench", info),
        workload,
        costs: costs(info),
        same_output: runs.windows(2).all(|pair| pair[0].output_hash == pair[1].output_hash),
        tokens_per_s: Spread::of(&rates),
        tokens_per_s_of_engines: Spread::of(&medians).filter(|_| plan.repeat > 1),
        runs,
        verification,
    }
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
    // Prompt and output have room together, in sequences of two tokens too.
    let short = Lengths::up_to((llm.info().limits.sequence / 2).clamp(1, 8));
    let seed = plan.requests.seed();
    let workload = Workload { source: Source::Pcg, seed, requests: 8, input: short.clone(), output: short };
    let short = requests::drawn(&workload, llm.info().vocab, &plan.sampling);
    measure(llm, &short, 0, None, &mut |_| {})?;
    if plan.warm_up {
        measure(llm, requests, late(plan), None, &mut |_| {})?;
    }
    Ok(())
}

fn print(out: &mut dyn Write, text: fmt::Arguments<'_>) -> Result<(), BenchError> {
    out.write_fmt(text).and_then(|()| out.flush()).map_err(BenchError::Print)
}
