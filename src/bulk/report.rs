//! What is said of a job that has ended, for people and for machines; see [`report`](crate::report).

use serde::Serialize;

use super::job::Job;
use super::settings::Sampling;
use super::tally::Tally;
use crate::info::Info;
use crate::report::Setup;
use crate::telemetry::RunRecord;

/// A job, and what was seen of it.
#[derive(Clone, Debug, Serialize)]
pub struct BulkReport {
    /// What ran on what.
    #[serde(flatten)]
    pub setup: Setup,
    job: Lines,
    sampling: Sampling,
    /// The one run.
    pub runs: [RunRecord; 1],
}

/// Where lines came from, where results went, and how many.
#[derive(Clone, Debug, Serialize)]
struct Lines {
    input: String,
    output: String,
    finished: u64,
    failed: u64,
    /// Those that had a good result before.
    skipped: u64,
}

impl BulkReport {
    /// Of a job that `generate` has done.
    pub fn new(info: &Info, job: &Job, tally: Tally, record: RunRecord) -> Self {
        let Tally { finished, failed, skipped, .. } = tally;
        let (input, output) = (job.input.to_string(), job.output.to_string());
        BulkReport {
            setup: Setup::new("generate", info),
            job: Lines { input, output, finished, failed, skipped },
            sampling: Sampling::from(&job.defaults.sampling),
            runs: [record],
        }
    }
}
