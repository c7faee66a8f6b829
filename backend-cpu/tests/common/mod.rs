//! What the tests of this crate share: random numbers, weights, and a machine with one step's batch on it.

#![allow(dead_code)]

pub mod processors;

use std::sync::Arc;

use half::{bf16, f16};
use minisgl_core::backend::{
    Device, Element, KvLayer, LayerWeights, MlpWeights, Ops, Purpose, Sampler, Step, WeightRole,
};
use minisgl_core::batch::{Batch, Dummy, Layout, PageUpdate, Row, StepShape, Token};
use minisgl_core::config::Limits;
use minisgl_core::constraint::mask_words;
use minisgl_core::request::Ticket;
use minisgl_core::rules::RULE_WORDS;
use minisgl_core::sampling::{SLOT_STATE_WORDS, SlotState};
use minisgl_core::spec::{Attention, DecoderSpec, Dims, LayerSpec, Mixer, NormForm, QkNorm, Rope};
use minisgl_core::tensor::{Dtype, HostTensor, TensorData, splitmix64};
use minisgl_cpu::{Buffer, Cpu, Weight};

/// Random numbers: SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        splitmix64(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }

    /// Uniform in [-1, 1).
    pub fn float(&mut self) -> f32 {
        (self.word() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// The numbers below `len` in a random order.
    pub fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut out: Vec<u32> = (0..len as u32).collect();
        for i in (1..len).rev() {
            out.swap(i, self.below(i + 1));
        }
        out
    }
}

/// A tensor of these values, rounded to its type, and the values after rounding.
pub fn tensor(rows: usize, values: &[f32], dtype: Dtype) -> (HostTensor, Vec<f32>) {
    let mut bytes = vec![0xff; 3]; // elements need not be aligned
    let mut rounded = Vec::new();
    for value in values {
        match dtype {
            Dtype::Bf16 => {
                bytes.extend(bf16::from_f32(*value).to_le_bytes());
                rounded.push(bf16::from_f32(*value).to_f32());
            }
            Dtype::F16 => {
                bytes.extend(f16::from_f32(*value).to_le_bytes());
                rounded.push(f16::from_f32(*value).to_f32());
            }
            Dtype::F32 => {
                bytes.extend(value.to_le_bytes());
                rounded.push(*value);
            }
        }
    }
    let range = 3..bytes.len();
    let data = TensorData::Bytes { owner: Arc::new(bytes), range, dtype };
    (HostTensor { name: "test".into(), rows, cols: values.len() / rows, data }, rounded)
}

/// A sequence in a step: tokens that are in the KV pages already, and new ones.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    pub slot: u32,
    pub cached: u32,
    pub new: u32,
}

/// A backend with the engine's buffers.
pub struct Machine {
    pub cpu: Cpu,
    pub dims: Dims,
    pub limits: Limits,
    pub layout: Layout,
    pub batch: Buffer,
    pub page_table: Buffer,
    pub token_pool: Buffer,
    pub slots: Buffer,
    pub rules: Buffer,
    pub history: Buffer,
    /// Of every row.
    pub masks: Buffer,
    /// `[slot][i]`: the pages, as the tests dealt them out.
    pub pages: Vec<Vec<u32>>,
}

pub fn dims(hidden: u32, heads: u32, kv_heads: u32, head_dim: u32, intermediate: u32, vocab: u32) -> Dims {
    Dims { layers: 1, hidden, heads, kv_heads, head_dim, intermediate, vocab, norm_eps: 1e-6 }
}

/// A model of two layers with head norms and rope.
pub fn spec(dims: Dims) -> DecoderSpec {
    let rope = Some(Rope::plain(1e4, dims.head_dim));
    let attention = Attention { qk_norm: QkNorm::PerHead, rope, ..Attention::plain() };
    let layer = LayerSpec { mixer: Mixer::Attention(attention), ..LayerSpec::plain() };
    DecoderSpec::uniform(Dims { layers: 2, ..dims }, layer)
}

/// The weights that such a layer has.
#[derive(Clone, Copy)]
pub struct Layer {
    pub norms: [Weight; 4],
    pub qkv: Weight,
    pub o: Weight,
    pub gate_up: Weight,
    pub down: Weight,
}

