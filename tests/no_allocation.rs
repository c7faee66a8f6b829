//! The engine's loop allocates nothing: counted over a whole offline run on the CPU backend.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{Golden, fixture};
use minisgl::models::FAMILIES;
use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::local::Local;
use minisgl_core::policy::Policy;
use minisgl_core::request::{Event, Request};
use minisgl_core::rules::Rules;
use minisgl_core::sampling::{PromptLogprobs, SamplingParams};
use minisgl_core::scheduler::{Order, Settings};
use minisgl_core::speculation::Speculation;
use minisgl_cpu::Cpu;
use minisgl_decoder::{Checkpoint, Decoder};

/// Counts allocations of every thread while it is told to.
struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

fn count() {
    if COUNTING.load(Ordering::Relaxed) {
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

fn engine(name: &Path, overlap: bool) -> Engine<Local<Cpu, Decoder<Cpu>>> {
    let checkpoint = Checkpoint::open(name, FAMILIES).unwrap();
    let mut backend = Cpu::new();
    let model = Decoder::load(&mut backend, &checkpoint).unwrap();
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
    Engine::new(backend, model, options).unwrap()
}

#[test]
fn a_whole_run_allocates_nothing_after_construction() {
    COUNTING.store(true, Ordering::Relaxed);
    drop(std::hint::black_box(vec![0u8; 100]));
    COUNTING.store(false, Ordering::Relaxed);
    assert_eq!(ALLOCATIONS.swap(0, Ordering::Relaxed), 1, "the counter counts");
    for (name, overlap) in [("tiny-tied", true), ("tiny-tied", false), ("qwen3-moe", true)] {
        let (golden, mut engine) = (Golden::open(name), engine(&fixture(name), overlap));
        let mut tokens = 0;
        let rules = Rules::new(vec![(5, 2.0)], vec![9], &[vec![1, 2], vec![3]]).unwrap();
        let allowing = rules.clone().allowing((0..100).collect()).unwrap();
        let rules = [rules, allowing].map(Arc::new);
        let mut run = |engine: &mut Engine<Local<Cpu, Decoder<Cpu>>>| {
            for i in 0..40u32 {
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
        // The thread pool starts its threads, and sizes its queues, on its first work.
        run(&mut engine);
        engine.clear_prefix_cache();
        engine.reset_stats();
        COUNTING.store(true, Ordering::Relaxed);
        run(&mut engine);
        COUNTING.store(false, Ordering::Relaxed);

        assert_eq!(ALLOCATIONS.swap(0, Ordering::Relaxed), 0, "{name}, overlap {overlap}");
        let stats = engine.stats();
        assert_eq!(stats.finished, 40);
        assert!(stats.retractions > 0 && stats.padding_rows > 0, "{stats:?}");
        assert!(stats.steps() - stats.decode_steps > 40, "{stats:?}");
        assert!(tokens > 2000);
        engine.check();
    }
}
