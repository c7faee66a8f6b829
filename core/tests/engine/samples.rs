//! Several samples of a prompt.

use minisgl_core::config::Limits;
use minisgl_core::engine::Engine;
use minisgl_core::local::Local;
use minisgl_core::policy::Policy;
use minisgl_core::request::{Request, SubmitError};
use minisgl_core::sampling::{PromptLogprobs, SamplingError, SamplingParams};
use minisgl_core::scheduler::Settings;
use minisgl_core::speculation::Speculation;

use super::{prompt, tokens};
use crate::support::expected::alone;
use crate::support::hashing::Hashing;
use crate::support::lazy::Lazy;
use crate::support::{Outcome, Outcomes, SMALL, engine, exactly, options, run_dry};

/// Submits `samples` of a prompt as a group, runs them dry, and gives their outcomes in their order.
fn run_group(
    engine: &mut Engine<Local<Lazy, Hashing>>,
    prompt: &[u32],
    params: SamplingParams,
    samples: u32,
) -> Vec<Outcome> {
    let of_sample = |sample| Request::new(prompt, params.of_sample(sample));
    let group: Vec<_> = (0..samples).map(of_sample).collect();
    let (mut tickets, mut outcomes) = (Vec::new(), Outcomes::default());
    engine.submit_group(&group, &mut |taken| tickets.push(taken.ticket)).expect("the group can run");
    run_dry(engine, &mut outcomes);
    tickets.into_iter().map(|ticket| outcomes.of(ticket)).collect()
}

/// What the samples of a prompt give alone.
fn samples_alone(prompt: &[u32], params: SamplingParams, samples: u32, limits: &Limits) -> Vec<Vec<u32>> {
    (0..samples).map(|sample| alone(prompt, &params.of_sample(sample), limits.sequence).0).collect()
}

#[test]
fn eight_samples_of_a_long_prompt_compute_it_once_and_hold_its_pages_once() {
    let limits = Limits {
        running: 8,
        queued: 8,
        sequence: 2048,
        prefill_tokens: 4096,
        page_size: 16,
        pages: 160,
        graph_rows: 8,
    };
    // The last page is not full, or is: then its last token is still drawn from.
    for (len, own) in [(2005, 5), (2000, 16)] {
        let (prompt, params) = (prompt(1, len), exactly(20));
        for (prefix_cache, policy, speculation) in [
            (true, Policy::Throughput, Speculation::Never),
            (false, Policy::Throughput, Speculation::Never),
            (false, Policy::Latency, Speculation::Never),
            (false, Policy::Throughput, Speculation::Always),
        ] {
            let mut options = options(limits);
            options.scheduler = Settings { prefix_cache, policy, speculation, ..options.scheduler };
            let mut engine = engine(options);
            let outcomes = run_group(&mut engine, &prompt, params, 8);
            let stats = engine.stats();
            assert_eq!(stats.prefill_tokens, u64::from(len + 7 * own), "the prompt once, and 7 last pages");
            let (shared, each) = ((len - own) / 16, (own + 20).div_ceil(16));
            assert_eq!(stats.pages_peak, shared + 8 * each, "the prompt's full pages are held once");
            assert_eq!(stats.retractions, 0);
            assert_eq!(tokens(outcomes), samples_alone(&prompt, params, 8, &limits));
        }
    }
}

#[test]
fn samples_that_find_no_place_together_enter_one_behind_the_other_and_still_compute_the_prompt_once() {
    // Two run at once, the prompt goes in chunks, and nobody is left of the group when the last ones enter.
    let limits = Limits { running: 2, ..SMALL };
    let (prompt, params) = (prompt(3, 34), exactly(4));
    for prefix_cache in [true, false] {
        let mut options = options(limits);
        options.scheduler.prefix_cache = prefix_cache;
        let mut engine = engine(options);
        let outcomes = run_group(&mut engine, &prompt, params, 7);
        assert_eq!(tokens(outcomes), samples_alone(&prompt, params, 7, &limits));
        assert_eq!(engine.stats().prefill_tokens, 34 + 6 * 2);
        // Without a prefix cache nothing is kept beyond the group.
        let again = run_group(&mut engine, &prompt, params, 2);
        let cached = if prefix_cache { 32 } else { 0 };
        assert_eq!(again[0].finished.map(|(_, cached)| cached), Some(cached));
        assert_eq!(again[1].finished.map(|(_, cached)| cached), Some(32));
    }
}

#[test]
fn retracted_samples_give_the_same_tokens_and_their_prompt_is_scored_once() {
    // Six of 7 pages each, and of 3 their own; 17 pages for all.
    let limits = Limits { running: 6, pages: 17, ..SMALL };
    let prompt_logprobs = Some(PromptLogprobs { from: 0, top: 0 });
    let (prompt, params) = (prompt(2, 16), SamplingParams { prompt_logprobs, ..exactly(12) });
    for (overlap, prefix_cache) in [(true, true), (true, false), (false, false)] {
        let mut options = options(limits);
        (options.overlap, options.scheduler.prefix_cache) = (overlap, prefix_cache);
        let mut engine = engine(options);
        let outcomes = run_group(&mut engine, &prompt, params, 6);
        let scores: Vec<usize> = outcomes.iter().map(|outcome| outcome.scores.len()).collect();
        assert_eq!(scores, [15, 0, 0, 0, 0, 0]);
        assert_eq!(tokens(outcomes), samples_alone(&prompt, params, 6, &limits));
        assert!(engine.stats().retractions > 0, "the pool is too small for all of them");
    }
}

#[test]
fn a_group_is_taken_in_wholly_or_not_at_all() {
    let mut engine = engine(options(SMALL));
    let (prompt, mut taken) = (prompt(1, 8), 0);
    let mut group: Vec<_> =
        (0..16).map(|sample| Request::new(&prompt, exactly(2).of_sample(sample))).collect();
    engine.submit_group(&group[..9], &mut |_| taken += 1).unwrap();
    let full = Err(SubmitError::QueueFull { capacity: 16 });
    assert_eq!(engine.submit_group(&group[..8], &mut |_| taken += 1), full);
    let too_many = SubmitError::TooManySamples { samples: 17, limit: 16 };
    let more = [&group[..], &group[..1]].concat();
    assert_eq!(engine.submit_group(&more, &mut |_| taken += 1), Err(too_many));
    group[6].params.top_p = f32::NAN;
    let refused = engine.submit_group(&group[..7], &mut |_| taken += 1);
    assert!(matches!(refused, Err(SubmitError::Sampling(SamplingError::TopP(_)))));
    assert_eq!(taken, 9);
    run_dry(&mut engine, &mut Outcomes::default());
    assert_eq!(engine.stats().finished, 9);
}
