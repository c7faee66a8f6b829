//! How requests end within a step.

use std::sync::Arc;

use minisgl_core::batch::Batch;
use minisgl_core::constraint::Constraint;
use minisgl_core::costs::StepCosts;
use minisgl_core::request::{Event, FinishReason, Request};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{NO_TOKEN, SamplingParams};
use minisgl_core::scheduler::Scheduler;

use super::{ends, scheduler, submit};
use crate::support::expected::{Allowed, EOS, VOCAB, allowed};
use crate::support::rule::Rule;
use crate::support::{SETTINGS, SMALL, exactly};

#[test]
fn a_request_may_be_aborted_between_the_scheduling_of_a_step_and_its_completion() {
    // A prompt of 4 fills a page; each further step may fill the next with a token that the host does not know yet.
    for steps_before in 1..10 {
        let mut scheduler = scheduler();
        let ticket = submit(&mut scheduler, &[1, 2, 3, 4], 30);
        let mut batches = [Batch::new(&SMALL), Batch::new(&SMALL)];
        for step in 0..steps_before {
            assert!(scheduler.schedule(&mut batches[step % 2]));
            if let Some(before) = step.checked_sub(1) {
                scheduler.complete(&batches[before % 2], &[5], &[], &mut |_| ());
            }
        }
        assert!(scheduler.schedule(&mut batches[steps_before % 2]));
        let mut reasons = Vec::new();
        assert!(scheduler.abort(ticket, &mut ends(&mut reasons)));
        scheduler.check();
        scheduler.complete(&batches[(steps_before - 1) % 2], &[5], &[], &mut ends(&mut reasons));
        scheduler.complete(&batches[steps_before % 2], &[5], &[], &mut ends(&mut reasons));
        scheduler.check();
        assert_eq!(reasons, [FinishReason::Abort]);
        assert!(scheduler.is_idle());
    }
}

#[test]
fn a_request_whose_logits_are_no_numbers_ends_alone() {
    let mut scheduler = scheduler();
    let tickets = [1, 2, 3].map(|text| submit(&mut scheduler, &[text, 1], 2));
    let mut batches = [Batch::new(&SMALL), Batch::new(&SMALL)];
    assert!(scheduler.schedule(&mut batches[0]));
    assert!(
        scheduler.schedule(&mut batches[1]),
        "the next step is on its way when the first one's tokens come"
    );
    let mut events = Vec::new();
    let mut sink = |event: Event<'_>| match event {
        Event::Token { ticket, token, .. } => events.push((ticket, Ok(token))),
        Event::Finished { ticket, reason, .. } => events.push((ticket, Err(reason))),
        Event::PromptLogprobs { .. } | Event::Embedding { .. } => {}
    };
    scheduler.complete(&batches[0], &[5, NO_TOKEN, 5], &[], &mut sink);
    scheduler.check();
    scheduler.complete(&batches[1], &[6, 0, 6], &[], &mut sink);
    scheduler.check();
    let of = |ticket| -> Vec<_> { events.iter().filter(|it| it.0 == ticket).map(|it| it.1).collect() };
    assert_eq!(of(tickets[1]), [Err(FinishReason::NotNumbers)]);
    for other in [tickets[0], tickets[2]] {
        assert_eq!(of(other), [Ok(5), Ok(6), Err(FinishReason::Length)]);
    }
    assert!(scheduler.is_idle());
}

/// How a request ends for which no token was drawn behind this output. It stops at token 5; no token allowed is all of them.
fn end_without_a_token(
    output: &[u32],
    min_tokens: u32,
    bad_words: &[Vec<u32>],
    allowed: &[u32],
    rule: Option<u32>,
) -> FinishReason {
    let rules = Rules::new(vec![], vec![5], bad_words).unwrap();
    let rules = Arc::new(if allowed.is_empty() { rules } else { rules.allowing(allowed.to_vec()).unwrap() });
    let constraint = rule.map(|seed| -> Arc<dyn Constraint> { Arc::new(Rule::new(seed, 0)) });
    let params = SamplingParams { min_tokens, ignore_eos: false, ..exactly(6) };
    let mut scheduler =
        Scheduler::new(SMALL, SETTINGS, StepCosts::default(), &[EOS], None).expect("host memory");
    let (rules, constraint) = (Some(&rules), constraint.as_ref());
    scheduler.submit(Request { rules, constraint, ..Request::new(&[1, 2], params) }).expect("it can run");
    let (mut batch, mut reasons) = (Batch::new(&SMALL), Vec::new());
    for token in output.iter().chain(&[NO_TOKEN]) {
        assert!(scheduler.schedule(&mut batch));
        scheduler.complete(&batch, &[*token], &[], &mut ends(&mut reasons));
    }
    scheduler.check();
    reasons[0]
}

