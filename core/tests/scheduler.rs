//! The scheduler by itself, driven closer than the engine drives it.

mod support;

use std::sync::Arc;

use minisgl_core::batch::{Batch, StepShape};
use minisgl_core::config::{Limits, LimitsError};
use minisgl_core::constraint::Constraint;
use minisgl_core::costs::{Line, StepCosts};
use minisgl_core::embedding::Embed;
use minisgl_core::request::{Event, FinishReason, Request, SubmitError, Ticket};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{NO_TOKEN, PromptLogprobs, RowLogprobs, SamplingParams};
use minisgl_core::scheduler::{Order, Scheduler, Settings};

use support::expected::{Allowed, EOS, VOCAB, allowed};
use support::rule::Rule;
use support::{SETTINGS, SMALL, exactly};

/// Steps cost nothing, so no prompt is held back, and running requests decode beside prompts.
fn scheduler_within(limits: Limits) -> Scheduler {
    Scheduler::new(limits, SETTINGS, StepCosts::default(), &[], None).expect("host memory")
}

/// With these prompts had better run together.
const DEAR_PROMPTS: StepCosts = StepCosts {
    decode: Line { fixed_ms: 10.0, token_ms: 0.0 },
    mixed: Line { fixed_ms: 80.0, token_ms: 0.0 },
    attention: Line { fixed_ms: 0.0, token_ms: 0.0 },
};

fn scheduler() -> Scheduler {
    scheduler_within(SMALL)
}

fn submit(scheduler: &mut Scheduler, prompt: &[u32], max_tokens: u32) -> Ticket {
    let request = Request::new(prompt, exactly(max_tokens));
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
fn a_mask_that_never_changes_comes_when_its_slot_is_taken_and_no_more() {
    let allowing = Arc::new(Rules::default().allowing(vec![5, 9]).unwrap());
    let allows_9 = |seed: &u32| {
        let is_mask = matches!(allowed(*seed, &[9]), Allowed::Mask(_));
        is_mask && matches!(allowed(*seed, &[]), Allowed::Mask(mask) if mask >> 9 & 1 == 1)
    };
    let constraint: Arc<dyn Constraint> = Arc::new(Rule::new((0..).find(allows_9).unwrap(), 0));
    let mut scheduler = scheduler();
    let slots = SMALL.running;
    let mut submit = |rules, constraint| {
        let request = Request { rules, constraint, ..Request::new(&[1, 2], exactly(3)) };
        scheduler.submit(request).expect("it can run").ticket
    };
    let free = submit(None, None);
    let kept = submit(Some(&allowing), None);
    let both = submit(Some(&allowing), Some(&constraint));
    let mut batch = Batch::new(&SMALL);
    let mut of_step = || {
        assert!(scheduler.schedule(&mut batch));
        let masks: Vec<_> = batch.masks().collect();
        let rows = batch.owners().iter().zip(batch.rows());
        let rows: Vec<_> = rows.map(|(owner, row)| (*owner, row.mask)).collect();
        let mut written = vec![[0]; masks.len()];
        let owners = masks.iter().map(|(owner, _)| *owner);
        owners.zip(&mut written).for_each(|(owner, mask)| scheduler.write_mask(owner, mask));
        scheduler.complete(&batch, &vec![9; rows.len()], &[], &mut |_| ());
        (masks, rows, written)
    };
    let (masks, rows, written) = of_step();
    assert_eq!(masks, [(both, 0), (kept, slots + 1)]);
    assert_eq!(rows, [(free, 0), (kept, 1 + slots + 1), (both, 1)]);
    assert_eq!(written[1], [1 << 5 | 1 << 9]);
    assert!(written[0] == [1 << 9] || written[0] == [1 << 5 | 1 << 9], "{written:?}");
    let (masks, rows, _) = of_step();
    assert_eq!(masks, [(both, 0)], "one that stays is there");
    assert_eq!(rows, [(free, 0), (kept, 1 + slots + 1), (both, 1)]);
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
        let settings = Settings { prefix_cache, ..SETTINGS };
        let mut scheduler =
            Scheduler::new(SMALL, settings, StepCosts::default(), &[], Some(8)).expect("host memory");
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

/// Most pages that a sequence of 60 tokens, 8 of which are seen, holds in a decode step.
fn held_within_a_window(params: SamplingParams, rules: Option<&Arc<Rules>>) -> u32 {
    let settings = Settings { prefix_cache: false, ..SETTINGS };
    let mut scheduler =
        Scheduler::new(SMALL, settings, StepCosts::default(), &[], Some(8)).expect("host memory");
    scheduler.submit(Request { rules, ..Request::new(&[1; 20], params) }).expect("it can run");
    let (mut batch, mut held) = (Batch::new(&SMALL), 0);
    while !scheduler.is_idle() {
        assert!(scheduler.schedule(&mut batch));
        if batch.shape().is_decode() {
            held = held.max(scheduler.load().pages_used);
        }
        let samples = batch.samples() as usize;
        scheduler.complete(&batch, &[3][..samples], &[], &mut |_| ());
        scheduler.check();
    }
    held
}

#[test]
fn pages_behind_the_window_stay_where_the_device_reads_their_tokens() {
    let (plain, all) = (exactly(40), 59_u32.div_ceil(SMALL.page_size));
    assert!(held_within_a_window(plain, None) <= 4);
    for penalized in [
        SamplingParams { repetition_penalty: 1.5, ..plain },
        SamplingParams { presence_penalty: 0.5, ..plain },
        SamplingParams { frequency_penalty: 0.5, ..plain },
    ] {
        assert_eq!(held_within_a_window(penalized, None), all, "{penalized:?}");
    }
    let bad = |words: &[Vec<u32>]| Arc::new(Rules::new(vec![], vec![], words).unwrap());
    assert_eq!(held_within_a_window(plain, Some(&bad(&[vec![4], vec![1, 2]]))), all);
    assert!(
        held_within_a_window(plain, Some(&bad(&[vec![4], vec![5]]))) <= 4,
        "a single token needs no history"
    );
}

/// A step, as those see it who wait and run.
#[derive(Debug, PartialEq)]
struct Seen {
    decoding: Vec<Ticket>,
    prefilling: Vec<Ticket>,
    retractions: u64,
}

/// Runs to the end, each step completed before the next; every request draws the same token.
fn run_dry(scheduler: &mut Scheduler, limits: &Limits) -> Vec<Seen> {
    let (mut batch, mut seen) = (Batch::new(limits), Vec::new());
    while !scheduler.is_idle() {
        assert!(scheduler.schedule(&mut batch), "requests wait, and nothing moves");
        let (decoding, prefilling) = batch.owners().split_at(batch.shape().decode_rows as usize);
        let retractions = scheduler.stats().retractions;
        seen.push(Seen { decoding: decoding.to_vec(), prefilling: prefilling.to_vec(), retractions });
        let tokens = vec![5; batch.samples() as usize];
        scheduler.complete(&batch, &tokens, &[], &mut |_| ());
        scheduler.check();
    }
    seen
}

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
fn whoever_has_room_is_admitted_though_one_before_it_had_none_and_was_aborted() {
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
fn however_long_sequences_may_be_there_is_room_for_as_many_requests_as_may_wait() {
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

/// Capacities under which the host keeps far fewer tokens than all requests may have: a window lets them run in few pages.
const LONG: Limits = Limits {
    running: 40,
    queued: 8,
    sequence: 16_384,
    prefill_tokens: 16_384,
    page_size: 16,
    pages: 1200,
    graph_rows: 0,
};

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

#[test]
fn long_requests_take_turns_where_the_host_keeps_few_tokens_and_all_end() {
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
