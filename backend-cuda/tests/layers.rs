//! All layers of a decode step in one kernel, against the kernels of single operations: the same bits.
//!
//! ```text
//!   embed ─┬─ each layer: qkv ─ attention ─ o ─ gate_up ─ down ─┐
//!          └─ qkv of the first ─ all else in one kernel ────────┴─> q, attended, activated, residual, pages of each layer
//! ```
//!
//! Rows, lengths and pages are random, of bf16 or of codes and scales; the last rows are padding, of which nobody wants an output.

mod support;

use half::bf16;
use minisgl_core::backend::{
    Device, Element, KvLayer, LayerWeights, MlpWeights, Ops, Purpose, Queue, Step, WeightRole,
};
use minisgl_core::batch::{
    HEADER_WORDS, Header, Layout, ROW_WORDS, Row, StepShape, TOKEN_WORDS, Token, zeroed_words,
};
use minisgl_core::config::Limits;
use minisgl_core::fp8;
use minisgl_core::kv::{KvFormat, KvLayout};
use minisgl_core::spec::{Attention, Bias, DecoderSpec, Dims, LayerSpec, Mixer, QkNorm, Rope};
use minisgl_core::tensor::{HostTensor, TensorData, splitmix64};
use minisgl_cuda::ops::halves::{Division, Part};
use minisgl_cuda::ops::{Buffers, Layer, Operations};
use minisgl_cuda::{Buffer, Cuda, Options, Weight};
use support::taken;

const PAGE_SIZE: u32 = 16;
/// Rows that nobody asked for.
const PADDING: u32 = 3;

/// Qwen3-0.6B, with fewer tokens to know.
const DIMS: Dims = Dims {
    layers: 28,
    hidden: 1024,
    heads: 16,
    kv_heads: 8,
    head_dim: 128,
    intermediate: 3072,
    vocab: 512,
    norm_eps: 1e-6,
};

/// A model's layers, and a step of them.
struct World {
    cuda: Cuda,
    operations: Operations,
    table: Weight,
    layers: Vec<LayerWeights<Weight>>,
    rope: Buffer,
    kv: Vec<KvLayer<Buffer>>,
    /// How keys and values are kept.
    layout: KvLayout,
    /// Planned whole, and planned as it is run else.
    steps: [Step<Buffer>; 2],
    rows: u32,
}

fn random(cuda: &mut Cuda, role: WeightRole, [rows, cols]: [u32; 2], seed: u64, most: f32) -> Weight {
    let (rows, cols) = (rows as usize, cols as usize);
    let data = TensorData::Uniform { seed, low: -most, high: most };
    cuda.load(role, &[HostTensor { name: "random".into(), rows, cols, data }]).unwrap()
}

fn words(cuda: &mut Cuda, words: &[u32]) -> Buffer {
    let buffer = cuda.alloc(Purpose::Scratch, Element::Word, words.len()).unwrap();
    let mut pinned = cuda.alloc_pinned(words.len()).unwrap();
    cuda.words_mut(&mut pinned).unwrap().copy_from_slice(words);
    cuda.upload(&mut pinned, 0..words.len(), buffer).unwrap();
    cuda.synchronize().unwrap();
    buffer
}

fn spec(layers: u32, kv: KvFormat) -> DecoderSpec {
    let rope = Some(Rope::plain(1e6, DIMS.head_dim));
    let attention = Attention { bias: Bias::None, qk_norm: QkNorm::PerHead, rope, ..Attention::plain() };
    let layer = LayerSpec { mixer: Mixer::Attention(attention), ..LayerSpec::plain() };
    DecoderSpec { kv: Some(kv), ..DecoderSpec::uniform(Dims { layers, ..DIMS }, layer) }
}

