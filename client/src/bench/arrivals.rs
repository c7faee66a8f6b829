//! When requests are due.
//!
//! ```text
//!   closed loop    so many at once: the next is due when one ends
//!   Poisson        gaps drawn from an exponential distribution; nobody waits for anybody
//!   timed          as a trace says, stretched by a factor
//! ```

use std::fmt;
use std::time::Duration;

use rand_core::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

use super::prompt::Request;

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// So many at once.
    Closed(usize),
    /// So many a second, on average.
    Poisson(f64),
    /// At their own times, multiplied by this.
    Timed(f64),
}

/// What is due when.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// The next when fewer than so many are open.
    Closed(usize),
    /// Each at its time from the start, in order.
    At(Vec<Duration>),
}

impl Arrivals {
    /// What is due when; the first request at once.
    pub fn schedule(self, requests: &[Request], seed: u64) -> Schedule {
        match self {
            Arrivals::Closed(open) => Schedule::Closed(open),
            Arrivals::Poisson(rate) => {
                let mut generator = Pcg64Mcg::seed_from_u64(seed);
                let mut at = 0.0;
                let mut next = || {
                    let now = at;
                    // Uniform in (0, 1]: 53 bits and one.
                    let uniform = ((generator.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
                    at -= uniform.ln() / rate;
                    Duration::try_from_secs_f64(now).unwrap_or(Duration::MAX)
                };
                Schedule::At(requests.iter().map(|_| next()).collect())
            }
            Arrivals::Timed(scale) => {
                let at = |request: &Request| {
                    let seconds = request.at.unwrap_or_default().as_secs_f64() * scale;
                    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
                };
                Schedule::At(requests.iter().map(at).collect())
            }
        }
    }
}

impl fmt::Display for Arrivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arrivals::Closed(open) => write!(f, "{open} at once"),
            Arrivals::Poisson(rate) => write!(f, "{rate:.3} a second (Poisson)"),
            Arrivals::Timed(scale) => write!(f, "at the trace's times, times {scale}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::prompt::Prompt;
    use super::*;

    fn requests(count: usize) -> Vec<Request> {
        let request = |i| Request {
            at: Some(Duration::from_secs(i)),
            prompt: Prompt::Tokens(vec![1]),
            output_tokens: 1,
        };
        (0..count as u64).map(request).collect()
    }

    fn times(arrivals: Arrivals, count: usize, seed: u64) -> Vec<f64> {
        match arrivals.schedule(&requests(count), seed) {
            Schedule::At(times) => times.iter().map(Duration::as_secs_f64).collect(),
            Schedule::Closed(_) => panic!("no times"),
        }
    }

    /// The mean of n gaps of an exponential distribution has a standard deviation of 1/sqrt(n) of it, the share of gaps
    /// longer than the mean one of sqrt(p (1 - p) / n), p being 1/e.
    #[test]
    fn poissons_gaps_are_exponentially_distributed() {
        let times = times(Arrivals::Poisson(50.0), 10_001, 3);
        assert!(times[0] == 0.0 && times.is_sorted());
        assert!((times[10_000] / 10_000.0 * 50.0 - 1.0).abs() < 0.04, "{}", times[10_000]);
        let long = times.windows(2).filter(|pair| pair[1] - pair[0] > 0.02).count();
        assert!((long as f64 / 10_000.0 - 0.3679).abs() < 0.02, "{long}");
    }

    #[test]
    fn a_seed_gives_the_same_times_again_and_another_seed_gives_others() {
        let of = |seed| times(Arrivals::Poisson(1.0), 5, seed);
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn a_traces_times_are_stretched() {
        assert_eq!(times(Arrivals::Timed(0.5), 4, 0), [0.0, 0.5, 1.0, 1.5]);
        assert_eq!(Arrivals::Closed(3).schedule(&requests(9), 0), Schedule::Closed(3));
    }
}
