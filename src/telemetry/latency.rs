//! Many latencies as a few numbers: percentiles and the shape of their distribution, in bounded memory.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longer latencies count as this long.
const LONGEST: Duration = Duration::from_hours(24);
/// Digits of a latency in microseconds that are kept: one in a thousand.
const DIGITS: u8 = 3;
/// Most bars of a distribution.
const BARS: usize = 48;
/// A bar is at least this much wider than nothing, so that bars are not finer than what is kept.
const RATIO_MIN: f64 = 1.005;

/// Latencies, counted in microseconds.
#[derive(Clone, Debug)]
pub struct Latencies {
    histogram: Histogram<u64>,
    sum_us: f64,
    longest_us: u64,
}

/// What is said of a set of latencies, in milliseconds. Percentiles are kept to one in a thousand.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LatencyReport {
    /// How many there were.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Half of them are at most this.
    pub p50: f64,
    /// Nine of ten are at most this.
    pub p90: f64,
    /// 99 of a hundred are at most this.
    pub p99: f64,
    /// The longest.
    pub max: f64,
    /// How they are distributed.
    pub distribution: Distribution,
}

/// Latencies counted between edges that lie a constant ratio apart: a logarithmic scale from the shortest to the longest.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Distribution {
    /// Milliseconds, one more than there are counts; empty where nothing was counted.
    pub edges: Vec<f64>,
    /// Latencies from an edge to the next.
    pub counts: Vec<u64>,
}

impl Default for Latencies {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST.as_micros() as u64, DIGITS);
        let histogram = histogram.expect("the bounds are in order and far enough apart");
        Latencies { histogram, sum_us: 0.0, longest_us: 0 }
    }
}

impl Latencies {
    /// Counts one; none is shorter than a microsecond.
    pub fn record(&mut self, latency: Duration) {
        let us = latency.min(LONGEST).as_micros().max(1) as u64;
        self.histogram.saturating_record(us);
        self.sum_us += us as f64;
        self.longest_us = self.longest_us.max(us);
    }

    /// Sums them up.
    pub fn report(&self) -> LatencyReport {
        let count = self.histogram.len();
        if count == 0 {
            return LatencyReport::default();
        }
        let ms = |us: u64| us as f64 / 1e3;
        // Of those that are not told apart, the least.
        let percentile =
            |share: f64| ms(self.histogram.lowest_equivalent(self.histogram.value_at_quantile(share)));
        LatencyReport {
            count,
            mean: (self.sum_us / count as f64).round() / 1e3,
            p50: percentile(0.5),
            p90: percentile(0.9),
            p99: percentile(0.99),
            max: ms(self.longest_us),
            distribution: self.distribution(),
        }
    }

    fn distribution(&self) -> Distribution {
        let least = self.histogram.min().max(1) as f64;
        let span = (self.longest_us as f64 / least).max(1.0).ln();
        let bars = ((span / RATIO_MIN.ln()) as usize).clamp(1, BARS);
        let edge = |i: usize| (least * (span * i as f64 / bars as f64).exp()).round() / 1e3;
        let mut counts = vec![0; bars];
        for value in self.histogram.iter_recorded() {
            let us = self.histogram.lowest_equivalent(value.value_iterated_to()) as f64;
            let place = (us / least).ln() / span * bars as f64;
            counts[(place as usize).min(bars - 1)] += value.count_at_value();
        }
        Distribution { edges: (0..=bars).map(edge).collect(), counts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latencies(ms: impl IntoIterator<Item = f64>) -> Latencies {
        let mut latencies = Latencies::default();
        ms.into_iter().for_each(|ms| latencies.record(Duration::from_secs_f64(ms / 1e3)));
        latencies
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-3 * b
    }

    #[test]
    fn a_percentile_is_the_least_latency_that_as_many_do_not_exceed() {
        let report = latencies((1..=100).rev().map(f64::from)).report();
        assert_eq!(report.count, 100);
        for (found, expected) in [
            (report.p50, 50.0),
            (report.p90, 90.0),
            (report.p99, 99.0),
            (report.max, 100.0),
            (report.mean, 50.5),
        ] {
            assert!(close(found, expected), "{found} for {expected}");
        }
        assert_eq!(latencies([]).report(), LatencyReport::default());
    }

    #[test]
    fn a_distribution_reaches_from_the_shortest_to_the_longest_and_counts_each_once() {
        let report = latencies((0..1000).map(|i| 2.0 * 1.01_f64.powi(i % 500))).report();
        let Distribution { edges, counts } = &report.distribution;
        assert_eq!((edges.len(), counts.len()), (BARS + 1, BARS));
        assert!(close(edges[0], 2.0) && close(edges[BARS], report.max), "{edges:?}");
        assert!(edges.is_sorted());
        assert_eq!(counts.iter().sum::<u64>(), 1000);
        assert!(counts.iter().all(|count| (10..40).contains(count)), "even on this scale: {counts:?}");
    }

    #[test]
    fn equal_latencies_are_one_bar() {
        let report = latencies([3.0; 7]).report();
        assert_eq!(report.distribution.counts, [7]);
        assert_eq!((report.p50, report.p99), (3.0, 3.0));
    }

    #[test]
    fn latencies_beyond_all_bounds_are_counted_at_them() {
        let mut latencies = latencies([0.0]);
        latencies.record(Duration::MAX);
        let report = latencies.report();
        assert_eq!(report.count, 2);
        assert!(close(report.max, LONGEST.as_secs_f64() * 1e3));
        assert_eq!(report.distribution.counts.iter().sum::<u64>(), 2);
    }
}
