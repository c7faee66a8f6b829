//! Turns a session's events into numbers.
//!
//! ```text
//!   submitted ──> Token ──> Token ──> … ──> Finished     a request: its latencies, where tokens are told
//!        Step ──> Step ──> Step ──> Step ──> …           the engine: its timeline
//! ```
//!
//! A step's tokens and rows count evenly over the time that it took, so that what is long shows as long and not as a gap
//! and a peak. When it ran is told by the device's clock, which is set by the host's so that no step ends after the host
//! saw its end; as the host may see ends late, the clock is set back whenever a step shows that it was ahead.
//!
//! Invariant: memory is that of the requests that are open, whatever has passed.

use std::collections::{BTreeMap, HashMap};
use std::ops::AddAssign;
use std::time::Instant;

use serde::Serialize;

use super::device::DeviceReport;
use super::latency::{Latencies, LatencyReport};
use super::timeline::{Timeline, rounded};
use crate::front::SessionEvent;
use crate::request::{Completion, FinishReason, Load, StepTiming};

/// All that was seen of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RunRecord {
    /// Output tokens.
    pub total_tokens: u64,
    /// Seconds that the whole run took.
    pub seconds: f64,
    /// Output tokens a second.
    pub tokens_per_s: f64,
    /// From when a request was handed over to its first token.
    pub first_token_ms: LatencyReport,
    /// From one token of a request to the next.
    pub between_tokens_ms: LatencyReport,
    /// How many requests ended, by why.
    pub ended: BTreeMap<FinishReason, u64>,
    /// How many requests and lines failed, by what was wrong.
    pub failures: BTreeMap<&'static str, u64>,
    /// What ran when.
    pub timeline: StepTimeline,
    /// The device meanwhile; `None` where it is not known.
    pub device_state: Option<DeviceReport>,
}

/// Width of a bucket to begin with, in seconds.
const BUCKET_S: f64 = 0.01;
/// No step is taken to be shorter, so that its tokens have a time to be dealt over.
const SHORTEST_S: f64 = 1e-6;

/// Hears a session from its start to its end.
#[derive(Debug)]
pub struct Recorder {
    /// By tag and sample.
    open: HashMap<(u64, u32), Open>,
    first_token: Latencies,
    between_tokens: Latencies,
    total_tokens: u64,
    load: Load,
    /// What the device's seconds need to become the session's.
    clock_offset_s: f64,
    /// When the last step ended, in seconds from the session's start.
    step_end_s: f64,
    ended: BTreeMap<FinishReason, u64>,
    failures: BTreeMap<&'static str, u64>,
    timeline: Timeline<Bucket>,
}

/// A request that has not ended.
#[derive(Debug)]
struct Open {
    /// When it last got a token; before its first one, when it was submitted.
    since: Instant,
    has_token: bool,
}

/// What ran when; one entry a bucket. `None` where no step ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StepTimeline {
    /// Seconds from one entry to the next.
    pub bucket_s: f64,
    /// Output tokens a second.
    pub output_tokens_per_s: Vec<f64>,
    /// Tokens of prefill rows a second.
    pub prefill_tokens_per_s: Vec<f64>,
    /// The share of time that the device spent in steps with prefill rows.
    pub prefill_share: Vec<f64>,
    /// The share of time that the device spent in steps of decode rows alone.
    pub decode_share: Vec<f64>,
    /// Rows of a step of decode rows alone, padding included.
    pub decode_rows: Vec<Option<f64>>,
    /// Requests in the batch.
    pub running: Vec<Option<f64>>,
    /// Requests that waited for a place in it.
    pub waiting: Vec<Option<f64>>,
    /// KV pages in use.
    pub pages_used: Vec<Option<f64>>,
}

/// Sums over a span of time. What is no count is weighted with the seconds that it lasted.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    output_tokens: f64,
    prefill_tokens: f64,
    prefill_s: f64,
    decode_s: f64,
    decode_rows: f64,
    running: f64,
    waiting: f64,
    pages_used: f64,
}

