//! What happened when, in bounded memory, however long it took.
//!
//! ```text
//!   time     0     w     2w    3w    4w                   full: pairs become one, and the width doubles
//!   buckets  | 0   | 1   | 2   | 3   |      ──at(5w)──>   | 0+1       | 2+3       | 4+5       |
//! ```
//!
//! A bucket holds sums, so that adding two gives what one of twice the width would have held.
//!
//! Invariant: at most [`BUCKETS`] buckets, each [`Timeline::width_s`] seconds wide, the first beginning at 0.

use std::ops::AddAssign;

/// Most buckets of a timeline.
pub const BUCKETS: usize = 300;

/// Sums over equal spans of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline<T> {
    width_s: f64,
    buckets: Vec<T>,
}

impl<T: Copy + Default + AddAssign> Timeline<T> {
    /// An empty one, whose buckets are `width_s` seconds wide to begin with.
    pub fn new(width_s: f64) -> Self {
        Timeline { width_s, buckets: Vec::new() }
    }

    /// How wide a bucket is now, in seconds.
    pub fn width_s(&self) -> f64 {
        self.width_s
    }

    /// The buckets, from time 0 on.
    pub fn buckets(&self) -> &[T] {
        &self.buckets
    }

    /// The bucket that a moment lies in, in seconds from the start; moments before it lie in the first.
    pub fn at(&mut self, seconds: f64) -> &mut T {
        while seconds >= self.width_s * BUCKETS as f64 {
            self.halve();
        }
        let i = ((seconds / self.width_s) as usize).min(BUCKETS - 1);
        if self.buckets.len() <= i {
            self.buckets.resize(i + 1, T::default());
        }
        &mut self.buckets[i]
    }

    /// Deals out what lasted from one moment to another: `part` is told how many of its seconds a bucket has, and gives
    /// what the bucket gets.
    pub fn spread(&mut self, from_s: f64, to_s: f64, mut part: impl FnMut(f64) -> T) {
        let from_s = from_s.max(0.0);
        // Makes room first, so that the width stays while buckets are dealt to. What ends where a bucket begins is not in it.
        self.at(to_s.next_down());
        let (first, last) = ((from_s / self.width_s) as usize, self.buckets.len() - 1);
        for i in first.min(last)..=last {
            let (begin, end) = (i as f64 * self.width_s, (i + 1) as f64 * self.width_s);
            let seconds = to_s.min(end) - from_s.max(begin);
            if seconds > 0.0 {
                self.buckets[i] += part(seconds);
            }
        }
    }

    fn halve(&mut self) {
        for i in 0..self.buckets.len().div_ceil(2) {
            let mut sum = self.buckets[2 * i];
            if let Some(second) = self.buckets.get(2 * i + 1) {
                sum += *second;
            }
            self.buckets[i] = sum;
        }
        self.buckets.truncate(self.buckets.len().div_ceil(2));
        self.width_s *= 2.0;
    }
}

/// To the nearest thousandth: what more digits would say is noise, and they fill reports.
pub fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_timeline_halves_its_buckets_and_loses_nothing() {
        let mut timeline = Timeline::<u64>::new(1.0);
        for second in 0..BUCKETS as u64 {
            *timeline.at(second as f64) += 1;
        }
        assert_eq!((timeline.width_s(), timeline.buckets().len()), (1.0, BUCKETS));
        *timeline.at(BUCKETS as f64) += 1;
        assert_eq!((timeline.width_s(), timeline.buckets().len()), (2.0, BUCKETS / 2 + 1));
        assert!(timeline.buckets()[..BUCKETS / 2].iter().all(|count| *count == 2));
        assert_eq!(timeline.buckets()[BUCKETS / 2], 1);
    }

    #[test]
    fn a_month_takes_no_more_memory_than_a_minute() {
        let mut timeline = Timeline::new(0.01);
        (0..2_592_000).step_by(600).for_each(|second| *timeline.at(f64::from(second)) += 1_u64);
        assert!(timeline.buckets().len() <= BUCKETS);
        assert_eq!(timeline.buckets().iter().sum::<u64>(), 4320);
    }

    #[test]
    fn what_lasts_is_dealt_out_by_time() {
        let mut timeline = Timeline::new(1.0);
        timeline.spread(0.5, 3.25, |seconds| seconds);
        assert_eq!(timeline.buckets(), [0.5, 1.0, 1.0, 0.25]);
        timeline.spread(-7.0, 0.5, |seconds| seconds);
        assert_eq!(timeline.buckets()[0], 1.0, "nothing lies before the start");
    }

    proptest! {
        #[test]
        fn the_parts_add_up_to_the_whole(spans in prop::collection::vec((0.0..5000.0_f64, 0.0..900.0_f64), 1..50)) {
            let mut timeline = Timeline::new(0.25);
            for (from, length) in &spans {
                timeline.spread(*from, from + length, |seconds| seconds);
            }
            let (dealt, all) = (timeline.buckets().iter().sum::<f64>(), spans.iter().map(|span| span.1).sum::<f64>());
            prop_assert!((dealt - all).abs() < 1e-6 * (1.0 + all), "{} of {}", dealt, all);
            prop_assert!(timeline.buckets().len() <= BUCKETS);
        }
    }
}
