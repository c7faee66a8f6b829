//! Outputs that are held to something.

use std::sync::Arc;

use minisgl_core::config::Limits;
use minisgl_core::constraint::{Constraint, ConstraintState};
use minisgl_core::request::{FinishReason, Request, Ticket};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::SamplingParams;
use minisgl_core::speculation::Speculation;

use super::prompt;
use crate::support::expected::{self, alone, alone_within};
use crate::support::rule::Rule;
use crate::support::{Outcomes, SMALL, engine, exactly, options, run_dry};

/// A constraint as a request takes it.
fn rule(seed: u32, late: u32) -> Arc<dyn Constraint> {
    Arc::new(Rule::new(seed, late))
}

/// A rule's seed whose output goes on for so many tokens at least.
fn seed_of_long_rule(request: &(Vec<u32>, SamplingParams), least: usize) -> u32 {
    let len =
        |seed: u32| alone_within(&request.0, &request.1, &[], SMALL.sequence, u32::MAX, Some(seed)).0.len();
    (0..).find(|seed| len(*seed) >= least).expect("some rule allows much")
}

#[test]
fn rows_without_a_constraint_wait_for_nobodys_mask_and_masks_are_waited_for_when_nothing_else_runs() {
    let (free, bound) = ((prompt(1, 5), exactly(20)), (prompt(2, 5), exactly(12)));
    let seed = seed_of_long_rule(&bound, 12);
    for overlap in [true, false] {
        let mut options = options(SMALL);
        options.overlap = overlap;
        let mut engine = engine(options);
        let constraint = rule(seed, u32::MAX);
        let free_ticket = engine.submit(Request::new(&free.0, free.1)).expect("it can run").ticket;
        let request = Request { constraint: Some(&constraint), ..Request::new(&bound.0, bound.1) };
        let bound_ticket = engine.submit(request).expect("it can run").ticket;
        let (mut outcomes, mut steps) = (Outcomes::default(), 0);
        while outcomes.of(free_ticket).finished.is_none() {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            steps += 1;
        }
        assert_eq!(steps, 20 + u32::from(overlap), "a token in every step");
        assert_eq!(outcomes.of(bound_ticket).tokens, [], "its mask comes only when it is waited for");
        run_dry(&mut engine, &mut outcomes);
        let expected = alone_within(&bound.0, &bound.1, &[], SMALL.sequence, u32::MAX, Some(seed));
        assert_eq!(outcomes.of(bound_ticket).tokens, expected.0);
    }
}

/// A constraint whose state never changes.
#[derive(Debug)]
struct Stuck(ConstraintState);

impl Constraint for Stuck {
    fn accept(&self, token: u32) {
        panic!("token {token} was drawn");
    }

    fn state(&self) -> ConstraintState {
        self.0
    }

    fn wait(&self) {}

    fn write_mask(&self, _: &mut [u32]) {
        panic!("there is no mask");
    }
}

#[test]
fn a_request_whose_constraint_allows_nothing_from_the_beginning_ends_and_those_behind_it_run() {
    for (state, reason) in [
        (ConstraintState::Complete, FinishReason::Complete),
        (ConstraintState::Failed, FinishReason::ConstraintFailed),
    ] {
        let mut engine = engine(options(Limits { running: 1, ..SMALL }));
        let constraint: Arc<dyn Constraint> = Arc::new(Stuck(state));
        let request = Request { constraint: Some(&constraint), ..Request::new(&[1, 2], exactly(3)) };
        let (mut outcomes, free) = (Outcomes::default(), (prompt(1, 5), exactly(4)));
        let first = engine.submit(Request::new(&free.0, free.1)).expect("it can run").ticket;
        let stuck = [(); 2].map(|()| engine.submit(request).expect("it can run").ticket);
        let last = engine.submit(Request::new(&free.0, free.1)).expect("it can run").ticket;
        for _ in 0..20 {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
        }
        assert!(engine.is_idle());
        for ticket in stuck {
            assert_eq!(outcomes.of(ticket).finished, Some((reason, 0)));
        }
        for ticket in [first, last] {
            assert_eq!(outcomes.of(ticket).tokens, alone(&free.0, &free.1, SMALL.sequence).0);
        }
    }
}

#[test]
fn a_request_with_allowed_tokens_has_a_token_in_every_step_drafts_among_them() {
    let ids = [2, 5, 11];
    let rules = Arc::new(Rules::default().allowing(ids.to_vec()).expect("a token at least"));
    let params = SamplingParams { seed: expected::REPEATING, ..exactly(20) };
    let repeating = vec![2, 5, 2, 5, 2, 5];
    let expected = expected::alone_allowing(&repeating, &params, &[], SMALL.sequence, u32::MAX, None, &ids);
    assert!(expected.0.iter().all(|token| ids.contains(token)));
    for (overlap, speculation) in
        [(true, Speculation::Never), (false, Speculation::Never), (true, Speculation::Always)]
    {
        let mut options = options(SMALL);
        (options.overlap, options.scheduler.speculation) = (overlap, speculation);
        let mut engine = engine(options);
        let request = Request { rules: Some(&rules), ..Request::new(&repeating, params) };
        let ticket = engine.submit(request).expect("it can run").ticket;
        let (mut outcomes, mut steps) = (Outcomes::default(), 0);
        while outcomes.of(ticket).finished.is_none() {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            steps += 1;
        }
        assert_eq!(outcomes.of(ticket).tokens, expected.0);
        match speculation {
            Speculation::Never => assert_eq!(steps, 20 + u32::from(overlap), "a token in every step"),
            _ => assert!(engine.stats().accepted > 0 && steps < 20, "{steps}, {:?}", engine.stats()),
        }
    }
}

#[test]
fn constrained_requests_advance_together_however_many_they_are() {
    let running = 300;
    let (prompt, params) = (prompt(4, 5), exactly(9));
    let limits = Limits {
        running,
        queued: running,
        prefill_tokens: 5 * running,
        pages: 8 * running,
        graph_rows: 0,
        ..SMALL
    };
    for overlap in [true, false] {
        let mut options = options(limits);
        (options.overlap, options.scheduler.prefix_cache) = (overlap, false);
        let mut engine = engine(options);
        let mut submit = |seed| {
            let constraint = Some(&rule(seed, 0));
            let request = Request { constraint, ..Request::new(&prompt, params) };
            engine.submit(request).expect("it can run").ticket
        };
        let tickets: Vec<Ticket> = (0..running).map(&mut submit).collect();
        let mut outcomes = Outcomes::default();
        while !engine.is_idle() {
            engine.step(&mut |event| outcomes.take_in(event)).expect("the device does not fail");
            let going_on = outcomes.list.iter().filter(|(_, outcome)| outcome.finished.is_none());
            let mut tokens = going_on.map(|(_, outcome)| outcome.tokens.len());
            let first = tokens.next();
            assert!(tokens.all(|other| Some(other) == first), "somebody is behind");
        }
        for (seed, ticket) in (0..).zip(tickets) {
            let (tokens, reason) = alone_within(&prompt, &params, &[], limits.sequence, u32::MAX, Some(seed));
            let outcome = outcomes.of(ticket);
            assert_eq!((outcome.tokens, outcome.finished), (tokens, Some((reason, 0))), "rule {seed}");
        }
    }
}
