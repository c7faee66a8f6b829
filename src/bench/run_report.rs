//! What is said of a run: one structure, written as a table for people and as JSON for machines.
//!
//! ```text
//!   Measurement ──┬──> RunReport ──┬── Display: the `Total:` line and the table below it
//!   Costs ────────┘        ^       └── Serialize: an entry of `runs`
//!   Ceilings? ─────────────┘ after the last run: measuring them leaves a GPU with other clocks
//! ```

use std::fmt;
use std::time::Duration;

use minisgl_core::stats::{ExpertsRead, Stats};
use serde::Serialize;

use super::floor::{Costs, Floor, Work};
use super::measure::{Measurement, output_hash};
use super::summary::Percentiles;
use crate::diagnostics::Ceilings;
use crate::request::{BesideWork, Completion, StepTiming};
use crate::telemetry::{LatencyReport, RunRecord};

/// Steps of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepsReport {
    /// Tokens run, padding not included.
    pub tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Rows of a step on average, padding not included in decode steps.
    pub mean_rows: f64,
    /// Seconds on the device.
    pub seconds: f64,
}

/// Steps in which running requests decode beside prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MixedReport {
    /// Decode rows, each one token.
    pub decode_tokens: u64,
    /// Tokens of prompts.
    pub prefill_tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Seconds on the devices, all engines together.
    pub seconds: f64,
}

/// Where the device waited for the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Idle {
    /// Seconds between the end of a step and the start of the next, over the run; of several engines, what each has on
    /// average.
    pub seconds: f64,
    /// The longest such gap, in milliseconds.
    pub longest_ms: f64,
}

/// What a decode step costs the host: scheduling, packing, launching, and handing out the tokens of the step before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HostReport {
    /// Rows of the steps looked at, padding included: the most that any had.
    pub rows: u32,
    /// How many there were.
    pub steps: usize,
    /// Microseconds in all but waiting, in half of them at most.
    pub p50_us: f64,
    /// Microseconds in all but waiting, in 99 of a hundred at most.
    pub p99_us: f64,
    /// Microseconds of that in driver calls, in half of them at most.
    pub driver_p50_us: f64,
}

/// How near a run came to the least time that the device allows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FloorReport {
    /// What the device reaches at best.
    pub ceilings: Ceilings,
    /// The least time.
    pub floor: Floor,
    /// The least time as a share of the time taken.
    pub share: f64,
}

/// All that is said of one run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunReport {
    /// Which engine ran it, counted from 1.
    pub engine: usize,
    /// What was seen of it.
    #[serde(flatten)]
    pub record: RunRecord,
    /// Steps of prompts alone, and of what retracted requests ran again.
    pub prefill: StepsReport,
    /// Steps of both.
    pub mixed: MixedReport,
    /// Steps of decode rows alone, one token a row.
    pub decode: StepsReport,
    /// Rows of these that were padding, as a share of all.
    pub padding_share: f64,
    /// Most decode rows of a step.
    pub rows_peak: u32,
    /// Different experts that a layer of such a step read on average; `None` where there are none.
    pub experts_read_mean: Option<f64>,
    /// Decode rows whose token was a draft.
    pub drafted: u64,
    /// Drafts that were what was drawn.
    pub accepted: u64,
    /// Between steps.
    pub device_idle: Idle,
    /// Beside the device; `None` where the host is the device.
    pub host: Option<HostReport>,
    /// Most KV pages held at once.
    pub pages_peak: u32,
    /// Requests that gave their pages back and ran again.
    pub retractions: u64,
    /// Prompt tokens found in the prefix cache by a request's first sample, whose prompt is to be computed; random prompts have none.
    pub cached_tokens: u64,
    /// Prompt tokens of the others, which the first one computed for them.
    pub shared_tokens: u64,
    /// Outputs that a limit cut short of what the workload asks for.
    pub outputs_cut: usize,
    /// Fingerprint of all output tokens, in hexadecimal digits.
    pub output_hash: String,
    /// What had to be read and done.
    pub work: Work,
    /// The least time it could have taken; `None` where the device's ceilings are not known.
    pub floor: Option<FloorReport>,
}

