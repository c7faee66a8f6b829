//! A counting allocator: once everything is built, neither single operations nor replays allocate.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use common::{Draw, Layer, Machine, Random, Sequence, dims, limits};
use minisgl_core::backend::{Device, KvLayer, Ops, Queue, Sampler};
use minisgl_core::sampling::{LOGPROB_WORDS, SlotState};
use minisgl_core::tensor::Dtype;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory that is allocated.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_allocate_nothing() {
    let mut random = Random(1);
    let mut machine = Machine::new(dims(64, 4, 2, 16, 96, 500), limits(24, 64, 8), &mut random);
    let mut weight = |rows, cols| machine.weight(&mut random, rows, cols, Dtype::Bf16).0;
    let (table, qkv, o) = (weight(500, 64), weight(128, 64), weight(64, 64));
    let (gate_up, down, head) = (weight(192, 64), weight(64, 96), weight(500, 64));
    let mut scale = |width| machine.scale(&mut random, width, Dtype::F32).0;
    let (norm, norms) = (scale(64), [scale(64), scale(64), scale(16), scale(16)]);
    let layer = Layer { norms, qkv, o, gate_up, down }.weights();
    let rope = machine.floats(&[0.6, 0.8].repeat(64 * 8));
    let kv_len = machine.kv_len();
    let kv = KvLayer { k: machine.alloc(kv_len), v: machine.alloc(kv_len), wide: None };
    let (gathered, logits) = (machine.alloc(24 * 64), machine.alloc(24 * 500));
    let (tokens, logprobs) = (machine.words(&[0; 24]), machine.alloc(24 * LOGPROB_WORDS));
    let sequences: Vec<_> = (0..24).map(|slot| Sequence { slot, cached: slot * 2, new: 1 }).collect();
    let sampling = |i: usize| {
        let (temperature, min_p) = (i as f32 * 0.1, 0.01);
        let state = SlotState { temperature, top_k: 400, top_p: 0.9, min_p, ..SlotState::default() };
        Draw { logprobs: 6, ..state.into() }
    };
    let (step, _, _) = machine.step(&mut random, &sequences, sampling, None);
    let mut pinned = machine.cpu.alloc_pinned(24).unwrap();
    let mut event = machine.cpu.event().unwrap();

    let forward = |machine: &mut Machine| {
        let cpu = &mut machine.cpu;
        cpu.begin_step(&step).unwrap();
        cpu.embed(&step, table).unwrap();
        cpu.decoder_layers(&step, &[layer; 2], &[Some(rope); 2], &[kv; 2]).unwrap();
        cpu.final_norm(&step, norm, gathered).unwrap();
        cpu.logits(&step, gathered, head, logits).unwrap();
        cpu.sample(&step, logits, tokens).unwrap();
        cpu.logprobs(&step, logits, tokens, logprobs).unwrap();
    };
    machine.cpu.begin_capture().unwrap();
    forward(&mut machine);
    let graph = machine.cpu.end_capture().unwrap();

    let mut rounds = |rounds| {
        let before = ALLOCATIONS.load(Relaxed);
        for _ in 0..rounds {
            forward(&mut machine);
            machine.cpu.replay(&graph).unwrap();
            machine.cpu.download(Queue::Copy, tokens, 24, &mut pinned).unwrap();
            machine.cpu.record(Queue::Copy, &mut event).unwrap();
        }
        ALLOCATIONS.load(Relaxed) - before
    };
    rounds(1);
    assert_eq!(rounds(200), 0);
}
