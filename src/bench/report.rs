//! What is said of a benchmark as a whole: what ran on what, every run, and how far the runs agree.

use std::fmt;

use serde::Serialize;

use super::floor::Costs;
use super::requests::WorkloadReport;
use super::run_report::RunReport;
use super::summary::Spread;
use super::verify::Verification;
use crate::report::Setup;

/// All runs, and what they ran on. Displayed, it is what goes below the runs' tables.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// What ran on what; of several engines, the last.
    #[serde(flatten)]
    pub setup: Setup,
    /// What ran.
    pub workload: WorkloadReport,
    /// What a unit of work costs.
    pub costs: Costs,
    /// One entry a run.
    pub runs: Vec<RunReport>,
    /// Output tokens a second over the runs.
    pub tokens_per_s: Option<Spread>,
    /// Medians of the runs of each engine, where there were several.
    pub tokens_per_s_of_engines: Option<Spread>,
    /// Do all runs' outputs agree?
    pub same_output: bool,
    /// Where asked for.
    pub verification: Option<Verification>,
}

impl BenchReport {
    /// How many engines ran.
    fn engines(&self) -> usize {
        self.runs.last().map_or(0, |run| run.engine)
    }

    /// Did every check pass that the output can fail?
    pub fn is_sound(&self) -> bool {
        self.same_output && self.verification.as_ref().is_none_or(|verified| verified.different.is_empty())
    }
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, run) in (1..).zip(&self.runs) {
            if let Some(floor) = &run.floor {
                let least_rate = run.record.total_tokens as f64 / floor.floor.seconds;
                writeln!(f, "Floor of run {number}: {least_rate:.0} tok/s, {floor}")?;
            }
        }
        let runs = self.runs.len();
        let medians =
            [(runs, "runs", self.tokens_per_s), (self.engines(), "engines", self.tokens_per_s_of_engines)];
        for (count, what, spread) in medians {
            if let Some(Spread { median, min, max }) = spread.filter(|_| count > 1) {
                let width = 100.0 * (max - min) / median;
                writeln!(
                    f,
                    "Median of {count} {what}: {median:.2}tok/s, from {min:.2} to {max:.2} (spread {width:.2}%)"
                )?;
            }
        }
        if !self.same_output {
            writeln!(f, "The runs' outputs DIFFER: see their hashes")?;
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
