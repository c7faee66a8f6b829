//! A layer's experts on the device: what they add is the definition's value within rounding, and a token's bits do not depend on
//! how many tokens are beside it, nor on what those chose; nor on how many ranks share the experts out.

#[path = "support/ending.rs"]
mod ending;
mod support;

use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytemuck::{Pod, cast_slice};
use ending::Ending;
use half::bf16;
use minisgl_core::backend::{Device, Element, ExpertWeights, Ops, Purpose, Queue, Step, WeightRole};
use minisgl_core::batch::{Layout, StepShape, Token, zeroed_words};
use minisgl_core::config::Limits;
use minisgl_core::fp8;
use minisgl_core::shard::Rank;
use minisgl_core::spec::{
    Activation, DecoderSpec, Dims, Experts as Spec, Fp8, Inputs, LayerSpec, Mlp, ScaleBlock, WeightFormat,
};
use minisgl_core::tensor::{Dtype, HostTensor, Scales, TensorData, splitmix64, uniform_element};
use minisgl_cuda::ops::exchange::Exchange;
use minisgl_cuda::ops::experts::{Ahead, ExpertLayer, Experts, experts_input};
use minisgl_cuda::ops::gemm::RowNorm;
use minisgl_cuda::{Buffer, Cuda, KernelSet, Link, Options, Weight, device_count};
use support::taken;

/// Tiles of every width, by how many pairs an expert gets; where all choose the same, both sides of each.
const TOKENS: [u32; 11] = [1, 2, 3, 8, 16, 17, 40, 100, 150, 300, 1100];
const EPS: f32 = 1e-6;
/// Three roundings to bf16: of what `down` gets, of what it gives, and of the residual stream.
const BOUND: f64 = 2.0 / 256.0;
/// Logits nearer than this may change places by rounding.
const GAP: f64 = 1e-4;
/// The slot of padding.
const NOBODY: u32 = 300;

#[derive(Clone, Copy)]
struct Case {
    hidden: u32,
    spec: Spec,
}

fn case(hidden: u32, count: u32, per_token: u32, intermediate: u32, normalized: bool) -> Case {
    let activation = Activation::Silu;
    Case { hidden, spec: Spec { activation, count, per_token, intermediate, normalized } }
}

fn cases() -> [Case; 6] {
    [
        case(96, 8, 2, 64, true),
        case(96, 8, 2, 48, false),
        case(2048, 128, 8, 768, true),
        case(200, 256, 16, 72, true),
        case(64, 5, 1, 24, false),
        case(320, 16, 16, 136, true),
    ]
}

/// In fp8, scales of blocks of so many rows and columns: as long as these blocks are whole.
fn cases_in_fp8() -> [(Case, [usize; 2]); 5] {
    [
        (case(64, 5, 1, 24, false), [1, 1 << 20]),
        (case(2048, 128, 8, 768, true), [128, 128]),
        (case(320, 16, 16, 136, true), [1, 64]),
        (case(128, 8, 3, 256, true), [128, 128]),
        (case(192, 256, 16, 72, true), [1, 128]),
    ]
}

/// In bf16 and in fp8, what two ranks can share out.
fn cases_of_ranks() -> [(Case, Option<[usize; 2]>); 4] {
    [
        (case(1024, 32, 4, 256, true), None),
        (case(256, 16, 8, 256, true), Some([128, 128])),
        (case(128, 5, 1, 48, false), None),
        (case(384, 8, 2, 144, true), Some([1, 64])),
    ]
}

/// What the next layer takes of each element that the experts' sum leaves in the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The element itself, as a matrix in bf16 does, and one whose inputs are rounded.
    Stream,
    /// That times its norm's scale by column, as a matrix in fp8 does.
    Scaled,
}

/// In turn.
const NEXT: [Next; 2] = [Next::Scaled, Next::Stream];

/// An element times a norm's scale by column.
fn times(x: bf16, scale: bf16) -> bf16 {
    bf16::from_f32(x.to_f32() * scale.to_f32())
}

/// Random weights `[rows, cols]`.
struct Random {
    tensor: HostTensor,
}

