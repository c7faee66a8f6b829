//! Sampling on the device against the CPU's, as `minisgl_perf::drawn` judges it.

#[path = "../../backend-cpu/tests/common/processors.rs"]
#[allow(dead_code, reason = "the CPU's tests use all of it")]
mod processors;
mod support;

use half::f16;
use minisgl_core::backend::{Device, Element, Ops, Purpose, Queue, Sampler, Step};
use minisgl_core::batch::{Header, Layout, ROW_WORDS, Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::constraint::mask_words;
use minisgl_core::rules::{RULE_WORDS, Rules, biased, penalized};
use minisgl_core::sampling::{LOGPROB_WORDS, NO_TOKEN, RowLogprobs, SamplingParams, SlotState};
use minisgl_core::spec::{DecoderSpec, Dims, LayerSpec};
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::{Buffer, Cuda, Options};
use minisgl_perf::drawn::complaint;

use processors::{Case, DRAWS};
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
    /// `[rows, mask_words]`.
    masks: Vec<u32>,
}

impl Bench {
    fn new(rows: u32, vocab: usize) -> Bench {
        Bench::with(limits(rows), vocab)
    }

    fn with(limits: Limits, vocab: usize) -> Bench {
        let mut cuda = Cuda::new(&Options::default()).expect("a GPU");
        let plan_words = cuda.reserve(&spec(vocab as u32), &limits).expect("scratch");
        Bench { cuda, limits, plan_words, vocab, masks: vec![u32::MAX] }
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
        let locations = (self.limits.pages as usize + 1) * self.limits.page_size as usize;
        Step {
            shape: StepShape::decode(rows.len() as u32),
            batch: self.words(&words),
            layout,
            page_table: self.words(&vec![0; slots * width as usize]),
            table_width: width,
            page_size: self.limits.page_size,
            token_pool: self.words(&vec![POISON; slots]),
            slots: self.words(bytemuck::cast_slice(&states)),
            rules: self.words(&vec![0; slots * RULE_WORDS]),
            history: self.words(&vec![0; locations]),
            masks: self.words(&self.masks.clone()),
        }
    }

    /// A buffer of logits.
    fn logits(&mut self, logits: &[f16]) -> Buffer {
        let mut packed: Vec<u16> = logits.iter().map(|l| l.to_bits()).collect();
        packed.resize(packed.len().next_multiple_of(2), 0);
        let words: Vec<u32> =
            packed.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect();
        self.words(&words)
    }