/// Pages of random codes, all of them numbers, whose scales make them numbers of up to about 2: as keys', in bf16, and as values', 256
/// times and in f16.
fn fp8_pages(layout: &KvLayout, pages: usize, seed: u64) -> Vec<u32> {
    let scales = (DIMS.kv_heads * PAGE_SIZE / 2) as usize; // two a word
    let codes = layout.page_bytes() / 4 - scales;
    let word = |i: usize, j: usize| {
        let random = splitmix64(seed ^ (i << 20 | j) as u64) as u32;
        let code = |code: u8| if code & 0x7f == fp8::NAN { code ^ 1 } else { code };
        if j < codes {
            u32::from_le_bytes(random.to_le_bytes().map(code))
        } else {
            0x3b00_3b00 | random & 0x007f_007f
        }
    };
    (0..pages).flat_map(|i| (0..codes + scales).map(move |j| word(i, j))).collect()
}

fn layer_weights(cuda: &mut Cuda, seed: u64) -> LayerWeights<Weight> {
    let Dims { hidden, head_dim, intermediate, .. } = DIMS;
    let (qkv, q) = (DIMS.qkv_width() as u32, DIMS.q_width() as u32);
    let mut linear =
        |sizes, part: u64, most| random(cuda, WeightRole::Linear, sizes, seed + (part << 32), most);
    let (qkv, o) = (linear([qkv, hidden], 1, 0.05), linear([hidden, q], 2, 0.05));
    let down = linear([hidden, intermediate], 3, 0.05);
    let (q_norm, k_norm) = (linear([1, head_dim], 4, 1.0), linear([1, head_dim], 5, 1.0));
    LayerWeights {
        attention_norm: None,
        qkv,
        qkv_bias: None,
        q_norm: Some(q_norm),
        k_norm: Some(k_norm),
        o,
        attention_out_norm: None,
        mlp_norm: None,
        mlp: MlpWeights::Dense {
            gate_up: random(cuda, WeightRole::GateUp, [2 * intermediate, hidden], seed + (6 << 32), 0.05),
            down,
        },
        mlp_out_norm: None,
    }
}

impl World {
    /// A row for each of the lengths, and padding.
    fn new(kept: KvFormat, layers: u32, lengths: &[u32], seed: u64) -> World {
        let mut cuda = Cuda::new(&Options::default()).expect("a GPU");
        let rows = lengths.len() as u32 + PADDING;
        let pages: u32 = lengths.iter().map(|length| length.div_ceil(PAGE_SIZE)).sum();
        let limits = Limits {
            running: rows,
            queued: 1,
            sequence: lengths.iter().copied().max().unwrap(),
            prefill_tokens: rows,
            page_size: PAGE_SIZE,
            pages,
            graph_rows: 0,
        };
        let operations = Operations::new(&mut cuda, &spec(layers, kept), &limits).unwrap();
        let table = random(&mut cuda, WeightRole::Embedding, [DIMS.vocab, DIMS.hidden], seed, 1.0);
        let weights = (1..=u64::from(layers)).map(|i| layer_weights(&mut cuda, seed + (i << 40))).collect();
        let angle = |position: u32, i: u32| {
            f64::from(position) * 1e6f64.powf(-f64::from(i) / f64::from(DIMS.head_dim / 2))
        };
        let angles = (0..limits.sequence)
            .flat_map(|position| (0..DIMS.head_dim / 2).map(move |i| angle(position, i)))
            .flat_map(|angle| [angle.cos() as f32, angle.sin() as f32].map(f32::to_bits));
        let rope = words(&mut cuda, &angles.collect::<Vec<_>>());
        let [layout, wide] = [kept, KvFormat::Bf16].map(|kept| KvLayout::new(kept, &DIMS, PAGE_SIZE));
        let all = pages as usize + 1;
        let wide = (kept == KvFormat::Fp8)
            .then(|| [(); 2].map(|()| cuda.alloc(Purpose::KvCache, Element::Kv, wide.words(all)).unwrap()));
        let mut fp8 = wide.map_or(Vec::new(), |_| fp8_pages(&layout, all, seed));
        let kv = (1..=u64::from(layers)).map(|i| {
            let mut pages = |part: u64| {
                let seed = seed + (i << 40) + (part << 32);
                match kept {
                    KvFormat::Fp8 => {
                        fp8.rotate_left(layout.page_bytes() / 4); // other pages in each place
                        words(&mut cuda, &fp8)
                    }
                    _ => {
                        let rows = all as u32 * DIMS.kv_heads * PAGE_SIZE;
                        random(&mut cuda, WeightRole::Linear, [rows, DIMS.head_dim], seed, 1.0).into()
                    }
                }
            };
            KvLayer { k: pages(7), v: pages(8), wide }
        });
        let kv = kv.collect();
        let steps = steps(&mut cuda, &operations, &limits, lengths, seed);
        World { cuda, operations, table, layers: weights, rope, kv, layout, steps, rows }
    }

