//! What a decode step costs the host: scheduling step N+1, then taking in the tokens of step N, as the engine does.
//!
//! Sequences differ in length, so that in each step one row of sixteen needs another page. The prefix cache is on,
//! nobody waits, nobody ends. Run it with `cargo bench -p minisgl-core`.

use std::cell::RefCell;

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use minisgl_core::batch::Batch;
use minisgl_core::config::Limits;
use minisgl_core::costs::StepCosts;
use minisgl_core::policy::Policy;
use minisgl_core::request::{Event, Request};
use minisgl_core::sampling::SamplingParams;
use minisgl_core::scheduler::{Order, Scheduler, Settings};
use minisgl_core::speculation::Speculation;

const VOCAB: u32 = 151_936;
const SEQUENCE: u32 = 2048;
/// Steps between two looks at whether sequences come to their end.
const SAMPLE_STEPS: u32 = 32;

fn main() {
    divan::main();
}

/// A scheduler in the midst of decoding, one step in flight.
struct Decoding {
    scheduler: Scheduler,
    in_flight: Batch,
    next: Batch,
    tokens: Vec<u32>,
    steps_left: u32,
}

impl Decoding {
    fn new(rows: u32) -> Self {
        let limits = Limits {
            running: rows,
            queued: rows,
            sequence: SEQUENCE,
            prefill_tokens: 8192,
            page_size: 16,
            pages: rows * (SEQUENCE / 16),
            graph_rows: 0,
        };
        let policy = Policy::Throughput;
        let settings = Settings {
            policy,
            prefix_cache: true,
            order: Order::Given,
            speculation: Speculation::Never,
            vocab: VOCAB,
        };
        let mut scheduler =
            Scheduler::new(limits, settings, StepCosts::default(), &[VOCAB - 1], None).expect("host memory");
        for row in 0..rows {
            let prompt: Vec<u32> = (0..100 + row % 16).map(|i| (row * 7919 + i) % 10_000).collect();
            let params = SamplingParams { max_tokens: SEQUENCE, ..SamplingParams::default() };
            scheduler.submit(Request::new(&prompt, params)).expect("the queue has room for all");
        }
        let tokens = (0..rows).map(|row| row * 31 % 10_000).collect();
        let (in_flight, next) = (Batch::new(&limits), Batch::new(&limits));
        let mut decoding = Decoding { scheduler, in_flight, next, tokens, steps_left: 0 };
        while decoding.scheduler.waiting() > 0 {
            decoding.step();
        }
        decoding.step();
        decoding.steps_left = SEQUENCE - 256;
        decoding
    }

    fn step(&mut self) -> usize {
        self.scheduler.schedule(&mut self.next);
        let mut tokens = 0;
        let mut sink = |event: Event<'_>| tokens += usize::from(matches!(event, Event::Token { .. }));
        self.scheduler.complete(&self.in_flight, &self.tokens, &[], &mut sink);
        std::mem::swap(&mut self.in_flight, &mut self.next);
        self.steps_left = self.steps_left.saturating_sub(1);
        tokens
    }
}

#[divan::bench(args = [1, 64, 256, 1024, 4096], sample_count = 200, sample_size = SAMPLE_STEPS)]
fn schedule_and_complete(bencher: Bencher<'_, '_>, rows: u32) {
    let decoding = RefCell::new(Decoding::new(rows));
    bencher
        .counter(ItemsCount::new(rows))
        .with_inputs(|| {
            let mut decoding = decoding.borrow_mut();
            if decoding.steps_left < 2 * SAMPLE_STEPS {
                *decoding = Decoding::new(rows);
            }
        })
        .bench_local_values(|()| {
            let tokens = decoding.borrow_mut().step();
            assert_eq!(tokens, rows as usize, "every row decodes in every step");
            black_box(tokens)
        });
}
