//! When prompts run, and how much of them.

use std::sync::Arc;

use minisgl_core::batch::{Batch, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::constraint::Constraint;
use minisgl_core::costs::StepCosts;
use minisgl_core::request::Request;
use minisgl_core::rules::Rules;
use minisgl_core::scheduler::Scheduler;

use super::{DEAR_PROMPTS, run_dry, scheduler, scheduler_within, submit};
use crate::support::expected::{Allowed, allowed};
use crate::support::rule::Rule;
use crate::support::{SETTINGS, SMALL, exactly};

#[test]
fn prompts_join_those_that_decode_and_a_long_one_goes_in_chunks() {
    // At most 16 tokens of prompts a step: 10 and 6 of 20, then the other 14 and 2 of 3, then the last one.
    let mut scheduler = scheduler();
    for (text, len) in [(1, 10), (2, 20), (3, 3)] {
        submit(&mut scheduler, &vec![text; len], 5);
    }
    let mut batch = Batch::new(&SMALL);
    let mut next = |scheduler: &mut Scheduler| {
        assert!(scheduler.schedule(&mut batch));
        let tokens = [5; 4];
        scheduler.complete(&batch, &tokens[..batch.rows().len()], &[], &mut |_| ());
        let rows = batch.rows().iter().map(|row| (row.position, row.tokens, row.sampled)).collect::<Vec<_>>();
        (batch.shape().decode_rows, rows)
    };
    assert_eq!(next(&mut scheduler), (0, vec![(0, 10, 1), (0, 6, 0)]));
    assert_eq!(next(&mut scheduler), (1, vec![(10, 1, 1), (6, 14, 1), (0, 2, 0)]));
    assert_eq!(next(&mut scheduler), (2, vec![(11, 1, 1), (20, 1, 1), (2, 1, 1)]));
    assert_eq!(next(&mut scheduler), (3, vec![(12, 1, 1), (21, 1, 1), (3, 1, 1)]));
}

#[test]
fn prompts_run_where_those_that_a_policy_has_decode_instead_wait_for_their_masks() {
    // The policy holds prompts back while others wait for places; but nobody can decode.
    let mut scheduler = Scheduler::new(SMALL, SETTINGS, DEAR_PROMPTS, &[], None).expect("host memory");
    scheduler.set_backlog(9);
    let constraint: Arc<dyn Constraint> = Arc::new(Rule::new(1, u32::MAX));
    let request = Request { constraint: Some(&constraint), ..Request::new(&[1, 2], exactly(3)) };
    scheduler.submit(request).expect("it can run");
    let mut batch = Batch::new(&SMALL);
    assert!(!scheduler.schedule(&mut batch) && scheduler.wait_for_mask());
    assert!(scheduler.schedule(&mut batch));
    let Allowed::Mask(mask) = allowed(1, &[]) else { panic!("something may come first") };
    scheduler.complete(&batch, &[mask.trailing_zeros()], &[], &mut |_| ());
    let prompt = submit(&mut scheduler, &[3], 2);
    assert!(scheduler.schedule(&mut batch));
    assert_eq!(batch.owners(), [prompt]);
}

#[test]
fn a_prompt_is_held_back_from_when_there_is_a_place_for_it() {
    // A row that stays empty costs 10 / 2 ms a step, and a step of prompts 80 ms by itself.
    let limits = Limits { running: 2, ..SMALL };
    for output in [20, 25, 31] {
        let mut scheduler = Scheduler::new(limits, SETTINGS, DEAR_PROMPTS, &[], None).expect("host memory");
        for (text, output) in [(1, output), (2, 60), (3, 5)] {
            submit(&mut scheduler, &[text], output);
        }
        scheduler.set_backlog(9);
        let (mut batch, mut held) = (Batch::new(&limits), 0);
        while scheduler.waiting() > 0 {
            assert!(scheduler.schedule(&mut batch));
            held += u32::from(batch.shape() == StepShape::decode(1));
            scheduler.complete(&batch, &[5; 2][..batch.samples() as usize], &[], &mut |_| ());
        }
        assert_eq!(held, 80 / 5, "behind an output of {output} tokens");
    }
}

#[test]
fn a_prompt_that_is_cut_is_run_to_its_end_before_another_one_begins() {
    let mut scheduler = scheduler();
    let [long, short] = [50, 3].map(|len| submit(&mut scheduler, &vec![1; len], 4));
    let seen = run_dry(&mut scheduler, &SMALL);
    let prefilling: Vec<_> = seen.iter().map(|step| step.prefilling.clone()).take(4).collect();
    assert_eq!(prefilling, [vec![long], vec![long], vec![long], vec![long, short]]);
}

/// Prompts of the first steps, where requests have these rules and nobody's tokens come in.
fn prompts_by_step<const STEPS: usize>(rules: &[Rules]) -> [u32; STEPS] {
    let mut scheduler = scheduler();
    for (text, rules) in (0..).zip(rules) {
        let (prompt, rules) = ([text], Arc::new(rules.clone()));
        let request = Request { rules: Some(&rules), ..Request::new(&prompt, exactly(4)) };
        scheduler.submit(request).expect("it can run");
    }
    let mut batch = Batch::new(&SMALL);
    std::array::from_fn(|_| {
        scheduler.schedule(&mut batch);
        batch.shape().prefill_rows
    })
}

#[test]
fn a_step_admits_as_many_requests_as_it_has_words_for_their_rules() {
    let small = Rules::new(vec![(1, 0.5)], vec![2, 3], &[]).unwrap();
    assert_eq!(prompts_by_step(&vec![small.clone(); 3]), [3, 0]);
    // Bad words of 1,000 words, and a step has RULE_WORDS = 3,328.
    let large = Rules::new(vec![], vec![2, 3], &vec![vec![1]; 499]).unwrap();
    assert_eq!(prompts_by_step(&[large.clone(), large.clone(), large.clone(), small]), [4, 0]);
    let biased = Rules::new((0..13).map(|id| (id, 0.5)).collect(), vec![], &vec![vec![1]; 511]).unwrap();
    assert_eq!(prompts_by_step(&vec![biased; 4]), [3, 1]);
}

#[test]
fn a_step_admits_as_many_requests_as_it_has_updates_for_the_pages_that_they_share() {
    let limits =
        Limits { running: 128, queued: 128, page_size: 1, pages: 8192, prefill_tokens: 256, ..SMALL };
    let mut scheduler = scheduler_within(limits);
    let prompt = [3; 60];
    submit(&mut scheduler, &prompt, 4);
    let (mut batch, mut entered) = (Batch::new(&limits), Vec::new());
    assert!(scheduler.schedule(&mut batch));
    for _ in 0..127 {
        submit(&mut scheduler, &prompt, 4);
    }
    while scheduler.waiting() > 0 {
        scheduler.complete(&batch, &[5; 128][..batch.samples() as usize], &[], &mut |_| ());
        assert!(scheduler.schedule(&mut batch));
        entered.push(batch.shape().prefill_rows as usize);
        scheduler.check();
    }
    assert_eq!(entered, [68, 59], "60 pages each, and 4,096 updates");
}

#[test]
fn what_is_read_of_the_cache_counts_as_context_within_the_window() {
    // A prompt of 3 and two tokens more: 1, 2, 3, and 4, 5.
    for (window, prefill, decode) in [(None, 6, 9), (Some(4), 6, 8), (Some(2), 5, 4)] {
        let mut scheduler =
            Scheduler::new(SMALL, SETTINGS, StepCosts::default(), &[], window).expect("host memory");
        submit(&mut scheduler, &[1, 2, 3], 3);
        run_dry(&mut scheduler, &SMALL);
        let stats = scheduler.stats();
        assert_eq!((stats.prefill_context, stats.decode_context), (prefill, decode), "{window:?}");
    }
}
