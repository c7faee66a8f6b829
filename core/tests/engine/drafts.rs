//! Drafts of the text itself.

use minisgl_core::config::Limits;
use minisgl_core::engine::EngineOptions;
use minisgl_core::sampling::SamplingParams;
use minisgl_core::scheduler::Settings;
use minisgl_core::speculation::Speculation;

use crate::support::expected::{self};
use crate::support::{SETTINGS, SMALL, engine, exactly, options, run_all};

/// Requests that repeat themselves, with and without log-probabilities, some of which end early.
fn repeating_requests() -> Vec<(Vec<u32>, SamplingParams)> {
    let request = |i: u32| {
        let prompt = (0..5 + 3 * i).map(|at| at % (2 + i)).collect();
        let seed = if i % 4 == 3 { i.into() } else { expected::REPEATING };
        (prompt, SamplingParams { seed, logprobs: i.is_multiple_of(2).then_some(1), ..exactly(20 + 2 * i) })
    };
    (0..6).map(request).collect()
}

#[test]
fn drafts_change_no_token_and_give_several_in_a_step() {
    for (overlap, pages, running) in
        [(true, 64, 4), (false, 64, 4), (true, 18, 4), (true, 64, 1), (true, 64, 2)]
    {
        let run = |speculation| {
            let limits = Limits { running, pages, ..SMALL };
            let scheduler = Settings { speculation, ..SETTINGS };
            let mut engine = engine(EngineOptions { overlap, scheduler, ..options(limits) });
            let outcomes = run_all(&mut engine, &repeating_requests());
            (outcomes, engine.stats())
        };
        let (expected, without) = run(Speculation::Never);
        let (outcomes, with) = run(Speculation::Always);
        assert_eq!(outcomes, expected);
        assert_eq!((without.drafted, without.accepted), (0, 0));
        match running {
            1 => assert_eq!(with.drafted, 0, "a step of one row has no room"),
            _ => assert!(0 < with.accepted && with.accepted < with.drafted, "{with:?}"),
        }
        if running == 2 {
            assert!(with.decode_steps < without.decode_steps, "{with:?} {without:?}");
        }
    }
}

#[test]
fn a_wrong_drafts_keys_do_not_reach_the_prefix_cache() {
    let scheduler = Settings { speculation: Speculation::Always, ..SETTINGS };
    let mut engine =
        engine(EngineOptions { scheduler, ..options(Limits { running: 4, page_size: 1, ..SMALL }) });
    for max_tokens in 1..24 {
        let params = SamplingParams { seed: expected::REPEATING, ..exactly(max_tokens) };
        let prompt = vec![0, 1, 0, 1, 0, 1];
        let first = run_all(&mut engine, &[(prompt.clone(), params)]).remove(0);
        // A prompt that the first one's output is part of finds its pages.
        let longer = [prompt, first.tokens, vec![5]].concat();
        let params = exactly(4);
        let outcome = run_all(&mut engine, &[(longer.clone(), params)]).remove(0);
        assert_eq!(outcome.tokens, expected::alone(&longer, &params, 64).0);
        assert!(outcome.finished.is_some_and(|(_, cached)| cached > 0));
    }
    assert!(engine.stats().accepted > 0 && engine.stats().drafted > engine.stats().accepted);
}
