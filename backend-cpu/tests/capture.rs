//! Capture and replay, and that a row's bits depend on that row alone.

mod common;

use common::{Layer, Machine, Random, Sequence, bits, dims, limits};
use minisgl_core::backend::{Device, KvLayer, Ops, Sampler, Step};
use minisgl_core::batch::{ROW_WORDS, StepShape};
use minisgl_core::sampling::SlotState;
use minisgl_core::tensor::Dtype;
use minisgl_cpu::{Buffer, CpuError, Weight};

/// A model of two equal layers with random weights, and its buffers.
struct Model {
    machine: Machine,
    table: Weight,
    layer: Layer,
    norm: Weight,
    head: Weight,
    rope: Buffer,
    kv: [KvLayer<Buffer>; 2],
    gathered: Buffer,
    logits: Buffer,
    tokens: Buffer,
}

const RUNNING: u32 = 9;
const VOCAB: usize = 203;

impl Model {
    /// The same weights for the same seed, whatever the page size.
    fn new(seed: u64, page_size: u32) -> Model {
        let random = &mut Random(seed);
        let dims = dims(40, 6, 2, 10, 52, VOCAB as u32);
        let mut machine = Machine::new(dims, limits(RUNNING, 160, page_size), &mut Random(seed + 1));
        let mut weight = |rows, cols| machine.weight(random, rows, cols, Dtype::Bf16).0;
        let table = weight(VOCAB, 40);
        let (qkv, o) = (weight(100, 40), weight(40, 60));
        let (gate_up, down, head) = (weight(104, 40), weight(40, 52), weight(VOCAB, 40));
        let mut scale = |width| machine.scale(random, width, Dtype::F32).0;
        let (attention, mlp, norm) = (scale(40), scale(40), scale(40));
        let layer = Layer { norms: [attention, mlp, scale(10), scale(10)], qkv, o, gate_up, down };
        let rope: Vec<f32> = (0..160 * 5).flat_map(|i| [(i as f32).cos(), (i as f32).sin()]).collect();
        let rope = machine.floats(&rope);
        let kv_len = machine.kv_len();
        let kv = [(); 2].map(|()| KvLayer { k: machine.alloc(kv_len), v: machine.alloc(kv_len), wide: None });
        let gathered = machine.poisoned(RUNNING as usize * 40);
        let logits = machine.poisoned(RUNNING as usize * VOCAB);
        let tokens = machine.words(&[u32::MAX; RUNNING as usize]);
        Model { machine, table, layer, norm, head, rope, kv, gathered, logits, tokens }
    }

    fn forward(&mut self, step: &Step<Buffer>) {
        let (cpu, layer) = (&mut self.machine.cpu, self.layer.weights());
        cpu.begin_step(step).unwrap();
        cpu.embed(step, self.table).unwrap();
        cpu.decoder_layers(step, &[layer; 2], &[Some(self.rope); 2], &self.kv).unwrap();
        cpu.final_norm(step, self.norm, self.gathered).unwrap();
        cpu.logits(step, self.gathered, self.head, self.logits).unwrap();
        cpu.sample(step, self.logits, self.tokens).unwrap();
    }

    /// The bits of each row's logits, and the tokens.
    fn results(&mut self, rows: usize) -> (Vec<Vec<u32>>, Vec<u32>) {
        let logits = self.machine.read(self.logits, rows * VOCAB);
        let tokens = self.machine.read_words(self.tokens, rows);
        (logits.chunks(VOCAB).map(bits).collect(), tokens)
    }

    /// Runs a step eagerly.
    fn run(&mut self, seed: u64, sequences: &[(u32, u32, u32)]) -> (Vec<Vec<u32>>, Vec<u32>) {
        let step = self.step(seed, sequences, None);
        self.forward(&step);
        self.results(sequences.len())
    }

