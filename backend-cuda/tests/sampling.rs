//! Sampling on the device against core's definition, as `perf::drawn` has it: in f64, by sorting.

mod support;

use half::f16;
use minisgl_core::backend::{Device, Element, Ops, Purpose, Queue, Sampler, Step};
use minisgl_core::batch::{Header, Layout, ROW_WORDS, Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::sampling::{LOGPROB_WORDS, NO_TOKEN, RowLogprobs, SlotState};
use minisgl_core::spec::{DecoderSpec, Dims, LayerSpec};
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::perf::drawn::complaint;
use minisgl_cuda::{Buffer, Cuda, Options};

use support::taken;

const POISON: u32 = 0xdead_beef;

struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        splitmix64(self.0)
    }

    fn fraction(&mut self) -> f64 {
        (self.word() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About normal, by the sum of twelve fractions.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.fraction()).sum::<f64>() - 6.0
    }
}

fn random_logits(random: &mut Random, rows: usize, vocab: usize) -> Vec<f16> {
    (0..rows * vocab).map(|_| f16::from_f64(3.0 * random.normal())).collect()
}

/// A row of a step, and its slot's state.
#[derive(Clone, Copy, Debug)]
struct Draw {
    row: Row,
    state: SlotState,
}

fn random_draw(random: &mut Random, slot: u32, vocab: usize) -> Draw {
    let row = Row {
        slot,
        first_token: slot,
        tokens: 1,
        position: 10 + slot,
        kv_len: 11 + slot,
        sampled: 1,
        ..Row::default()
    };
    let mut state = SlotState {
        temperature: [0.0, 0.6, 1.0, 1.7][random.word() as usize % 4],
        seed_low: random.word() as u32,
        seed_high: random.word() as u32,
        ..SlotState::default()
    };
    let filters = random.word();
    if filters & 1 != 0 {
        state.top_k = [1, 2, 50, vocab as u32 / 2, vocab as u32 + 5][random.word() as usize % 5];
    }
    if filters & 2 != 0 {
        state.top_p = [0.05, 0.5, 0.9, 0.99][random.word() as usize % 4];
    }
    if filters & 4 != 0 {
        state.min_p = [0.02, 0.3, 1.0][random.word() as usize % 3];
    }
    Draw { row, state }
}

/// The same, which asks for log-probabilities.
fn with_logprobs(draw: Draw, logprobs: u32) -> Draw {
    Draw { row: Row { logprobs, ..draw.row }, ..draw }
}

fn limits(rows: u32) -> Limits {
    Limits {
        running: rows,
        queued: 1,
        sequence: 64,
        prefill_tokens: 64,
        page_size: 16,
        pages: 64,
        graph_rows: 0,
    }
}

fn spec(vocab: u32) -> DecoderSpec {
    let dims = Dims {
        layers: 1,
        hidden: 64,
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
        intermediate: 64,
        vocab,
        norm_eps: 1e-6,
    };
    DecoderSpec::uniform(dims, LayerSpec::plain())
}

struct Bench {
    cuda: Cuda,
    limits: Limits,
    plan_words: usize,
    vocab: usize,
}

impl Bench {
    fn new(rows: u32, vocab: usize) -> Bench {
        let mut cuda = Cuda::new(&Options::default()).expect("a GPU");
        let limits = limits(rows);
        let plan_words = cuda.reserve(&spec(vocab as u32), &limits).expect("scratch");
        Bench { cuda, limits, plan_words, vocab }
    }

    fn words(&mut self, words: &[u32]) -> Buffer {
        let buffer = self.cuda.alloc(Purpose::Scratch, Element::Word, words.len()).expect("memory");
        let mut pinned = self.cuda.alloc_pinned(words.len()).expect("pinned memory");
        self.cuda.words_mut(&mut pinned).expect("words").copy_from_slice(words);
        self.cuda.upload(&mut pinned, 0..words.len(), buffer).expect("an upload");
        self.cuda.synchronize().expect("no failure");
        buffer
    }

    fn read(&mut self, buffer: Buffer, words: usize) -> Vec<u32> {
        let mut pinned = self.cuda.alloc_pinned(words).expect("pinned memory");
        self.cuda.download(Queue::Compute, buffer, words, &mut pinned).expect("a download");
        self.cuda.words(&pinned).expect("words").to_vec()
    }

