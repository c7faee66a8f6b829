//! What a benchmark leaves behind, as tables and as JSON.

use std::fmt;

use minisgl::telemetry::LatencyReport;
use serde::Serialize;

use super::load::Loaded;
use super::prompt::Api;
use super::recorder::{Failures, Record};
use super::sweep::Highest;

/// Bounds of the 99th percentiles, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Goals {
    /// Of the time to the first token.
    pub ttft_ms: Option<f64>,
    /// Of the time between tokens.
    pub itl_ms: Option<f64>,
    /// Of the whole.
    pub e2e_ms: Option<f64>,
}

impl Goals {
    /// Is there none?
    pub fn is_empty(&self) -> bool {
        *self == Goals::default()
    }

    /// Does a run keep them all? One in which a request failed, or that was stopped, does not.
    pub fn keeps(&self, record: &Record) -> bool {
        let within = |goal: Option<f64>, found: &LatencyReport| goal.is_none_or(|goal| found.p99 <= goal);
        record.failed + record.unfinished == 0
            && within(self.ttft_ms, &record.ttft_ms)
            && within(self.itl_ms, &record.itl_ms)
            && within(self.e2e_ms, &record.e2e_ms)
    }
}

/// All runs, and what they ran on.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Which program.
    pub program: &'static str,
    /// Of minisgl.
    pub version: &'static str,
    /// The command line.
    pub command: Vec<String>,
    /// When it was made, in seconds since 1970.
    pub unix_time: u64,
    /// The service.
    pub url: String,
    /// The model's name.
    pub model: String,
    /// Which endpoint.
    pub api: Api,
    /// What the sweep looked for.
    pub goals: Goals,
    /// In order.
    pub runs: Vec<RunReport>,
    /// The highest rate at which the goals hold, where that was looked for and there is one.
    pub highest_rate: Option<f64>,
}

/// A run.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// How requests came.
    pub arrivals: String,
    /// Requests of it.
    pub requests: usize,
    /// What came of it.
    #[serde(flatten)]
    pub loaded: Loaded,
    /// Microseconds of processor time of the service's process an output token, where that was asked for.
    pub service_us_per_token: Option<f64>,
    /// Were the goals kept, where there are any?
    pub keeps_goals: Option<bool>,
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RunReport { arrivals, requests, loaded: Loaded { record, client }, .. } = self;
        let Record { finished, failed, seconds, requests_per_s, output_tokens, tokens_per_s, .. } = record;
        writeln!(f, "Total: {output_tokens}tok, Time: {seconds:.2}s, Throughput: {tokens_per_s:.2}tok/s")?;
        writeln!(
            f,
            "  requests      {finished} of {requests} finished, {failed} failed; {requests_per_s:.2} a second"
        )?;
        if record.unfinished > 0 {
            writeln!(f, "  unfinished    {} when the run was stopped", record.unfinished)?;
        }
        writeln!(f, "  arrivals      {arrivals}; {} on their way at the peak", record.open_peak)?;
        for (name, latencies) in [
            ("TTFT", &record.ttft_ms),
            ("ITL", &record.itl_ms),
            ("TPOT", &record.tpot_ms),
            ("E2E", &record.e2e_ms),
            ("sent late", &record.lateness_ms),
        ] {
            let LatencyReport { count, mean, p50, p90, p99, max, .. } = latencies;
            if *count == 0 {
                writeln!(f, "  {name:<13} none")?;
                continue;
            }
            writeln!(
                f,
                "  {name:<13} p50 {p50:.2} ms, p90 {p90:.2}, p99 {p99:.2}, at most {max:.2}, {mean:.2} on average"
            )?;
        }
        writeln!(
            f,
            "  prompts       {} tokens, {} of them cached",
            record.prompt_tokens, record.cached_tokens
        )?;
        if record.short_outputs > 0 {
            let short = record.short_outputs;
            writeln!(
                f,
                "  outputs short {short} with fewer tokens than asked for; does the service know ignore_eos?"
            )?;
        }
        if let Some(cost) = client.filter(|_| *output_tokens > 0) {
            let busy = 100.0 * cost.busy;
            write!(
                f,
                "  this client   {:.1} us of processor time a token, {busy:.0}% of a core",
                cost.us_per_token
            )?;
            let warning = ": TOO BUSY, this may be its own speed and not the service's";
            writeln!(f, "{}", if cost.is_busy() { warning } else { "" })?;
        }
        if let Some(us) = self.service_us_per_token {
            writeln!(f, "  the service   {us:.1} us of processor time a token")?;
        }
        for (kind, Failures { count, first }) in &record.failures {
            writeln!(f, "  failed        {count} by {kind}; the first: {first}")?;
        }
        if let Some(keeps) = self.keeps_goals {
            writeln!(f, "  goals         {}", if keeps { "kept" } else { "not kept" })?;
        }
        Ok(())
    }
}