#[test]
fn where_rules_forbid_all_tokens_that_is_the_reason_and_else_the_logits_are() {
    let (none, numbers) = (FinishReason::NoTokenLeft, FinishReason::NotNumbers);
    let ends = |output: &[u32], min_tokens, bad: &[&[u32]], allowed: &[u32]| {
        let bad: Vec<_> = bad.iter().map(|word| word.to_vec()).collect();
        end_without_a_token(output, min_tokens, &bad, allowed, None)
    };
    assert_eq!(ends(&[], 0, &[], &[3]), numbers);
    assert_eq!(ends(&[], 0, &[], &[VOCAB - 1]), numbers);
    // A bad word of one token, and of all that are allowed or of some.
    assert_eq!(ends(&[], 0, &[&[3]], &[3]), none);
    assert_eq!(ends(&[], 0, &[&[3]], &[3, 4]), numbers);
    assert_eq!(ends(&[], 0, &[&[3], &[4]], &[3, 4]), none);
    // One of several tokens, once the output, and not the prompt, ends with those before its last.
    assert_eq!(ends(&[4, 6], 0, &[&[4, 6, 3]], &[3, 4, 6]), numbers);
    assert_eq!(ends(&[4, 6], 0, &[&[4, 6, 3], &[4], &[6]], &[3, 4, 6]), none);
    assert_eq!(ends(&[6], 0, &[&[4, 6, 3], &[4], &[6]], &[3, 4, 6]), numbers);
    assert_eq!(ends(&[], 0, &[&[1, 2, 3], &[4]], &[3, 4]), numbers);
    // What would end an output that is too short: a stop token, the model's own.
    assert_eq!(ends(&[], 1, &[], &[5, EOS]), none);
    assert_eq!(ends(&[3], 2, &[&[3]], &[3, 5, EOS]), none);
    assert_eq!(ends(&[3], 1, &[&[3]], &[3, 5, EOS]), numbers);
    assert_eq!(ends(&[], 1, &[], &[3]), numbers);
    // All of the vocabulary, and nothing said of any.
    assert_eq!(ends(&[], 0, &[], &[]), numbers);
    let all: Vec<Vec<u32>> = (0..VOCAB).map(|id| vec![id]).collect();
    assert_eq!(end_without_a_token(&[], 0, &all, &[], None), none);
    // A constraint's mask, and what is left of it.
    let Allowed::Mask(mask) = allowed(1, &[]) else { panic!("something may come first") };
    let (inside, outside): (Vec<u32>, Vec<u32>) = (0..VOCAB).partition(|id| mask >> id & 1 == 1);
    assert_eq!(end_without_a_token(&[], 0, &[], &[], Some(1)), numbers);
    assert_eq!(end_without_a_token(&[], 0, &[], &outside, Some(1)), none);
    assert_eq!(end_without_a_token(&[], 0, &[], &inside[..1], Some(1)), numbers);
    assert_eq!(end_without_a_token(&[], 0, &[inside[..1].to_vec()], &inside[..1], Some(1)), none);
}

#[test]
fn nothing_is_kept_of_what_a_request_said_of_tokens_once_it_has_ended() {
    let rules = Arc::new(Rules::new(vec![(1, 0.5)], vec![], &[]).unwrap());
    let constraint: Arc<dyn Constraint> = Arc::new(Rule::new(1, 0));
    let mut scheduler = scheduler();
    let request =
        Request { rules: Some(&rules), constraint: Some(&constraint), ..Request::new(&[1, 2], exactly(3)) };
    let ticket = scheduler.submit(request).expect("it can run").ticket;
    assert_eq!((Arc::strong_count(&rules), Arc::strong_count(&constraint)), (2, 2));
    assert!(scheduler.abort(ticket, &mut |_| ()));
    assert_eq!((Arc::strong_count(&rules), Arc::strong_count(&constraint)), (1, 1));
}

#[test]
fn all_requests_may_end_in_one_step() {
    let mut scheduler = scheduler();
    for text in 0..4 {
        submit(&mut scheduler, &[text, 1], 1);
    }
    let mut batch = Batch::new(&SMALL);
    assert!(scheduler.schedule(&mut batch));
    let mut reasons = Vec::new();
    scheduler.complete(&batch, &[5; 4], &[], &mut ends(&mut reasons));
    assert_eq!(reasons, [FinishReason::Length; 4]);
    assert!(scheduler.is_idle());
    scheduler.check();
}

#[test]
fn a_tiny_temperature_reaches_the_device_as_greedy() {
    let mut scheduler = scheduler();
    for temperature in [1e-39, 0.5] {
        let params = SamplingParams { temperature, ..exactly(2) };
        scheduler.submit(Request::new(&[1], params)).expect("it can run");
    }
    let mut batch = Batch::new(&SMALL);
    assert!(scheduler.schedule(&mut batch));
    let temperatures = batch.slot_updates().iter().map(|update| update.state.temperature);
    assert_eq!(temperatures.collect::<Vec<_>>(), [0.0, 0.5]);
}