    fn step(&mut self, draws: &[Draw]) -> Step<Buffer> {
        let rows: Vec<Row> = draws.iter().map(|draw| draw.row).collect();
        let layout = Layout::new(&self.limits, self.plan_words);
        let mut words = vec![0u32; layout.words];
        let header = Header {
            rows: rows.len() as u32,
            tokens: rows.len() as u32,
            samples: rows.len() as u32,
            ..Header::default()
        };
        words[..16].copy_from_slice(bytemuck::cast_slice(&[header]));
        words[layout.rows..][..rows.len() * ROW_WORDS].copy_from_slice(bytemuck::cast_slice(&rows));
        let slots = self.limits.running as usize + 1;
        let mut states = vec![SlotState::default(); slots];
        draws.iter().for_each(|draw| states[draw.row.slot as usize] = draw.state);
        let width = self.limits.table_width();
        Step {
            shape: StepShape::decode(rows.len() as u32),
            batch: self.words(&words),
            layout,
            page_table: self.words(&vec![0; slots * width as usize]),
            table_width: width,
            page_size: self.limits.page_size,
            token_pool: self.words(&vec![POISON; slots]),
            slots: self.words(bytemuck::cast_slice(&states)),
        }
    }

    /// Tokens and token pool after sampling these rows.
    fn sample(&mut self, draws: &[Draw], logits: &[f16]) -> (Vec<u32>, Vec<u32>, Vec<RowLogprobs>) {
        let step = self.step(draws);
        let mut packed: Vec<u16> = logits.iter().map(|l| l.to_bits()).collect();
        packed.resize(packed.len().next_multiple_of(2), 0);
        let words: Vec<u32> =
            packed.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect();
        let logits = self.words(&words);
        let tokens = self.words(&vec![POISON; 2 * self.limits.running as usize]);
        let logprobs = self.words(&vec![POISON; 2 * self.limits.running as usize * LOGPROB_WORDS]);
        self.cuda.sample(&step, logits, tokens).expect("a launch");
        self.cuda.logprobs(&step, logits, tokens, logprobs).expect("a launch");
        let words = self.read(logprobs, draws.len() * LOGPROB_WORDS);
        (
            self.read(tokens, draws.len()),
            self.read(step.token_pool, self.limits.running as usize + 1),
            bytemuck::cast_slice(&words).to_vec(),
        )
    }
}

