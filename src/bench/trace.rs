//! A run as a timeline: Chrome's trace format, which <https://ui.perfetto.dev> opens.
//!
//! ```text
//!   device   [prefill][decode][decode][decode]…       steps back to back: nothing is lost
//!   host        [launch]  [launch] [launch]           each call launches a step and completes the one before
//! ```
//!
//! The two tracks come from two clocks. The device's is moved so that no step ends after the call that saw it end,
//! and one step ends just then: the offset can only be too small by the shortest time a result took to the host.
//! Every engine has a pair of tracks, as a process of its own.

use std::io;

use serde::Serialize;

use crate::request::{StepShape, StepTiming};

const DEVICE_TRACK: u32 = 1;
const HOST_TRACK: u32 = 2;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    display_time_unit: &'static str,
    trace_events: Vec<Entry>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Entry {
    Name { name: &'static str, ph: char, pid: u32, tid: u32, args: Named },
    Span { name: &'static str, ph: char, pid: u32, tid: u32, ts: f64, dur: f64, args: Counts },
}

#[derive(Serialize)]
struct Named {
    name: &'static str,
}

#[derive(Serialize)]
struct Counts {
    step: usize,
    decode_rows: u32,
    prefill_rows: u32,
    prefill_tokens: u32,
}

/// Writes the steps of a run as a trace.
///
/// # Errors
/// The writer's.
pub fn write(steps: &[StepTiming], out: impl io::Write) -> io::Result<()> {
    let engines = steps.iter().map(|step| step.engine + 1).max().unwrap_or(1);
    let mut trace_events = Vec::new();
    for engine in 0..engines {
        let its: Vec<&StepTiming> = steps.iter().filter(|step| step.engine == engine).collect();
        trace_events.extend(tracks(1 + engine, &its));
    }
    serde_json::to_writer(out, &Trace { display_time_unit: "ms", trace_events }).map_err(io::Error::from)
}

/// The tracks of an engine.
fn tracks(pid: u32, steps: &[&StepTiming]) -> Vec<Entry> {
    let name = |name, tid, label| Entry::Name { name, ph: 'M', pid, tid, args: Named { name: label } };
    let mut entries = vec![
        name("process_name", 0, "minisgl"),
        name("thread_name", DEVICE_TRACK, "device"),
        name("thread_name", HOST_TRACK, "host"),
    ];
    let offset_us = device_clock_offset_us(steps);
    for (i, step) in steps.iter().enumerate() {
        let span = |name, tid, ts, dur| {
            let StepShape { decode_rows, prefill_rows, .. } = step.shape;
            let prefill_tokens = step.shape.prefill_tokens();
            let args = Counts { step: i, decode_rows, prefill_rows, prefill_tokens };
            Entry::Span { name, ph: 'X', pid, tid, ts, dur, args }
        };
        let name = match (step.shape.decode_rows, step.shape.prefill_rows) {
            (_, 0) => "decode",
            (0, _) => "prefill",
            _ => "mixed",
        };
        let start_us = step.start_ms * 1e3 + offset_us;
        entries.push(span(name, DEVICE_TRACK, start_us, f64::from(step.gpu_ms) * 1e3));
        let host_us = (step.host_start.as_secs_f64() * 1e6, step.host_time.as_secs_f64() * 1e6);
        entries.push(span("launch next, complete", HOST_TRACK, host_us.0, host_us.1));
    }
    entries
}

/// What the device's microseconds need to become the host's.
fn device_clock_offset_us(steps: &[&StepTiming]) -> f64 {
    let offset = |step: &&StepTiming| {
        let host_end_us = (step.host_start + step.host_time).as_secs_f64() * 1e6;
        host_end_us - (step.start_ms + f64::from(step.gpu_ms)) * 1e3
    };
    steps.iter().map(offset).min_by(f64::total_cmp).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::Value;

    use super::*;
    use crate::request::Load;

    fn step(shape: StepShape, start_ms: f64, gpu_ms: f32, host_start_us: u64, host_us: u64) -> StepTiming {
        let host_start = Duration::from_micros(host_start_us);
        let host_time = Duration::from_micros(host_us);
        StepTiming {
            engine: 0,
            shape,
            start_ms,
            gpu_ms,
            host_start,
            host_time,
            beside_work: None,
            load: Load::default(),
            output_tokens: 0,
        }
    }

    const MIXED: StepShape = StepShape { decode_rows: 3, prefill_rows: 1, tokens: 40, samples: 4 };

    fn spans(steps: &[StepTiming], track: u32) -> Vec<Value> {
        let mut text = Vec::new();
        write(steps, &mut text).unwrap();
        let trace: Value = serde_json::from_slice(&text).unwrap();
        let events = trace["traceEvents"].as_array().unwrap().clone();
        events.into_iter().filter(|event| event["ph"] == "X" && event["tid"] == track).collect()
    }

    #[test]
    fn steps_keep_their_device_times_and_end_no_later_than_the_host_saw_them_end() {
        // The device's clock runs 5 ms ahead; the host sees each end 10 or 20 microseconds late.
        let steps = [
            step(StepShape { decode_rows: 0, ..MIXED }, 5.0, 2.0, 100, 1920), // Ends at 2000 us, seen at 2020.
            step(StepShape::decode(3), 7.0, 1.0, 2020, 990), // Ends at 3000 us, seen at 3010.
            step(MIXED, 8.0, 1.0, 3000, 1020),
        ];
        let device = spans(&steps, DEVICE_TRACK);
        assert_eq!(device[0]["name"], "prefill");
        assert_eq!(device[1]["name"], "decode");
        assert_eq!(device[1]["args"]["decode_rows"], 3);
        assert_eq!(device[2]["name"], "mixed");
        assert_eq!(device[2]["args"]["prefill_tokens"], 37);
        let number = |value: &Value| value.as_f64().unwrap();
        let close = |a: f64, b: f64| (a - b).abs() < 1e-6;
        assert!(close(number(&device[1]["ts"]) - number(&device[0]["ts"]), 2000.0));
        assert!(close(number(&device[0]["dur"]), 2000.0));
        let host = spans(&steps, HOST_TRACK);
        let end = |span: &Value| number(&span["ts"]) + number(&span["dur"]);
        assert!(device.iter().zip(&host).all(|(device, host)| end(device) <= end(host) + 1e-6));
        assert!(close(end(&device[1]), end(&host[1])), "the step seen soonest ends just then");
    }

    #[test]
    fn a_run_without_steps_is_an_empty_trace() {
        assert!(spans(&[], DEVICE_TRACK).is_empty());
    }
}