    /// Puts a step of `(slot, cached, new)` on the device; token ids depend on the seed and the order alone.
    fn step(&mut self, seed: u64, sequences: &[(u32, u32, u32)], shape: Option<StepShape>) -> Step<Buffer> {
        let sequences: Vec<_> =
            sequences.iter().map(|&(slot, cached, new)| Sequence { slot, cached, new }).collect();
        let sampling = |i| {
            let state =
                SlotState { temperature: i as f32 * 0.5, top_p: 0.9, seed_low: 5, ..SlotState::default() };
            state.into()
        };
        self.machine.step(&mut Random(seed), &sequences, sampling, shape).0
    }

    /// Row `i` of a step, run alone with the token that it has in that step.
    fn run_one_of(&mut self, seed: u64, sequences: &[(u32, u32, u32)], i: usize) -> (Vec<u32>, u32) {
        let step = self.step(seed, sequences, None);
        let mut words = self.machine.read_words(self.machine.batch, self.machine.layout.words);
        let layout = step.layout;
        words.copy_within(layout.rows + i * ROW_WORDS..layout.rows + (i + 1) * ROW_WORDS, layout.rows);
        words.copy_within(layout.tokens + i * 4..layout.tokens + (i + 1) * 4, layout.tokens);
        words[layout.rows + 1] = 0; // first_token
        let batch = self.machine.batch;
        self.machine.write(batch, &words);
        let step = self.machine.step_of(StepShape::decode(1));
        self.forward(&step);
        let (logits, tokens) = self.results(1);
        (logits[0].clone(), tokens[0])
    }
}

