//! What is said of a benchmark as a whole: what ran on what, every run, and how far the runs agree.

use std::fmt;

use serde::Serialize;

use super::floor::Costs;
use super::run_report::RunReport;
use super::summary::Spread;
use super::verify::Verification;
use crate::gauge::DeviceState;
use crate::info::Info;

/// All runs, and what they ran on. Displayed, it is what goes below the runs' tables.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// The command line.
    pub command: Vec<String>,
    /// When it ended, in seconds since 1970.
    pub unix_time: u64,
    /// Checkpoint directory or preset.
    pub model: String,
    /// `cpu` or `cuda`.
    pub backend: &'static str,
    /// The device's name.
    pub device: String,
    /// What ran.
    pub workload: WorkloadReport,
    /// The capacities it ran with.
    pub engine: EngineReport,
    /// What a unit of work costs.
    pub costs: Costs,
    /// One entry a run.
    pub runs: Vec<RunReport>,
    /// Output tokens a second over the runs.
    pub tokens_per_s: Option<Spread>,
    /// Do all runs' outputs agree?
    pub same_output: bool,
    /// Where asked for.
    pub verification: Option<Verification>,
    /// The GPU's clocks right after the last run.
    pub device_state: Option<DeviceState>,
}

/// What ran.
#[derive(Clone, Debug, Serialize)]
pub struct WorkloadReport {
    /// `pcg`, `minisgl`, or a file's path.
    pub source: String,
    /// Of the generator, or of requests without one.
    pub seed: u64,
    /// How many.
    pub requests: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Tokens to be drawn, of a file's requests at most.
    pub output_tokens: u64,
    /// 0 is greedy; null where each request may have its own.
    pub temperature: Option<f32>,
}

/// Capacities of the engine, and how long it took to get ready.
#[derive(Clone, Debug, Serialize)]
pub struct EngineReport {
    /// Requests at once.
    pub max_running: u32,
    /// Tokens of a sequence.
    pub max_seq_len: u32,
    /// Tokens of a prefill step.
    pub max_prefill_tokens: u32,
    /// Tokens of a KV page.
    pub page_size: u32,
    /// KV pages.
    pub num_pages: u32,
    /// Rows of the largest recorded decode step.
    pub max_graph_batch: u32,
    /// Bytes of device memory free before the decode steps were recorded.
    pub memory_free_before_recording: u64,
    /// Bytes of device memory free after that.
    pub memory_free_ready: u64,
    /// Seconds to open the device and load the weights.
    pub load_seconds: f64,
    /// Seconds to allocate everything else and record the decode steps.
    pub capture_seconds: f64,
}

impl EngineReport {
    /// As the engine says of itself.
    pub fn new(info: &Info) -> Self {
        EngineReport {
            max_running: info.limits.running,
            max_seq_len: info.limits.sequence,
            max_prefill_tokens: info.limits.prefill_tokens,
            page_size: info.limits.page_size,
            num_pages: info.limits.pages,
            max_graph_batch: info.limits.graph_rows,
            memory_free_before_recording: info.memory_free_before_recording,
            memory_free_ready: info.memory_free_ready,
            load_seconds: info.load_seconds,
            capture_seconds: info.capture_seconds,
        }
    }
}

impl BenchReport {
    /// Did every check pass that the output can fail?
    pub fn is_sound(&self) -> bool {
        self.same_output && self.verification.as_ref().is_none_or(|verified| verified.different.is_empty())
    }
}

impl fmt::Display for WorkloadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WorkloadReport { source, seed, requests, prompt_tokens, output_tokens, temperature } = self;
        write!(f, "{requests} requests ({source}, seed {seed}): {prompt_tokens} prompt and ")?;
        match temperature {
            Some(temperature) => write!(f, "{output_tokens} output tokens, temperature {temperature}"),
            None => write!(f, "at most {output_tokens} output tokens"),
        }
    }
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.runs.len();
        if let Some(rates) = self.tokens_per_s.filter(|_| runs > 1) {
            let Spread { median, min, max } = rates;
            writeln!(
                f,
                "Median of {runs} runs: {median:.2}tok/s, from {min:.2} to {max:.2} (spread {:.2}%)",
                100.0 * rates.width()
            )?;
        }
        if !self.same_output {
            writeln!(f, "The runs' outputs DIFFER: see their hashes")?;
        }
        if let Some(state) = &self.device_state {
            fmt_state(state, f)?;
        }
        match &self.verification {
            Some(Verification { requests, different }) if different.is_empty() => {
                writeln!(f, "Verified: {requests} requests alone give the same tokens")
            }
            Some(Verification { requests, different }) => {
                let count = different.len();
                writeln!(f, "Verified: {count} of {requests} requests alone give OTHER tokens: {different:?}")
            }
            None => Ok(()),
        }
    }
}

fn fmt_state(state: &DeviceState, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let DeviceState { driver, sm_mhz, sm_mhz_max, memory_mhz, power_w, temperature_c, throttle_reasons } =
        state;
    let held = if throttle_reasons.is_empty() { "nothing".to_owned() } else { throttle_reasons.join(", ") };
    writeln!(
        f,
        "GPU at the end: {sm_mhz} of {sm_mhz_max} MHz, memory {memory_mhz} MHz, {power_w:.0} W, {temperature_c} C, held \
         down by {held}; driver {driver}"
    )
}