#[test]
#[ignore = "needs a GPU"]
fn every_row_draws_the_token_of_the_definition() {
    let mut random = Random(7);
    for (rows, vocab) in taken([(5, 1001), (1, 768), (33, 1024), (256, 4099), (9, 151_936), (64, 151_936)]) {
        let mut bench = Bench::new(rows, vocab);
        let drawn: Vec<Draw> = (0..rows).map(|slot| random_draw(&mut random, slot, vocab)).collect();
        let logits = random_logits(&mut random, rows as usize, vocab);
        let (tokens, pool, _) = bench.sample(&drawn, &logits);
        for (i, Draw { row, state }) in drawn.iter().enumerate() {
            let own = &logits[i * vocab..][..vocab];
            let own: Vec<f32> = own.iter().map(|logit| logit.to_f32()).collect();
            let complaint = complaint(state, row.kv_len, &own, tokens[i]);
            assert_eq!(complaint, None, "{rows} x {vocab}: row {i}: {state:?}");
            assert_eq!(pool[row.slot as usize], tokens[i], "the pool's token of row {i}");
        }
        assert_eq!(pool[rows as usize], POISON, "a slot that nobody has was written");
        assert_eq!(bench.vocab, vocab);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_row_draws_the_same_token_alone_and_among_others_and_again() {
    let (rows, vocab) = (200, 20_001);
    let mut random = Random(11);
    let mut bench = Bench::new(rows, vocab);
    let drawn: Vec<Draw> = (0..rows).map(|slot| random_draw(&mut random, slot, vocab)).collect();
    let logits = random_logits(&mut random, rows as usize, vocab);
    let (together, ..) = bench.sample(&drawn, &logits);
    let (again, ..) = bench.sample(&drawn, &logits);
    assert_eq!(together, again);
    for i in (0..rows as usize).step_by(17) {
        let (alone, ..) = bench.sample(&drawn[i..=i], &logits[i * vocab..][..vocab]);
        assert_eq!(alone[0], together[i], "row {i}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_row_whose_logits_are_no_numbers_draws_none_and_the_others_theirs() {
    let not_numbers =
        [(f16::NAN, false), (-f16::NAN, false), (f16::INFINITY, false), (f16::NEG_INFINITY, true)];
    let mut random = Random(17);
    for (rows, vocab) in taken([(24, 1), (32, 1001), (33, 1024), (64, 151_936)]) {
        let mut bench = Bench::new(rows, vocab);
        let drawn: Vec<Draw> =
            (0..rows).map(|slot| with_logprobs(random_draw(&mut random, slot, vocab), 3)).collect();
        let mut logits = random_logits(&mut random, rows as usize, vocab);
        let (good, ..) = bench.sample(&drawn, &logits);
        for (i, logits) in logits.chunks_mut(vocab).enumerate().filter(|(i, _)| i % 2 == 1) {
            let (value, everywhere) = not_numbers[i / 2 % 4];
            logits[random.word() as usize % vocab] = value;
            if everywhere {
                logits.fill(value);
            }
        }
        for _ in 0..2 {
            let (tokens, pool, logprobs) = bench.sample(&drawn, &logits);
            for (i, Draw { row, state }) in drawn.iter().enumerate() {
                let expected = if i % 2 == 1 { (NO_TOKEN, 0) } else { (good[i], good[i]) };
                assert_eq!(
                    (tokens[i], pool[row.slot as usize]),
                    expected,
                    "{rows} x {vocab}: row {i}: {state:?}"
                );
                assert_eq!(logprobs[i].len == POISON, i % 2 == 1, "log-probabilities of row {i}");
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_masked_logit_is_never_drawn() {
    let (rows, vocab) = (100, 1024);
    let mut random = Random(19);
    let mut bench = Bench::new(rows, vocab);
    let drawn: Vec<Draw> = (0..rows).map(|slot| random_draw(&mut random, slot, vocab)).collect();
    let mut logits = random_logits(&mut random, rows as usize, vocab);
    for (_, logit) in logits.iter_mut().enumerate().filter(|(i, _)| i % 3 != 0) {
        *logit = f16::NEG_INFINITY;
    }
    let (tokens, ..) = bench.sample(&drawn, &logits);
    for (i, token) in tokens.into_iter().enumerate() {
        assert!(
            (token as usize) < vocab && (i * vocab + token as usize).is_multiple_of(3),
            "row {i} drew {token}"
        );
    }
}

#[test]
#[ignore = "needs a GPU"]
fn logprobs_are_those_of_the_softmax_before_temperature() {
    let mut random = Random(13);
    for (rows, vocab) in taken([(7, 1001), (1, 768), (20, 151_936)]) {
        let mut bench = Bench::new(rows, vocab);
        let drawn: Vec<Draw> =
            (0..rows).map(|slot| with_logprobs(random_draw(&mut random, slot, vocab), slot % 22)).collect();
        let logits = random_logits(&mut random, rows as usize, vocab);
        let (tokens, _, logprobs) = bench.sample(&drawn, &logits);
        for (i, Draw { row, .. }) in drawn.iter().enumerate() {
            if row.logprobs == 0 {
                assert_eq!(logprobs[i].len, POISON, "row {i} asked for none");
                continue;
            }
            let own = &logits[i * vocab..][..vocab];
            let total = own.iter().map(|l| l.to_f64().exp()).sum::<f64>().ln();
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|a, b| own[*b].to_f64().total_cmp(&own[*a].to_f64()).then(a.cmp(b)));
            let given = &logprobs[i];
            assert_eq!(given.len, row.logprobs - 1);
            assert!((f64::from(given.token) - (own[tokens[i] as usize].to_f64() - total)).abs() < 1e-4);
            for (rank, (id, logprob)) in given.top().enumerate() {
                assert_eq!(id as usize, order[rank], "row {i}, rank {rank}");
                assert!((f64::from(logprob) - (own[id as usize].to_f64() - total)).abs() < 1e-4);
            }
        }
    }
}
