//! The cases: small operations, products, experts, attention, whole decode steps.

mod attention;
mod decode;
mod experts;
mod products;
mod small;

use crate::case::{Case, Filter};

/// The cases that a filter takes, small ones first.
pub fn cases(filter: &Filter) -> Vec<Case> {
    let mut cases = small::cases(filter);
    cases.extend(products::cases(filter));
    cases.extend(experts::cases(filter));
    cases.extend(attention::cases(filter));
    cases.extend(decode::cases(filter));
    cases.retain(|case| filter.takes(case));
    cases
}

/// Tokens that decode rows see beside a prompt's.
const BESIDE_PROMPT: u32 = 1024;

/// `(rows, tokens, behind)` of steps of decode rows and a prompt's tokens behind a context, where they are asked for by name.
fn mixed(filter: &Filter) -> Vec<(u32, u32, u32)> {
    let asked = filter.words.iter().any(|word| word.contains("mixed"));
    let rows = if asked { filter.rows_or(&[64]) } else { Vec::new() };
    let mut steps = Vec::new();
    for rows in rows {
        for tokens in filter.tokens() {
            steps.extend(filter.contexts().into_iter().map(|behind| (rows, tokens, behind)));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_takes_the_cases_that_hold_all_its_words() {
        let filter =
            Filter { words: vec!["gemm_".into(), "model=14b".into()], rows: vec![3], ..Filter::default() };
        let cases = cases(&filter);
        assert!(!cases.is_empty());
        assert!(
            cases.iter().all(|case| case.family.starts_with("gemm_") && case.shape.contains("model=14b"))
        );
        assert!(cases.iter().any(|case| case.shape.contains("tokens=3 ")));
    }

    #[test]
    fn mixed_steps_are_there_where_they_are_asked_for() {
        let filter = |word: &str| Filter {
            words: vec![word.into(), "model=0.6b".into(), "behind=4096".into()],
            rows: vec![64],
            tokens: vec![100],
            ..Filter::default()
        };
        assert_eq!(cases(&filter("mixed_step")).len(), 1);
        assert_eq!(cases(&filter("attention_mixed")).len(), 2, "with a window too");
        assert!(cases(&filter("rows=64 context=1024")).is_empty());
    }

    #[test]
    fn windows_and_biases_have_cases_of_their_own_and_a_window_bounds_what_is_read() {
        let of = |words: &[&str], model: &str| {
            let words = words.iter().map(|word| (*word).to_owned()).collect();
            cases(&Filter { words, model: Some(model.parse().unwrap()), ..Filter::default() })
        };
        let plain = "heads=16";
        assert!(!of(&["attention_decode", "window=1024"], plain).is_empty());
        assert!(!of(&["attention_prefill", "window=1024"], plain).is_empty());
        assert!(!of(&["gemm_qkv", "bias"], plain).is_empty());
        let bytes = |model: &str| of(&["attention_decode", "rows=8 context=4096"], model)[0].bytes;
        assert!((0.24..0.26).contains(&(bytes("window=1024") / bytes(plain))));
        assert!(of(&["attention_"], "window=100").iter().all(|case| case.shape.contains("window=100")));
    }
}
