//! What is seen of a run from outside the service: the times of requests and of their tokens, as the metrics that
//! docs/clients.md defines.
//!
//! ```text
//!   due ──── sent ────────── first output ── … ── last output ── end
//!   │<─ lateness ─>│                │<─ ITL ─>│<─ ITL ─>│         │
//!   │<──────────── TTFT ───────────>│<────── TPOT · n ─>│         │
//!   │<──────────────────────────── E2E ──────────────────────────>│
//! ```
//!
//! It knows no clock: times are told, counted from the run's start. It takes the same memory however long a run is.

use std::collections::BTreeMap;
use std::time::Duration;

use minisgl::telemetry::{Latencies, LatencyReport};
use serde::Serialize;

use crate::chunk::Usage;

/// Takes in what happens to requests, which are numbered.
#[derive(Debug, Default)]
pub struct Recorder {
    open: BTreeMap<usize, Open>,
    open_peak: usize,
    first: Latencies,
    between: Latencies,
    per_token: Latencies,
    whole: Latencies,
    late: Latencies,
    started: Option<Duration>,
    last_end: Duration,
    finished: u64,
    unfinished: u64,
    short: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    /// Of requests that are open, too.
    seen_tokens: u64,
    failures: BTreeMap<String, Failures>,
}

/// A request on its way.
#[derive(Debug)]
struct Open {
    due: Duration,
    asked: u64,
    first: Option<Duration>,
    last: Duration,
    tokens: u64,
}

/// Requests that failed in one way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Failures {
    /// How many.
    pub count: u64,
    /// What was said of the first one.
    pub first: String,
}

/// All that was seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Record {
    /// Requests that ended well.
    pub finished: u64,
    /// Requests that did not.
    pub failed: u64,
    /// Requests that were on their way when the run was stopped.
    pub unfinished: u64,
    /// Requests that failed, by what was wrong.
    pub failures: BTreeMap<String, Failures>,
    /// From when the first request was due until the last one ended.
    pub seconds: f64,
    /// Requests a second that ended well.
    pub requests_per_s: f64,
    /// Output tokens a second.
    pub tokens_per_s: f64,
    /// Output tokens.
    pub output_tokens: u64,
    /// Outputs with fewer tokens than were asked for.
    pub short_outputs: u64,
    /// Tokens of prompts, as the service counts them.
    pub prompt_tokens: u64,
    /// How many of them it had computed before.
    pub cached_tokens: u64,
    /// Requests on their way at once, at most.
    pub open_peak: usize,
    /// From when a request was due to its first token.
    pub ttft_ms: LatencyReport,
    /// From one token of a request to the next.
    pub itl_ms: LatencyReport,
    /// The mean of these of one request.
    pub tpot_ms: LatencyReport,
    /// From when a request was due to its end.
    pub e2e_ms: LatencyReport,
    /// From when a request was due until it was sent.
    pub lateness_ms: LatencyReport,
}

impl Recorder {
    /// A request that was due at `due` and asks for so many tokens goes out.
    pub fn sent(&mut self, request: usize, due: Duration, now: Duration, asked: u32) {
        self.late.record(now.saturating_sub(due));
        self.started = Some(self.started.map_or(due, |started| started.min(due)));
        let open = Open { due, asked: asked.into(), first: None, last: due, tokens: 0 };
        self.open.insert(request, open);
        self.open_peak = self.open_peak.max(self.open.len());
    }

    /// Tokens of its output have come together.
    pub fn output(&mut self, request: usize, tokens: u64, now: Duration) {
        let Some(open) = self.open.get_mut(&request).filter(|_| tokens > 0) else { return };
        match open.first {
            None => {
                open.first = Some(now);
                self.first.record(now.saturating_sub(open.due));
            }
            Some(_) => self.between.record(now.saturating_sub(open.last)),
        }
        (1..tokens).for_each(|_| self.between.record(Duration::ZERO));
        open.tokens += tokens;
        self.seen_tokens += tokens;
        open.last = now;
    }

