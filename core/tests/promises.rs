//! What the scheduler promises whatever its policy says (`core/src/scheduling/scheduler.rs`), in every step of random streams.
//!
//! A model beside it knows who waits, who runs and how far everybody is, from what the scheduler has said so far. It does not say what
//! the next step is, which policies choose, but what it may be:
//!
//! ```text
//!   rows   decode: all that run and can, oldest first, or none │ the prompt that was cut │ who waits, in order │ one that is cut
//! ```

mod support;

use std::cmp::Reverse;
use std::collections::VecDeque;

use minisgl_core::batch::{Batch, Row};
use minisgl_core::config::Limits;
use minisgl_core::costs::{Line, StepCosts};
use minisgl_core::policy::Policy;
use minisgl_core::request::{Event, FinishReason, Request, Ticket};
use minisgl_core::sampling::SamplingParams;
use minisgl_core::scheduler::{Order, Scheduler, Settings};
use proptest::prelude::*;

use support::expected::{EOS, VOCAB};
use support::{SETTINGS, cases, exactly};

#[derive(Clone, Debug)]
enum Action {
    Submit { prompt: Vec<u32>, max_tokens: u32, ignore_eos: bool },
    Step,
    Abort(prop::sample::Index),
}

#[derive(Clone, Debug)]
struct Stream {
    limits: Limits,
    settings: Settings,
    costs: StepCosts,
    window: Option<u32>,
    /// Is a step scheduled before the one before it is completed?
    overlap: bool,
    /// What is drawn, over and over.
    drawn: Vec<u32>,
    actions: Vec<Action>,
}

#[derive(Debug)]
struct Known {
    ticket: Ticket,
    ignore_eos: bool,
    max_tokens: u32,
    len_max: u32,
    known: u32,
    planned: u32,
    computed: u32,
    prefill_len: u32,
    /// Pages behind the window that have gone back.
    dropped: u32,
    ended: bool,
}

impl Known {
    fn is_prefilling(&self) -> bool {
        self.computed < self.prefill_len
    }

    fn can_decode(&self) -> bool {
        !self.is_prefilling() && self.planned < self.len_max
    }
}

/// Requests by their number: the order in which they were submitted.
struct Model {
    limits: Limits,
    order: Order,
    window: Option<u32>,
    /// Cached pages are not known here.
    counts_pages: bool,
    requests: Vec<Known>,
    waiting: Vec<usize>,
    /// Oldest first.
    retracted: VecDeque<usize>,
    /// In the order of their admission.
    running: Vec<usize>,
}

impl Model {
    fn submit(&mut self, ticket: Ticket, prompt: u32, max_tokens: u32, ignore_eos: bool) {
        self.waiting.push(self.requests.len());
        self.requests.push(Known {
            ticket,
            ignore_eos,
            max_tokens,
            len_max: prompt + max_tokens,
            known: prompt,
            planned: prompt,
            computed: 0,
            prefill_len: 0,
            dropped: 0,
            ended: false,
        });
        if self.order == Order::LongestOutputFirst {
            self.waiting.sort_by_key(|it| Reverse(self.requests[*it].max_tokens));
        }
    }

    fn of(&self, ticket: Ticket) -> usize {
        self.requests.iter().position(|it| it.ticket == ticket).expect("it was submitted")
    }

    fn end(&mut self, request: usize) {
        self.requests[request].ended = true;
        self.waiting.retain(|it| *it != request);
        self.retracted.retain(|it| *it != request);
        self.running.retain(|it| *it != request);
    }

    /// Pages of so many positions.
    fn pages(&self, positions: u32) -> u32 {
        positions.div_ceil(self.limits.page_size)
    }

    /// Pages that those hold, and with another one for each that decodes now.
    fn held(&self, requests: &[usize], decoding: bool) -> u32 {
        let of = |it: &Known| self.pages(it.computed + u32::from(decoding && it.can_decode())) - it.dropped;
        requests.iter().map(|request| of(&self.requests[*request])).sum()
    }