impl Random {
    fn new(seed: u64, rows: u32, cols: u32, size: f32) -> Random {
        let data = TensorData::Uniform { seed, low: -size, high: size };
        Random {
            tensor: HostTensor { name: "random".into(), rows: rows as usize, cols: cols as usize, data },
        }
    }

    /// Of the standard deviation `gain / sqrt(cols)`.
    fn matrix(seed: u64, rows: u32, cols: u32, gain: f32) -> Random {
        Random::new(seed, rows, cols, gain * (3.0 / cols as f32).sqrt())
    }

    /// Random codes, and scales by which they have about the same deviation.
    fn codes(seed: u64, rows: u32, cols: u32, gain: f32, block: [usize; 2]) -> Random {
        let (rows, cols) = (rows as usize, cols as usize);
        let random = |i: usize| splitmix64(seed.wrapping_add(i as u64)) >> 40;
        let codes: Vec<u8> = (0..rows * cols)
            .map(|i| random(i) as u8)
            .map(|code| if code & 0x7f == fp8::NAN { code ^ 1 } else { code })
            .collect();
        let deviation = gain / (cols as f32).sqrt() / 120.0; // random codes have 120
        let scale = |i| deviation * (0.5 + random(usize::MAX - i) as f32 / (1 << 24) as f32);
        let values = (0..rows.div_ceil(block[0]) * cols.div_ceil(block[1])).map(scale).collect();
        let range = 0..codes.len();
        let scales = Arc::new(Scales { values, block, inputs: Inputs::Plain, input_scale: None });
        let data = TensorData::Fp8 { owner: Arc::new(codes), range, scales };
        Random { tensor: HostTensor { name: "random".into(), rows, cols, data } }
    }

    /// A rank's share of the rows of each of so many matrices, which are stacked.
    fn shares(&self, matrices: u32, rank: Rank) -> Vec<HostTensor> {
        let rows = self.tensor.rows / matrices as usize;
        let Range { start, end } = rank.share(rows);
        (0..matrices as usize).map(|matrix| self.rows(matrix * rows + start..matrix * rows + end)).collect()
    }

    fn rows(&self, rows: Range<usize>) -> HostTensor {
        let HostTensor { rows: all, cols, ref data, .. } = self.tensor;
        let TensorData::Fp8 { owner, scales, .. } = data else {
            return self.tensor.window(rows, 0..cols);
        };
        let scales = scales.of_rows(rows.clone(), [all, cols]).expect("whole blocks of scales");
        let range = rows.start * cols..rows.end * cols;
        let data = TensorData::Fp8 { owner: owner.clone(), range, scales: Arc::new(scales) };
        HostTensor { rows: rows.len(), data, ..self.tensor.clone() }
    }

    /// The only row, as it is kept.
    fn columns(&self) -> Vec<bf16> {
        self.row(0).into_iter().map(bf16::from_f64).collect()
    }