    /// Each of the layers, over a step.
    fn layers<'a>(&'a self, step: &'a Step<Buffer>) -> impl Iterator<Item = Layer<'a>> + Clone {
        let all = self.layers.iter().zip(&self.kv).enumerate();
        all.map(|(index, (weights, kv))| Layer {
            index,
            step,
            weights,
            next: None,
            rope: Some(self.rope),
            kv: *kv,
        })
    }

    fn embed(&self, step: &Step<Buffer>) {
        let (launcher, Operations { ends, buffers, dims, sumsq, .. }) =
            (self.cuda.launcher(), &self.operations);
        ends.embed(launcher, step, self.table.address(), dims.hidden, buffers.residual, *sumsq).unwrap();
    }

    /// NaN where the layers leave something for each other.
    fn poison(&mut self) {
        let buffers = self.operations.buffers;
        for buffer in [buffers.residual, buffers.q, buffers.attended, buffers.activated] {
            let mut pinned = self.cuda.alloc_pinned(buffer.bytes() / 4).unwrap();
            self.cuda.words_mut(&mut pinned).unwrap().fill(u32::MAX);
            let words = 0..buffer.bytes() / 4;
            self.cuda.upload(&mut pinned, words, buffer).unwrap();
            self.cuda.synchronize().unwrap();
        }
    }

    /// By the kernels of single operations, for all rows.
    fn one_by_one(&mut self) -> Vec<Left> {
        self.poison();
        let step = &self.steps[0];
        self.embed(step);
        let (launcher, operations) = (self.cuda.launcher(), &self.operations);
        for layer in self.layers(step) {
            let Buffers { q, attended, .. } = operations.buffers;
            operations.before_attention(launcher, &layer, Part::Whole).unwrap();
            operations.attention.attend(launcher, step, Part::Whole, q, layer.kv, attended).unwrap();
            operations.after_attention(launcher, &layer, Part::Whole).unwrap();
        }
        self.left()
    }

    /// In one kernel, launched or recorded.
    fn at_once(&mut self, recorded: bool) -> Vec<Left> {
        self.poison();
        let step = self.steps[1];
        if recorded {
            self.cuda.begin_capture().unwrap();
        }
        self.embed(&step);
        self.operations.layers(self.cuda.launcher(), &step, self.layers(&step)).unwrap();
        if recorded {
            let graph = self.cuda.end_capture().unwrap();
            self.cuda.replay(&graph).unwrap();
            self.cuda.synchronize().unwrap();
        }
        self.left()
    }

    /// What the layers leave.
    fn left(&mut self) -> Vec<Left> {
        let Buffers { residual, q, attended, activated, .. } = self.operations.buffers;
        let widths = [DIMS.q_width(), DIMS.q_width(), DIMS.intermediate as usize, DIMS.hidden as usize];
        let names = ["q", "attended", "activated", "residual"].map(str::to_owned);
        let rows = (self.rows - PADDING) as usize;
        let mut left: Vec<Left> = names
            .into_iter()
            .zip([q, attended, activated, residual])
            .zip(widths)
            .map(|((name, buffer), width)| Left {
                name,
                width,
                values: download(&mut self.cuda, buffer.slice(0..rows * width)),
            })
            .collect();
        // Padding rows write to the dummy page, the last one, in any order.
        let page = self.layout.page_bytes();
        for (i, kv) in self.kv.clone().iter().enumerate() {
            for (what, buffer) in [("keys", kv.k), ("values", kv.v)] {
                let kept = buffer.elements() * (buffer.bytes() - page) / buffer.bytes();
                let values = download(&mut self.cuda, buffer.slice(0..kept));
                left.push(Left { name: format!("{what} of layer {i}"), width: page / 2, values });
            }
        }
        left
    }
}