    /// Takes in what has been scheduled, and so many retractions with it.
    fn take_step(&mut self, batch: &Batch, retractions: usize) {
        let rows: Vec<(Ticket, Row)> =
            batch.owners().iter().copied().zip(batch.rows().iter().copied()).collect();
        let (decoding, prefilling) = rows.split_at(batch.shape().decode_rows as usize);
        self.retract(retractions);
        assert!(retractions == 0 || prefilling.is_empty(), "nobody is admitted in a step that retracts");
        self.decode(decoding);
        self.prefill(prefilling);
        let tokens: u32 = prefilling.iter().map(|(_, row)| row.tokens).sum();
        assert!(tokens <= self.limits.prefill_tokens && self.running.len() <= self.limits.running as usize);
    }

    fn retract(&mut self, retractions: usize) {
        let kept = self.running.len() - retractions;
        if retractions > 0 && self.counts_pages && self.window.is_none() {
            let with_one_more = self.held(&self.running[..kept + 1], true);
            assert!(with_one_more > self.limits.pages, "somebody was retracted who had a page");
        }
        assert!(retractions == 0 || kept > 0, "the oldest goes on");
        for request in self.running.split_off(kept).into_iter().rev() {
            let it = &mut self.requests[request];
            (it.computed, it.prefill_len, it.dropped) = (0, 0, 0);
            self.retracted.push_front(request);
        }
    }

    fn decode(&mut self, rows: &[(Ticket, Row)]) {
        if rows.is_empty() {
            return;
        }
        let can = self.running.iter().map(|it| &self.requests[*it]).filter(|it| it.can_decode());
        let all: Vec<Ticket> = can.map(|it| it.ticket).collect();
        let decoding: Vec<Ticket> = rows.iter().map(|it| it.0).collect();
        assert_eq!(decoding, all, "all decode, or none");
        for (ticket, row) in rows {
            let request = self.of(*ticket);
            self.advance(request, row);
        }
    }

    fn prefill(&mut self, rows: &[(Ticket, Row)]) {
        for (i, (ticket, row)) in rows.iter().enumerate() {
            let request = self.of(*ticket);
            let is_cut = self.running.last().is_some_and(|it| self.requests[*it].is_prefilling());
            match is_cut {
                true => assert_eq!((i, self.running.last()), (0, Some(&request)), "another one begins"),
                false => self.admit(request, row),
            }
            self.advance(request, row);
            assert!(i + 1 == rows.len() || row.sampled == 1, "only the last one is cut");
        }
    }

    fn admit(&mut self, request: usize, row: &Row) {
        let next = match self.retracted.pop_front() {
            Some(next) => next,
            None => self.waiting.remove(0),
        };
        assert_eq!(request, next, "requests are admitted in their order");
        let it = &self.requests[request];
        assert_eq!(it.known, it.planned, "its last token has come in");
        if self.counts_pages {
            let watermark = self.running.len() as u32;
            let taken = self.held(&self.running, false) + self.pages(it.known);
            assert!(taken + watermark <= self.limits.pages, "each running request has a page left");
            assert_eq!(row.position, 0);
        }
        assert!(row.position.is_multiple_of(self.limits.page_size));
        let it = &mut self.requests[request];
        (it.computed, it.prefill_len) = (row.position, it.known);
        self.running.push(request);
    }

    /// It has a row.
    fn advance(&mut self, request: usize, row: &Row) {
        let page_size = self.limits.page_size;
        let it = &mut self.requests[request];
        assert_eq!(row.position, it.computed, "its rows follow each other");
        assert!(!it.ended && it.planned < it.len_max, "its last step has been scheduled");
        if let Some(window) = self.window {
            it.dropped = (it.computed + 1).saturating_sub(window) / page_size;
        }
        it.computed += row.tokens;
        assert!(row.tokens > 0 && it.computed <= it.len_max);
        assert_eq!(row.sampled == 1, !it.is_prefilling(), "a prompt that is cut draws nothing");
        it.planned += row.sampled;
    }

