//! Processor time: what watching a service takes here, and what serving takes there.

use std::fs;
use std::time::Duration;

use serde::Serialize;

/// Ticks a second in which Linux tells a process's time.
const TICKS: u64 = 100;

/// A client that is so busy may be what is measured.
const BUSY: f64 = 0.8;

/// What the client itself took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ClientCost {
    /// Microseconds of processor time an output token.
    pub us_per_token: f64,
    /// The share of the run that its thread computed.
    pub busy: f64,
}

impl ClientCost {
    /// Of a thread that has computed for so long of `elapsed`.
    pub fn new(computed: Duration, elapsed: Duration, tokens: u64) -> Self {
        ClientCost {
            us_per_token: computed.as_secs_f64() * 1e6 / tokens.max(1) as f64,
            busy: computed.as_secs_f64() / elapsed.as_secs_f64().max(1e-9),
        }
    }

    /// Is it so busy that it may hide the service's speed?
    pub fn is_busy(&self) -> bool {
        self.busy > BUSY
    }
}

/// How long this thread has computed; `None` where the system does not tell.
pub fn thread_time() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    stat.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// How long all threads of a process have computed; `None` where there is none, or the system does not tell.
pub fn process_time(process: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Behind the name, which may hold anything: fields 3 and on, of which 14 and 15 are times.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Duration::from_millis((ticks(14)? + ticks(15)?) * 1000 / TICKS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_what_was_computed_and_not_what_went_by() {
        let cost = ClientCost::new(Duration::from_millis(30), Duration::from_secs(1), 10_000);
        assert!((cost.us_per_token - 3.0).abs() < 1e-9 && (cost.busy - 0.03).abs() < 1e-9);
        assert!(!cost.is_busy() && ClientCost { busy: 0.9, ..cost }.is_busy());
    }

    #[test]
    fn a_process_that_is_there_has_a_time_and_one_that_is_not_has_none() {
        assert!(process_time(std::process::id()).is_some());
        assert_eq!(process_time(u32::MAX), None);
    }
}