    /// It has ended well.
    pub fn finished(&mut self, request: usize, usage: Option<Usage>, now: Duration) {
        let Some(open) = self.open.remove(&request) else { return };
        self.last_end = self.last_end.max(now);
        self.finished += 1;
        self.whole.record(now.saturating_sub(open.due));
        if let (Some(first), 2..) = (open.first, open.tokens) {
            let gaps = u32::try_from(open.tokens - 1).unwrap_or(u32::MAX);
            self.per_token.record(open.last.saturating_sub(first) / gaps);
        }
        // What the service counts includes tokens that have no text.
        let tokens = usage.map_or(open.tokens, |usage| usage.completion_tokens);
        self.output_tokens += tokens;
        self.short += u64::from(tokens < open.asked);
        if let Some(usage) = usage {
            self.prompt_tokens += usage.prompt_tokens;
            self.cached_tokens += usage.cached_tokens();
        }
    }

    /// It has failed: the kind of failure, and what is to be said of it.
    pub fn failed(&mut self, request: usize, kind: &str, what: &str, now: Duration) {
        let Some(open) = self.open.remove(&request) else { return };
        self.last_end = self.last_end.max(now);
        self.output_tokens += open.tokens;
        let failures = self.failures.entry(kind.to_owned()).or_default();
        if failures.count == 0 {
            failures.first = what.to_owned();
        }
        failures.count += 1;
    }

    /// The run ends here, whatever is on its way.
    pub fn stopped(&mut self, now: Duration) {
        self.last_end = self.last_end.max(now);
        self.output_tokens += self.open.values().map(|open| open.tokens).sum::<u64>();
        self.unfinished += self.open.len() as u64;
        self.open.clear();
    }

    /// How many are on their way.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// How many have ended well, and how many failed.
    pub fn ended(&self) -> (u64, u64) {
        (self.finished, self.failures.values().map(|failures| failures.count).sum())
    }

    /// Output tokens that have come so far.
    pub fn tokens(&self) -> u64 {
        self.seen_tokens
    }