    /// Tokens and token pool after sampling these rows.
    fn sample(&mut self, draws: &[Draw], logits: &[f16]) -> (Vec<u32>, Vec<u32>, Vec<RowLogprobs>) {
        let step = self.step(draws);
        let logits = self.logits(logits);
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
fn the_sign_of_a_zero_changes_neither_a_token_nor_a_rank() {
    let mut random = Random(29);
    for (rows, vocab) in taken([(60, 16), (33, 1001), (64, 4099)]) {
        let mut bench = Bench::new(rows, vocab);
        let drawn: Vec<Draw> =
            (0..rows).map(|slot| with_logprobs(random_draw(&mut random, slot, vocab), 21)).collect();
        let values = [0.0, -0.0, 1.0, -1.0, -0.5].map(f16::from_f32);
        let signed: Vec<f16> =
            (0..rows as usize * vocab).map(|_| values[random.word() as usize % 5]).collect();
        let plain: Vec<f16> = signed.iter().map(|logit| f16::from_f32(logit.to_f32() + 0.0)).collect();
        let [signed, plain] = [signed, plain].map(|logits| bench.sample(&drawn, &logits));
        assert!(signed == plain, "{rows} x {vocab}");
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

/// What a row asks for, and the tokens of its sequence.
struct Edits {
    params: SamplingParams,
    biases: Vec<(u32, f32)>,
    endings: Vec<u32>,
    bad_words: Vec<Vec<u32>>,
    prompt_len: u32,
    tokens: Vec<u32>,
}

impl Edits {
    fn random(random: &mut Random, vocab: usize, len: usize) -> Edits {
        let mut below = |bound: usize| random.word() as usize % bound.max(1);
        let ids = [20.min(vocab), vocab][below(2)];
        let tokens: Vec<u32> = (0..len).map(|_| below(ids) as u32).collect();
        let params = SamplingParams {
            temperature: [0.0, 0.8][below(2)],
            top_k: [0, 5][below(2)],
            repetition_penalty: [1.0, 1.2, 0.5, 1e30, 1e-30][below(5)],
            presence_penalty: [0.0, 0.7, -2.0, 2.0][below(4)],
            frequency_penalty: [0.0, 0.3, -2.0, 2.0][below(4)],
            min_tokens: [0, 5, len as u32][below(3)],
            ..SamplingParams::default()
        };
        let mut biases: Vec<(u32, f32)> =
            (0..below(1025)).map(|_| (below(vocab) as u32, below(200) as f32 - 100.0 + 0.3)).collect();
        biases.sort_by_key(|(id, _)| *id);
        biases.dedup_by_key(|(id, _)| *id);
        let bad_words = (0..below(40)).map(|_| {
            let mut word = tokens[len - below(len.min(5))..].to_vec();
            word.push(below(vocab) as u32);
            word
        });
        let bad_words = bad_words.collect();
        let endings = (0..below(9)).map(|_| below(vocab) as u32).collect();
        Edits { params, biases, endings, bad_words, prompt_len: below(len + 1) as u32, tokens }
    }

    fn state(&self) -> (SlotState, Vec<u32>) {
        let rules = Rules::new(self.biases.clone(), vec![], &self.bad_words).expect("few rules");
        let mut state = self.params.slot_state(self.prompt_len);
        rules.apply(self.endings.len(), &mut state);
        (state, rules.words(self.endings.iter().copied()).collect())
    }

    /// Core's definition, rounded to f16 behind each step.
    fn edited(&self, logits: &[f16]) -> Vec<f16> {
        let (state, _) = self.state();
        let mut logits = logits.to_vec();
        let output = &self.tokens[self.prompt_len as usize..];
        let mut edit = |id: u32, edit: &dyn Fn(f32) -> f32| {
            let logit = &mut logits[id as usize];
            if logit.is_finite() {
                *logit = f16::from_f32(edit(logit.to_f32()));
            }
        };
        if (output.len() as u32) < self.params.min_tokens {
            self.endings.iter().for_each(|id| edit(*id, &|_| f32::NEG_INFINITY));
        }
        for (last, before) in self.bad_words.iter().filter_map(|word| word.split_last()) {
            if output.ends_with(before) {
                edit(*last, &|_| f32::NEG_INFINITY);
            }
        }
        self.biases.iter().for_each(|(id, bias)| edit(*id, &|logit| biased(logit, *bias)));
        let mut seen = std::collections::BTreeMap::new();
        for (position, id) in (0..).zip(&self.tokens) {
            *seen.entry(*id).or_insert(0) += u32::from(position >= self.prompt_len);
        }
        if state.penalizes() {
            seen.iter().for_each(|(id, count)| edit(*id, &|logit| penalized(logit, *count, &state)));
        }
        logits
    }
}

#[test]
#[ignore = "needs a GPU"]
fn logits_are_edited_as_the_definition_says_and_the_token_is_theirs() {
    let mut random = Random(23);
    for (rows, vocab, len) in
        taken([(9, 17, 30), (33, 1024, 200), (7, 6145, 3000), (5, 20_001, 20_000), (40, 151_936, 2000)])
    {
        let page_size = 16;
        let sequence = len as u32 + page_size;
        let pages = rows * sequence.div_ceil(page_size);
        let limits = Limits { sequence, page_size, pages, ..limits(rows) };
        let mut bench = Bench::with(limits, vocab);
        let all: Vec<Edits> = (0..rows)
            .map(|_| {
                let len = 1 + random.word() as usize % len;
                Edits::random(&mut random, vocab, len)
            })
            .collect();
        let slots: Vec<_> = all.iter().map(Edits::state).collect();
        let of_rows: Vec<_> = slots
            .into_iter()
            .zip(&all)
            .map(|((state, rules), edits)| (state, rules, edits.tokens.as_slice()))
            .collect();
        let (step, draws) = step_behind(&mut bench, &of_rows);
        let mut logits = random_logits(&mut random, rows as usize, vocab);
        for (i, value) in [f16::NEG_INFINITY, f16::NAN, f16::MAX].into_iter().enumerate() {
            logits[i * vocab + random.word() as usize % vocab] = value;
        }
        let (buffer, tokens) = (bench.logits(&logits), bench.words(&vec![POISON; 2 * rows as usize]));
        bench.cuda.sample(&step, buffer, tokens).expect("a launch");
        let tokens = bench.read(tokens, rows as usize);
        let words = bench.read(buffer, (rows as usize * vocab).div_ceil(2));
        let edited: &[u16] = bytemuck::cast_slice(&words);
        for (i, edits) in all.iter().enumerate() {
            let expected = edits.edited(&logits[i * vocab..][..vocab]);
            let got = &edited[i * vocab..][..vocab];
            let wrong = (0..vocab).find(|id| expected[*id].to_bits() != got[*id]);
            assert_eq!(wrong, None, "{rows} x {vocab}: row {i}: {:?}", edits.params);
            let numbers: Vec<f32> = expected.iter().map(|logit| logit.to_f32()).collect();
            let none = numbers.iter().any(|x| x.is_nan()) || numbers.iter().all(|x| *x == f32::NEG_INFINITY);
            if none {
                assert_eq!(tokens[i], NO_TOKEN);
                continue;
            }
            // What is never drawn is far below what may be.
            let finite: Vec<f32> = numbers.iter().map(|x| x.max(-1e9)).collect();
            let complaint = complaint(&draws[i].state, draws[i].row.kv_len, &finite, tokens[i]);
            assert_eq!(complaint, None, "{rows} x {vocab}: row {i}: {:?}", edits.params);
        }
    }
}

/// A step whose rows have these sequences of tokens, beside what their slots say, and the rows as they draw.
fn step_behind(bench: &mut Bench, rows: &[(SlotState, Vec<u32>, &[u32])]) -> (Step<Buffer>, Vec<Draw>) {
    let Limits { pages, page_size, running, .. } = bench.limits;
    let (slots, width) = (running as usize + 1, bench.limits.table_width());
    let mut rules = vec![0; slots * RULE_WORDS];
    let mut table = vec![pages; slots * width as usize];
    let mut history = vec![POISON; ((pages + 1) * page_size) as usize];
    let mut draws = vec![];
    for (slot, (state, words, tokens)) in (0..).zip(rows) {
        rules[slot as usize * RULE_WORDS..][..words.len()].copy_from_slice(words);
        for (position, id) in (0..).zip(*tokens) {
            // Pages from the last to the first.
            let page = pages - 1 - (slot * width + position / page_size);
            table[(slot * width + position / page_size) as usize] = page;
            history[(page * page_size + position % page_size) as usize] = *id;
        }
        let kv_len = tokens.len() as u32;
        let row = Row {
            slot,
            first_token: slot,
            tokens: 1,
            position: kv_len - 1,
            kv_len,
            sampled: 1,
            ..Row::default()
        };
        draws.push(Draw { row, state: *state });
    }
    let step = Step {
        rules: bench.words(&rules),
        page_table: bench.words(&table),
        history: bench.words(&history),
        ..bench.step(&draws)
    };
    (step, draws)
}

/// A device for all cases, whose rows of logits are of one length, with a row for each seed of a case: opening one, and each
/// step's buffers, take longer than what is drawn.
fn bench_of_cases(cases: &[Case]) -> Bench {
    let (rows, sequence) = (DRAWS as u32, 64);
    let limits = Limits { sequence, pages: rows * sequence / 16, ..limits(rows) };
    Bench::with(limits, cases[0].logits.len())
}

/// The edited logits and the tokens of a case, drawn with each of the seeds.
fn draw_case(bench: &mut Bench, case: &Case, seeds: std::ops::Range<u64>) -> (Vec<f16>, Vec<u32>) {
    let (rows, vocab) = ((seeds.end - seeds.start) as usize, case.logits.len());
    let slots: Vec<_> = seeds.map(|seed| case.slot(seed)).collect();
    let of_rows: Vec<_> =
        slots.into_iter().map(|(state, rules)| (state, rules, case.tokens.as_slice())).collect();
    let (step, _) = step_behind(bench, &of_rows);
    let logits: Vec<f16> = case.logits.iter().copied().map(f16::from_f32).collect();
    let (buffer, tokens) = (bench.logits(&logits.repeat(rows)), bench.words(&vec![POISON; 2 * rows]));
    bench.cuda.sample(&step, buffer, tokens).expect("a launch");
    let words = bench.read(buffer, (rows * vocab).div_ceil(2));
    let edited = bytemuck::cast_slice::<u32, u16>(&words).iter().copied().map(f16::from_bits).collect();
    (edited, bench.read(tokens, rows))
}

/// An edited logit here is rounded to f16 twice at most: this much of itself, or of what a bias has lifted it to on the way.
const ROUNDED: f32 = 0.05;

#[test]
#[ignore = "needs a GPU"]
fn logits_are_edited_as_transformers_does_it_and_the_token_is_one_of_what_it_keeps() {
    let cases = Case::all();
    let mut bench = bench_of_cases(&cases);
    for case in cases {
        let (edited, tokens) = draw_case(&mut bench, &case, 0..128);
        for (got, expected) in edited.iter().zip(case.edited.iter().cycle()) {
            let got = got.to_f32();
            assert!(
                got == *expected || (got - expected).abs() <= ROUNDED,
                "{}: {got}, {expected}",
                case.name
            );
        }
        for (seed, token) in (0..).zip(tokens) {
            let scores = case.scores(seed);
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let got = scores[token as usize];
            assert!(largest - got <= 2.0 * ROUNDED, "{}, seed {seed}: {got}, {largest}", case.name);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn tokens_come_as_often_as_what_transformers_keeps_says() {
    let cases = Case::all();
    let mut bench = bench_of_cases(&cases);
    for case in cases {
        let mut counts = vec![0; case.logits.len()];
        let (_, tokens) = draw_case(&mut bench, &case, 0..DRAWS);
        tokens.into_iter().for_each(|token| counts[token as usize] += 1);
        let likelihood = case.likelihood(&counts);
        assert!(likelihood > 0.001, "{}: {likelihood} for {counts:?}", case.name);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_masked_row_draws_what_it_would_draw_from_the_allowed_logits_and_others_what_they_did() {
    let mut random = Random(11);
    for (rows, vocab) in taken([(5, 1001), (33, 1024), (64, 4099), (16, 151_936)]) {
        let mut bench = Bench::new(rows, vocab);
        let mut drawn: Vec<Draw> = (0..rows).map(|slot| random_draw(&mut random, slot, vocab)).collect();
        let logits = random_logits(&mut random, rows as usize, vocab);
        let words = mask_words(vocab as u32);
        let mut edited = logits.clone();
        bench.masks.clear();
        for (i, draw) in drawn.iter_mut().enumerate().filter(|(i, _)| i % 3 != 1) {
            let mut mask = vec![0; words];
            let allowed = [1, 3, 200, 4 * vocab][random.word() as usize % 4];
            (0..allowed)
                .map(|_| random.word() as usize % vocab)
                .for_each(|id| mask[id / 32] |= 1 << (id % 32));
            let forbidden = (0..vocab).filter(|id| mask[id / 32] >> (id % 32) & 1 == 0);
            forbidden.for_each(|id| edited[i * vocab + id] = f16::NEG_INFINITY);
            bench.masks.extend(mask);
            draw.row.logprobs = 1 + i as u32 % 6;
            draw.row.mask = (bench.masks.len() / words) as u32;
        }
        let (tokens, _, logprobs) = bench.sample(&drawn, &logits);
        for (i, Draw { row, state }) in drawn.iter().enumerate() {
            let own: Vec<f32> = edited[i * vocab..][..vocab].iter().map(|logit| logit.to_f32()).collect();
            // What is never drawn is far below what may be.
            let finite: Vec<f32> = own.iter().map(|logit| logit.max(-1e9)).collect();
            let complaint = complaint(state, row.kv_len, &finite, tokens[i]);
            assert_eq!(complaint, None, "{rows} x {vocab}: row {i}: {state:?}");
            if row.logprobs > 0 {
                let possible = own.iter().filter(|logit| **logit > f32::NEG_INFINITY).count();
                let told: Vec<_> = logprobs[i].top().collect();
                assert_eq!(told.len(), possible.min(row.logprobs as usize - 1), "row {i}");
                assert!(
                    told.iter().all(|(id, x)| own[*id as usize].is_finite() && x.is_finite()),
                    "row {i}: {told:?}"
                );
            }
        }
    }
}
