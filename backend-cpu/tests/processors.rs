//! The sampler against transformers' logits processors: the same logits, the same tokens, and tokens as often as they should come.

mod common;

use common::processors::{Case, DRAWS, upper_gamma};
use common::{Draw, Drawn, Random, bits, edit_and_draw};

/// The edited logits and the tokens of a case, drawn with each of the seeds.
fn draw(case: &Case, seeds: std::ops::Range<u64>) -> (Vec<f32>, Vec<u32>) {
    let rows = seeds.clone().map(|seed| {
        let (state, rules) = case.slot(seed);
        Drawn { tokens: case.tokens.clone(), draw: Draw { rules, ..state.into() } }
    });
    let rows: Vec<Drawn> = rows.collect();
    let logits = case.logits.repeat(rows.len());
    edit_and_draw(&mut Random(seeds.start), &rows, case.logits.len(), &logits)
}

#[test]
fn logits_are_edited_as_transformers_does_it_and_the_token_is_that_of_what_it_keeps() {
    for case in Case::all() {
        let (edited, tokens) = draw(&case, 0..128);
        for row in edited.chunks(case.logits.len()) {
            assert_eq!(bits(row), bits(&case.edited), "{}", case.name);
        }
        for (seed, token) in (0..).zip(tokens) {
            let scores = case.scores(seed);
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(scores[token as usize], largest, "{}, seed {seed}", case.name);
        }
    }
}

#[test]
fn tokens_come_as_often_as_what_transformers_keeps_says() {
    for case in Case::all() {
        let mut counts = vec![0; case.logits.len()];
        for seed in (0..DRAWS).step_by(512) {
            draw(&case, seed..seed + 512).1.into_iter().for_each(|token| counts[token as usize] += 1);
        }
        let likelihood = case.likelihood(&counts);
        assert!(likelihood > 0.001, "{}: {likelihood} for {counts:?}", case.name);
    }
}

#[test]
fn what_is_drawn_of_another_distribution_is_found_out() {
    let plain = Case::all().swap_remove(0);
    let mut counts = vec![0; plain.logits.len()];
    draw(&plain, 0..512).1.into_iter().for_each(|token| counts[token as usize] += 1);
    let mut flatter = Case::all().swap_remove(0);
    flatter.kept.iter_mut().for_each(|logit| *logit /= 1.5);
    assert!(plain.likelihood(&counts) > 0.001 && flatter.likelihood(&counts) < 0.001);
}

#[test]
fn the_likelihood_of_a_chi_square_is_that_of_the_tables() {
    // Critical values of the distribution, by degrees of freedom.
    for (freedom, square, p) in [
        (1, 3.841, 0.05),
        (1, 10.828, 0.001),
        (2, 5.991, 0.05),
        (5, 20.515, 0.001),
        (10, 18.307, 0.05),
        (63, 103.44, 0.001),
    ] {
        let got = upper_gamma(f64::from(freedom) / 2.0, square / 2.0);
        assert!((got / p - 1.0).abs() < 0.01, "{freedom} degrees, {square}: {got}, not {p}");
    }
}
