//! What is wrong with a kernel's result, in a sentence.

use half::bf16;

/// A complaint where pairs of `(got, wanted)` differ by more than `max` of the wanted ones' norm.
pub(crate) fn relative_error(pairs: impl Iterator<Item = (f64, f64)>, max: f64) -> Option<String> {
    let (wrong, all) = pairs.fold((0.0, 0.0), |(wrong, all), (got, wanted)| {
        (wrong + (got - wanted).powi(2), all + wanted * wanted)
    });
    let error = (wrong / all).sqrt();
    let fits = error <= max;
    (!fits).then(|| format!("the relative error is {error:.2e}, more than {max:.0e}"))
}

/// The first value that is further from the expected one than `relative` of it (and a little more near zero).
pub(crate) fn first_wrong(values: &[bf16], relative: f64, expected: impl Fn(usize) -> f64) -> Option<String> {
    values.iter().enumerate().find_map(|(i, value)| {
        let (value, expected) = (f64::from(value.to_f32()), expected(i));
        let close = (value - expected).abs() <= relative * expected.abs();
        (!close).then(|| format!("element {i} is {value}, not {expected}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_relative_to_the_norm_and_nan_is_one() {
        let wanted = [3.0, 4.0];
        let pairs = |off: f64| wanted.into_iter().map(move |value| (value + off, value));
        assert_eq!(relative_error(pairs(0.0), 0.01), None);
        assert_eq!(relative_error(pairs(0.03), 0.01), None);
        assert!(relative_error(pairs(0.04), 0.01).is_some());
        assert!(relative_error(pairs(f64::NAN), 0.01).is_some());
    }
}
