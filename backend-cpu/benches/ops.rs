//! The operations that take a step's time, as rates: items are floating-point operations, or logits for sampling.
//!
//!     cargo bench -p minisgl-cpu

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Machine, Random, Sequence, dims, limits};
use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use minisgl_core::backend::{Ops, Sampler};
use minisgl_core::sampling::SlotState;
use minisgl_core::spec::Attention;
use minisgl_core::tensor::Dtype;

fn main() {
    divan::main();
}

/// `(tokens, rows, cols)`
#[divan::bench(args = [(1, 2048, 64), (256, 2048, 64), (1024, 256, 64), (1, 4096, 1024), (16, 4096, 1024), (256, 4096, 1024)])]
fn linear(bencher: Bencher<'_, '_>, (tokens, rows, cols): (usize, usize, usize)) {
    let random = &mut Random(1);
    let mut machine = Machine::new(dims(8, 2, 1, 4, 8, 16), limits(1, 16, 4), random);
    let (weight, _) = machine.weight(random, rows, cols, Dtype::Bf16);
    let (x, out) = (machine.floats(&random.floats(tokens * cols)), machine.alloc(tokens * rows));
    bencher
        .counter(ItemsCount::new(2 * tokens * rows * cols))
        .bench_local(|| machine.cpu.linear(tokens as u32, x, weight, out).unwrap());
}

/// `(sequences, tokens of each, context before them, heads, kv_heads, head_dim)`
#[divan::bench(args = [(256, 1, 800, 2, 1, 64), (8, 500, 0, 2, 1, 64), (32, 1, 1000, 16, 8, 128)])]
fn attention(bencher: Bencher<'_, '_>, shape: (u32, u32, u32, u32, u32, u32)) {
    let (rows, new, cached, heads, kv_heads, head_dim) = shape;
    let random = &mut Random(2);
    let dims = dims(8, heads, kv_heads, head_dim, 8, 16);
    let mut machine = Machine::new(dims, limits(rows, cached + new, 32), random);
    let sequences: Vec<_> = (0..rows).map(|slot| Sequence { slot, cached, new }).collect();
    let (step, tokens, _) = machine.step(random, &sequences, common::greedy, None);
    machine.cpu.begin_step(&step).unwrap();
    let kv = machine.kv(random);
    let qkv = random.floats(tokens.len() * dims.qkv_width());
    let (qkv, out) = (machine.floats(&qkv), machine.alloc(tokens.len() * dims.q_width()));
    let pairs: u64 = tokens.iter().map(|token| u64::from(token.position) + 1).sum();
    bencher
        .counter(ItemsCount::new(pairs as usize * dims.q_width() * 4))
        .bench_local(|| machine.cpu.attention(&step, &Attention::plain(), qkv, kv, out).unwrap());
}

#[derive(Debug)]
enum Sampling {
    Greedy,
    Temperature,
    TopKTopP,
}

#[divan::bench(args = [Sampling::Greedy, Sampling::Temperature, Sampling::TopKTopP])]
fn sample(bencher: Bencher<'_, '_>, sampling: &Sampling) {
    let (rows, vocab) = (256, 2048);
    let random = &mut Random(3);
    let mut machine = Machine::new(dims(8, 2, 1, 4, 8, vocab as u32), limits(rows, 16, 16), random);
    let sequences: Vec<_> = (0..rows).map(|slot| Sequence { slot, cached: 3, new: 1 }).collect();
    let drawn = |i: usize| SlotState { temperature: 0.6, seed_low: i as u32, ..SlotState::default() };
    let (step, _, _) = machine.step(
        random,
        &sequences,
        |i| match sampling {
            Sampling::Greedy => common::greedy(i),
            Sampling::Temperature => drawn(i).into(),
            Sampling::TopKTopP => SlotState { top_k: 50, top_p: 0.9, ..drawn(i) }.into(),
        },
        None,
    );
    machine.cpu.begin_step(&step).unwrap();
    let logits = random.floats(rows as usize * vocab);
    let (logits, tokens) = (machine.floats(&logits), machine.words(&vec![0; rows as usize]));
    bencher
        .counter(ItemsCount::new(rows as usize * vocab))
        .bench_local(|| black_box(machine.cpu.sample(&step, logits, tokens)).unwrap());
}
