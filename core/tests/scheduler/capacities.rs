//! Many requests, and long ones.

use std::sync::Arc;

use minisgl_core::batch::Batch;
use minisgl_core::config::{Limits, LimitsError};
use minisgl_core::constraint::Constraint;
use minisgl_core::costs::StepCosts;
use minisgl_core::embedding::Embed;
use minisgl_core::request::{Event, FinishReason, Request};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{PromptLogprobs, RowLogprobs, SamplingParams};
use minisgl_core::scheduler::{Scheduler, Settings};

use super::{LONG, run_dry, scheduler, scheduler_within, submit};
use crate::support::expected::{Allowed, allowed};
use crate::support::rule::Rule;
use crate::support::{SETTINGS, SMALL, exactly};

#[test]
fn thousands_of_requests_may_all_need_a_page_in_the_same_step() {
    let running = 5000;
    let (page_size, pages, prefill_tokens) = (16, 3 * running, 10 * running);
    let limits = Limits { running, queued: running, page_size, pages, prefill_tokens, ..SMALL };
    let settings = Settings { prefix_cache: false, ..SETTINGS };
    let mut scheduler =
        Scheduler::new(limits, settings, StepCosts::default(), &[], None).expect("host memory");
    // Those that find no room in the first step would be as far as the others when they enter in the second.
    for i in 0..running {
        submit(&mut scheduler, &[3; 10][..if i < 4096 { 9 } else { 10 }], 10);
    }
    let mut batch = Batch::new(&limits);
    while scheduler.schedule(&mut batch) {
        let tokens = vec![5; batch.samples() as usize];
        scheduler.complete(&batch, &tokens, &[], &mut |_| ());
    }
    assert_eq!(scheduler.stats().finished, u64::from(running));
}

#[test]
fn the_queue_takes_as_many_requests_as_may_wait_however_long_sequences_are() {
    // The pool holds far less than the longest sequence.
    let limits = Limits { queued: 3, sequence: 262_144, page_size: 16, pages: 8, ..SMALL };
    let mut scheduler = scheduler_within(limits);
    for text in 1..4 {
        submit(&mut scheduler, &[text; 100], 20);
    }
    run_dry(&mut scheduler, &limits);
    assert_eq!(scheduler.stats().finished, 3);
}

#[test]
fn long_requests_run_one_after_the_other_where_the_host_keeps_few_tokens_and_all_end() {
    let kept = LONG.token_blocks() * LONG.block_tokens();
    for (prompt, output) in [(16, 16_000), (9000, 2000)] {
        let settings = Settings { prefix_cache: false, ..SETTINGS };
        let mut scheduler =
            Scheduler::new(LONG, settings, StepCosts::default(), &[], Some(64)).expect("host memory");
        let (prompt, requests) = (vec![1; prompt], 40);
        assert!((prompt.len() + output as usize) * requests > kept as usize);
        let mut batch = Batch::new(&LONG);
        let (mut submitted, mut ended, mut steps) = (0, 0, 0);
        while ended < requests {
            while submitted < requests && scheduler.submit(Request::new(&prompt, exactly(output))).is_ok() {
                submitted += 1;
            }
            assert!(scheduler.schedule(&mut batch), "somebody can go on");
            let tokens = [3; 40];
            scheduler.complete(&batch, &tokens[..batch.samples() as usize], &[], &mut |event| {
                if let Event::Finished { reason, tokens, .. } = event {
                    assert_eq!((reason, tokens.len()), (FinishReason::Length, output as usize));
                    assert!(tokens.iter().all(|token| *token == 3));
                    ended += 1;
                }
            });
            if steps % 500 == 0 {
                scheduler.check();
            }
            steps += 1;
        }
        assert!(scheduler.is_idle());
        scheduler.check();
    }
}

#[test]
fn the_hosts_tables_of_many_long_sequences_are_megabytes() {
    let limits = Limits { running: 4096, queued: 1024, sequence: 262_144, pages: 65_536, ..LONG };
    let (bytes, masks) = (limits.host_bytes(151_936, 1024, 1), 2 * 4096 * 151_936 / 8);
    assert!((masks..300 << 20).contains(&bytes), "{bytes} bytes, half of them masks of two steps");
    assert!(limits.check().is_ok());
}

#[test]
fn capacities_whose_numbers_fit_32_bits_are_taken_to_the_last_one() {
    // A page beside those that there are is for rows that only pad a step.
    let (pages, last) = (|pages| Limits { page_size: 1, pages, ..SMALL }, u32::MAX - 2);
    assert_eq!(pages(last).check(), Ok(()));
    assert_eq!(pages(last + 1).check(), Err(LimitsError::TooLarge("number of pages")));
}

#[test]
fn a_copy_of_a_batch_is_what_it_is_a_copy_of() {
    let rules = Arc::new(Rules::new(vec![(1, 0.5)], vec![2], &[]).unwrap().allowing(vec![1, 2, 5]).unwrap());
    let allows_5 = |seed: u32, output: &[u32]| matches!(allowed(seed, output), Allowed::Mask(mask) if mask >> 5 & 1 == 1);
    let seed = (0..).find(|seed| allows_5(*seed, &[]) && allows_5(*seed, &[5])).unwrap();
    let constraint: Arc<dyn Constraint> = Arc::new(Rule::new(seed, 0));
    let mut scheduler = scheduler();
    let scored = PromptLogprobs { from: 1, top: 2 };
    for (params, rules, constraint) in [
        (SamplingParams { logprobs: Some(1), ..exactly(3) }, Some(&rules), None),
        (SamplingParams { prompt_logprobs: Some(scored), ..exactly(3) }, None, Some(&constraint)),
        (SamplingParams { embed: Some(Embed { dimensions: None }), ..exactly(0) }, None, None),
    ] {
        let request = Request { rules, constraint, ..Request::new(&[1, 2, 3], params) };
        scheduler.submit(request).expect("it can run");
    }
    let scores: [RowLogprobs; 2] = bytemuck::Zeroable::zeroed();
    let (mut batch, mut copy) = (Batch::new(&SMALL), Batch::new(&SMALL));
    for _ in 0..2 {
        assert!(scheduler.schedule(&mut batch));
        copy.copy_from(&batch);
        assert_eq!(format!("{copy:?}"), format!("{batch:?}"));
        scheduler.take_scores(&batch, &scores[..batch.scored().len()], &mut |_| ());
        scheduler.complete(&batch, &[5; 3][..batch.samples() as usize], &[], &mut |_| ());
    }
}