impl RunReport {
    /// Sums up a run of the engine with this number; its floor is not known yet.
    pub(super) fn new(engine: usize, run: &Measurement, costs: &Costs) -> Self {
        let (padding_rows, decode) = (run.stats.padding_rows, decode(run));
        let found = |of: fn(&&Completion) -> bool| {
            run.completions.iter().filter(of).map(|one| u64::from(one.cached_tokens)).sum()
        };
        RunReport {
            engine,
            record: run.record.clone(),
            prefill: prefill(run),
            mixed: mixed(run),
            decode,
            padding_share: ratio(padding_rows as f64, (padding_rows + decode.tokens) as f64),
            rows_peak: run.stats.rows_peak,
            experts_read_mean: experts_read(&run.experts),
            drafted: run.stats.drafted,
            accepted: run.stats.accepted,
            device_idle: idle(&run.steps),
            host: host(&run.steps),
            pages_peak: run.stats.pages_peak,
            retractions: run.stats.retractions,
            cached_tokens: found(|one| one.sample == 0),
            shared_tokens: found(|one| one.sample > 0),
            outputs_cut: run.completions.iter().filter(|one| one.warning.is_some()).count(),
            output_hash: format!("{:016x}", output_hash(&run.completions)),
            work: costs.work(&run.stats, &run.experts),
            floor: None,
        }
    }

    /// Says what the device allows at best.
    pub fn set_ceilings(&mut self, ceilings: Ceilings) {
        let floor = self.work.floor(&ceilings);
        self.floor = Some(FloorReport { ceilings, floor, share: floor.seconds / self.record.seconds });
    }
}

fn prefill(run: &Measurement) -> StepsReport {
    let steps = || run.steps.iter().filter(|step| step.shape.decode_rows == 0);
    let rows: u64 = steps().map(|step| u64::from(step.shape.prefill_rows)).sum();
    let Stats { prefill_tokens, mixed_prefill_tokens, prefill_steps, .. } = run.stats;
    StepsReport {
        tokens: prefill_tokens - mixed_prefill_tokens,
        steps: prefill_steps,
        mean_rows: ratio(rows as f64, prefill_steps as f64),
        seconds: device_seconds(steps()),
    }
}

fn mixed(run: &Measurement) -> MixedReport {
    let steps = run.steps.iter().filter(|step| step.shape.decode_rows > 0 && step.shape.prefill_rows > 0);
    let Stats { mixed_decode_tokens, mixed_prefill_tokens, mixed_steps, .. } = run.stats;
    MixedReport {
        decode_tokens: mixed_decode_tokens,
        prefill_tokens: mixed_prefill_tokens,
        steps: mixed_steps,
        seconds: device_seconds(steps),
    }
}

fn decode(run: &Measurement) -> StepsReport {
    let Stats { decode_tokens, mixed_decode_tokens, decode_steps, .. } = run.stats;
    let tokens = decode_tokens - mixed_decode_tokens;
    StepsReport {
        tokens,
        steps: decode_steps,
        mean_rows: ratio(tokens as f64, decode_steps as f64),
        seconds: device_seconds(steps_of_decode(&run.steps)),
    }
}

fn experts_read(&ExpertsRead { layers, experts }: &ExpertsRead) -> Option<f64> {
    (layers > 0).then(|| experts as f64 / layers as f64)
}

fn steps_of_decode(steps: &[StepTiming]) -> impl Iterator<Item = &StepTiming> + Clone {
    steps.iter().filter(|step| step.shape.is_decode())
}

fn device_seconds<'a>(steps: impl Iterator<Item = &'a StepTiming>) -> f64 {
    sum(steps.map(|step| f64::from(step.gpu_ms) / 1e3))
}

/// That of nothing is 0, and not the -0 that `Iterator::sum` begins with.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |sum, value| sum + value)
}

fn idle(steps: &[StepTiming]) -> Idle {
    let gap_ms = |(before, after): (&StepTiming, &StepTiming)| {
        let end_ms = before.start_ms + f64::from(before.gpu_ms);
        (after.start_ms - end_ms).max(0.0)
    };
    let engines = steps.iter().map(|step| step.engine + 1).max().unwrap_or(1);
    let gaps_ms = (0..engines).flat_map(|engine| {
        let its = || steps.iter().filter(move |step| step.engine == engine);
        its().zip(its().skip(1)).map(gap_ms)
    });
    let seconds = sum(gaps_ms.clone()) / 1e3 / f64::from(engines);
    Idle { seconds, longest_ms: gaps_ms.fold(0.0, f64::max) }
}