    /// What a row means: of fp8 codes times their scales.
    fn row(&self, row: usize) -> Vec<f64> {
        let cols = self.tensor.cols;
        match &self.tensor.data {
            TensorData::Uniform { seed, low, high } => {
                let element = |i| f64::from(uniform_element(*seed, i as u64, *low, *high).to_f32());
                (row * cols..(row + 1) * cols).map(element).collect()
            }
            TensorData::Fp8 { owner, scales, .. } => {
                let codes = &(**owner).as_ref()[row * cols..][..cols];
                let [high, wide] = scales.block;
                let scales = &scales.values[row / high * cols.div_ceil(wide)..];
                let scale = |col: usize| scales[col / wide];
                let element =
                    |(col, code): (usize, &u8)| f64::from(fp8::decode(*code)) * f64::from(scale(col));
                codes.iter().enumerate().map(element).collect()
            }
            _ => unreachable!("tests make no other"),
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A case on the device, and its weights.
struct Layer {
    cuda: Cuda,
    experts: Experts,
    case: Case,
    weights: ExpertWeights<Weight>,
    norm: Weight,
    /// The next layer's.
    next_norm: Weight,
    /// To the other ranks, where there are some.
    ranks: Option<(Link, Exchange)>,
    layout: Layout,
    router: Random,
    gate_up: Random,
    down: Random,
    columns: Random,
    next_columns: Random,
    /// `[tokens, hidden]`
    x: Vec<bf16>,
    label: String,
}

impl Layer {
    /// `fp8`: the blocks of scales, where weights are so.
    fn new(set: KernelSet, case: Case, fp8: Option<[usize; 2]>) -> Layer {
        let cuda = Cuda::new(&Options { kernels: set, ..Options::default() }).expect("a GPU");
        let label = format!("{set:?}, {} wide, {:?}, fp8 {fp8:?}", case.hidden, case.spec);
        Layer::on(cuda, None, fresh_seed(), label, case, fp8)
    }

    /// A rank's share of the layer that this seed makes.
    fn of_rank(link: Link, seed: u64, case: Case, fp8: Option<[usize; 2]>) -> Layer {
        let cuda = Cuda::of_rank(link.clone()).expect("a GPU");
        let label = format!("{:?}, {} wide, {:?}, fp8 {fp8:?}", link.rank(), case.hidden, case.spec);
        Layer::on(cuda, Some(link), seed, label, case, fp8)
    }

    fn on(
        mut cuda: Cuda,
        link: Option<Link>,
        seed: u64,
        label: String,
        case: Case,
        fp8: Option<[usize; 2]>,
    ) -> Layer {
        let rank = link.as_ref().map_or(Rank::ALONE, Link::rank);
        let (hidden, Spec { count, intermediate, .. }) = (case.hidden, case.spec);
        let dims = Dims {
            layers: 1,
            hidden,
            heads: 1,
            kv_heads: 1,
            head_dim: 64,
            intermediate,
            vocab: 8,
            norm_eps: EPS,
        };
        let own = Spec { intermediate: intermediate / rank.count, ..case.spec };
        let layer = LayerSpec { mlp: Mlp::Experts(own), ..LayerSpec::plain() };
        let limits = Limits {
            running: NOBODY,
            queued: 1,
            sequence: 512,
            prefill_tokens: TOKENS[TOKENS.len() - 1],
            page_size: 32,
            pages: 512,
            graph_rows: 1,
        };
        let router = Random::matrix(seed ^ 1, count, hidden, 1.5);
        let matrix = |seed, rows, cols, gain| match fp8 {
            None => Random::matrix(seed, rows, cols, gain),
            Some(block) => Random::codes(seed, rows, cols, gain, block),
        };
        let gate_up =
            matrix(seed ^ 2, count * 2 * intermediate, hidden, if fp8.is_some() { 2.0 } else { 1.0 });
        let down = matrix(seed ^ 3, count * hidden, intermediate, 3.0);
        let columns = Random::new(seed ^ 4, 1, hidden, 1.0);
        let next_columns = Random::new(seed ^ 6, 1, hidden, 1.0);
        let mut load = |role, parts: &[HostTensor]| cuda.load(role, parts).unwrap();
        let mut whole = |random: &Random| load(WeightRole::Linear, std::slice::from_ref(&random.tensor));
        let (norm, next_norm) = (whole(&columns), whole(&next_columns));
        let weights = ExpertWeights {
            router: whole(&router),
            gate_up: load(WeightRole::ExpertsGateUp(count), &gate_up.shares(2 * count, rank)),
            down: load(WeightRole::ExpertsDown(1), &down.shares(count, rank)),
        };
        let format = Fp8 { block: ScaleBlock::Tile { rows: 1, cols: 128 }, inputs: Inputs::Plain };
        let weights_are = fp8.map_or(WeightFormat::Bf16, |_| WeightFormat::Fp8(format));
        let spec = DecoderSpec { weights: weights_are, ..DecoderSpec::uniform(dims, layer) };
        let experts = Experts::new(&mut cuda, &spec, &limits).unwrap().unwrap();
        let most = TOKENS[TOKENS.len() - 1] as u64;
        let x = (0..most * u64::from(hidden)).map(|i| uniform_element(seed ^ 5, i, -2.0, 2.0)).collect();
        let layout = Layout::new(&limits, 0);
        let inner = Experts::inner(&spec) * rank.count as usize;
        let ranks = link.map(|link| {
            let exchange = Exchange::new(&mut cuda, &link, &dims, &limits, inner).expect("memory");
            (link, exchange)
        });
        Layer {
            cuda,
            experts,
            case,
            weights,
            norm,
            next_norm,
            ranks,
            layout,
            router,
            gate_up,
            down,
            columns,
            next_columns,
            x,
            label,
        }
    }

    /// A matrix whose rows have one value each, as wide as the residual stream.
    fn load_rows(&mut self, rows: &[bf16]) -> Weight {
        let cols = self.case.hidden as usize;
        let bytes: Vec<u8> = rows.iter().flat_map(|row| row.to_le_bytes().repeat(cols)).collect();
        let range = 0..bytes.len();
        let data = TensorData::Bytes { owner: Arc::new(bytes), range, dtype: Dtype::Bf16 };
        let tensor = HostTensor { name: "rows".into(), rows: rows.len(), cols, data };
        self.cuda.load(WeightRole::Linear, &[tensor]).unwrap()
    }

    fn upload<T: Pod>(&mut self, element: Element, values: &[T]) -> Buffer {
        let bytes: &[u8] = cast_slice(values);
        let words = bytes.len().div_ceil(4);
        let mut pinned = self.cuda.alloc_pinned(words).unwrap();
        let staging: &mut [u8] = bytemuck::cast_slice_mut(self.cuda.words_mut(&mut pinned).unwrap());
        staging[..bytes.len()].copy_from_slice(bytes);
        let elements = words * 4 / minisgl_cuda::element_bytes(element);
        let buffer = self.cuda.alloc(Purpose::Scratch, element, elements).unwrap();
        self.cuda.upload(&mut pinned, 0..words, buffer).unwrap();
        self.cuda.synchronize().unwrap();
        buffer
    }

    fn download<T: Pod>(&mut self, buffer: Buffer) -> Vec<T> {
        let words = buffer.bytes() / 4;
        let mut pinned = self.cuda.alloc_pinned(words).unwrap();
        self.cuda.download(Queue::Compute, buffer, words, &mut pinned).unwrap();
        cast_slice(self.cuda.words(&pinned).unwrap()).to_vec()
    }

    /// Sums of squares of 64 elements each, as whoever wrote `x` leaves them.
    fn sums(&self, x: &[bf16]) -> Vec<f32> {
        let square_sum = |part: &[bf16]| part.iter().map(|x| x.to_f32() * x.to_f32()).sum();
        x.chunks(self.case.hidden as usize).flat_map(|row| row.chunks(64).map(square_sum)).collect()
    }

    /// Allocating waits for all kernels on a device, also for those that wait for what this rank has not launched yet.
    fn meet(&self) {
        self.ranks.iter().for_each(|(link, _)| link.meet().expect("no other rank has failed"));
    }

    /// The residual stream behind the layer, `[tokens, hidden]`, of these tokens; `slot` says whose each is.
    fn run(
        &mut self,
        x: &[bf16],
        shape: fn(u32) -> StepShape,
        slot: impl Fn(u32) -> u32,
        next: Next,
    ) -> Vec<Vec<bf16>> {
        let (hidden, segments) = (self.case.hidden as usize, self.case.hidden.div_ceil(64));
        let tokens = (x.len() / hidden) as u32;
        let mut words = zeroed_words(&self.layout);
        for t in 0..tokens {
            let token = Token { id: 0, slot: slot(t), position: 0, location: 0 };
            words[self.layout.tokens + 4 * t as usize..][..4].copy_from_slice(cast_slice(&[token]));
        }
        let batch = self.upload(Element::Word, &words);
        let margin = vec![bf16::from_bits(0x7fff); 64];
        let residual = self.upload(Element::Activation, &[x, &margin].concat());
        let scaled = self.upload(Element::Activation, &[&vec![bf16::NAN; x.len()], &margin[..]].concat());
        let sums = self.sums(x);
        let sumsq = self.upload(Element::Float, &sums);
        let step = step_of(shape(tokens), batch, self.layout);
        let row_norm = RowNorm { sumsq: sumsq.address(), segments, hidden: hidden as u32, eps: EPS };
        let ranks = self.ranks.as_ref().map_or(1, |(link, _)| link.rank().count);
        let ahead = match next {
            Next::Stream => Ahead::NOTHING,
            Next::Scaled => Ahead { norm: self.next_norm.address(), scaled: scaled.address() },
        };
        let layer = ExpertLayer {
            spec: Spec { intermediate: self.case.spec.intermediate / ranks, ..self.case.spec },
            weights: &self.weights,
            norm: self.norm.address(),
            row_norm,
            residual: residual.address(),
            x: if self.is_fp8() { scaled.address() } else { residual.address() },
            sumsq: sumsq.address(),
            ahead,
            exchange: self.ranks.as_ref().map(|(_, exchange)| exchange),
        };
        self.meet();
        self.ranks.iter().for_each(|(_, exchange)| exchange.begin_step());
        self.experts.launch(self.cuda.launcher(), &step, &layer).unwrap();
        self.meet();
        self.cuda.synchronize().unwrap();
        let out: Vec<bf16> = self.download(residual);
        assert!(out[x.len()..].iter().all(|x| x.to_bits() == 0x7fff), "{}: written too far", self.label);
        let left: Vec<bf16> = self.download(scaled);
        assert!(left[x.len()..].iter().all(|x| x.to_bits() == 0x7fff), "{}: scaled too far", self.label);
        let out = &out[..x.len()];
        let (columns, next_columns) = (self.columns.columns(), self.next_columns.columns());
        // Where the next layer takes the stream that is there which these experts got, if they got anything but the stream.
        let expected = |i: usize| match next {
            Next::Scaled => times(out[i], next_columns[i % hidden]).to_bits(),
            Next::Stream if self.is_fp8() => experts_input(x[i].to_f32() * columns[i % hidden].to_f32()),
            Next::Stream => bf16::NAN.to_bits(),
        };
        let wrong = (0..x.len()).find(|i| left[*i].to_bits() != expected(*i));
        let wrong = wrong.map(|i| (i / hidden, i % hidden, left[i].to_bits(), expected(i)));
        assert_eq!(wrong, None, "{}: left for a layer that takes {next:?}", self.label);
        let got: Vec<f32> = self.download(sumsq);
        for (got, want) in got.iter().zip(self.sums(out)) {
            assert!((got - want).abs() <= 1e-4 * want.max(1.0), "{}: a sum is {got} for {want}", self.label);
        }
        out.chunks(hidden).map(<[bf16]>::to_vec).collect()
    }

    fn is_fp8(&self) -> bool {
        self.weights.gate_up.is_fp8()
    }

    /// The residual stream of a token by the definition; `None` where rounding may choose another expert.
    fn expected(&self, x: &[bf16]) -> Option<Vec<f64>> {
        let Spec { count, per_token, intermediate, normalized, .. } = self.case.spec;
        let (count, per_token, mlp) = (count as usize, per_token as usize, intermediate as usize);
        let hidden = x.len();
        let x: Vec<f64> = x.iter().map(|x| f64::from(x.to_f32())).collect();
        let scale = (dot(&x, &x) / hidden as f64 + f64::from(EPS)).sqrt().recip();
        let normed: Vec<f64> = x.iter().map(|x| x * scale).collect();
        let columns = self.columns.row(0);
        let routed: Vec<f64> = normed.iter().zip(&columns).map(|(x, c)| x * c).collect();
        let logits: Vec<f64> = (0..count).map(|e| dot(&self.router.row(e), &routed)).collect();
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        if count > per_token && logits[order[per_token - 1]] - logits[order[per_token]] < GAP {
            return None;
        }
        let chosen = &order[..per_token];
        let sum: f64 = if normalized { chosen } else { &order[..] }.iter().map(|e| logits[*e].exp()).sum();
        // A norm is multiplied into bf16 matrices when they are loaded, which this test does not.
        let inputs = if self.is_fp8() { &routed } else { &normed };
        let mut out = x;
        for e in chosen {
            let gate = |row: usize| dot(&self.gate_up.row(e * 2 * mlp + row), inputs);
            let activated: Vec<f64> = (0..mlp)
                .map(|i| {
                    let gate_value = gate(i);
                    gate_value / (1.0 + (-gate_value).exp()) * gate(mlp + i)
                })
                .collect();
            let share = logits[*e].exp() / sum;
            for (i, out) in out.iter_mut().enumerate() {
                *out += share * dot(&self.down.row(e * hidden + i), &activated);
            }
        }
        Some(out)
    }

    fn check(&mut self) {
        let hidden = self.case.hidden as usize;
        let x = self.x.clone();
        let padding = |t: u32| t % 50 == 4;
        let slot = |t: u32| if padding(t) { NOBODY } else { 0 };
        let all = self.run(&x, prefill, slot, Next::Scaled);
        let mut compared = 0;
        for t in [0, 1, 2, 3, 17, 64, 149, 255, 299, 700, 1099] {
            let Some(want) = self.expected(&x[t * hidden..][..hidden]) else { continue };
            compared += 1;
            let size = (dot(&want, &want) / hidden as f64).sqrt();
            let error = |i: usize| (f64::from(all[t][i].to_f32()) - want[i]).abs();
            let worst = (0..hidden).map(error).fold(0.0, f64::max);
            let is_close = (0..hidden).all(|i| error(i) <= 4.0 * BOUND * (size + want[i].abs()));
            assert!(is_close, "{}, token {t}: off by {worst}, of values of size {size}", self.label);
            let squares: f64 = (0..hidden).map(|i| error(i).powi(2)).sum();
            let relative = (squares / hidden as f64).sqrt() / size;
            assert!(relative <= BOUND, "{}, token {t}: relative error {relative}", self.label);
            let moved: f64 =
                (0..hidden).map(|i| (want[i] - f64::from(x[t * hidden + i].to_f32())).powi(2)).sum();
            assert!(
                (moved / hidden as f64).sqrt() > 0.1 * size,
                "{}: it adds too little to tell",
                self.label
            );
        }
        assert!(compared > 4, "{}: most choices are too near to tell", self.label);
        for t in (0..all.len()).filter(|t| padding(*t as u32)) {
            assert_eq!(all[t], x[t * hidden..][..hidden], "{}: padding chose", self.label);
        }
        for (tokens, next) in taken(TOKENS).zip(NEXT.into_iter().cycle()) {
            let out = self.run(&x[..tokens as usize * hidden], StepShape::decode, slot, next);
            let differs = (0..out.len()).find(|t| out[*t] != all[*t]);
            assert_eq!(differs, None, "{}: {tokens} tokens differ from {}", self.label, all.len());
        }
        // All tokens choose the same experts; the rest are read by nobody. Then all but one, whose experts may be others.
        for tokens in taken([200, 64, 65, 128, 1100, 129, 192, 193, 256, 257]) {
            let before = self.experts_read();
            let same: Vec<bf16> = (0..tokens).flat_map(|_| x[..hidden].to_vec()).collect();
            let out = self.run(&same, StepShape::decode, |_| 1, Next::Stream);
            assert!(
                out.iter().all(|row| *row == all[0]),
                "{}: tokens that choose the same differ",
                self.label
            );
            let after = self.experts_read();
            let read = [after[0] - before[0], after[1] - before[1]];
            assert_eq!(read, [1, u64::from(self.case.spec.per_token)], "{}", self.label);
            let but_one = [&same[hidden..], &x[hidden..2 * hidden]].concat();
            let out = self.run(&but_one, StepShape::decode, |_| 1, Next::Scaled);
            assert!(out[..tokens - 1].iter().all(|row| *row == all[0]), "{}: all but one", self.label);
            assert_eq!(out[tokens - 1], all[1], "{}: the one", self.label);
        }
    }

    fn experts_read(&mut self) -> [u64; 2] {
        let read = self.experts.read(&mut self.cuda).unwrap();
        [read.layers, read.experts]
    }
}

/// Shown if the test fails.
fn fresh_seed() -> u64 {
    let seed = splitmix64(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64);
    println!("seed {seed}");
    seed
}

fn prefill(tokens: u32) -> StepShape {
    StepShape { decode_rows: 0, prefill_rows: 1, tokens, samples: 1 }
}

fn step_of(shape: StepShape, batch: Buffer, layout: Layout) -> Step<Buffer> {
    Step {
        shape,
        batch,
        layout,
        page_table: batch,
        table_width: 1,
        page_size: 32,
        token_pool: batch,
        slots: batch,
        rules: batch,
        history: batch,
        masks: batch,
    }
}

/// Experts add what their definition says, whatever is beside a token.
#[test]
#[ignore = "needs a GPU"]
fn experts_are_as_defined_with_the_hopper_kernels() {
    taken(cases()).for_each(|case| Layer::new(KernelSet::Auto, case, None).check());
}

#[test]
#[ignore = "needs a GPU"]
fn experts_are_as_defined_with_the_portable_kernels() {
    taken(cases()).for_each(|case| Layer::new(KernelSet::Portable, case, None).check());
}

#[test]
#[ignore = "needs a GPU"]
fn experts_in_fp8_are_as_defined() {
    taken(cases_in_fp8()).for_each(|(case, block)| Layer::new(KernelSet::Auto, case, Some(block)).check());
}

/// Products that vanish leave a sign: logits of -0 and 0 are equals, as in the definition.
#[test]
#[ignore = "needs a GPU"]
fn of_logits_that_are_minus_zero_and_zero_the_lower_experts_are_chosen() {
    for set in [KernelSet::Auto, KernelSet::Portable] {
        let mut layer = Layer::new(set, case(64, 8, 1, 24, true), None);
        // A logit is 64 times 2^14 * 2^-24 * 2^-133, times the norm's 2^-14: less than any number.
        let x = [bf16::from_f32(2f32.powi(14)); 3 * 64];
        layer.norm = layer.load_rows(&[bf16::from_f32(2f32.powi(-24))]);
        let least = bf16::from_bits(1);
        let mut with = |rows: [bf16; 8]| {
            layer.weights.router = layer.load_rows(&rows);
            layer.run(&x, StepShape::decode, |_| 0, Next::Stream)
        };
        let signed = with(std::array::from_fn(|row| if row % 2 == 0 { -least } else { least }));
        assert_eq!(signed, with([bf16::ZERO; 8]), "{set:?}");
    }
}

#[test]
#[ignore = "needs two GPUs"]
fn experts_of_ranks_have_the_bits_of_one_gpu() {
    // Products take places early, which ranks of one device would need for what they send.
    if device_count().expect("a driver") < 2 {
        eprintln!("skipped: two GPUs are needed");
        return;
    }
    for (case, fp8) in taken(cases_of_ranks()) {
        let links = Link::group(&[0, 1], KernelSet::Auto, Duration::from_secs(30));
        let links = links.expect("GPUs that reach each other");
        let seed = fresh_seed();
        let work = |mut layer: Layer| {
            let (hidden, x) = (layer.case.hidden as usize, layer.x.clone());
            let slot = |t: u32| if t % 50 == 4 { NOBODY } else { 0 };
            let runs = taken([1100, 1, 2, 17, 64, 65, 150, 300]).zip(NEXT.into_iter().cycle());
            runs.map(|(tokens, next)| layer.run(&x[..tokens * hidden], StepShape::decode, slot, next))
                .collect::<Vec<_>>()
        };
        let alone = Cuda::new(&Options::default()).expect("a GPU");
        let expected = work(Layer::on(alone, None, seed, "alone".into(), case, fp8));
        let (work, expected) = (&work, &expected);
        thread::scope(|scope| {
            for link in links {
                scope.spawn(move || {
                    let _ending = Ending(link.aborter());
                    let layer = Layer::of_rank(link, seed, case, fp8);
                    let label = layer.label.clone();
                    for (got, expected) in work(layer).iter().zip(expected) {
                        let differs = (0..got.len()).find(|t| got[*t] != expected[*t]);
                        assert_eq!(differs, None, "{label}: of {} tokens", got.len());
                    }
                });
            }
        });
    }
}
