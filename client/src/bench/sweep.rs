//! The highest rate at which a service keeps its goals.
//!
//! ```text
//!   low ─ keeps ─┬──────────────┬── middle ──┬─ fails ─ high      the middle by ratio, until both are close
//! ```

/// Rates this close together are not told apart.
const CLOSE: f64 = 1.05;

/// What a search found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Highest {
    /// Not even the lowest rate keeps the goals.
    Below(f64),
    /// Kept at this rate; at one a twentieth higher, at most, they are not.
    At(f64),
    /// Kept at the highest rate that was to be tried.
    AtLeast(f64),
}

/// Searches between two rates; `keeps` says whether the goals hold at one.
///
/// # Errors
/// Those of `keeps`.
pub fn highest<E>(
    (low, high): (f64, f64),
    mut keeps: impl FnMut(f64) -> Result<bool, E>,
) -> Result<Highest, E> {
    if !keeps(low)? {
        return Ok(Highest::Below(low));
    }
    if low >= high {
        return Ok(Highest::AtLeast(low));
    }
    if keeps(high)? {
        return Ok(Highest::AtLeast(high));
    }
    let (mut kept, mut failed) = (low, high);
    while failed / kept > CLOSE {
        let middle = (kept * failed).sqrt();
        match keeps(middle)? {
            true => kept = middle,
            false => failed = middle,
        }
    }
    Ok(Highest::At(kept))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn search(range: (f64, f64), limit: f64) -> (Highest, usize) {
        let mut tried = 0;
        let found = highest(range, |rate| {
            tried += 1;
            Ok::<bool, Infallible>(rate <= limit)
        });
        (found.unwrap_or(Highest::Below(0.0)), tried)
    }

    #[test]
    fn the_rate_found_keeps_the_goals_and_one_a_twentieth_higher_does_not() {
        for limit in [1.0, 3.0, 17.3, 63.0] {
            let (found, tried) = search((1.0, 64.0), limit);
            let Highest::At(rate) = found else { panic!("{found:?}") };
            assert!(rate <= limit && limit < rate * 1.05, "{rate} for {limit}");
            assert!(tried <= 9, "{tried} runs");
        }
    }

    #[test]
    fn a_range_that_has_no_such_rate_is_told() {
        assert_eq!(search((2.0, 64.0), 1.0).0, Highest::Below(2.0));
        assert_eq!(search((2.0, 64.0), 64.0).0, Highest::AtLeast(64.0));
        assert_eq!(search((2.0, 2.0), 2.0).0, Highest::AtLeast(2.0));
        let error = highest((1.0, 2.0), |rate| if rate > 1.0 { Err("gone") } else { Ok(true) });
        assert_eq!(error, Err("gone"));
    }
}
