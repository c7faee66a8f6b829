//! After construction the engine allocates nothing: a counting allocator watches a whole offline run.
//!
//! It counts by thread, since the test harness has threads of its own.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use minisgl_core::config::Limits;
use minisgl_core::constraint::Constraint;
use minisgl_core::embedding::Embed;
use minisgl_core::request::{Event, FinishReason, Request, SubmitError, Ticket};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{PromptLogprobs, SamplingParams};
use minisgl_core::scheduler::Order;

use support::expected::VOCAB;
use support::rule::Rule;
use support::{engine, exactly, options};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count_allocation() {
    ALLOCATIONS.set(ALLOCATIONS.get() + 1);
}

// SAFETY: all is passed on to the system's allocator, whose contract is the same.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller keeps the contract.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// 200 requests through a queue of 10: samples of one prompt, shared prefixes, chunks, retractions, log-probabilities, embeddings, rules, constraints,
/// ends by all reasons, and one abort.
#[test]
fn a_whole_run_allocates_nothing_after_construction() {
    let limits = Limits {
        running: 12,
        queued: 10,
        sequence: 96,
        prefill_tokens: 40,
        page_size: 4,
        pages: 80,
        graph_rows: 8,
    };
    let requests: Vec<(Vec<u32>, SamplingParams)> = (0..200u32)
        .map(|i| {
            let prompt = (0..10 + i * 7 % 50).map(|at| (at * (1 + i % 4) + i / 20) % VOCAB).collect();
            let logprobs = i.is_multiple_of(5).then_some(3);
            let ignore_eos = !i.is_multiple_of(3);
            let prompt_logprobs = i.is_multiple_of(7).then_some(PromptLogprobs { from: i % 40, top: 2 });
            let params = SamplingParams {
                logprobs,
                prompt_logprobs,
                ignore_eos,
                min_tokens: i % 4,
                seed: i.into(),
                ..exactly(5 + i % 30)
            };
            let embedded = SamplingParams { embed: Some(Embed::default()), ..exactly(0) };
            (prompt, if i % 11 == 3 { embedded } else { params })
        })
        .collect();
    let edits = Rules::new(vec![(1, 0.5)], vec![2], &[vec![3], vec![4, 5]]).expect("few rules");
    let allowing = Rules::default().allowing((1..VOCAB).collect()).expect("a token at least");
    let (edits, allowing) = (Arc::new(edits), Arc::new(allowing));
    for (overlap, order) in [(true, Order::Given), (false, Order::Given), (true, Order::Prefix)] {
        let mut options = options(limits);
        (options.overlap, options.scheduler.order) = (overlap, order);
        let mut engine = engine(options);
        let constraints: Vec<Arc<dyn Constraint>> =
            (0..200).map(|seed| Arc::new(Rule::new(seed, seed % 3)) as _).collect();
        let (mut tokens, mut ended, mut next, mut last) = (0u64, 0, 0, None::<Ticket>);
        let (mut stopped, mut held) = (0, 0);
        let before = ALLOCATIONS.get();
        while next < requests.len() || !engine.is_idle() {
            while let Some((prompt, params)) = requests.get(next) {
                // Of the prompts that come to it some have two samples, the others one.
                let of_sample = |sample: u32| {
                    let number = next + sample as usize;
                    Request {
                        rules: match next % 6 {
                            0 | 3 => Some(&edits),
                            1 => Some(&allowing),
                            _ => None,
                        },
                        constraint: constraints.get(number).filter(|_| number.is_multiple_of(4)),
                        ..Request::new(prompt, params.of_sample(sample))
                    }
                };
                let group = [of_sample(0), of_sample(1)];
                let samples = if next.is_multiple_of(10) { &group[..] } else { &group[..1] };
                match engine.submit_group(samples, &mut |submitted| last = Some(submitted.ticket)) {
                    Ok(()) => next += samples.len(),
                    Err(SubmitError::QueueFull { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            let mut sink = |event: Event<'_>| match event {
                Event::PromptLogprobs { .. } | Event::Embedding { .. } => {}
                Event::Token { .. } => tokens += 1,
                Event::Finished { reason, .. } => {
                    ended += 1;
                    stopped += u32::from(reason == FinishReason::Stop);
                    held +=
                        u32::from(matches!(reason, FinishReason::Complete | FinishReason::ConstraintFailed));
                }
            };
            if let Some(ticket) = last.take().filter(|_| next == requests.len()) {
                engine.abort(ticket, &mut sink);
            }
            engine.step(&mut sink).expect("the device does not fail");
        }
        let allocations = ALLOCATIONS.get() - before;
        assert_eq!(allocations, 0, "allocations in a run of {tokens} tokens");
        let stats = engine.stats();
        assert_eq!((ended, stats.finished, stats.output_tokens), (200, 200, tokens));
        assert!(stopped > 0 && held > 0, "{stopped} by a stop token, {held} by a constraint");
        assert!(stats.retractions > 0 && stats.cached_tokens > 0 && stats.padding_rows > 0, "{stats:?}");
    }
}
