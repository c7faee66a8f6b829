//! Who is admitted, and who gives way.

use minisgl_core::batch::Batch;
use minisgl_core::config::Limits;
use minisgl_core::request::{Request, SubmitError, Ticket};

use super::{Seen, run_dry, scheduler_within, submit};
use crate::support::{SMALL, exactly};

/// In which order requests entered, retracted ones again.
fn admissions(seen: &[Seen]) -> Vec<Ticket> {
    let mut entered: Vec<Ticket> = seen.iter().flat_map(|step| step.prefilling.clone()).collect();
    entered.dedup();
    entered
}

#[test]
fn requests_are_admitted_as_submitted_and_retracted_ones_before_them_the_oldest_first() {
    // Twelve pages: the fourth page of four sequences is one too many, and so is the fifth of three.
    let limits = Limits { pages: 12, prefill_tokens: 64, ..SMALL };
    let mut scheduler = scheduler_within(limits);
    let [a, b, c, d, e] = [1, 2, 3, 4, 6].map(|text| submit(&mut scheduler, &[text; 8], 20));
    let seen = run_dry(&mut scheduler, &limits);
    let entered = admissions(&seen);
    assert_eq!(entered, [a, b, c, d, b, c, d, e], "d was retracted first, then c and b");
}

#[test]
fn the_oldest_request_is_never_retracted_and_decodes_in_every_step() {
    let limits = Limits { pages: 12, prefill_tokens: 64, ..SMALL };
    let mut scheduler = scheduler_within(limits);
    let [oldest, ..] = [1, 2, 3, 4].map(|text| submit(&mut scheduler, &[text; 8], 20));
    let seen = run_dry(&mut scheduler, &limits);
    assert!(seen.last().unwrap().retractions >= 2);
    let first = seen.iter().position(|step| step.decoding.contains(&oldest)).unwrap();
    assert!(seen[first..first + 19].iter().all(|step| step.decoding[0] == oldest), "{seen:#?}");
}

#[test]
fn nobody_is_admitted_in_a_step_that_retracts() {
    // The retracted one's pages stay in the prefix cache, so that it could come back at once.
    for running in [2, 3, 4] {
        let limits = Limits { pages: 10, running, ..SMALL };
        let mut scheduler = scheduler_within(limits);
        for text in 1..5 {
            submit(&mut scheduler, &[text; 8], 24);
        }
        let seen = run_dry(&mut scheduler, &limits);
        let retracting = seen.windows(2).filter(|pair| pair[1].retractions > pair[0].retractions);
        assert!(retracting.clone().count() > 0);
        assert!(retracting.clone().all(|pair| pair[1].prefilling.is_empty()), "{seen:#?}");
    }
}

#[test]
fn an_admission_leaves_a_page_for_each_running_request() {
    // Of five pages the first request has two, so three are left: one is the running request's, and two don't do for a
    // prompt of three. The last request would fit, but it does not pass.
    let limits = Limits { pages: 5, ..SMALL };
    let mut scheduler = scheduler_within(limits);
    let [first, second] = [(1, 8), (2, 12)].map(|(text, len)| submit(&mut scheduler, &vec![text; len], 4));
    let third = submit(&mut scheduler, &[3], 4);
    let seen = run_dry(&mut scheduler, &limits);
    assert_eq!(admissions(&seen), [first, second, third]);
    let enters = |ticket| seen.iter().position(|step| step.prefilling.contains(&ticket)).unwrap();
    let first_ends = seen.iter().rposition(|step| step.decoding.contains(&first)).unwrap();
    assert!(enters(second) > first_ends && enters(third) >= enters(second), "{seen:#?}");
    assert_eq!(seen.last().unwrap().retractions, 0);
}

#[test]
fn a_request_that_fits_is_admitted_though_the_one_before_it_did_not_and_was_aborted() {
    // A prompt of four pages finds three of five, of which one is the running request's.
    let limits = Limits { pages: 5, ..SMALL };
    let mut scheduler = scheduler_within(limits);
    submit(&mut scheduler, &[1; 7], 2);
    let [large, small] = [14, 4].map(|len| submit(&mut scheduler, &vec![2; len], 1));
    let mut batch = Batch::new(&limits);
    assert!(scheduler.schedule(&mut batch));
    assert_eq!(batch.owners().len(), 1, "there is no room");
    assert!(scheduler.abort(large, &mut |_| ()));
    scheduler.complete(&batch, &[5], &[], &mut |_| ());
    assert!(scheduler.schedule(&mut batch));
    assert_eq!(batch.owners().last(), Some(&small));
}

#[test]
fn retracted_requests_take_no_places_of_the_queue() {
    let limits = Limits { pages: 12, prefill_tokens: 64, queued: 4, ..SMALL };
    let mut scheduler = scheduler_within(limits);
    let texts = [1, 2, 3, 4];
    for text in texts {
        submit(&mut scheduler, &[text; 8], 20);
    }
    let mut batch = Batch::new(&limits);
    while scheduler.stats().retractions == 0 {
        assert!(scheduler.schedule(&mut batch));
        scheduler.complete(&batch, &[5; 4][..batch.samples() as usize], &[], &mut |_| ());
    }
    for text in texts {
        submit(&mut scheduler, &[text; 8], 20);
    }
    let refused = scheduler.submit(Request::new(&[1], exactly(1)));
    assert_eq!(refused, Err(SubmitError::QueueFull { capacity: 4 }));
    run_dry(&mut scheduler, &limits);
    assert_eq!(scheduler.stats().finished, 8);
}