    /// What is to be heard when a step's tokens come in.
    fn complete(&mut self, batch: &Batch, tokens: &[u32]) -> Vec<(Ticket, Result<u32, FinishReason>)> {
        let mut heard = Vec::new();
        for (ticket, token) in batch.owners().iter().zip(tokens).take(batch.samples() as usize) {
            let request = self.of(*ticket);
            let it = &mut self.requests[request];
            if it.ended {
                continue;
            }
            it.known += 1;
            heard.push((*ticket, Ok(*token)));
            let reason = match () {
                () if *token == EOS && !it.ignore_eos => FinishReason::Eos,
                () if it.known == it.len_max => FinishReason::Length,
                () => continue,
            };
            heard.push((*ticket, Err(reason)));
            self.end(request);
        }
        heard
    }

    /// The scheduler says the same of who is where.
    fn compare(&self, scheduler: &Scheduler) {
        scheduler.check();
        assert_eq!(scheduler.running(), self.running.len());
        assert_eq!(scheduler.waiting(), self.waiting.len() + self.retracted.len());
        let (used, held) = (scheduler.load().pages_used, self.held(&self.running, false));
        // A prompt that found no page may have let go what lies behind its window all the same.
        assert!(!self.counts_pages || used == held || self.window.is_some() && used < held, "{used}, {held}");
    }
}

fn heard(events: &mut Vec<(Ticket, Result<u32, FinishReason>)>) -> impl FnMut(Event<'_>) {
    |event| match event {
        Event::Token { ticket, token, .. } => events.push((ticket, Ok(token))),
        Event::Finished { ticket, reason, .. } => events.push((ticket, Err(reason))),
        Event::PromptLogprobs { .. } | Event::Embedding { .. } => panic!("nobody asked for {event:?}"),
    }
}

struct Play {
    scheduler: Scheduler,
    model: Model,
    batches: [Batch; 2],
    /// Which batch is on its way.
    in_flight: Option<usize>,
    overlap: bool,
    drawn: std::iter::Cycle<std::vec::IntoIter<u32>>,
}

impl Play {
    fn new(stream: &Stream) -> Play {
        let Stream { limits, settings, costs, window, .. } = *stream;
        Play {
            scheduler: Scheduler::new(limits, settings, costs, &[EOS], window).expect("host memory"),
            model: Model {
                limits,
                order: settings.order,
                window,
                counts_pages: !settings.prefix_cache,
                requests: Vec::new(),
                waiting: Vec::new(),
                retracted: VecDeque::new(),
                running: Vec::new(),
            },
            batches: [Batch::new(&limits), Batch::new(&limits)],
            in_flight: None,
            overlap: stream.overlap,
            drawn: stream.drawn.clone().into_iter().cycle(),
        }
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::Submit { prompt, max_tokens, ignore_eos } => {
                let params = SamplingParams { ignore_eos: *ignore_eos, ..exactly(*max_tokens) };
                // One that can never run, or finds the queue full, changes nothing.
                if let Ok(taken) = self.scheduler.submit(Request::new(prompt, params)) {
                    self.model.submit(taken.ticket, prompt.len() as u32, taken.max_tokens, *ignore_eos);
                }
            }
            Action::Step => {
                assert!(self.step() || self.scheduler.is_idle(), "requests wait, and nothing moves")
            }
            Action::Abort(_) if self.model.requests.is_empty() => {}
            Action::Abort(index) => {
                let request = index.index(self.model.requests.len());
                let Known { ticket, ended, .. } = self.model.requests[request];
                let mut events = Vec::new();
                assert_eq!(self.scheduler.abort(ticket, &mut heard(&mut events)), !ended);
                assert_eq!(events.len(), usize::from(!ended));
                self.model.end(request);
            }
        }
        self.model.compare(&self.scheduler);
    }

    /// Schedules a step, then completes the one before it; false if there was neither.
    fn step(&mut self) -> bool {
        let (next, before) = (1 - self.in_flight.unwrap_or(1), self.scheduler.stats().retractions);
        let is_scheduled = self.scheduler.schedule(&mut self.batches[next]);
        let retractions = self.scheduler.stats().retractions - before;
        // One without a row may still retract: where the oldest has its last token on its way, and the next one finds no page.
        self.model.take_step(&self.batches[next], retractions as usize);
        self.model.compare(&self.scheduler);
        let completed = self.in_flight.take();
        completed.into_iter().for_each(|batch| self.complete(batch));
        match self.overlap {
            true => self.in_flight = is_scheduled.then_some(next),
            false if is_scheduled => self.complete(next),
            false => {}
        }
        is_scheduled || completed.is_some()
    }

    fn complete(&mut self, batch: usize) {
        let batch = &self.batches[batch];
        let tokens: Vec<u32> = self.drawn.by_ref().take(batch.samples() as usize).collect();
        let mut events = Vec::new();
        self.scheduler.complete(batch, &tokens, &[], &mut heard(&mut events));
        assert_eq!(events, self.model.complete(batch, &tokens));
    }
}

