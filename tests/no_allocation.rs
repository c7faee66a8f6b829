//! The engine's loop allocates nothing: counted over whole offline runs on the CPU backend, by itself and on two ranks.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{Golden, fixture};
use minisgl::models::FAMILIES;
use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::executor::Executor;
use minisgl_core::local::Local;
use minisgl_core::policy::Policy;
use minisgl_core::request::{Event, Request};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{PromptLogprobs, SamplingParams};
use minisgl_core::scheduler::{Order, Settings};
use minisgl_core::shard::Rank;
use minisgl_core::speculation::Speculation;
use minisgl_cpu::{Cpu, CpuError, Link};
use minisgl_decoder::{Checkpoint, Decoder, LoadError};
use minisgl_ranks::Ranks;

/// Counts allocations of every thread but the harness's while it is told to: that one says when a test takes a minute.
struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static HAS_BEGUN: AtomicBool = AtomicBool::new(false);

thread_local! {
    static IS_HARNESS: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    // The process's first allocation is its first thread's.
    if !HAS_BEGUN.load(Ordering::Relaxed) && !HAS_BEGUN.swap(true, Ordering::Relaxed) {
        IS_HARNESS.set(true);
    }
    if COUNTING.load(Ordering::Relaxed) && !IS_HARNESS.get() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `realloc`'s contract.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

type OnCpu = Local<Cpu, Decoder<Cpu>>;

fn alone(checkpoint: &Checkpoint) -> OnCpu {
    let mut backend = Cpu::new();
    let model = Decoder::load(&mut backend, checkpoint).unwrap();
    Local::new(backend, model)
}

fn on_two_ranks(checkpoint: &Checkpoint) -> Ranks<OnCpu> {
    let patience = Duration::from_secs(60);
    let links = Link::group(2, patience);
    let (abort, renew) = (links[0].aborter(), links[0].renewer());
    let builder = |(index, link)| {
        let checkpoint = checkpoint.clone();
        move || {
            let mut cpu = Cpu::of_rank(1, link);
            let model = Decoder::load_part(&mut cpu, &checkpoint, Rank { index, count: 2 })?;
            Ok::<_, LoadError<CpuError>>(Local::new(cpu, model))
        }
    };
    Ranks::start((0..).zip(links).map(builder).collect(), patience, abort, renew).unwrap()
}

fn engine<X: Executor>(checkpoint: &Checkpoint, executor: X, overlap: bool) -> Engine<X> {
    // A pool so small that requests are retracted, prompts cut into chunks, and more requests than fit at once.
    let limits = Limits {
        running: 8,
        queued: 64,
        sequence: 256,
        prefill_tokens: 24,
        page_size: 16,
        pages: 20,
        graph_rows: 4,
    };
    let scheduler = Settings {
        policy: Policy::Throughput,
        prefix_cache: true,
        order: Order::LongestOutputFirst,
        speculation: Speculation::Always,
        vocab: checkpoint.config().spec.dims.vocab,
    };
    let options =
        EngineOptions { limits, fit: None, scheduler, eos: checkpoint.config().eos.clone(), overlap };
    Engine::of(executor, options).unwrap()
}

#[test]
fn a_whole_run_allocates_nothing_after_construction() {
    COUNTING.store(true, Ordering::Relaxed);
    drop(std::hint::black_box(vec![0u8; 100]));
    COUNTING.store(false, Ordering::Relaxed);
    assert_eq!(ALLOCATIONS.swap(0, Ordering::Relaxed), 1, "the counter counts");
    for (name, overlap) in [("tiny-tied", true), ("tiny-tied", false), ("qwen3-moe", true)] {
        let (golden, checkpoint) = (Golden::open(name), Checkpoint::open(fixture(name), FAMILIES).unwrap());
        allocates_nothing(
            &golden,
            engine(&checkpoint, alone(&checkpoint), overlap),
            &format!("{name}, {overlap}"),
        );
        let ranks = engine(&checkpoint, on_two_ranks(&checkpoint), overlap);
        allocates_nothing(&golden, ranks, &format!("{name}, {overlap}, on two ranks"));
    }
}

fn allocates_nothing<X: Executor>(golden: &Golden, mut engine: Engine<X>, label: &str) {
    let mut tokens = 0;
    let rules = Rules::new(vec![(5, 2.0)], vec![9], &[vec![1, 2], vec![3]]).unwrap();
    let allowing = rules.clone().allowing((0..100).collect()).unwrap();
    let rules = [rules, allowing].map(Arc::new);
    let mut run = |engine: &mut Engine<X>, requests: u32| {
        for i in 0..requests {
            let sampling = SamplingParams {
                temperature: [0.0, 0.8][i as usize % 2],
                top_k: [0, 40, 0][i as usize % 3],
                top_p: [1.0, 0.9][i as usize / 2 % 2],
                min_p: [0.0, 0.0, 0.05][i as usize % 3],
                repetition_penalty: [1.0, 1.0, 1.1][i as usize % 3],
                frequency_penalty: [0.0, 0.5][i as usize / 2 % 2],
                min_tokens: i % 4,
                seed: u64::from(i),
                max_tokens: 10 + 3 * i,
                ignore_eos: i % 2 == 0,
                logprobs: (i % 5 == 0).then_some(4),
                prompt_logprobs: (i % 3 == 0).then_some(PromptLogprobs { from: i, top: 3 }),
                ..SamplingParams::default()
            };
            let prompt = &golden.examples[i as usize % golden.examples.len()].prompt;
            let rules = (i % 2 == 0).then_some(&rules[i as usize / 2 % 2]);
            engine.submit(Request { rules, ..Request::new(prompt, sampling) }).unwrap();
        }
        while !engine.is_idle() {
            engine.step(&mut |event| tokens += u64::from(matches!(event, Event::Token { .. }))).unwrap();
        }
    };
    // The thread pool starts its threads, and sizes its queues, on its first work; the first request asks for all that may be asked.
    run(&mut engine, 1);
    engine.clear_prefix_cache();
    engine.reset_stats();
    COUNTING.store(true, Ordering::Relaxed);
    run(&mut engine, 40);
    COUNTING.store(false, Ordering::Relaxed);

    assert_eq!(ALLOCATIONS.swap(0, Ordering::Relaxed), 0, "{label}");
    let stats = engine.stats();
    assert_eq!(stats.finished, 40);
    assert!(stats.retractions > 0 && stats.padding_rows > 0, "{stats:?}");
    assert!(stats.steps() - stats.decode_steps > 40, "{stats:?}");
    assert!(tokens > 1000, "{tokens}");
    engine.check();
}