#[test]
fn a_replay_does_what_the_operations_do_with_the_batch_of_the_moment() {
    let prompts = [(0, 0, 30), (4, 0, 71), (2, 0, 9)];
    let decodes = [(0, 30, 1), (4, 71, 1), (2, 9, 1)];
    let mut eager = Model::new(1, 8);
    eager.run(7, &prompts);

    let mut recorded = Model::new(1, 8);
    let prefill = recorded.step(7, &prompts, None);
    recorded.forward(&prefill);
    let before = recorded.results(3);
    let padded = recorded.machine.step_of(StepShape::decode(8));
    recorded.machine.cpu.begin_capture().unwrap();
    recorded.forward(&padded);
    let graph = recorded.machine.cpu.end_capture().unwrap();
    assert_eq!(recorded.results(3), before, "recording runs nothing");

    for step in 0..3 {
        let decodes = decodes.map(|(slot, cached, new)| (slot, cached + step, new));
        let expected = eager.run(u64::from(step), &decodes);
        recorded.step(u64::from(step), &decodes, Some(StepShape::decode(8)));
        recorded.machine.cpu.replay(&graph).unwrap();
        assert_eq!(recorded.results(3), expected);
        let (padding, _) = recorded.results(8);
        assert!(padding.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "padding rows too");
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_the_batch() {
    let prompts = [(0, 0, 100), (1, 0, 3), (2, 0, 64), (3, 0, 65), (4, 0, 1), (5, 0, 128)];
    let decodes: Vec<_> = prompts.iter().map(|&(slot, _, new)| (slot, new, 1)).collect();
    let mut together = Model::new(2, 16);
    together.run(1, &prompts);
    let (expected, _) = together.run(2, &decodes);
    for (i, expected) in expected.iter().enumerate() {
        let (alone, _) = together.run_one_of(2, &decodes, i);
        assert_eq!(&alone, expected, "row {i} alone");
    }
}

#[test]
fn bits_do_not_depend_on_page_size_or_chunks() {
    let mut expected = None;
    for page_size in [1, 4, 32, 128] {
        let mut model = Model::new(3, page_size);
        let whole = model.run(9, &[(3, 0, 150)]);
        assert_eq!(*expected.get_or_insert(whole.clone()), whole, "pages of {page_size}");
    }
    for chunk in [7, 50, 149] {
        let mut model = Model::new(3, 16);
        let step = model.step(9, &[(3, 0, 150)], None);
        let batch = model.machine.read_words(step.batch, step.layout.words);
        let mut last = None;
        for first in (0..150usize).step_by(chunk) {
            let tokens = chunk.min(150 - first);
            let mut words = batch.clone();
            let from = step.layout.tokens + first * 4;
            words.copy_within(from..from + tokens * 4, step.layout.tokens);
            let row = &mut words[step.layout.rows..];
            (row[2], row[3], row[4]) = (tokens as u32, first as u32, (first + tokens) as u32);
            model.machine.write(step.batch, &words);
            let shape = StepShape { tokens: tokens as u32, ..step.shape };
            let step = model.machine.step_of(shape);
            model.forward(&step);
            last = Some(model.results(1));
        }
        assert_eq!(last, expected, "chunks of {chunk}");
    }
}

/// Runs steps of `(slot, cached, ids)`, and gives the bits of each row's logits in the last one. Slot 1 maps slot 0's first pages.
fn last_of(steps: &[&[(u32, u32, &[u32])]]) -> Vec<Vec<u32>> {
    let mut model = Model::new(5, 16);
    let shared = model.machine.pages[0][..2].to_vec();
    model.machine.pages[1][..2].copy_from_slice(&shared);
    let mut last = Vec::new();
    for rows in steps {
        let ids: Vec<u32> = rows.iter().flat_map(|(.., ids)| ids.iter().copied()).collect();
        let sequence =
            |&(slot, cached, ids): &(u32, u32, &[u32])| Sequence { slot, cached, new: ids.len() as u32 };
        let sequences: Vec<_> = rows.iter().map(sequence).collect();
        let (step, ..) = model.machine.step_with(&ids, &sequences, common::greedy, None);
        model.forward(&step);
        last = model.results(rows.len()).0;
    }
    last
}

#[test]
fn rows_of_a_step_see_what_other_rows_of_it_store() {
    let prompt: Vec<u32> = (0..32).map(|i| i * 37 % 200).collect();
    let (behind, others) = ([7, 150, 3, 99, 42], [11; 40]);
    // A prompt whose beginning is computed beside it, by a row before or behind its own.
    let apart = last_of(&[&[(0, 0, &prompt)], &[(1, 32, &behind)]]);
    let reader_first = last_of(&[&[(1, 32, &behind), (2, 0, &others), (0, 0, &prompt)]]);
    let reader_last = last_of(&[&[(0, 0, &prompt), (2, 0, &others), (1, 32, &behind)]]);
    assert_eq!([&reader_first[0], &reader_last[2]], [&apart[0]; 2]);
    assert_ne!(last_of(&[&[(1, 32, &behind)]])[0], apart[0], "without that row it would be another");
    // Decode rows at consecutive positions of one sequence, as drafts are.
    let one_by_one = last_of(&[&[(0, 0, &prompt)], &[(0, 32, &[5])], &[(0, 33, &[6])], &[(0, 34, &[8])]]);
    let at_once = last_of(&[&[(0, 0, &prompt)], &[(0, 32, &[5]), (0, 33, &[6]), (0, 34, &[8])]]);
    assert_eq!(at_once[2], one_by_one[0]);
}

#[test]
fn what_cannot_be_recorded_says_so() {
    let mut model = Model::new(4, 16);
    let cpu = &mut model.machine.cpu;
    assert!(matches!(cpu.end_capture(), Err(CpuError::Recording(_))));
    let mut pinned = cpu.alloc_pinned(4).unwrap();
    let mut event = cpu.event().unwrap();
    cpu.begin_capture().unwrap();
    assert!(matches!(cpu.begin_capture(), Err(CpuError::Recording(_))));
    assert!(matches!(cpu.upload(&mut pinned, 0..4, model.tokens), Err(CpuError::Recording(_))));
    assert!(matches!(
        cpu.record(minisgl_core::backend::Queue::Compute, &mut event),
        Err(CpuError::Recording(_))
    ));
    let graph = cpu.end_capture().unwrap();
    cpu.replay(&graph).unwrap();
}
