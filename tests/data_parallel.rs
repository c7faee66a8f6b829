//! Several engines behind one queue, on the CPU, through the public API: what one engine gives.

mod common;

use common::{family, greedy_request, mixed_requests};
use minisgl::{Completion, GenerateRequest, Order, Stats};

fn run(engines: usize, order: Order, requests: &[GenerateRequest]) -> (Vec<Completion>, Stats) {
    let mut llm = family("tiny-tied").data_parallel(engines).max_running(4).order(order).build().unwrap();
    assert_eq!((llm.info().engines, llm.info().running()), (engines, 4 * engines));
    let completions = llm.generate(requests).unwrap();
    llm.check();
    let stats = llm.stats();
    (completions, stats)
}

#[test]
fn several_engines_give_what_one_gives() {
    let requests = mixed_requests(30, 300);
    let (expected, one) = run(1, Order::Given, &requests);
    for engines in [2, 3] {
        for order in [Order::Given, Order::Prefix] {
            let (completions, all) = run(engines, order, &requests);
            for (completion, expected) in completions.iter().zip(&expected) {
                let cached_tokens = completion.cached_tokens; // Which engine ran what is chance.
                assert_eq!(
                    *completion,
                    Completion { cached_tokens, ..expected.clone() },
                    "{engines} {order:?}"
                );
            }
            assert_eq!((all.finished, all.output_tokens), (one.finished, one.output_tokens));
        }
    }
}

#[test]
fn requests_beyond_what_the_engines_queues_hold_wait_for_them() {
    let requests: Vec<_> = (0..80).map(|i| greedy_request(&[i % 7, i], 1 + i % 5)).collect();
    // An engine that sorts its queue takes all that this holds, and gives back what is beyond.
    let (completions, stats) = run(2, Order::Prefix, &requests);
    for (i, completion) in (0..).zip(&completions) {
        assert_eq!((completion.token_ids.len() as u32, &completion.error), (1 + i % 5, &None));
    }
    assert_eq!((completions.len(), stats.finished), (80, 80));
}

#[test]
fn a_callers_counters_and_cache_are_those_of_all_engines() {
    let mut llm = family("tiny-tied").data_parallel(2).max_running(4).build().unwrap();
    let requests = mixed_requests(12, 300);
    let ran =
        |completions: Vec<Completion>| completions.iter().filter(|one| one.error.is_none()).count() as u64;
    let finished = ran(llm.generate(&requests).unwrap());
    assert!(llm.stats().finished == finished && finished > 4);
    llm.reset_stats();
    assert_eq!(llm.stats(), Stats::default());
    llm.clear_prefix_cache();
    assert_eq!(ran(llm.generate(&requests).unwrap()), finished);
    assert_eq!(llm.stats().finished, finished);
    assert!(llm.ceilings().unwrap().is_none(), "the CPU has none");
}