fn limits() -> impl Strategy<Value = Limits> {
    (1..6u32, 1..6u32, 2..40u32, 1..20u32, 0..4u32, 1..24u32).prop_map(
        |(running, queued, sequence, prefill_tokens, page_bits, pages)| Limits {
            running,
            queued,
            sequence,
            prefill_tokens,
            page_size: 1 << page_bits,
            pages,
            graph_rows: 0,
        },
    )
}

fn costs() -> impl Strategy<Value = StepCosts> {
    let line = || {
        (0..40u8, 0..8u8).prop_map(|(fixed, token)| Line { fixed_ms: fixed.into(), token_ms: token.into() })
    };
    (line(), line(), line()).prop_map(|(decode, mixed, attention)| StepCosts { decode, mixed, attention })
}

fn action() -> impl Strategy<Value = Action> {
    let prompt = prop::collection::vec(0..2u32, 1..24);
    let submit = (prompt, 1..20u32, any::<bool>());
    prop_oneof![
        4 => submit.prop_map(|(prompt, max_tokens, ignore_eos)| Action::Submit { prompt, max_tokens, ignore_eos }),
        8 => Just(Action::Step),
        1 => any::<prop::sample::Index>().prop_map(Action::Abort),
    ]
}

fn stream() -> impl Strategy<Value = Stream> {
    let order = prop::sample::select(&[Order::Given, Order::LongestOutputFirst]);
    let policy = prop_oneof![Just(Policy::Throughput), Just(Policy::Latency)];
    let settings = (policy, any::<bool>(), order).prop_map(|(policy, prefix_cache, order)| Settings {
        policy,
        prefix_cache,
        order,
        ..SETTINGS
    });
    let window = prop::option::weighted(0.3, 2..24u32);
    let drawn = prop::collection::vec(0..VOCAB, 1..30);
    let actions = prop::collection::vec(action(), 1..60);
    (limits(), settings, costs(), window, any::<bool>(), drawn, actions).prop_map(
        |(limits, settings, costs, window, overlap, drawn, actions)| Stream {
            limits,
            settings,
            costs,
            window,
            overlap,
            drawn,
            actions,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(4000), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_step_is_one_of_those_that_are_promised_and_every_request_ends(stream in stream()) {
        let mut play = Play::new(&stream);
        stream.actions.iter().for_each(|action| play.act(action));
        let mut steps = 0;
        while !play.scheduler.is_idle() {
            play.act(&Action::Step);
            steps += 1;
            prop_assert!(steps < 10_000, "requests run for ever");
        }
        prop_assert!(play.model.requests.iter().all(|it| it.ended));
    }
}
