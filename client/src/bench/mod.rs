//! Load on a service, and what it does to latencies: what `serve-bench` runs.
//!
//! ```text
//!   Source ── requests ──┐
//!   Arrivals ─ schedule ─┴─> Target::load ── Record ──> tables, JSON
//!       ^                                      │
//!       └── sweep: another rate <── goals ─────┘
//! ```

pub mod arrivals;
pub mod cost;
pub mod load;
pub mod prompt;
pub mod recorder;
pub mod report;
pub mod source;
mod stream;
pub mod sweep;
pub mod trace;
mod wire;

use std::io::{self, Write};

use thiserror::Error;

use arrivals::{Arrivals, Schedule};
use cost::process_time;
use load::{Flow, LoadError, Target};
use recorder::Recorder;
use report::{Goals, RunReport};
use source::Source;
use sweep::{Highest, highest};

/// Requests that warm a service up differ from all that are measured by their seed.
const WARM_UP: u64 = u64::MAX / 2;

/// What to run.
pub struct Plan {
    /// What is asked.
    pub source: Source,
    /// How requests come, or rates to search between.
    pub pace: Pace,
    /// Of the sweep, or to be told of a run.
    pub goals: Goals,
    /// Of the times at which requests come.
    pub seed: u64,
    /// Requests that run first, and are not measured.
    pub warm_up: usize,
    /// The service's process, whose processor time is to be told.
    pub process: Option<u32>,
}

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// One run.
    Once(Arrivals),
    /// The highest rate, between these, at which the goals hold.
    Sweep(f64, f64),
}

/// Why a benchmark ends early.
#[derive(Debug, Error)]
pub enum BenchError {
    /// Of the load.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Of what is printed.
    #[error("the table can't be printed: {0}")]
    Print(#[from] io::Error),
}

/// Why no further run comes.
enum Early {
    Stopped,
    Error(BenchError),
}

impl From<BenchError> for Early {
    fn from(error: BenchError) -> Self {
        Early::Error(error)
    }
}

impl Plan {
    /// Runs it all: tables go to `out`, and `on_wait` is told how far a run has come, and says whether it is to go on. The
    /// run that it stops is the last one.
    ///
    /// # Errors
    /// No load can be put on the service, or a table can't be printed.
    pub fn run(
        &self,
        target: &Target,
        out: &mut dyn Write,
        on_wait: &mut dyn FnMut(&Recorder) -> Flow,
    ) -> Result<(Vec<RunReport>, Option<Highest>), BenchError> {
        self.warm_up(target, on_wait)?;
        let mut runs = Vec::new();
        let mut run = |arrivals| {
            let report = self.once(target, arrivals, runs.len() as u64, on_wait)?;
            write!(out, "{report}").map_err(BenchError::Print)?;
            let record = &report.loaded.record;
            let (keeps, stopped) =
                (self.goals.keeps(record), record.finished + record.failed < report.requests as u64);
            runs.push(report);
            if stopped { Err(Early::Stopped) } else { Ok(keeps) }
        };
        let found = match self.pace {
            Pace::Once(arrivals) => run(arrivals).map(|_| None),
            Pace::Sweep(low, high) => highest((low, high), |rate| run(Arrivals::Poisson(rate))).map(Some),
        };
        match found {
            Ok(None) | Err(Early::Stopped) => Ok((runs, None)),
            Ok(Some(found)) => {
                writeln!(out, "{found}")?;
                Ok((runs, Some(found)))
            }
            Err(Early::Error(error)) => Err(error),
        }
    }

    fn warm_up(&self, target: &Target, on_wait: &mut dyn FnMut(&Recorder) -> Flow) -> Result<(), BenchError> {
        if self.warm_up > 0 {
            let mut requests = self.source.requests(WARM_UP);
            requests.truncate(self.warm_up);
            let open = match self.pace {
                Pace::Once(Arrivals::Closed(open)) => open,
                _ => requests.len(),
            };
            target.load(&requests, &Schedule::Closed(open), on_wait)?;
        }
        Ok(())
    }

    fn once(
        &self,
        target: &Target,
        arrivals: Arrivals,
        run: u64,
        on_wait: &mut dyn FnMut(&Recorder) -> Flow,
    ) -> Result<RunReport, BenchError> {
        let requests = self.source.requests(run);
        let schedule = arrivals.schedule(&requests, self.seed.wrapping_add(run));
        let before = self.process.and_then(process_time);
        let loaded = target.load(&requests, &schedule, on_wait)?;
        let after = self.process.and_then(process_time);
        let service_us_per_token = before.zip(after).map(|(before, after)| {
            let tokens = loaded.record.output_tokens.max(1) as f64;
            after.saturating_sub(before).as_secs_f64() * 1e6 / tokens
        });
        Ok(RunReport {
            arrivals: arrivals.to_string(),
            requests: requests.len(),
            keeps_goals: (!self.goals.is_empty()).then(|| self.goals.keeps(&loaded.record)),
            loaded,
            service_us_per_token,
        })
    }
}