/// A buffer's bits.
struct Left {
    name: String,
    width: usize,
    values: Vec<u16>,
}

fn download(cuda: &mut Cuda, buffer: Buffer) -> Vec<u16> {
    let words = buffer.bytes() / 4;
    let mut pinned = cuda.alloc_pinned(words).unwrap();
    cuda.download(Queue::Compute, buffer, words, &mut pinned).unwrap();
    bytemuck::cast_slice(cuda.words(&pinned).unwrap()).to_vec()
}

/// The step of rows that attend to so many tokens, and of padding: planned whole, and as it is run else.
fn steps(
    cuda: &mut Cuda,
    operations: &Operations,
    limits: &Limits,
    lengths: &[u32],
    seed: u64,
) -> [Step<Buffer>; 2] {
    let shape = StepShape::decode(limits.running);
    assert_eq!(operations.division(shape), Division::Multiprocessors, "it is run as it is elsewhere");
    let (width, dummy) = (limits.table_width(), limits.running);
    let mut pages: Vec<u32> = (0..limits.pages).collect();
    pages.sort_by_key(|page| splitmix64(seed ^ u64::from(*page)));
    let mut pages = pages.into_iter();
    let mut table = vec![limits.pages; (limits.running as usize + 1) * width as usize];
    let rows: Vec<Row> = (0..limits.running)
        .map(|index| {
            let kv_len = lengths.get(index as usize).copied().unwrap_or(1);
            let slot = if (index as usize) < lengths.len() { index } else { dummy };
            Row {
                slot,
                first_token: index,
                tokens: 1,
                position: kv_len - 1,
                kv_len,
                sampled: 1,
                ..Row::default()
            }
        })
        .collect();
    let tokens: Vec<Token> = rows
        .iter()
        .map(|row| {
            let Row { slot, position, kv_len, first_token, .. } = *row;
            let own = &mut table[(slot * width) as usize..][..width as usize];
            if slot != dummy {
                own.iter_mut()
                    .zip(pages.by_ref().take(kv_len.div_ceil(PAGE_SIZE) as usize))
                    .for_each(|(to, page)| *to = page);
            }
            let location = own[(position / PAGE_SIZE) as usize] * PAGE_SIZE + position % PAGE_SIZE;
            let id = (splitmix64(seed + u64::from(first_token)) % u64::from(DIMS.vocab)) as u32;
            Token { id, slot, position, location }
        })
        .collect();
    let plan_words = operations.attention.plan_words(limits);
    let layout = Layout::new(limits, plan_words);
    let mut batch = zeroed_words(&layout);
    let header =
        Header { rows: limits.running, tokens: limits.running, samples: limits.running, ..Header::default() };
    batch[..HEADER_WORDS].copy_from_slice(bytemuck::cast_slice(&[header]));
    batch[layout.rows..][..rows.len() * ROW_WORDS].copy_from_slice(bytemuck::cast_slice(&rows));
    batch[layout.tokens..][..rows.len() * TOKEN_WORDS].copy_from_slice(bytemuck::cast_slice(&tokens));
    let slots = limits.running as usize + 1;
    let page_table = words(cuda, &table);
    let unused = words(cuda, &vec![0; slots.max(((limits.pages + 1) * PAGE_SIZE) as usize)]);
    let planned = |division| {
        operations.attention.plan(shape, division, &rows, &mut batch[layout.plan..][..plan_words]);
        Step {
            shape,
            batch: words(cuda, &batch),
            layout,
            page_table,
            table_width: width,
            page_size: PAGE_SIZE,
            token_pool: unused,
            slots: unused,
            rules: unused,
            history: unused,
            masks: unused,
        }
    };
    [Division::None, Division::Multiprocessors].map(planned)
}

