//! A device's clocks, power and what holds them down, sampled by a thread of its own while something else works.
//!
//! One look afterwards sees a card that has come to rest. What counts is how it was meanwhile: so every number is a mean,
//! a least and a greatest value over samples, and every reason has the share of samples that named it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::timeline::Timeline;
use super::timeline::rounded;

/// Time between two samples.
pub const PERIOD: Duration = Duration::from_millis(100);
/// NVML's name for a device that has nothing to do: no reason to call it held down.
const IDLE: &str = "gpu_idle";

/// A GPU's state at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DeviceState {
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: u32,
    /// Clock of the memory, MHz.
    pub memory_mhz: u32,
    /// Power drawn, W.
    pub power_w: f64,
    /// Temperature of the chip, degrees Celsius.
    pub temperature_c: u32,
    /// What holds the clocks down; empty if nothing does.
    pub throttle_reasons: Vec<String>,
}

/// Where a device's state can be asked for, from any thread.
pub struct Probe {
    /// Version of the driver.
    pub driver: String,
    /// The highest clock of the multiprocessors, MHz.
    pub sm_mhz_max: u32,
    /// Gives the state now; `None` if there is no answer.
    pub read: Box<dyn FnMut() -> Option<DeviceState> + Send>,
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probe")
            .field("driver", &self.driver)
            .field("sm_mhz_max", &self.sm_mhz_max)
            .finish_non_exhaustive()
    }
}

/// A number over the samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Of all samples.
    pub mean: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

/// Something that held the clocks down.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Throttle {
    /// NVML's name for it.
    pub reason: String,
    /// The share of samples that named it.
    pub share: f64,
}

/// A device over a span of time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceReport {
    /// Version of the driver.
    pub driver: String,
    /// How many samples there are.
    pub samples: u64,
    /// Milliseconds between two of them.
    pub period_ms: u64,
    /// The highest clock that the multiprocessors have, MHz.
    pub sm_mhz_max: u32,
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: Measured,
    /// Clock of the memory, MHz.
    pub memory_mhz: Measured,
    /// Power drawn, W.
    pub power_w: Measured,
    /// Temperature of the chip, degrees Celsius.
    pub temperature_c: Measured,
    /// What held the clocks down, the most frequent first; a device that merely had nothing to do included, as `gpu_idle`.
    pub throttle: Vec<Throttle>,
    /// How it went.
    pub timeline: DeviceTimeline,
}

/// A device over time; `None` in a bucket without a sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct DeviceTimeline {
    /// Seconds from one entry to the next.
    pub bucket_s: f64,
    /// Mean clock of the multiprocessors, MHz.
    pub sm_mhz: Vec<Option<f64>>,
    /// Mean power, W.
    pub power_w: Vec<Option<f64>>,
    /// Mean temperature, degrees Celsius.
    pub temperature_c: Vec<Option<f64>>,
    /// The share of samples with a reason that held the clocks down, having nothing to do excepted.
    pub throttled: Vec<Option<f64>>,
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DeviceReport { samples, sm_mhz, sm_mhz_max, memory_mhz, power_w, temperature_c, driver, .. } =
            self;
        write!(
            f,
            "SM {:.0} MHz on average ({:.0} to {:.0} of {sm_mhz_max}), memory {:.0} MHz, {:.0} W ({:.0} to {:.0}), at \
             most {:.0} C; ",
            sm_mhz.mean,
            sm_mhz.min,
            sm_mhz.max,
            memory_mhz.mean,
            power_w.mean,
            power_w.min,
            power_w.max,
            temperature_c.max
        )?;
        match self.throttle.as_slice() {
            [] => write!(f, "held down by nothing")?,
            reasons => {
                let named = |one: &Throttle| format!("{} in {:.0}%", one.reason, 100.0 * one.share);
                write!(f, "held down by {}", reasons.iter().map(named).collect::<Vec<_>>().join(", "))?;
            }
        }
        write!(f, " of {samples} samples; driver {driver}")
    }
}

/// Does some work and samples the device meanwhile. No report without a probe, or where it never answered.
pub fn sample_while<R>(probe: Option<&mut Probe>, work: impl FnOnce() -> R) -> (R, Option<DeviceReport>) {
    sample_every(PERIOD, probe, work)
}