impl Layer {
    /// `norms`: before attention and MLP, of queries and keys.
    pub fn weights(&self) -> LayerWeights<Weight> {
        let [attention, mlp, q, k] = self.norms.map(Some);
        LayerWeights {
            attention_norm: attention,
            qkv: self.qkv,
            qkv_bias: None,
            q_norm: q,
            k_norm: k,
            o: self.o,
            attention_out_norm: None,
            mlp_norm: mlp,
            mlp: MlpWeights::Dense { gate_up: self.gate_up, down: self.down },
            mlp_out_norm: None,
        }
    }
}

pub fn limits(running: u32, sequence: u32, page_size: u32) -> Limits {
    let pages = running * sequence.div_ceil(page_size);
    let prefill_tokens = running * sequence;
    Limits { running, queued: 1, sequence, prefill_tokens, page_size, pages, graph_rows: running }
}

impl Machine {
    pub fn new(dims: Dims, limits: Limits, random: &mut Random) -> Machine {
        Machine::of(&spec(dims), limits, random)
    }

    pub fn of(spec: &DecoderSpec, limits: Limits, random: &mut Random) -> Machine {
        let (mut cpu, dims) = (Cpu::new(), spec.dims);
        cpu.supports(spec).unwrap();
        assert_eq!(cpu.reserve(spec, &limits).unwrap(), 0);
        let layout = Layout::new(&limits, 0);
        let mut words = |words| cpu.alloc(Purpose::Scratch, Element::Word, words).unwrap();
        let batch = words(layout.words);
        let page_table = words((limits.running + 1) as usize * limits.table_width() as usize);
        let token_pool = words(limits.running as usize + 1);
        let slots = words((limits.running as usize + 1) * SLOT_STATE_WORDS);
        let rules = words((limits.running as usize + 1) * RULE_WORDS);
        let history = words((limits.pages as usize + 1) * limits.page_size as usize);
        let masks = words(limits.running as usize * mask_words(dims.vocab));
        let order = random.permutation(limits.pages as usize);
        let pages = order.chunks(limits.table_width() as usize).map(<[u32]>::to_vec).collect();
        Machine {
            cpu,
            dims,
            limits,
            layout,
            batch,
            page_table,
            token_pool,
            slots,
            rules,
            history,
            masks,
            pages,
        }
    }

    pub fn alloc(&mut self, len: usize) -> Buffer {
        self.cpu.alloc(Purpose::Scratch, Element::Activation, len).unwrap()
    }

    /// A buffer with these words.
    pub fn words(&mut self, words: &[u32]) -> Buffer {
        let buffer = self.cpu.alloc(Purpose::Scratch, Element::Word, words.len()).unwrap();
        self.write(buffer, words);
        buffer
    }

    pub fn write(&mut self, buffer: Buffer, words: &[u32]) {
        let mut pinned = self.cpu.alloc_pinned(words.len()).unwrap();
        self.cpu.words_mut(&mut pinned).unwrap().copy_from_slice(words);
        self.cpu.upload(&mut pinned, 0..words.len(), buffer).unwrap();
    }

    /// A buffer with these floats.
    pub fn floats(&mut self, floats: &[f32]) -> Buffer {
        self.words(bytemuck::cast_slice(floats))
    }

    /// A buffer of NaNs, so that what an operation does not write is seen.
    pub fn poisoned(&mut self, len: usize) -> Buffer {
        self.floats(&vec![f32::NAN; len])
    }

    pub fn read(&mut self, buffer: Buffer, len: usize) -> Vec<f32> {
        self.cpu.read_logits(buffer, len as u32, 0..1).unwrap()
    }

    pub fn read_words(&mut self, buffer: Buffer, len: usize) -> Vec<u32> {
        self.read(buffer, len).into_iter().map(f32::to_bits).collect()
    }

    /// A random matrix on the device, with the values that it holds.
    pub fn weight(
        &mut self,
        random: &mut Random,
        rows: usize,
        cols: usize,
        dtype: Dtype,
    ) -> (Weight, Vec<f32>) {
        let (tensor, values) = tensor(rows, &random.floats(rows * cols), dtype);
        (self.cpu.load(WeightRole::Linear, &[tensor]).unwrap(), values)
    }

