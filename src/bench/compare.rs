//! Two reports side by side: the ratio of what was measured, how far runs of each lie apart, and what else differs.
//!
//! Reports of older versions are read too: what one of the two lacks is left out.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

use super::summary::Spread;

/// Two reports, read.
#[derive(Clone, Debug)]
pub struct Comparison {
    names: [String; 2],
    reports: [Value; 2],
}

/// Why two reports can't be compared.
#[derive(Debug, Error)]
pub enum CompareError {
    /// A file that can't be read.
    #[error("{} can't be read: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that holds something else.
    #[error("{} is no report of `offline-bench --json`: {what}", path.display())]
    NoReport {
        /// Which.
        path: PathBuf,
        /// What is amiss.
        what: String,
    },
}

/// A row of the table: its name, where a run has its value, and what to multiply it with.
type Row = (&'static str, &'static str, f64);

const ROWS: [Row; 18] = [
    ("output tok/s", "/tokens_per_s", 1.0),
    ("seconds", "/seconds", 1.0),
    ("prefill, s", "/prefill/seconds", 1.0),
    ("decode, s", "/decode/seconds", 1.0),
    ("device idle, s", "/device_idle/seconds", 1.0),
    ("TTFT p50, ms", "/first_token_ms/p50", 1.0),
    ("TTFT p90, ms", "/first_token_ms/p90", 1.0),
    ("TTFT p99, ms", "/first_token_ms/p99", 1.0),
    ("ITL p50, ms", "/between_tokens_ms/p50", 1.0),
    ("ITL p90, ms", "/between_tokens_ms/p90", 1.0),
    ("ITL p99, ms", "/between_tokens_ms/p99", 1.0),
    ("host work p50, us", "/host/p50_us", 1.0),
    ("KV pages, peak", "/pages_peak", 1.0),
    ("share of the floor, %", "/floor/share", 100.0),
    ("read ceiling, GB/s", "/floor/ceilings/bytes_per_s", 1e-9),
    ("SM clock, MHz", "/device_state/sm_mhz/mean", 1.0),
    ("power, W", "/device_state/power_w/mean", 1.0),
    ("temperature, C", "/device_state/temperature_c/mean", 1.0),
];

/// Parts of a report that must agree for a ratio to mean one thing.
const SETTINGS: [&str; 5] = ["model", "backend", "device", "workload", "engine"];
/// Fields of them that differ from process to process.
const MEASURED: [&str; 4] =
    ["memory_free_before_recording", "memory_free_ready", "load_seconds", "capture_seconds"];

impl Comparison {
    /// Reads two reports.
    ///
    /// # Errors
    /// A file that can't be read, or that holds no report.
    pub fn open(paths: [&Path; 2]) -> Result<Self, CompareError> {
        let [a, b] = paths;
        let names = [a, b].map(|path| path.display().to_string());
        Ok(Comparison { names, reports: [read(a)?, read(b)?] })
    }

    /// Of a row, over the runs of each report that has it in every one.
    fn spreads(&self, pointer: &str) -> [Option<Spread>; 2] {
        [0, 1].map(|i| {
            let values: Option<Vec<f64>> =
                runs(&self.reports[i]).map(|run| run.pointer(pointer)?.as_f64()).collect();
            Spread::of(&values?)
        })
    }

    /// Names of settings that differ, and their two values.
    pub fn different_settings(&self) -> Vec<(String, [String; 2])> {
        let mut different = Vec::new();
        for part in SETTINGS {
            collect_different(part, self.reports.each_ref().map(|report| &report[part]), &mut different);
        }
        different
    }

    /// Did all runs of both draw the same tokens?
    pub fn same_output(&self) -> bool {
        let mut hashes = self.reports.iter().flat_map(runs).map(|run| &run["output_hash"]);
        hashes.next().is_none_or(|first| hashes.all(|hash| hash == first))
    }
}

fn read(path: &Path) -> Result<Value, CompareError> {
    let text = std::fs::read(path).map_err(|source| CompareError::Read { path: path.to_owned(), source })?;
    let no_report = |what| CompareError::NoReport { path: path.to_owned(), what };
    let report: Value = serde_json::from_slice(&text).map_err(|error| no_report(error.to_string()))?;
    match runs(&report).all(|run| run["tokens_per_s"].is_f64()) && runs(&report).next().is_some() {
        true => Ok(report),
        false => Err(no_report("it has no runs with `tokens_per_s`".to_owned())),
    }
}

fn runs(report: &Value) -> impl Iterator<Item = &Value> {
    report["runs"].as_array().into_iter().flatten()
}

/// Leaves of two values that differ; what one of them does not have is no difference.
fn collect_different(name: &str, values: [&Value; 2], different: &mut Vec<(String, [String; 2])>) {
    match values {
        [Value::Object(a), Value::Object(b)] => {
            for (key, value) in a.iter().filter(|(key, _)| !MEASURED.contains(&key.as_str())) {
                if let Some(other) = b.get(key) {
                    collect_different(&format!("{name}.{key}"), [value, other], different);
                }
            }
        }
        [a, b] if a != b => different.push((name.to_owned(), [a.to_string(), b.to_string()])),
        _ => {}
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.reports.each_ref().map(|report| runs(report).count());
        for (letter, i) in [("a", 0), ("b", 1)] {
            writeln!(f, "{letter}: {}, {} runs", self.names[i], counts[i])?;
        }
        writeln!(
            f,
            "{:<22} {:>11} {:>7} {:>11} {:>7} {:>8}",
            "median, ± half", "a", "± %", "b", "± %", "b / a"
        )?;
        for (name, pointer, scale) in ROWS {
            let [Some(a), Some(b)] = self.spreads(pointer) else { continue };
            write!(f, "{name:<22}")?;
            for spread in [a, b] {
                write!(f, " {:>11} {:>7}", figure(spread.median * scale), percent(50.0 * spread.width()))?;
            }
            writeln!(f, " {:>8}", ratio(b.median, a.median))?;
        }
        self.fmt_throttles(f)?;
        self.fmt_verdict(f)?;
        self.fmt_warnings(f)
    }
}