/// Says where two runs first differ, buffer by buffer.
fn differences(expected: &[Left], got: &[Left]) -> Vec<String> {
    let mut texts = Vec::new();
    for (expected, got) in expected.iter().zip(got) {
        let differ = |(a, b): (&u16, &u16)| a != b;
        let pairs = || expected.values.iter().zip(&got.values);
        let Some(first) = pairs().position(differ) else { continue };
        let count = pairs().filter(|pair| differ(*pair)).count();
        let [a, b] = [&expected.values, &got.values].map(|values| bf16::from_bits(values[first]));
        let nan = got.values.iter().filter(|bits| bf16::from_bits(**bits).is_nan()).count();
        texts.push(format!(
            "{}: {count} of {} differ, {nan} are NaN; first [{}][{}]: {a} expected, {b} got",
            expected.name,
            expected.values.len(),
            first / expected.width,
            first % expected.width,
        ));
    }
    texts
}

/// Where keys and values are kept in bf16, and in fp8.
fn same_bits(layers: u32, lengths: &[u32], seed: u64) {
    for kept in [KvFormat::Bf16, KvFormat::Fp8] {
        same_bits_where(kept, layers, lengths, seed);
    }
}

fn same_bits_where(kept: KvFormat, layers: u32, lengths: &[u32], seed: u64) {
    println!("{layers} layers, {} rows and {PADDING} of padding, {kept:?}, seed {seed}", lengths.len());
    let mut world = World::new(kept, layers, lengths, seed);
    // First, so that nothing is in the pages yet of what it is to leave there.
    let first = world.at_once(false);
    let expected = world.one_by_one();
    let sane = |left: &Left| left.values.iter().all(|bits| bf16::from_bits(*bits).is_finite());
    let numbers = if kept == KvFormat::Fp8 { 4 } else { expected.len() }; // codes are none
    assert!(expected[..numbers].iter().all(sane), "numbers that are none are equal to nothing");
    let same = |how: &str, got: &[Left]| {
        let differences = differences(&expected, got);
        assert!(differences.is_empty(), "{how}\n{}", differences.join("\n"));
    };
    same("launched", &first);
    for _ in 0..2 {
        same("recorded", &world.at_once(true));
    }
}

fn fresh_seed() -> u64 {
    use std::time::{SystemTime, UNIX_EPOCH};
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 % (1 << 31)
}

/// So many lengths up to the longest.
fn random_lengths(rows: u32, longest: u32, seed: u64) -> Vec<u32> {
    (0..u64::from(rows - PADDING)).map(|i| 1 + (splitmix64(seed + i) % u64::from(longest)) as u32).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn one_layer_is_that_of_single_kernels() {
    for rows in taken([40, 64, 101, 256]) {
        let seed = fresh_seed();
        same_bits(1, &random_lengths(rows, 600, seed), seed);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn two_layers_are_those_of_single_kernels() {
    for rows in taken([40, 57, 64, 96, 130, 200, 256]) {
        let seed = fresh_seed();
        same_bits(2, &random_lengths(rows, 700, seed), seed);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn long_rows_are_cut_into_pieces_and_folded_alike() {
    let seed = fresh_seed();
    let mut lengths = random_lengths(48, 300, seed);
    lengths[7] = 9_000;
    lengths[30] = 4_097;
    same_bits(2, &lengths, seed);
    same_bits(2, &[2_500; 37], seed);
}

#[test]
#[ignore = "needs a GPU"]
fn a_whole_models_layers_are_those_of_single_kernels() {
    for rows in taken([48, 256]) {
        let seed = fresh_seed();
        same_bits(28, &random_lengths(rows, 64, seed), seed);
    }
}