/// Of the largest decode steps.
fn host(steps: &[StepTiming]) -> Option<HostReport> {
    let rows = steps_of_decode(steps).map(|step| step.shape.decode_rows).max()?;
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let times = |step: &StepTiming| {
        let BesideWork { waiting, driver } = step.beside_work?;
        Some((us(step.host_time - waiting), us(driver)))
    };
    let largest = steps_of_decode(steps).filter(|step| step.shape.decode_rows == rows);
    let (mut work, mut driver): (Vec<f64>, Vec<f64>) = largest.map(times).collect::<Option<_>>()?;
    let Percentiles { p50: p50_us, p99: p99_us } = Percentiles::of(&mut work);
    let driver_p50_us = Percentiles::of(&mut driver).p50;
    Some(HostReport { rows, steps: work.len(), p50_us, p99_us, driver_p50_us })
}

/// 0 where there is nothing to divide by.
fn ratio(part: f64, whole: f64) -> f64 {
    if whole == 0.0 { 0.0 } else { part / whole }
}

impl fmt::Display for StepsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StepsReport { tokens, steps, mean_rows, seconds } = self;
        write!(f, "{tokens} tokens in {steps} steps of {mean_rows:.1} rows on average, {seconds:.3} s")
    }
}

impl fmt::Display for MixedReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MixedReport { decode_tokens, prefill_tokens, steps, seconds } = self;
        write!(
            f,
            "{decode_tokens} decode rows beside {prefill_tokens} tokens of prompts in {steps} steps, {seconds:.3} s"
        )
    }
}

impl fmt::Display for RunReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RunReport { record, prefill, mixed, decode, .. } = self;
        let RunRecord { total_tokens, seconds, tokens_per_s, .. } = record;
        writeln!(f, "Total: {total_tokens}tok, Time: {seconds:.2}s, Throughput: {tokens_per_s:.2}tok/s")?;
        writeln!(f, "  prefill       {prefill}")?;
        if mixed.steps > 0 {
            writeln!(f, "  mixed         {mixed}")?;
        }
        writeln!(f, "  decode        {decode}")?;
        let (padding, peak) = (100.0 * self.padding_share, self.rows_peak);
        writeln!(f, "  decode rows   {peak} at the peak, {padding:.1}% of all rows padding")?;
        if let Some(read) = self.experts_read_mean {
            writeln!(f, "  experts       {read:.1} read by a layer of a decode step on average")?;
        }
        let Idle { seconds: idle_s, longest_ms } = self.device_idle;
        let idle_share = 100.0 * ratio(idle_s, *seconds);
        writeln!(
            f,
            "  device idle   {idle_s:.3} s between steps ({idle_share:.1}%), at most {longest_ms:.3} ms"
        )?;
        if let Some(HostReport { rows, p50_us, p99_us, driver_p50_us, .. }) = self.host {
            writeln!(
                f,
                "  host work     p50 {p50_us:.1} us, {driver_p50_us:.1} of them in the driver, p99 {p99_us:.1} us; a decode \
                 step of {rows} rows"
            )?;
        }
        for (name, latencies) in [("TTFT", &record.first_token_ms), ("ITL", &record.between_tokens_ms)] {
            let LatencyReport { mean, p50, p90, p99, max, .. } = latencies;
            writeln!(
                f,
                "  {name:<13} p50 {p50:.2} ms, p90 {p90:.2}, p99 {p99:.2}, at most {max:.2}, {mean:.2} on average"
            )?;
        }
        if self.drafted > 0 {
            let share = 100.0 * ratio(self.accepted as f64, self.drafted as f64);
            writeln!(
                f,
                "  speculation   {} of {} drafts were right ({share:.1}%)",
                self.accepted, self.drafted
            )?;
        }
        writeln!(f, "  KV pages      {} at the peak, {} retractions", self.pages_peak, self.retractions)?;
        match self.cached_tokens {
            0 => writeln!(f, "  prefix cache  0 prompt tokens found")?,
            found => writeln!(f, "  prefix cache  CONTAMINATED: {found} prompt tokens were not computed")?,
        }
        if self.shared_tokens > 0 {
            writeln!(f, "  samples       {} prompt tokens shared with the first one", self.shared_tokens)?;
        }
        if self.outputs_cut > 0 {
            writeln!(f, "  outputs cut   {} by the sequence limit or the pool", self.outputs_cut)?;
        }
        writeln!(f, "  output hash   {}", self.output_hash)?;
        match &record.device_state {
            Some(device) => writeln!(f, "  device        {device}")?,
            None => writeln!(f, "  device        its clocks and power are not known")?,
        }
        let Work { kv_bytes, weight_bytes, prefill_flop } = self.work;
        let (kv, weights, flop) = (Si(kv_bytes), Si(weight_bytes), Si(prefill_flop));
        writeln!(f, "  least work    {kv}B of KV and {weights}B of weights read, {flop}FLOP of prefill")
    }
}

