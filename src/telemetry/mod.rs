//! What is seen of a run while it goes on, in bounded memory: who waited how long, what ran when, how the device was.
//!
//! ```text
//!   session events ──> Recorder ── latencies, timeline, ends, failures ──┐
//!   device's state, every 100 ms ──> a thread of its own ── DeviceReport ┴──> RunRecord ──> table, JSON, page
//! ```

mod device;
mod latency;
mod recorder;
mod timeline;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::request::FinishReason;

pub use device::{DeviceReport, DeviceState, DeviceTimeline, Measured, Probe, Throttle, sample_while};
pub use latency::{Distribution, Latencies, LatencyReport};
pub use recorder::{Recorder, StepTimeline};
pub use timeline::{BUCKETS, Timeline};

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

/// To the nearest thousandth: what more digits would say is noise, and they fill reports.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