    /// Sums it all up.
    pub fn record(&self) -> Record {
        let seconds = self.last_end.saturating_sub(self.started.unwrap_or_default()).as_secs_f64();
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        Record {
            finished: self.finished,
            failed: self.ended().1,
            unfinished: self.unfinished,
            failures: self.failures.clone(),
            seconds,
            requests_per_s: rate(self.finished),
            tokens_per_s: rate(self.output_tokens),
            output_tokens: self.output_tokens,
            short_outputs: self.short,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            open_peak: self.open_peak,
            ttft_ms: self.first.report(),
            itl_ms: self.between.report(),
            tpot_ms: self.per_token.report(),
            e2e_ms: self.whole.report(),
            lateness_ms: self.late.report(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn usage(text: &str) -> Option<Usage> {
        Some(serde_json::from_str(text).unwrap())
    }

    /// To one in a thousand, which is what is kept.
    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-3 * b
    }

    /// Request i of a hundred is due at 10 i ms, sent 1 ms later, has its first token after i + 1 ms and then one every
    /// 2 ms, or at the tenth token every 50 ms, and ends 3 ms behind its twelfth.
    #[test]
    fn percentiles_are_those_of_the_times_that_are_told() {
        let mut recorder = Recorder::default();
        for i in 0..100 {
            let (request, due) = (i as usize, ms(10 * i));
            recorder.sent(request, due, due + ms(1), 12);
            let mut now = due + ms(i + 1);
            recorder.output(request, 1, now);
            for token in 2..=12 {
                now += ms(if token == 10 { 50 } else { 2 });
                recorder.output(request, 1, now);
            }
            recorder.finished(request, None, now + ms(3));
        }
        let record = recorder.record();
        assert_eq!((record.finished, record.failed, record.short_outputs), (100, 0, 0));
        assert_eq!((record.ttft_ms.count, record.itl_ms.count, record.output_tokens), (100, 1100, 1200));
        for (found, expected) in [
            (record.ttft_ms.p50, 50.0),
            (record.ttft_ms.p99, 99.0),
            (record.ttft_ms.max, 100.0),
            (record.itl_ms.p50, 2.0),
            (record.itl_ms.p90, 2.0),
            (record.itl_ms.p99, 50.0),
            (record.tpot_ms.p50, 70.0 / 11.0),
            (record.e2e_ms.p50, 50.0 + 70.0 + 3.0),
            (record.lateness_ms.p99, 1.0),
            // From 0 to 990 + 100 + 70 + 3 ms.
            (record.seconds, 1.163),
            (record.tokens_per_s, 1200.0 / 1.163),
            (record.requests_per_s, 100.0 / 1.163),
        ] {
            assert!(close(found, expected), "{found} for {expected}");
        }
    }

    #[test]
    fn tokens_that_come_together_have_no_time_between_them() {
        let mut recorder = Recorder::default();
        recorder.sent(0, ms(0), ms(0), 5);
        recorder.output(0, 2, ms(10));
        recorder.output(0, 0, ms(11));
        recorder.output(0, 3, ms(40));
        recorder.finished(0, None, ms(40));
        let record = recorder.record();
        assert_eq!((record.itl_ms.count, record.output_tokens), (4, 5));
        assert!(close(record.itl_ms.max, 30.0) && record.itl_ms.p50 < 0.01);
        assert!(close(record.tpot_ms.p50, 7.5));
    }

    #[test]
    fn the_services_own_count_of_tokens_is_the_better_one() {
        let mut recorder = Recorder::default();
        for request in 0..2 {
            recorder.sent(request, ms(0), ms(0), 5);
            recorder.output(request, 1, ms(1));
        }
        let counts =
            r#"{"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}"#;
        recorder.finished(0, usage(counts), ms(2));
        recorder.finished(1, usage(r#"{"prompt_tokens": 3, "completion_tokens": 2}"#), ms(2));
        let record = recorder.record();
        assert_eq!((record.output_tokens, record.short_outputs), (7, 1));
        assert_eq!((record.prompt_tokens, record.cached_tokens), (10, 4));
    }

    #[test]
    fn failures_are_counted_by_kind_and_give_no_latency_of_the_whole() {
        let mut recorder = Recorder::default();
        for (request, kind) in ["status 429", "status 429", "time-out"].into_iter().enumerate() {
            recorder.sent(request, ms(0), ms(0), 5);
            recorder.output(request, 1, ms(4));
            recorder.failed(request, kind, &format!("said of {request}"), ms(9));
        }
        assert_eq!((recorder.open(), recorder.ended(), recorder.tokens()), (0, (0, 3), 3));
        let record = recorder.record();
        assert_eq!((record.finished, record.failed, record.open_peak), (0, 3, 1));
        let expected = Failures { count: 2, first: "said of 0".to_owned() };
        assert_eq!(record.failures["status 429"], expected);
        assert_eq!((record.e2e_ms.count, record.output_tokens), (0, 3));
        assert_eq!(Recorder::default().record(), Record::default());
    }

    #[test]
    fn a_run_that_is_stopped_counts_what_came_until_then() {
        let mut recorder = Recorder::default();
        for request in 0..3 {
            recorder.sent(request, ms(0), ms(0), 5);
            recorder.output(request, 2, ms(4));
        }
        recorder.finished(0, None, ms(5));
        recorder.stopped(ms(10));
        let record = recorder.record();
        assert_eq!((record.finished, record.failed, record.unfinished), (1, 0, 2));
        assert_eq!((record.output_tokens, record.e2e_ms.count), (6, 1));
        assert!(close(record.tokens_per_s, 600.0));
    }
}
