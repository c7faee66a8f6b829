//! Many numbers as a few: percentiles of times, median and spread of runs.

use serde::Serialize;

/// The middle and the tail of a set of times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half of them are at most this.
    pub p50: f64,
    /// 99 of a hundred are at most this.
    pub p99: f64,
}

impl Percentiles {
    /// Of these times; zeros if there are none. Their order is lost.
    pub fn of(times: &mut [f64]) -> Self {
        times.sort_unstable_by(f64::total_cmp);
        let rank = |share: f64| {
            let i = (share * times.len() as f64).ceil() as usize;
            times.get(i.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Percentiles { p50: rank(0.5), p99: rank(0.99) }
    }
}

/// The middle of several runs, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// Of these values; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Spread { median: (low + high) / 2.0, min, max })
    }

    /// From the least to the greatest, as a share of the median.
    pub fn width(&self) -> f64 {
        (self.max - self.min) / self.median
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_least_value_that_as_many_do_not_exceed() {
        let mut hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(Percentiles::of(&mut hundred), Percentiles { p50: 50.0, p99: 99.0 });
        assert_eq!(Percentiles::of(&mut [3.0, 1.0, 2.0]), Percentiles { p50: 2.0, p99: 3.0 });
        assert_eq!(Percentiles::of(&mut [7.0]), Percentiles { p50: 7.0, p99: 7.0 });
        assert_eq!(Percentiles::of(&mut []), Percentiles::default());
    }

    #[test]
    fn the_median_is_the_middle_run_and_the_spread_reaches_from_least_to_greatest() {
        let three = Spread::of(&[12.0, 8.0, 10.0]).unwrap();
        assert_eq!(three, Spread { median: 10.0, min: 8.0, max: 12.0 });
        assert_eq!(three.width(), 0.4);
        assert_eq!(Spread::of(&[1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(Spread::of(&[]), None);
    }
}
