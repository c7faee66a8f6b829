//! The time of a call on the device's own clock.
//!
//! ```text
//!   warm call | e0 [calls of repetition 0] e1 [calls of repetition 1] e2 …        time per call = (e(i+1) - e(i)) / calls
//! ```
//!
//! The calls of a repetition are one graph (or, without, plain launches); all repetitions are enqueued before the first
//! ends, so that the host is never in the measurement. Each call is told its number, so that it can use other buffers
//! than the calls before it: what it reads is then not in the L2 cache ("cold"), as in a model, where a step's weights
//! and keys pass through the cache before they are read again.

use minisgl_core::backend::Device;
use minisgl_cuda::{Cuda, CudaError, Launcher};

/// How to time.
#[derive(Clone, Copy, Debug)]
pub struct PerfOptions {
    /// Time on a stream of its own; else on the device's compute stream.
    pub init_stream: bool,
    /// Measurements.
    pub repetitions: u32,
    /// Calls that are recorded as one graph and replayed in each measurement; 0 times one plain launch in each.
    pub graph_repetitions: u32,
}

impl Default for PerfOptions {
    fn default() -> Self {
        PerfOptions { init_stream: true, repetitions: 10, graph_repetitions: 10 }
    }
}

/// Milliseconds per call, over the measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// The mean.
    pub mean_ms: f64,
    /// The standard deviation.
    pub spread_ms: f64,
    /// The quickest measurement.
    pub least_ms: f64,
}

impl Timing {
    fn of(samples: &[f64]) -> Timing {
        let count = samples.len().max(1) as f64;
        let mean_ms = samples.iter().sum::<f64>() / count;
        let variance = samples.iter().map(|ms| (ms - mean_ms).powi(2)).sum::<f64>() / count;
        let least_ms = samples.iter().copied().fold(f64::INFINITY, f64::min);
        Timing { mean_ms, spread_ms: variance.sqrt(), least_ms }
    }
}

/// Times `launch`, which enqueues one call on the launcher it is given; its second argument counts the calls.
///
/// # Errors
/// Those of the launches, and of the device.
pub fn perf_cuda(
    cuda: &mut Cuda,
    options: &PerfOptions,
    mut launch: impl FnMut(&Launcher, usize) -> Result<(), CudaError>,
) -> Result<Timing, CudaError> {
    // Whatever the caller enqueued to set its buffers up is done before another stream reads them.
    cuda.synchronize()?;
    let own;
    let launcher = if options.init_stream {
        own = cuda.another_launcher()?;
        &own
    } else {
        cuda.launcher()
    };
    let mut call = 0;
    let mut next = |launcher: &Launcher| {
        call += 1;
        launch(launcher, call - 1)
    };
    next(launcher)?;
    launcher.synchronize()?;
    if options.graph_repetitions == 0 {
        return measure(launcher, options.repetitions, 1, || next(launcher));
    }
    launcher.begin_capture()?;
    let recorded = (0..options.graph_repetitions).try_for_each(|_| next(launcher));
    let graph = launcher.end_capture();
    recorded?;
    let graph = graph?;
    launcher.replay(&graph)?;
    measure(launcher, options.repetitions, options.graph_repetitions, || launcher.replay(&graph))
}

/// Times `enqueue`, which enqueues `calls` calls, `repetitions` times.
pub(crate) fn measure(
    launcher: &Launcher,
    repetitions: u32,
    calls: u32,
    mut enqueue: impl FnMut() -> Result<(), CudaError>,
) -> Result<Timing, CudaError> {
    let events = (0..=repetitions).map(|_| launcher.event()).collect::<Result<Vec<_>, _>>()?;
    for (i, event) in events.iter().enumerate() {
        if i > 0 {
            enqueue()?;
        }
        launcher.record(event)?;
    }
    launcher.synchronize()?;
    let samples = events
        .windows(2)
        .map(|pair| Ok(f64::from(launcher.ms_between(&pair[0], &pair[1])?) / f64::from(calls)))
        .collect::<Result<Vec<_>, CudaError>>()?;
    Ok(Timing::of(&samples))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timing_gives_mean_spread_and_least() {
        let timing = Timing::of(&[1.0, 3.0]);
        assert_eq!(timing, Timing { mean_ms: 2.0, spread_ms: 1.0, least_ms: 1.0 });
    }
}