impl Comparison {
    fn fmt_throttles(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (letter, report) in ["a", "b"].into_iter().zip(&self.reports) {
            let throttles =
                runs(report).filter_map(|run| run.pointer("/device_state/throttle")?.as_array()).flatten();
            let mut most: Vec<(&str, f64)> = Vec::new();
            for (reason, share) in
                throttles.filter_map(|one| Some((one["reason"].as_str()?, one["share"].as_f64()?)))
            {
                match most.iter_mut().find(|(known, _)| *known == reason) {
                    Some((_, greatest)) => *greatest = greatest.max(share),
                    None => most.push((reason, share)),
                }
            }
            for (reason, share) in most {
                writeln!(
                    f,
                    "{letter} was held down by {reason} in up to {:.0}% of a run's samples",
                    100.0 * share
                )?;
            }
        }
        Ok(())
    }

    /// Whether the difference is more than runs of one report differ by.
    fn fmt_verdict(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [Some(a), Some(b)] = self.spreads("/tokens_per_s") else { return Ok(()) };
        let apart = a.max < b.min || b.max < a.min;
        let change = 100.0 * (b.median / a.median - 1.0);
        let lone = self.reports.iter().any(|report| runs(report).count() < 2);
        let verdict = match (lone, apart) {
            (true, _) => "one run says nothing of the spread: repeat with --runs 5",
            (false, true) => "every run of one is beyond every run of the other",
            (false, false) => "the runs overlap: no difference shown",
        };
        writeln!(f, "b makes {change:+.2}% tokens a second; {verdict}")
    }

    fn fmt_warnings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, [a, b]) in self.different_settings() {
            writeln!(f, "WARNING: {name} differs: {a} and {b}")?;
        }
        if !self.same_output() {
            writeln!(f, "WARNING: the outputs differ: not all runs have the same output hash")?;
        }
        Ok(())
    }
}

/// With about four digits that count.
fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// A dash where there is nothing to divide by.
fn percent(value: f64) -> String {
    if value.is_finite() { format!("{value:.2}") } else { "-".to_owned() }
}

fn ratio(part: f64, whole: f64) -> String {
    if whole == 0.0 { "-".to_owned() } else { format!("{:.4}", part / whole) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report(rates: &[f64], hash: &str, running: u32) -> Value {
        let run = |rate: &f64| {
            json!({"tokens_per_s": rate, "seconds": 1000.0 / rate, "output_hash": hash,
                   "device_state": {"throttle": [{"reason": "sw_power_cap", "share": 0.95}]}})
        };
        json!({
            "model": "tiny", "engine": {"max_running": running, "load_seconds": rates[0]},
            "runs": rates.iter().map(run).collect::<Vec<_>>(),
        })
    }

    fn compared(a: Value, b: Value) -> Comparison {
        Comparison { names: ["a.json".to_owned(), "b.json".to_owned()], reports: [a, b] }
    }

    #[test]
    fn medians_are_divided_and_spreads_stand_beside_them() {
        let text = compared(report(&[99.0, 100.0, 103.0], "f", 8), report(&[110.0, 108.0, 109.0], "f", 8))
            .to_string();
        let row = text.lines().find(|line| line.starts_with("output tok/s")).unwrap();
        let cells: Vec<_> = row.split_whitespace().skip(2).collect();
        assert_eq!(cells, ["100.00", "2.00", "109.00", "0.92", "1.0900"], "{text}");
        assert!(text.contains("b makes +9.00% tokens a second; every run of one is beyond"), "{text}");
        assert!(text.contains("a was held down by sw_power_cap in up to 95%"), "{text}");
        assert!(
            !text.contains("TTFT") && !text.contains("WARNING"),
            "neither has it, nothing differs: {text}"
        );
    }

    #[test]
    fn runs_that_overlap_show_no_difference_and_one_run_shows_nothing() {
        let text = compared(report(&[99.0, 105.0], "f", 8), report(&[104.0, 110.0], "f", 8)).to_string();
        assert!(text.contains("the runs overlap"), "{text}");
        let text = compared(report(&[99.0], "f", 8), report(&[104.0, 110.0], "f", 8)).to_string();
        assert!(text.contains("one run says nothing of the spread"), "{text}");
    }

    #[test]
    fn other_settings_and_other_tokens_are_warned_of_and_measured_fields_are_not() {
        let text = compared(report(&[99.0], "f", 8), report(&[104.0], "e", 16)).to_string();
        assert!(text.contains("WARNING: engine.max_running differs: 8 and 16"), "{text}");
        assert!(text.contains("WARNING: the outputs differ"), "{text}");
        assert_eq!(text.matches("WARNING").count(), 2, "{text}");
    }
}