impl fmt::Display for FloorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FloorReport { ceilings, floor, share } = self;
        let matmul = ceilings.flop_per_s.map_or("no known".into(), |rate| format!("{:.0}", rate / 1e12));
        write!(
            f,
            "{:.2} s at {:.0} GB/s and {matmul} TFLOP/s: {:.1}% reached",
            floor.seconds,
            ceilings.bytes_per_s / 1e9,
            100.0 * share
        )
    }
}

/// A count with three or four digits and a decimal prefix: `1.25 G`.
struct Si(u64);

impl fmt::Display for Si {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
        let value = self.0 as f64;
        let (unit, prefix) = prefixes.into_iter().find(|(unit, _)| value >= *unit).unwrap_or((1.0, ""));
        write!(f, "{:.2} {prefix}", value / unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::tests::completion;
    use crate::request::{Load, StepShape};

    const PREFILL: StepShape = StepShape { decode_rows: 0, prefill_rows: 4, tokens: 8, samples: 4 };
    const MIXED: StepShape = StepShape { decode_rows: 1, prefill_rows: 1, tokens: 3, samples: 2 };

    fn step(shape: StepShape, start_ms: f64, gpu_ms: f32) -> StepTiming {
        let (host_start, host_time) = (Duration::ZERO, Duration::from_micros(u64::from(shape.rows()) + 90));
        let (waiting, driver) = (Duration::from_micros(80), Duration::from_micros(5));
        let beside_work = Some(BesideWork { waiting, driver });
        StepTiming {
            engine: 0,
            shape,
            start_ms,
            gpu_ms,
            host_start,
            host_time,
            beside_work,
            load: Load::default(),
            output_tokens: 0,
        }
    }

    const COSTS: Costs = Costs {
        weight_bytes_per_step: 100,
        expert_bytes: 7,
        kv_bytes_per_token: 10,
        flop_per_token: 1000,
        flop_per_context: 1,
    };

    fn measurement() -> Measurement {
        Measurement {
            record: RunRecord { total_tokens: 8, seconds: 2.0, tokens_per_s: 4.0, ..RunRecord::default() },
            stats: Stats {
                prefill_steps: 1,
                decode_steps: 2,
                mixed_steps: 1,
                prefill_tokens: 10,
                mixed_prefill_tokens: 2,
                prefill_context: 20,
                decode_tokens: 7,
                mixed_decode_tokens: 1,
                padding_rows: 2,
                output_tokens: 8,
                decode_context: 40,
                rows_peak: 4,
                pages_peak: 3,
                ..Stats::default()
            },
            experts: ExpertsRead::default(),
            steps: vec![
                step(PREFILL, 100.0, 50.0),
                step(StepShape::decode(4), 150.0, 10.0),
                step(StepShape::decode(2), 165.0, 20.0),
                step(MIXED, 185.0, 7.0),
            ],
            completions: Vec::new(),
        }
    }

    #[test]
    fn the_first_line_is_the_one_that_tools_read() {
        let report = RunReport::new(1, &measurement(), &COSTS);
        let text = report.to_string();
        assert_eq!(text.lines().next(), Some("Total: 8tok, Time: 2.00s, Throughput: 4.00tok/s"));
        assert!(text.contains("clocks and power are not known"), "{text}");
    }

    #[test]
    fn times_are_split_by_kind_and_gaps_between_steps_are_idle() {
        let report = RunReport::new(1, &measurement(), &COSTS);
        assert!((report.prefill.seconds - 0.05).abs() < 1e-9);
        assert!((report.decode.seconds - 0.03).abs() < 1e-9);
        assert!((report.mixed.seconds - 0.007).abs() < 1e-9);
        assert_eq!((report.prefill.tokens, report.decode.tokens), (8, 6));
        assert_eq!(report.prefill.mean_rows, 4.0);
        assert_eq!(report.decode.mean_rows, 3.0);
        assert_eq!(report.padding_share, 0.25);
        assert!((report.device_idle.seconds - 0.005).abs() < 1e-9);
        assert!((report.device_idle.longest_ms - 5.0).abs() < 1e-4);
    }

    #[test]
    fn an_engine_is_not_idle_while_another_one_works() {
        let of = |engine, start_ms| StepTiming { engine, ..step(PREFILL, start_ms, 10.0) };
        let Idle { seconds, longest_ms } = idle(&[of(0, 0.0), of(1, 2.0), of(0, 14.0), of(1, 12.0)]);
        assert_eq!((seconds, longest_ms), (0.002, 4.0));
    }

    #[test]
    fn the_hosts_work_is_that_of_the_largest_decode_steps_without_waiting() {
        let report = RunReport::new(1, &measurement(), &COSTS);
        let host = report.host.unwrap();
        assert_eq!((host.rows, host.steps), (4, 1));
        assert!((host.driver_p50_us - 5.0).abs() < 1e-6);
        assert!(
            (host.p50_us - 14.0).abs() < 1e-6,
            "4 + 90 - 80 us, not the prefill step's or the smaller step's"
        );
        let mut on_the_cpu = measurement();
        on_the_cpu.steps.iter_mut().for_each(|step| step.beside_work = None);
        assert_eq!(RunReport::new(1, &on_the_cpu, &COSTS).host, None);
    }

    #[test]
    fn the_share_of_the_floor_is_its_time_over_the_time_taken() {
        let ceilings = Ceilings { bytes_per_s: 600.0, flop_per_s: Some(100_200.0) };
        let mut report = RunReport::new(1, &measurement(), &COSTS);
        assert_eq!(report.floor, None, "no ceilings, no floor");
        report.set_ceilings(ceilings);
        assert_eq!(report.work, Work { kv_bytes: 400, weight_bytes: 200, prefill_flop: 10_020 });
        let reached = report.floor.unwrap();
        assert!((reached.floor.seconds - 1.1).abs() < 1e-9, "1 s of bytes and 0.1 s of operations");
        assert!((reached.share - 0.55).abs() < 1e-9);
        assert!(reached.to_string().ends_with("55.0% reached"));
    }

    #[test]
    fn experts_are_counted_by_layer_and_their_bytes_are_work() {
        let report = RunReport::new(1, &measurement(), &COSTS);
        assert!(report.experts_read_mean.is_none() && !report.to_string().contains("experts"));
        let experts = ExpertsRead { layers: 4, experts: 10 };
        let report = RunReport::new(1, &Measurement { experts, ..measurement() }, &COSTS);
        assert!(report.to_string().contains("experts       2.5 read"), "{report}");
        assert_eq!(report.work.weight_bytes, 200 + 70);
    }

    #[test]
    fn large_counts_are_written_with_a_prefix() {
        let text = |count| Si(count).to_string();
        assert_eq!([text(13_850_000_000_000), text(999), text(1000)], ["13.85 T", "999.00 ", "1.00 k"]);
    }

    #[test]
    fn what_a_prompts_first_sample_computes_for_the_others_is_no_contamination() {
        let of = |sample, cached_tokens| Completion { sample, cached_tokens, ..completion(&[1], None) };
        let completions = vec![of(0, 0), of(1, 48), of(2, 48)];
        let report = RunReport::new(1, &Measurement { completions, ..measurement() }, &COSTS);
        assert_eq!((report.cached_tokens, report.shared_tokens), (0, 96));
        assert!(!report.to_string().contains("CONTAMINATED"), "{report}");
    }

    #[test]
    fn prefix_cache_hits_are_called_contamination() {
        let clean = RunReport::new(1, &measurement(), &COSTS);
        assert!(!clean.to_string().contains("CONTAMINATED"));
        let hit = RunReport { cached_tokens: 32, ..clean };
        assert!(hit.to_string().contains("CONTAMINATED: 32 prompt tokens"));
    }
}
