//! Requests in the order of their prompts.

use minisgl_core::batch::Batch;
use minisgl_core::config::Limits;
use minisgl_core::costs::StepCosts;
use minisgl_core::request::Ticket;
use minisgl_core::scheduler::{Order, Scheduler, Settings};

use super::{LONG, scheduler, submit};
use crate::support::expected::VOCAB;
use crate::support::{SETTINGS, SMALL};

#[test]
fn a_token_that_the_host_does_not_know_is_in_no_prefix() {
    let prompt = [1, 2, 3, 4];
    // Nor does what lies where its page's tokens are going to be make one.
    for page in (0..VOCAB).flat_map(|unknown| [[5, 5, 5, unknown], [unknown; 4]]) {
        let mut scheduler = scheduler();
        let ticket = submit(&mut scheduler, &prompt, 30);
        let mut batches = [(); 5].map(|()| Batch::new(&SMALL));
        for step in 0..5 {
            assert!(scheduler.schedule(&mut batches[step]));
            if (1..4).contains(&step) {
                scheduler.complete(&batches[step - 1], &[5], &[], &mut |_| ());
            }
        }
        // The last token of the second page is on its way.
        assert_eq!(batches[4].rows()[0].kv_len, 8);
        assert!(scheduler.abort(ticket, &mut |_| ()));
        submit(&mut scheduler, &[&prompt[..], &page, &[1]].concat(), 1);
        assert!(scheduler.schedule(&mut batches[0]));
        assert_eq!(batches[0].rows()[0].position, 4, "the prompt's page alone is cached, not {page:?}");
    }
}

/// Prompts in the order of their admission, one running at a time: `first` wait together, and when one of them is running, those
/// of `aborted` that wait are aborted once `later` has come, and `last` comes.
fn admitted_one_by_one(
    order: Order,
    first: &[&[u32]],
    later: &[&[u32]],
    aborted: &[u32],
    last: &[&[u32]],
) -> Vec<Vec<u32>> {
    let limits = Limits { running: 1, ..SMALL };
    let settings = Settings { order, ..SETTINGS };
    let mut scheduler =
        Scheduler::new(limits, settings, StepCosts::default(), &[], None).expect("host memory");
    let submit_all = |scheduler: &mut Scheduler, prompts: &[&[u32]]| -> Vec<(Ticket, Vec<u32>)> {
        prompts.iter().map(|prompt| (submit(scheduler, prompt, 1), prompt.to_vec())).collect()
    };
    let mut prompts = submit_all(&mut scheduler, first);
    let mut batch = Batch::new(&limits);
    let mut admitted = Vec::new();
    while scheduler.schedule(&mut batch) {
        let ticket = batch.owners()[0];
        admitted.extend(prompts.iter().find(|it| it.0 == ticket).map(|it| it.1.clone()));
        if admitted.len() == 1 {
            prompts.extend(submit_all(&mut scheduler, later));
            for (ticket, _) in prompts.iter().filter(|(_, prompt)| *prompt == aborted) {
                assert!(scheduler.abort(*ticket, &mut |_| ()));
            }
            prompts.extend(submit_all(&mut scheduler, last));
        }
        scheduler.complete(&batch, &[5], &[], &mut |_| ());
        scheduler.check();
    }
    admitted
}

#[test]
fn by_prefix_prompts_ascend_and_what_comes_too_late_for_this_sweep_is_in_the_next() {
    let first: [&[u32]; 4] = [&[4, 4], &[9], &[4], &[6, 1, 2]];
    let later: [&[u32]; 6] = [&[3, 1], &[6, 1], &[9, 1], &[3], &[4, 9], &[4]];
    let expected: [&[u32]; 10] =
        [&[4], &[4], &[4, 4], &[4, 9], &[6, 1], &[6, 1, 2], &[9], &[9, 1], &[3], &[3, 1]];
    assert_eq!(admitted_one_by_one(Order::Prefix, &first, &later, &[], &[]), expected);
    let given: Vec<_> = first.iter().chain(&later).map(|prompt| prompt.to_vec()).collect();
    assert_eq!(admitted_one_by_one(Order::Given, &first, &later, &[], &[]), given);
}

#[test]
fn by_prefix_what_comes_later_has_its_place_in_the_second_sweep_too() {
    let limits = Limits { running: 1, ..SMALL };
    let settings = Settings { order: Order::Prefix, ..SETTINGS };
    let mut scheduler =
        Scheduler::new(limits, settings, StepCosts::default(), &[], None).expect("host memory");
    let mut batch = Batch::new(&limits);
    let mut admitted = Vec::new();
    // Behind 5, the first sweep, come 1 and 3; once 1 has gone, 4 is of theirs.
    for coming in [&[5][..], &[3, 1], &[4], &[]] {
        for id in coming {
            submit(&mut scheduler, &[*id], 1);
        }
        assert!(scheduler.schedule(&mut batch));
        admitted.push(batch.tokens()[0].id);
        scheduler.complete(&batch, &[9], &[], &mut |_| ());
        scheduler.check();
    }
    assert_eq!(admitted, [5, 1, 3, 4]);
}

#[test]
fn by_prefix_an_abort_leaves_the_others_in_their_sweeps() {
    // Admitted: 4; of this sweep: 6 and 8; of the next one: 2 and 3.
    for (aborted, last, expected) in
        [(6, 7, [4, 7, 8, 2, 3]), (2, 1, [4, 6, 8, 1, 3]), (8, 9, [4, 6, 9, 2, 3])]
    {
        let admitted =
            admitted_one_by_one(Order::Prefix, &[&[4], &[6], &[8]], &[&[3], &[2]], &[aborted], &[&[last]]);
        assert_eq!(admitted.concat(), expected, "{aborted} is aborted, {last} comes");
    }
}

#[test]
fn by_prefix_a_prompt_is_before_those_that_it_begins_and_equal_ones_are_as_they_came() {
    let limits = Limits { running: 1, ..LONG };
    let settings = Settings { order: Order::Prefix, ..SETTINGS };
    let mut scheduler =
        Scheduler::new(limits, settings, StepCosts::default(), &[], None).expect("host memory");
    // All that the host keeps in one piece, and a token more.
    let whole = limits.block_tokens() as usize;
    let tickets = [whole + 1, whole, whole, whole + 1].map(|len| submit(&mut scheduler, &vec![2; len], 1));
    let mut batch = Batch::new(&limits);
    let mut admitted = Vec::new();
    while scheduler.schedule(&mut batch) {
        admitted.extend(tickets.iter().position(|ticket| *ticket == batch.owners()[0]));
        scheduler.complete(&batch, &[5], &[], &mut |_| ());
        scheduler.check();
    }
    assert_eq!(admitted, [1, 2, 0, 3]);
}