    /// A random norm scale on the device, with the values that it holds.
    pub fn scale(&mut self, random: &mut Random, width: usize, dtype: Dtype) -> (Weight, Vec<f32>) {
        let (tensor, values) = tensor(1, &random.floats(width), dtype);
        (self.cpu.load(WeightRole::Norm(NormForm::Scale), &[tensor]).unwrap(), values)
    }

    pub fn kv(&mut self, random: &mut Random) -> KvLayer<Buffer> {
        let len = (self.limits.pages + 1) * self.limits.page_size * self.dims.kv_heads * self.dims.head_dim;
        let (k, v) = (random.floats(len as usize), random.floats(len as usize));
        KvLayer { k: self.floats(&k), v: self.floats(&v), wide: None }
    }

    pub fn kv_len(&self) -> usize {
        ((self.limits.pages + 1) * self.limits.page_size * self.dims.kv_heads * self.dims.head_dim) as usize
    }

    /// Where position `position` of a slot lies.
    pub fn location(&self, slot: u32, position: u32) -> u32 {
        let size = self.limits.page_size;
        self.pages[slot as usize][(position / size) as usize] * size + position % size
    }

    /// Puts a step of these sequences on the device, with random token ids, padded to `shape`. Those at the beginning that
    /// have one new token decode. Their slots' states take effect with the step's beginning.
    pub fn step(
        &mut self,
        random: &mut Random,
        sequences: &[Sequence],
        draw: impl Fn(usize) -> Draw,
        shape: Option<StepShape>,
    ) -> (Step<Buffer>, Vec<Token>, Vec<Row>) {
        let tokens = sequences.iter().map(|sequence| sequence.new).sum();
        let ids: Vec<u32> = (0..tokens).map(|_| random.below(self.dims.vocab as usize) as u32).collect();
        self.step_with(&ids, sequences, draw, shape)
    }

    /// The same with these token ids, those of the first sequence first.
    pub fn step_with(
        &mut self,
        ids: &[u32],
        sequences: &[Sequence],
        draw: impl Fn(usize) -> Draw,
        shape: Option<StepShape>,
    ) -> (Step<Buffer>, Vec<Token>, Vec<Row>) {
        let mut ids = ids.iter();
        let mut batch = Batch::new(&self.limits);
        for (i, sequence) in sequences.iter().enumerate() {
            let Sequence { slot, cached, new } = *sequence;
            let Draw { state, rules, logprobs, masked } = draw(i);
            let owner = Ticket { entry: slot, generation: 0 };
            batch.push_slot(slot, state, rules.into_iter());
            let row = Row {
                slot,
                first_token: batch.tokens().len() as u32,
                tokens: new,
                position: cached,
                kv_len: cached + new,
                sampled: 1,
                logprobs,
                mask: if masked { batch.push_mask(owner) } else { 0 },
            };
            let mut token = |position| {
                let id = *ids.next().expect("an id for each token");
                Token { id, slot, position, location: self.location(slot, position) }
            };
            if new == 1 && batch.shape().is_decode() {
                batch.push_decode_row(owner, row, token(cached));
            } else {
                batch.push_prefill_row(owner, row);
                (cached..cached + new).for_each(|position| batch.push_token(token(position)));
            }
            for i in 0..(cached + new).div_ceil(self.limits.page_size) {
                let page = self.pages[slot as usize][i as usize];
                batch.push_update(PageUpdate { index: slot * self.limits.table_width() + i, page });
            }
        }
        let shape = shape.unwrap_or(batch.shape());
        let dummy = Dummy { slot: self.limits.running, location: self.limits.pages * self.limits.page_size };
        let mut words = vec![0; self.layout.words];
        batch.pack(&self.layout, shape, dummy, 0, &mut words);
        let buffer = self.batch;
        self.write(buffer, &words);
        (self.step_of(shape), batch.tokens().to_vec(), batch.rows().to_vec())
    }