fn sample_every<R>(
    period: Duration,
    probe: Option<&mut Probe>,
    work: impl FnOnce() -> R,
) -> (R, Option<DeviceReport>) {
    let Some(probe) = probe else { return (work(), None) };
    thread::scope(|scope| {
        let (done, ended) = mpsc::channel();
        let sampler = thread::Builder::new()
            .name("minisgl-sample".to_owned())
            .spawn_scoped(scope, move || sample(probe, period, &ended));
        let result = work();
        drop(done);
        // Without a thread, or if the library below it panics, nothing is known of the device.
        let report = sampler.ok().and_then(|sampler| sampler.join().ok()).flatten();
        (result, report)
    })
}

/// Samples until `ended` is closed; work that is shorter than a period gets one sample at its end.
fn sample(probe: &mut Probe, period: Duration, ended: &Receiver<()>) -> Option<DeviceReport> {
    let started = Instant::now();
    let mut samples = Samples::new(period);
    let mut due = started + period;
    loop {
        let left = due.saturating_duration_since(Instant::now());
        let over = ended.recv_timeout(left) != Err(RecvTimeoutError::Timeout);
        if (!over || samples.count == 0)
            && let Some(state) = (probe.read)()
        {
            samples.add(started.elapsed().as_secs_f64(), &state);
        }
        if over {
            return samples.report(probe, period);
        }
        // A library that is slow to answer is not asked the more often for it.
        due = (due + period).max(Instant::now());
    }
}

/// The samples so far, summed up.
struct Samples {
    count: u64,
    sm_mhz: Range,
    memory_mhz: Range,
    power_w: Range,
    temperature_c: Range,
    reasons: BTreeMap<String, u64>,
    timeline: Timeline<Bucket>,
}

/// Sum and ends of a number.
#[derive(Clone, Copy, Default)]
struct Range {
    sum: f64,
    ends: Option<(f64, f64)>,
}

impl Range {
    fn add(&mut self, value: f64) {
        self.sum += value;
        let (min, max) = self.ends.unwrap_or((value, value));
        self.ends = Some((min.min(value), max.max(value)));
    }

    fn measured(&self, count: u64) -> Measured {
        let (min, max) = self.ends.unwrap_or_default();
        Measured { mean: rounded(self.sum / count as f64), min, max }
    }
}

/// Sums over the samples of a span.
#[derive(Clone, Copy, Default)]
struct Bucket {
    count: f64,
    sm_mhz: f64,
    power_w: f64,
    temperature_c: f64,
    throttled: f64,
}

impl AddAssign for Bucket {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.sm_mhz += other.sm_mhz;
        self.power_w += other.power_w;
        self.temperature_c += other.temperature_c;
        self.throttled += other.throttled;
    }
}

impl Samples {
    fn new(period: Duration) -> Self {
        Samples {
            count: 0,
            sm_mhz: Range::default(),
            memory_mhz: Range::default(),
            power_w: Range::default(),
            temperature_c: Range::default(),
            reasons: BTreeMap::new(),
            timeline: Timeline::new(period.as_secs_f64()),
        }
    }

    fn add(&mut self, seconds: f64, state: &DeviceState) {
        let (sm_mhz, temperature_c) = (f64::from(state.sm_mhz), f64::from(state.temperature_c));
        self.count += 1;
        self.sm_mhz.add(sm_mhz);
        self.memory_mhz.add(f64::from(state.memory_mhz));
        self.power_w.add(state.power_w);
        self.temperature_c.add(temperature_c);
        for reason in &state.throttle_reasons {
            *self.reasons.entry(reason.clone()).or_default() += 1;
        }
        let is_held = state.throttle_reasons.iter().any(|reason| reason != IDLE);
        let throttled = f64::from(u8::from(is_held));
        *self.timeline.at(seconds) +=
            Bucket { count: 1.0, sm_mhz, power_w: state.power_w, temperature_c, throttled };
    }

