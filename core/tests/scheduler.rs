//! The scheduler by itself, driven closer than the engine drives it.

mod support;

use minisgl_core::batch::Batch;
use minisgl_core::request::{Event, FinishReason, Request, Ticket};
use minisgl_core::sampling::{NO_TOKEN, SamplingParams};
use minisgl_core::scheduler::{Order, Policy, Scheduler};

use support::expected::VOCAB;
use support::{SMALL, exactly};

fn scheduler() -> Scheduler {
    Scheduler::new(SMALL, Policy { prefix_cache: true, order: Order::Given, vocab: VOCAB }, &[], None)
}

fn submit(scheduler: &mut Scheduler, prompt: &[u32], max_tokens: u32) -> Ticket {
    let request = Request { prompt, params: exactly(max_tokens) };
    scheduler.submit(request).expect("it can run").ticket
}

/// The reasons in a list of events.
fn ends(events: &mut Vec<FinishReason>) -> impl FnMut(Event<'_>) {
    |event| {
        if let Event::Finished { reason, .. } = event {
            events.push(reason);
        }
    }
}

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
fn prompts_go_first_and_a_long_one_goes_in_chunks() {
    // At most 16 tokens a prefill step: 10 and 6 of 20, then the other 14 and 2 of 3, then the last one.
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
    assert_eq!(next(&mut scheduler), (0, vec![(6, 14, 1), (0, 2, 0)]));
    assert_eq!(next(&mut scheduler), (0, vec![(2, 1, 1)]));
    assert_eq!(next(&mut scheduler), (3, vec![(10, 1, 1), (20, 1, 1), (3, 1, 1)]));
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

#[test]
fn a_tiny_temperature_reaches_the_device_as_greedy() {
    let mut scheduler = scheduler();
    for temperature in [1e-39, 0.5] {
        let params = SamplingParams { temperature, ..exactly(2) };
        scheduler.submit(Request { prompt: &[1], params }).expect("it can run");
    }
    let mut batch = Batch::new(&SMALL);
    assert!(scheduler.schedule(&mut batch));
    assert_eq!(batch.rows().iter().map(|row| row.temperature).collect::<Vec<_>>(), [0.0, 0.5]);
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

/// A sequence of 60 tokens, 8 of which are seen: pages of its own never exceed the window, the page that it begins in and the
/// one that is being filled, but for the prefix tree's, which hold a window's worth.
#[test]
fn pages_behind_the_window_go_back_while_a_request_runs() {
    for prefix_cache in [false, true] {
        let policy = Policy { prefix_cache, order: Order::Given, vocab: VOCAB };
        let mut scheduler = Scheduler::new(SMALL, policy, &[], Some(8));
        submit(&mut scheduler, &[1; 20], 40);
        let mut batch = Batch::new(&SMALL);
        while !scheduler.is_idle() {
            assert!(scheduler.schedule(&mut batch));
            scheduler.check();
            if batch.shape().is_decode() {
                let held = if prefix_cache { 2 } else { 0 };
                assert!(scheduler.load().pages_used <= held + 4, "{} pages", scheduler.load().pages_used);
            }
            let samples = batch.samples() as usize;
            scheduler.complete(&batch, &[3, 3][..samples], &[], &mut |_| ());
            scheduler.check();
        }
    }
}