impl AddAssign for Bucket {
    fn add_assign(&mut self, other: Self) {
        self.output_tokens += other.output_tokens;
        self.prefill_tokens += other.prefill_tokens;
        self.prefill_s += other.prefill_s;
        self.decode_s += other.decode_s;
        self.decode_rows += other.decode_rows;
        self.running += other.running;
        self.waiting += other.waiting;
        self.pages_used += other.pages_used;
    }
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new()
    }
}

impl Recorder {
    /// For a session that begins now.
    pub fn new() -> Self {
        Recorder {
            open: HashMap::new(),
            first_token: Latencies::default(),
            between_tokens: Latencies::default(),
            total_tokens: 0,
            load: Load::default(),
            clock_offset_s: f64::INFINITY,
            step_end_s: 0.0,
            ended: BTreeMap::new(),
            failures: BTreeMap::new(),
            timeline: Timeline::new(BUCKET_S),
        }
    }

    /// Output tokens so far.
    pub fn total_tokens(&self) -> u64 {
        self.total_tokens
    }

    /// What the engine had on its hands after the last step.
    pub fn load(&self) -> Load {
        self.load
    }

    /// A request of so many samples was handed over.
    pub fn submitted(&mut self, tag: u64, samples: u32, at: Instant) {
        let open = |sample| ((tag, sample), Open { since: at, has_token: false });
        self.open.extend((0..samples).map(open));
    }

    /// A line that makes no request.
    pub fn failed(&mut self, kind: &'static str) {
        *self.failures.entry(kind).or_default() += 1;
    }

    /// Something happened in the session.
    pub fn hear(&mut self, event: &SessionEvent) {
        match event {
            SessionEvent::Token { tag, sample, at, .. } => self.token((*tag, *sample), *at),
            SessionEvent::Finished { tag, completion, .. } => self.finished(*tag, completion),
            SessionEvent::Step(timing) => self.step(timing),
            SessionEvent::Started { .. } => {}
        }
    }

    fn token(&mut self, of: (u64, u32), at: Instant) {
        let Some(open) = self.open.get_mut(&of) else { return };
        let latencies = if open.has_token { &mut self.between_tokens } else { &mut self.first_token };
        latencies.record(at.saturating_duration_since(open.since));
        *open = Open { since: at, has_token: true };
    }

    fn finished(&mut self, tag: u64, completion: &Completion) {
        self.open.remove(&(tag, completion.sample));
        *self.ended.entry(completion.finish_reason).or_default() += 1;
        if let Some(error) = &completion.error {
            self.failed(error.kind());
        }
    }

    fn step(&mut self, timing: &StepTiming) {
        self.total_tokens += u64::from(timing.output_tokens);
        self.load = timing.load;
        let (start_s, end_s) = self.place(timing);
        let step_s = end_s - start_s;
        let shape = timing.shape;
        self.timeline.spread(start_s, end_s, |seconds| {
            let share = seconds / step_s;
            let (prefill_s, decode_s) = if shape.is_decode() { (0.0, seconds) } else { (seconds, 0.0) };
            Bucket {
                output_tokens: share * f64::from(timing.output_tokens),
                prefill_tokens: share * f64::from(shape.prefill_tokens()),
                prefill_s,
                decode_s,
                decode_rows: decode_s * f64::from(shape.decode_rows),
                running: seconds * f64::from(timing.load.running),
                waiting: seconds * f64::from(timing.load.waiting),
                pages_used: seconds * f64::from(timing.load.pages_used),
            }
        });
    }

    /// When a step began and ended, in seconds from the session's start: never before the step before it had ended.
    fn place(&mut self, timing: &StepTiming) -> (f64, f64) {
        let device_s = f64::from(timing.gpu_ms) / 1e3;
        let device_end_s = timing.start_ms / 1e3 + device_s;
        let seen_s = (timing.host_start + timing.host_time).as_secs_f64();
        self.clock_offset_s = self.clock_offset_s.min(seen_s - device_end_s);
        let before_s = self.step_end_s;
        self.step_end_s = (device_end_s + self.clock_offset_s).max(before_s + SHORTEST_S);
        let start_s = (self.step_end_s - device_s).max(before_s);
        (start_s.min(self.step_end_s - SHORTEST_S / 2.0), self.step_end_s)
    }