impl fmt::Display for Highest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Highest::Below(rate) => write!(f, "The goals are not even kept at {rate:.2} requests a second."),
            Highest::At(rate) => write!(f, "The goals are kept up to {rate:.2} requests a second."),
            Highest::AtLeast(rate) => {
                write!(f, "The goals are kept at {rate:.2} requests a second, the highest rate tried.")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::cost::ClientCost;
    use super::*;

    fn latencies(p99: f64) -> LatencyReport {
        LatencyReport { p99, ..LatencyReport::default() }
    }

    fn record() -> Record {
        Record {
            finished: 2,
            output_tokens: 30,
            seconds: 2.0,
            tokens_per_s: 15.0,
            ttft_ms: latencies(10.0),
            itl_ms: latencies(20.0),
            e2e_ms: latencies(30.0),
            ..Record::default()
        }
    }

    #[test]
    fn goals_are_kept_when_every_99th_percentile_is_within_them_and_nothing_failed() {
        let goals = |ttft_ms, itl_ms, e2e_ms| Goals { ttft_ms, itl_ms, e2e_ms };
        let all = goals(Some(10.0), Some(20.0), Some(30.0));
        assert!(all.keeps(&record()));
        for tighter in
            [goals(Some(9.0), None, None), goals(None, Some(19.0), None), goals(None, None, Some(29.0))]
        {
            assert!(!tighter.keeps(&record()), "{tighter:?}");
        }
        assert!(!all.keeps(&Record { failed: 1, ..record() }));
        assert!(!all.keeps(&Record { unfinished: 1, ..record() }));
        assert!(Goals::default().is_empty() && !all.is_empty());
    }

    #[test]
    fn what_was_not_measured_is_no_number() {
        let report = RunReport {
            arrivals: "8 at once".to_owned(),
            requests: 2,
            loaded: Loaded { record: Record { failed: 2, ..Record::default() }, client: None },
            service_us_per_token: None,
            keeps_goals: None,
        };
        let text = report.to_string();
        assert!(text.contains("  TTFT          none\n") && !text.contains("p50"), "{text}");
        let measured = LatencyReport { count: 1, ..latencies(7.0) };
        let record = Record { ttft_ms: measured, ..Record::default() };
        let text = RunReport { loaded: Loaded { record, client: None }, ..report }.to_string();
        assert!(
            text.contains("  TTFT          p50 0.00 ms, p90 0.00, p99 7.00")
                && text.contains("  ITL           none"),
            "{text}"
        );
    }

    #[test]
    fn the_table_says_what_would_make_its_numbers_wrong() {
        let report = |record, busy| RunReport {
            arrivals: "8 at once".to_owned(),
            requests: 2,
            loaded: Loaded { record, client: Some(ClientCost { us_per_token: 3.0, busy }) },
            service_us_per_token: Some(9.0),
            keeps_goals: Some(true),
        };
        let good = report(record(), 0.1).to_string();
        assert!(good.starts_with("Total: 30tok, Time: 2.00s, Throughput: 15.00tok/s\n"), "{good}");
        assert!(
            !good.contains("TOO BUSY") && !good.contains("outputs short") && !good.contains("  failed"),
            "{good}"
        );
        assert!(good.contains("goals         kept"), "{good}");
        let failures = Failures { count: 1, first: "status 429: full".to_owned() };
        let bad = Record {
            short_outputs: 1,
            failures: BTreeMap::from([("status 429".to_owned(), failures)]),
            ..record()
        };
        let bad = report(bad, 0.95).to_string();
        for warning in
            ["TOO BUSY", "outputs short 1", "failed        1 by status 429; the first: status 429: full"]
        {
            assert!(bad.contains(warning), "{warning} is missing:\n{bad}");
        }
    }
}