    fn report(self, probe: &Probe, period: Duration) -> Option<DeviceReport> {
        let count = self.count;
        let share =
            |(reason, named): (String, u64)| Throttle { reason, share: rounded(named as f64 / count as f64) };
        let mut throttle: Vec<Throttle> = self.reasons.into_iter().map(share).collect();
        throttle.sort_by(|a, b| b.share.total_cmp(&a.share));
        let series = |value: fn(&Bucket) -> f64| {
            let mean = |bucket: &Bucket| (bucket.count > 0.0).then(|| rounded(value(bucket) / bucket.count));
            self.timeline.buckets().iter().map(mean).collect()
        };
        (count > 0).then(|| DeviceReport {
            driver: probe.driver.clone(),
            samples: count,
            period_ms: period.as_millis() as u64,
            sm_mhz_max: probe.sm_mhz_max,
            sm_mhz: self.sm_mhz.measured(count),
            memory_mhz: self.memory_mhz.measured(count),
            power_w: self.power_w.measured(count),
            temperature_c: self.temperature_c.measured(count),
            throttle,
            timeline: DeviceTimeline {
                bucket_s: self.timeline.width_s(),
                sm_mhz: series(|bucket| bucket.sm_mhz),
                power_w: series(|bucket| bucket.power_w),
                temperature_c: series(|bucket| bucket.temperature_c),
                throttled: series(|bucket| bucket.throttled),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn state(sm_mhz: u32, reasons: &[&str]) -> DeviceState {
        let throttle_reasons = reasons.iter().map(|reason| reason.to_string()).collect();
        DeviceState { sm_mhz, memory_mhz: 2619, power_w: 600.5, temperature_c: 61, throttle_reasons }
    }

    fn probe(read: impl FnMut() -> Option<DeviceState> + Send + 'static) -> Probe {
        Probe { driver: "580.1".to_owned(), sm_mhz_max: 1980, read: Box::new(read) }
    }

    #[test]
    fn a_card_that_is_capped_while_it_works_is_reported_so_though_it_rests_afterwards() {
        let (capped, resting) = (state(1600, &["sw_power_cap"]), state(1980, &[]));
        let looks = Arc::new(AtomicU32::new(0));
        let seen = looks.clone();
        let mut probe = probe(move || match seen.fetch_add(1, Ordering::SeqCst) {
            look if look % 4 == 3 => Some(resting.clone()),
            _ => Some(capped.clone()),
        });
        let work = || {
            while looks.load(Ordering::SeqCst) < 8 {
                thread::yield_now();
            }
            "done"
        };
        let (result, report) = sample_every(Duration::from_millis(1), Some(&mut probe), work);
        let report = report.unwrap();
        assert_eq!(result, "done");
        assert!(report.samples >= 8);
        assert_eq!((report.sm_mhz.min, report.sm_mhz.max), (1600.0, 1980.0));
        let mean = 1600.0 + 380.0 * (report.samples / 4) as f64 / report.samples as f64;
        assert!((report.sm_mhz.mean - mean).abs() < 1e-3, "{report:?}");
        assert_eq!(report.throttle[0].reason, "sw_power_cap");
        // Every fourth look saw it resting, however many there were.
        let capped = report.samples - report.samples / 4;
        assert_eq!(report.throttle[0].share, rounded(capped as f64 / report.samples as f64), "{report:?}");
        assert_eq!(report.power_w, Measured { mean: 600.5, min: 600.5, max: 600.5 });
        assert_eq!((report.driver.as_str(), report.sm_mhz_max), ("580.1", 1980));
    }

    #[test]
    fn work_shorter_than_a_period_has_a_sample_and_does_not_wait_for_it() {
        let mut probe = probe(|| Some(state(1980, &[])));
        let started = Instant::now();
        let ((), report) = sample_every(Duration::from_secs(3600), Some(&mut probe), || ());
        assert!(started.elapsed() < Duration::from_secs(60));
        assert_eq!(report.unwrap().samples, 1);
    }

    #[test]
    fn a_device_that_is_not_known_or_never_answers_has_no_report() {
        assert_eq!(sample_while(None, || 7), (7, None));
        assert_eq!(sample_while(Some(&mut probe(|| None)), || 7), (7, None));
    }

    #[test]
    fn a_source_that_panics_costs_the_report_and_not_the_work() {
        let mut probe = probe(|| panic!("the library is broken"));
        assert_eq!(sample_while(Some(&mut probe), || 7), (7, None));
    }

    #[test]
    fn time_without_a_sample_is_empty_and_having_nothing_to_do_is_not_being_held_down() {
        let mut samples = Samples::new(PERIOD);
        samples.add(0.05, &state(1980, &[IDLE]));
        samples.add(0.25, &state(1500, &[IDLE, "hw_slowdown"]));
        let report = samples.report(&probe(|| None), PERIOD).unwrap();
        assert_eq!(report.timeline.sm_mhz, [Some(1980.0), None, Some(1500.0)]);
        assert_eq!(report.timeline.throttled, [Some(0.0), None, Some(1.0)]);
        let shares: Vec<_> = report.throttle.iter().map(|one| (one.reason.as_str(), one.share)).collect();
        assert_eq!(shares, [(IDLE, 1.0), ("hw_slowdown", 0.5)]);
    }
}
