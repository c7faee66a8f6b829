//! The model's logits and greedy tokens on the golden checkpoints, driven step by step without an engine.
//!
//! The driver below gives slot s the pages that lie backwards from the pool's end, so that no page's number equals
//! its place in a sequence.

mod support;

use std::fs;

use half::{bf16, f16};
use minisgl_core::backend::{Device, Element, Model, Ops, Purpose, Queue, Sampler, Step};
use minisgl_core::batch::{
    Batch, Dummy, LAST_TOKEN, Layout, PageUpdate, Row, StepShape, Token, packed_rows, zeroed_words,
};
use minisgl_core::config::Limits;
use minisgl_core::request::Ticket;
use minisgl_core::rules::RULE_WORDS;
use minisgl_core::sampling::SLOT_STATE_WORDS;
use minisgl_cpu::Cpu;
use minisgl_decoder::{Checkpoint, Decoder};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use support::golden::{Example, FIXTURES, assert_logits, examples, fixture};
use support::{FAMILIES, TempDir};

/// Tokens of one slot to run next.
#[derive(Clone, Copy)]
struct Run<'a> {
    slot: u32,
    position: u32,
    tokens: &'a [u32],
}

struct Driver {
    cpu: Cpu,
    model: Decoder<Cpu>,
    limits: Limits,
    layout: Layout,
    step: Step<<Cpu as Device>::Buffer>,
    tokens: <Cpu as Device>::Buffer,
    staging: <Cpu as Device>::Pinned,
    results: <Cpu as Device>::Pinned,
    /// All slots have the pages of slot 0.
    pages_shared: bool,
}

impl Driver {
    fn new(checkpoint: &Checkpoint, page_size: u32) -> Driver {
        let (running, sequence) = (40, 192);
        let limits = Limits {
            running,
            queued: 1,
            sequence,
            prefill_tokens: 1200,
            page_size,
            pages: running * sequence.div_ceil(page_size),
            graph_rows: 0,
        };
        limits.check().unwrap();
        let mut cpu = Cpu::new();
        let mut model = Decoder::load(&mut cpu, checkpoint).unwrap();
        let plan_words = model.reserve(&mut cpu, &limits).unwrap();
        model.alloc_pages(&mut cpu, limits.pages, page_size).unwrap();
        let layout = Layout::new(&limits, plan_words);
        let table_width = limits.table_width();
        let mut words = |n: usize| cpu.alloc(Purpose::Scratch, Element::Word, n).unwrap();
        let slots = running as usize + 1;
        let batch = words(layout.words);
        let page_table = words(slots * table_width as usize);
        let token_pool = words(slots);
        let states = words(slots * SLOT_STATE_WORDS);
        let rules = words(slots * RULE_WORDS);
        let history = words((limits.pages as usize + 1) * page_size as usize);
        let masks = words(0);
        let tokens = words(running as usize);
        let shape = StepShape::decode(0);
        let step = Step {
            shape,
            batch,
            layout,
            page_table,
            table_width,
            page_size,
            token_pool,
            slots: states,
            rules,
            history,
            masks,
        };
        let staging = cpu.alloc_pinned(layout.words).unwrap();
        let results = cpu.alloc_pinned(running as usize).unwrap();
        Driver { cpu, model, limits, layout, step, tokens, staging, results, pages_shared: false }
    }