    /// Sums up what was heard. The session took `seconds`.
    pub fn record(&self, seconds: f64, device_state: Option<DeviceReport>) -> RunRecord {
        RunRecord {
            total_tokens: self.total_tokens,
            seconds,
            tokens_per_s: self.total_tokens as f64 / seconds,
            first_token_ms: self.first_token.report(),
            between_tokens_ms: self.between_tokens.report(),
            ended: self.ended.clone(),
            failures: self.failures.clone(),
            timeline: self.step_timeline(seconds),
            device_state,
        }
    }

    fn step_timeline(&self, seconds: f64) -> StepTimeline {
        let (width, buckets) = (self.timeline.width_s(), self.timeline.buckets());
        let seconds = seconds.max(self.step_end_s);
        // The last bucket ends with the session.
        let span = |i: usize| {
            if i + 1 < buckets.len() { width } else { (seconds - i as f64 * width).clamp(1e-6, width) }
        };
        let over_time = |value: fn(&Bucket) -> f64| {
            buckets.iter().enumerate().map(|(i, bucket)| rounded(value(bucket) / span(i))).collect()
        };
        let mean = |value: fn(&Bucket) -> f64, weight: fn(&Bucket) -> f64| {
            let mean = |bucket| (weight(bucket) > 0.0).then(|| rounded(value(bucket) / weight(bucket)));
            buckets.iter().map(mean).collect()
        };
        let busy_s = |bucket: &Bucket| bucket.prefill_s + bucket.decode_s;
        StepTimeline {
            bucket_s: width,
            output_tokens_per_s: over_time(|bucket| bucket.output_tokens),
            prefill_tokens_per_s: over_time(|bucket| bucket.prefill_tokens),
            prefill_share: over_time(|bucket| bucket.prefill_s),
            decode_share: over_time(|bucket| bucket.decode_s),
            decode_rows: mean(|bucket| bucket.decode_rows, |bucket| bucket.decode_s),
            running: mean(|bucket| bucket.running, busy_s),
            waiting: mean(|bucket| bucket.waiting, busy_s),
            pages_used: mean(|bucket| bucket.pages_used, busy_s),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::request::{RequestError, StepShape};

    const DECODE: StepShape = StepShape { decode_rows: 4, prefill_rows: 0, tokens: 4, samples: 4 };
    const PREFILL: StepShape = StepShape { decode_rows: 0, prefill_rows: 4, tokens: 100, samples: 4 };

    fn token(tag: u64, at: Instant) -> SessionEvent {
        SessionEvent::Token { tag, sample: 0, token: 1, text: String::new(), logprobs: None, at }
    }

    fn step(shape: StepShape, end_ms: u64, device_ms: f32, output_tokens: u32) -> SessionEvent {
        SessionEvent::Step(StepTiming {
            engine: 0,
            shape,
            output_tokens,
            load: Load { running: 3, waiting: 5, pages_used: 7 },
            start_ms: 5000.0 + end_ms as f64 - f64::from(device_ms),
            gpu_ms: device_ms,
            host_start: Duration::from_millis(end_ms - 1),
            host_time: Duration::from_millis(1),
            beside_work: None,
        })
    }

    fn ended(tag: u64, finish_reason: FinishReason, error: Option<RequestError>) -> SessionEvent {
        let completion = Completion { finish_reason, ..Completion::rejected(RequestError::EmptyStop) };
        let completion = Box::new(Completion { error, ..completion });
        SessionEvent::Finished { tag, text: String::new(), completion }
    }

    #[test]
    fn latencies_are_each_requests_own() {
        let started = Instant::now();
        let at = |ms| started + Duration::from_millis(ms);
        let mut recorder = Recorder::new();
        recorder.submitted(0, 1, started);
        recorder.submitted(1, 1, at(5));
        let events = [token(0, at(10)), token(1, at(10)), token(1, at(13)), token(0, at(20))];
        events.iter().for_each(|event| recorder.hear(event));
        recorder.hear(&step(DECODE, 20, 10.0, 4));
        let record = recorder.record(0.02, None);
        assert_eq!((record.first_token_ms.count, record.first_token_ms.max), (2, 10.0));
        assert_eq!((record.first_token_ms.p50, record.between_tokens_ms.p50), (5.0, 3.0));
        assert_eq!((record.between_tokens_ms.count, record.between_tokens_ms.max), (2, 10.0));
        assert_eq!((record.total_tokens, record.tokens_per_s), (4, 200.0));
    }

    #[test]
    fn a_step_counts_evenly_over_the_time_that_it_took() {
        let mut recorder = Recorder::new();
        recorder.hear(&step(PREFILL, 20, 20.0, 0));
        recorder.hear(&step(DECODE, 35, 10.0, 2));
        let timeline = recorder.record(0.035, None).timeline;
        assert_eq!(timeline.bucket_s, 0.01);
        assert_eq!(timeline.prefill_share, [1.0, 1.0, 0.0, 0.0]);
        assert_eq!(timeline.decode_share, [0.0, 0.0, 0.5, 1.0], "the last bucket lasts 5 ms");
        assert_eq!(timeline.prefill_tokens_per_s, [5000.0, 5000.0, 0.0, 0.0]);
        assert_eq!(timeline.output_tokens_per_s, [0.0, 0.0, 100.0, 200.0]);
        assert_eq!(timeline.decode_rows, [None, None, Some(4.0), Some(4.0)]);
        assert_eq!(timeline.running, [Some(3.0); 4]);
        assert_eq!((timeline.waiting[0], timeline.pages_used[3]), (Some(5.0), Some(7.0)));
    }

    #[test]
    fn a_step_whose_end_is_seen_late_is_placed_by_the_devices_clock() {
        let mut recorder = Recorder::new();
        let late = |end_ms: u64, late_ms: u64| match step(DECODE, end_ms, 10.0, 1) {
            SessionEvent::Step(timing) => {
                SessionEvent::Step(StepTiming { host_time: Duration::from_millis(1 + late_ms), ..timing })
            }
            other => other,
        };
        for event in [late(20, 0), late(30, 9), late(40, 3)] {
            recorder.hear(&event);
        }
        let timeline = recorder.record(0.05, None).timeline;
        assert_eq!(timeline.decode_share[..4], [0.0, 1.0, 1.0, 1.0]);
        // The first end was seen late: steps are too late until a better one is seen, and none overlaps another.
        let mut recorder = Recorder::new();
        for event in [late(20, 10), late(30, 0), late(40, 0)] {
            recorder.hear(&event);
        }
        let timeline = recorder.record(0.05, None).timeline;
        assert!(timeline.decode_share.iter().all(|share| *share <= 1.0), "{timeline:?}");
        assert!((timeline.decode_share[3] - 1.0).abs() < 1e-9, "{timeline:?}");
    }

    #[test]
    fn steps_that_take_no_time_count_all_the_same() {
        let mut recorder = Recorder::new();
        let at = |us: u64| match step(DECODE, 1, 0.0, 3) {
            SessionEvent::Step(timing) => SessionEvent::Step(StepTiming {
                host_start: Duration::from_nanos(us * 7),
                host_time: Duration::ZERO,
                start_ms: 0.0,
                ..timing
            }),
            other => other,
        };
        (0..20_000).for_each(|i| recorder.hear(&at(i)));
        let record = recorder.record(1.0, None);
        assert_eq!(record.total_tokens, 60_000);
        let dealt: f64 = recorder.timeline.buckets().iter().map(|bucket| bucket.output_tokens).sum();
        assert!((dealt - 60_000.0).abs() < 1e-3, "{dealt}");
    }

    #[test]
    fn ends_and_failures_are_counted_by_kind_and_nothing_is_kept_of_a_request_that_ended() {
        let started = Instant::now();
        let mut recorder = Recorder::new();
        for tag in 0..1000 {
            recorder.submitted(tag, 1, started);
            let error = (tag % 10 == 0).then_some(RequestError::EmptyStop);
            let reason = if error.is_some() { FinishReason::Rejected } else { FinishReason::Eos };
            recorder.hear(&ended(tag, reason, error));
        }
        recorder.failed("malformed line");
        let record = recorder.record(1.0, None);
        assert_eq!(record.ended, BTreeMap::from([(FinishReason::Eos, 900), (FinishReason::Rejected, 100)]));
        assert_eq!(record.failures, BTreeMap::from([("empty stop text", 100), ("malformed line", 1)]));
        assert!(recorder.open.is_empty());
    }
}