    /// A step over this machine's buffers.
    pub fn step_of(&self, shape: StepShape) -> Step<Buffer> {
        Step {
            shape,
            batch: self.batch,
            layout: self.layout,
            page_table: self.page_table,
            table_width: self.limits.table_width(),
            page_size: self.limits.page_size,
            token_pool: self.token_pool,
            slots: self.slots,
            rules: self.rules,
            history: self.history,
            masks: self.masks,
        }
    }
}

/// How a row of a step draws.
#[derive(Clone, Debug, Default)]
pub struct Draw {
    /// Its slot's state.
    pub state: SlotState,
    /// The words of its slot's rules.
    pub rules: Vec<u32>,
    /// As [`Row::logprobs`].
    pub logprobs: u32,
    /// Has it a mask? Masks lie in the order of the rows that have one.
    pub masked: bool,
}

impl From<SlotState> for Draw {
    fn from(state: SlotState) -> Draw {
        Draw { state, ..Draw::default() }
    }
}

/// A row that draws, and the tokens of its sequence.
pub struct Drawn {
    pub tokens: Vec<u32>,
    pub draw: Draw,
}

/// Edits the rows' logits, and draws. Their tokens, 60 each at most, reach the history in portions, cut at random.
pub fn edit_and_draw(
    random: &mut Random,
    rows: &[Drawn],
    vocab: usize,
    logits: &[f32],
) -> (Vec<f32>, Vec<u32>) {
    let limits = limits(rows.len() as u32, 64, 16);
    let mut machine = Machine::new(dims(8, 2, 1, 4, 8, vocab as u32), limits, random);
    let table = tensor(vocab, &random.floats(vocab * 8), Dtype::F32).0;
    let table = machine.cpu.load(WeightRole::Embedding, &[table]).unwrap();
    let slots = random.permutation(rows.len());
    let mut cached = vec![0; rows.len()];
    loop {
        // The last token is for the step that draws.
        let left: Vec<usize> = rows.iter().zip(&cached).map(|(row, at)| row.tokens.len() - 1 - at).collect();
        let is_last = left.iter().all(|left| *left == 0);
        let going: Vec<usize> = (0..rows.len()).filter(|i| is_last || left[*i] > 0).collect();
        let portion = |i: usize, random: &mut Random| match left[i] {
            0 => 1,
            left => 1 + random.below(left),
        };
        let sequences: Vec<Sequence> = going
            .iter()
            .map(|&i| Sequence { slot: slots[i], cached: cached[i] as u32, new: portion(i, random) as u32 })
            .collect();
        let ids = going.iter().zip(&sequences);
        let ids = ids.flat_map(|(&i, it)| &rows[i].tokens[it.cached as usize..][..it.new as usize]);
        let ids: Vec<u32> = ids.copied().collect();
        let (step, ..) = machine.step_with(&ids, &sequences, |at| rows[going[at]].draw.clone(), None);
        machine.cpu.begin_step(&step).unwrap();
        machine.cpu.embed(&step, table).unwrap();
        if is_last {
            let (buffer, tokens) = (machine.floats(logits), machine.words(&vec![u32::MAX; rows.len()]));
            machine.cpu.sample(&step, buffer, tokens).unwrap();
            return (machine.read(buffer, logits.len()), machine.read_words(tokens, rows.len()));
        }
        going.iter().zip(&sequences).for_each(|(&i, it)| cached[i] += it.new as usize);
    }
}

/// Every row draws greedily.
pub fn greedy(_: usize) -> Draw {
    Draw::default()
}

/// Of cases, as they come, those that Miri has time for.
pub fn in_time<T>(cases: impl IntoIterator<Item = T>, under_miri: usize) -> impl Iterator<Item = T> {
    cases.into_iter().take(if cfg!(miri) { under_miri } else { usize::MAX })
}

/// Panics where two rows of numbers differ by more than `bound` of the largest.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], expected: &[f64], bound: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-30f64, |a, b| a.max(b.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - expected).abs() / largest;
        assert!(error <= bound, "{what}: element {i} is {got}, not {expected} (error {error:e})");
    }
}

/// The bits of floats, so that equality means equality.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