    /// Runs a step, the first runs as decode rows, and gives each run's logits and greedy token.
    fn run(&mut self, decode_rows: usize, runs: &[Run<'_>]) -> Vec<(Vec<f32>, u32)> {
        let batch = self.batch(decode_rows, runs);
        let shape = batch.shape();
        let dummy = Dummy { slot: self.limits.running, location: self.limits.pages * self.limits.page_size };
        let mut words = zeroed_words(&self.layout);
        let len = batch.pack(&self.layout, shape, dummy, 0, &mut words);
        let rows = packed_rows(&self.layout, runs.len(), &words).to_vec();
        self.model.plan(&self.cpu, shape, &rows, &mut words[self.layout.plan..self.layout.rows]);
        self.cpu.words_mut(&mut self.staging).unwrap().copy_from_slice(&words);
        self.cpu.upload(&mut self.staging, 0..len, self.step.batch).unwrap();
        self.step.shape = shape;
        self.model.forward(&mut self.cpu, &self.step).unwrap();
        self.model.norm(&mut self.cpu, &self.step).unwrap();
        self.model.head(&mut self.cpu, &self.step).unwrap();
        self.cpu.sample(&self.step, Model::<Cpu>::logits(&self.model), self.tokens).unwrap();
        self.cpu.synchronize().unwrap();
        self.cpu.download(Queue::Compute, self.tokens, runs.len(), &mut self.results).unwrap();
        let tokens = self.cpu.words(&self.results).unwrap()[..runs.len()].to_vec();
        let vocab = self.model.dims().vocab;
        let logits = self.model.logits_buffer().unwrap();
        let logits = self.cpu.read_logits(logits, vocab, 0..runs.len()).unwrap();
        logits.chunks_exact(vocab as usize).map(<[f32]>::to_vec).zip(tokens).collect()
    }

    /// Packs the runs, with a page-table update for each page that a run is the first of its slot to enter.
    fn batch(&self, decode_rows: usize, runs: &[Run<'_>]) -> Batch {
        let page_size = self.limits.page_size;
        let mut batch = Batch::new(&self.limits);
        for (i, run) in runs.iter().enumerate() {
            let kv_len = run.position + run.tokens.len() as u32;
            let row = Row {
                slot: run.slot,
                first_token: batch.tokens().len() as u32,
                tokens: run.tokens.len() as u32,
                position: run.position,
                kv_len,
                sampled: 1,
                ..Row::default()
            };
            let first_page = if self.pages_shared { 0 } else { run.position.div_ceil(page_size) };
            for i in first_page..kv_len.div_ceil(page_size) {
                let index = run.slot * self.step.table_width + i;
                batch.push_update(PageUpdate { index, page: self.page(run.slot, i) });
            }
            let mut tokens = (run.position..).zip(run.tokens).map(|(position, id)| {
                let page = self.page(run.slot, position / page_size);
                let location = page * page_size + position % page_size;
                Token { id: *id, slot: run.slot, position, location }
            });
            let owner = Ticket { entry: run.slot, generation: 0 };
            if i < decode_rows {
                batch.push_decode_row(owner, row, tokens.next().unwrap());
            } else {
                batch.push_prefill_row(owner, row);
                tokens.for_each(|token| batch.push_token(token));
            }
        }
        batch
    }

    fn page(&self, slot: u32, i: u32) -> u32 {
        let slot = if self.pages_shared { 0 } else { slot };
        self.limits.pages - 1 - (slot * self.step.table_width + i)
    }
}

/// One step in which row i runs the prompt up to the i-th position asked for, in a slot of its own.
#[track_caller]
fn check_prefill(driver: &mut Driver, what: &str, example: &Example) {
    let first = example.prompt.len() - example.logits.len();
    let runs: Vec<Run<'_>> = (0..example.logits.len())
        .map(|i| Run { slot: i as u32, position: 0, tokens: &example.prompt[..=first + i] })
        .collect();
    let results = driver.run(0, &runs);
    for (i, ((logits, _), expected)) in results.iter().zip(&example.logits).enumerate() {
        assert_logits(&format!("{what}, position {}", first + i), logits, expected);
    }
}

fn each_example(page_size: u32, mut check: impl FnMut(&mut Driver, &str, &Example)) {
    for name in FIXTURES {
        let dir = fixture(name);
        let checkpoint = Checkpoint::open(&dir, FAMILIES).unwrap();
        for (i, example) in examples(&dir).iter().enumerate() {
            let mut driver = Driver::new(&checkpoint, page_size);
            check(&mut driver, &format!("{name}, example {i}"), example);
        }
    }
}

#[test]
fn prefill_gives_the_expected_logits_at_every_position() {
    each_example(16, check_prefill);
}

/// The golden weights are bf16; f32 holds them exactly and f16 but for the smallest.
#[test]
fn weights_stored_as_f16_or_f32_give_the_expected_logits() {
    let dir = fixture("tiny-tied");
    let stored = fs::read(dir.join("model.safetensors")).unwrap();
    for dtype in [Dtype::F16, Dtype::F32] {
        let converted = TempDir::new();
        converted.write("config.json", fs::read(dir.join("config.json")).unwrap());
        converted.write("model.safetensors", convert(&stored, dtype));
        let mut driver = Driver::new(&Checkpoint::open(converted.path(), FAMILIES).unwrap(), 16);
        for (i, example) in examples(&dir).iter().enumerate() {
            check_prefill(&mut driver, &format!("{dtype:?}, example {i}"), example);
        }
    }
}

/// A safetensors file of bf16 with its elements in another type.
fn convert(file: &[u8], dtype: Dtype) -> Vec<u8> {
    let tensors = SafeTensors::deserialize(file).unwrap().tensors();
    let bytes = |tensor: &TensorView<'_>| -> Vec<u8> {
        let elements =
            tensor.data().chunks_exact(2).map(|bytes| bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
        match dtype {
            Dtype::F16 => elements.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
            _ => elements.flat_map(f32::to_le_bytes).collect(),
        }
    };
    let converted: Vec<(String, Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec(), bytes(tensor))).collect();
    let views = converted
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn decode_gives_the_expected_logits_at_every_position() {
    each_example(32, |driver, what, example| {
        let first = example.prompt.len() - example.logits.len();
        for position in 0..example.prompt.len() {
            let run =
                Run { slot: 3, position: position as u32, tokens: &example.prompt[position..=position] };
            let (logits, _) = driver.run(1, &[run]).remove(0);
            if position >= first {
                assert_logits(
                    &format!("{what}, position {position}"),
                    &logits,
                    &example.logits[position - first],
                );
            }
        }
    });
}

#[test]
fn greedy_tokens_come_out_as_expected_and_go_back_in_through_the_token_pool() {
    each_example(16, |driver, what, example| {
        let run = Run { slot: 7, position: 0, tokens: &example.prompt };
        let (mut logits, token) = driver.run(0, &[run]).remove(0);
        let mut greedy = vec![token];
        while greedy.len() < example.greedy.len() {
            let position = (example.prompt.len() + greedy.len() - 1) as u32;
            let run = Run { slot: 7, position, tokens: &[LAST_TOKEN] };
            let (next_logits, token) = driver.run(1, &[run]).remove(0);
            logits = next_logits;
            greedy.push(token);
        }
        assert_eq!(greedy, example.greedy, "{what}");
        assert_logits(&format!("{what}, last token"), &logits, &example.last_logits);
    });
}

/// The contract of [`Ops`](minisgl_core::backend::Ops): in each layer keys and values of all rows are stored before any row
/// attends. So a row may map pages that are filled beside it, wherever in the step the row that fills them stands.
#[test]
fn a_row_attends_to_what_other_rows_of_its_step_store() {
    each_example(16, |driver, what, example| {
        driver.pages_shared = true;
        let expected = example.logits.last().unwrap();
        let len = example.prompt.len();
        for split in [len - 1, len / 2] {
            let before = Run { slot: 0, position: 0, tokens: &example.prompt[..split] };
            let after = Run { slot: 1, position: split as u32, tokens: &example.prompt[split..] };
            let is_one_token = usize::from(split + 1 == len);
            for decode_rows in 0..=is_one_token {
                let (logits, _) = driver.run(decode_rows, &[after, before]).remove(0);
                assert_logits(&format!("{what}, {decode_rows} decode rows, from {split}"), &logits, expected);
                // What lies in the pages is of no use to the next round.
                let other: Vec<u32> = example.prompt.iter().map(|id| (id + 1) % 50).collect();
                driver.run(0, &[Run { slot: 0, position: 0, tokens: &other }]);
            }
        }
    });
}
