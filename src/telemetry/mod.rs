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

pub use device::{DeviceReport, DeviceState, DeviceTimeline, Measured, Probe, Throttle, sample_while};
pub use latency::{Distribution, Latencies, LatencyReport};
pub use recorder::{Recorder, RunRecord, StepTimeline};
pub use timeline::{BUCKETS, Timeline};
