//! Matrix products on the device: what each epilogue writes is the definition's value within rounding, and a token's
//! bits do not depend on how many tokens are multiplied with it, nor on the share of an SM that the product has.
//!
//! Every case multiplies the first `tokens` rows of one random matrix for a list of token counts. The largest run is
//! compared with the definition in f64, every other run with the largest, bit by bit. Outputs are poisoned before, and
//! what lies behind them must still be poison after; what lies behind the last row of x is NaN.

#[path = "support/fp8.rs"]
mod fp8;
mod support;

use std::time::{SystemTime, UNIX_EPOCH};

use bytemuck::{Pod, cast_slice};
use fp8::What;
use half::{bf16, f16};
use minisgl_core::backend::{Device, Element, KvLayer, Purpose, Queue, Step};
use minisgl_core::batch::{Layout, StepShape, Token};
use minisgl_core::config::Limits;
use minisgl_core::tensor::{splitmix64, uniform_element};
use minisgl_cuda::ops::fp8_pages::Fp8Pages;
use minisgl_cuda::ops::gemm::{
    Epilogue, GateUp, Gemm, Head, Linear, Qkv, RankSums, Residual, RowNorm, Rows, SmShare,
};
use minisgl_cuda::{Address, Buffer, Cuda, KernelSet, Options, SLICING, Weight};
use support::taken;

/// Both sides of every tile of every kernel. Sanitizers see every fourth.
const TOKENS: [u32; 26] = [
    1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 40, 48, 49, 64, 65, 96, 100, 128, 129, 176, 200, 256, 257, 384,
    1000,
];
/// Rows and columns of a matrix that L2 does not hold beside x, for which there are other tilings. It has neither whole
/// tiles of rows nor whole bands of them.
const LARGE: (usize, usize) = (2600, 5120);
/// Rows and columns of a third, so few and so many that clusters share out the slices of every kind of tile.
const DEEP: (usize, usize) = (2600, 12_288);
/// Gates and columns of another, with so many rows that the widest tiles are the quickest for the most tokens.
const WIDE: (usize, usize) = (4024, 1600);
/// The same of matrices whose rows give each multiprocessor one tile of 192, 224 or 288 rows.
const TALL: [(usize, usize); 3] = [(10_000, 640), (13_000, 512), (17_000, 384)];
/// What an output holds before; a NaN in bf16, f16 and f32.
const POISON: u16 = 0x7fff;
/// What pages of fp8 hold before.
const POISON_BYTE: u8 = 0x5a;
const EPS: f32 = 1e-6;

/// The device with its kernels.
struct Gpu {
    cuda: Cuda,
    gemm: Gemm,
    set: KernelSet,
    share: SmShare,
    seed: u64,
}

impl Gpu {
    fn new(set: KernelSet) -> Gpu {
        let mut cuda = Cuda::new(&Options { kernels: set, ..Options::default() }).expect("a GPU");
        let gemm = Gemm::new(&mut cuda).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Gpu { cuda, gemm, set, share: SmShare::Whole, seed: splitmix64(now.as_nanos() as u64) }
    }

    /// `count` numbers in `[-size, size)`.
    fn random(&mut self, count: usize, size: f32) -> Vec<bf16> {
        self.seed = splitmix64(self.seed);
        (0..count as u64).map(|i| uniform_element(self.seed, i, -size, size)).collect()
    }

    fn upload<T: Pod>(&mut self, element: Element, values: &[T]) -> Buffer {
        let bytes: &[u8] = cast_slice(values);
        let words = bytes.len().div_ceil(4);
        let mut pinned = self.cuda.alloc_pinned(words).unwrap();
        cast_slice_mut(self.cuda.words_mut(&mut pinned).unwrap())[..bytes.len()].copy_from_slice(bytes);
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

    /// An output of `elements` elements and a margin, all poison.
    fn poisoned(&mut self, elements: usize) -> Buffer {
        self.upload(Element::Activation, &vec![POISON; elements.next_multiple_of(2) + 256])
    }

    fn weight(&mut self, values: &[bf16], rows: usize, cols: usize) -> Weight {
        Weight::new(self.upload(Element::Activation, values).address(), rows, cols)
    }

    /// Encodes the rows of the batch's tokens, which begin at word `at`.
    fn encode(&mut self, heads: Heads, batch: Buffer, at: usize, tokens: u32, kv: KvLayer<Buffer>) {
        let limits = Limits {
            running: 1,
            queued: 1,
            sequence: 16,
            prefill_tokens: 16,
            page_size: heads.page_size as u32,
            pages: 1,
            graph_rows: 0,
        };
        let step = Step {
            shape: StepShape { decode_rows: 0, prefill_rows: 1, tokens, samples: 1 },
            batch,
            layout: Layout { tokens: at, ..Layout::new(&limits, 0) },
            page_table: batch,
            table_width: 1,
            page_size: heads.page_size as u32,
            token_pool: batch,
            slots: batch,
            rules: batch,
            history: batch,
            masks: batch,
        };
        let dims = fp8::dims(heads.kv, heads.dim);
        let pages = Fp8Pages::new(self.cuda.modules(), &dims, None).unwrap();
        pages.encode(self.cuda.launcher(), &step, 0..tokens, kv).unwrap();
        self.cuda.synchronize().unwrap();
    }

    fn launch<E: Epilogue>(&mut self, w: Weight, x: Buffer, tokens: u32, epilogue: &E) {
        let launcher = self.cuda.launcher();
        let x = Rows { address: x.address(), there: (x.elements() / w.cols()) as u32 };
        self.gemm.launch(launcher, w, x, tokens, self.share, epilogue).unwrap();
        self.cuda.synchronize().unwrap();
    }
}

fn cast_slice_mut(words: &mut [u32]) -> &mut [u8] {
    bytemuck::cast_slice_mut(words)
}

/// The output's values; what lies behind them must be poison.
fn without_margin(raw: Vec<u16>, elements: usize, label: &str) -> Vec<u16> {
    let touched = (elements..raw.len()).find(|i| raw[*i] != POISON);
    assert_eq!(touched, None, "{label}: written beyond the output of {elements} elements");
    raw[..elements].to_vec()
}

/// A matrix product's operands.
struct Operands {
    cols: usize,
    /// `[rows, cols]`
    w: Vec<bf16>,
    /// `[tokens, cols]`
    x: Vec<bf16>,
    on_device: (Weight, Buffer),
}

impl Operands {
    fn new(gpu: &mut Gpu, rows: usize, cols: usize) -> Operands {
        let tokens = TOKENS[TOKENS.len() - 1] as usize;
        let (w, x) = (gpu.random(rows * cols, (3.0 / cols as f32).sqrt()), gpu.random(tokens * cols, 1.0));
        // What a tile reads behind the last token is nobody's.
        let behind = vec![bf16::NAN; 256 * cols];
        let on_device =
            (gpu.weight(&w, rows, cols), gpu.upload(Element::Activation, &[&x[..], &behind].concat()));
        Operands { cols, w, x, on_device }
    }

    /// `y[t, :]`, without an epilogue.
    fn product(&self, t: usize) -> Vec<f64> {
        let x: Vec<f64> = self.x[t * self.cols..][..self.cols].iter().map(|x| f64::from(*x)).collect();
        let dot = |row: &[bf16]| row.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum();
        self.w.chunks_exact(self.cols).map(dot).collect()
    }

    /// Random sums of squares, `[tokens, segments]`, near those of `x`, and each token's scale.
    fn norm(&self, gpu: &mut Gpu) -> (Buffer, RowNorm, Vec<f64>) {
        let segments = self.cols.div_ceil(64);
        let tokens = self.x.len() / self.cols;
        let sums: Vec<f32> = gpu.random(tokens * segments, 5.0).iter().map(|x| 21.0 + x.to_f32()).collect();
        let scale = |sums: &[f32]| {
            let sum: f64 = sums.iter().map(|x| f64::from(*x)).sum();
            (sum / self.cols as f64 + f64::from(EPS)).sqrt().recip()
        };
        let scales = sums.chunks_exact(segments).map(scale).collect();
        let buffer = gpu.upload(Element::Float, &sums);
        let (segments, hidden) = (segments as u32, self.cols as u32);
        (buffer, RowNorm { sumsq: buffer.address(), segments, hidden, eps: EPS }, scales)
    }
}

/// Runs every token count with every share of an SM that the kernels tell apart; compares the largest with `expected` and the others with the largest.
fn check(
    gpu: &mut Gpu,
    label: &str,
    bound: f64,
    mut run: impl FnMut(&mut Gpu, u32) -> Vec<Vec<f32>>,
    expected: impl Fn(usize) -> Vec<f64>,
) {
    let label = format!("{:?} {label}", gpu.set);
    let largest = run(gpu, TOKENS[TOKENS.len() - 1]);
    for t in [0, 1, 7, 8, 63, 64, 127, 128, 191, 255, 256, 640, 999] {
        check_values(&format!("{label}, token {t}"), &largest[t], &expected(t), bound);
    }
    let shares: &[SmShare] =
        if gpu.set == KernelSet::Portable { &[SmShare::Whole] } else { &[SmShare::Whole, SmShare::Half] };
    for (tokens, share) in taken(TOKENS).flat_map(|tokens| shares.iter().map(move |share| (tokens, *share))) {
        gpu.share = share;
        let out = run(gpu, tokens);
        gpu.share = SmShare::Whole;
        let places = || (0..out.len()).flat_map(|t| (0..out[t].len()).map(move |i| (t, i)));
        let differs = |(t, i): &(usize, usize)| out[*t][*i].to_bits() != largest[*t][*i].to_bits();
        if let Some((t, i)) = places().find(differs) {
            panic!(
                "{label}: {} of {} values differ between {tokens} ({share:?}) and {} tokens; the first is token {t}, output {i}: {}, {}",
                places().filter(differs).count(),
                places().count(),
                largest.len(),
                out[t][i],
                largest[t][i]
            );
        }
    }
}

/// Compares the first `want.len()` values.
fn check_values(label: &str, got: &[f32], want: &[f64], bound: f64) {
    let got = &got[..want.len()];
    let size = (want.iter().map(|x| x * x).sum::<f64>() / want.len() as f64).sqrt();
    let error = |i: usize| (f64::from(got[i]) - want[i]).abs();
    let is_bad = |i: &usize| {
        let small_enough = error(*i) <= 4.0 * bound * (size + want[*i].abs());
        !small_enough // NaN too
    };
    let bad: Vec<usize> = (0..got.len()).filter(is_bad).collect();
    let worst = (0..got.len()).map(error).fold(0.0, f64::max);
    if let (Some(first), Some(last)) = (bad.first(), bad.last()) {
        panic!(
            "{label}: {} of {} outputs are off, {first} to {last}; the first is {} for {}; the largest error is {worst}",
            bad.len(),
            got.len(),
            got[*first],
            want[*first]
        );
    }
    let squares: f64 = (0..got.len()).map(|i| error(i).powi(2)).sum();
    let relative = (squares / want.len() as f64).sqrt() / size;
    assert!(relative <= bound, "{label}: relative error {relative}, allowed {bound}");
}

fn bf16_rows(raw: &[u16], width: usize) -> Vec<Vec<f32>> {
    let value = |bits: &u16| bf16::from_bits(*bits).to_f32();
    raw.chunks_exact(width).map(|row| row.iter().map(value).collect()).collect()
}

/// Rounding to bf16, 8 significant bits, errs by 2^-8 of a value at most; the sums' order adds little. A row may be
/// ruled by a single value, so no average counts here.
const BF16: f64 = 1.0 / 256.0;
/// Sums of products of bf16 in f32.
const F32: f64 = 1e-4;
/// Rounding to f16: 2^-12.
const F16: f64 = 4e-4;

fn linear(gpu: &mut Gpu, rows: usize, cols: usize) {
    let operands = Operands::new(gpu, rows, cols);
    let (w, x) = operands.on_device;
    let label = format!("linear {rows}x{cols}");
    let run = |gpu: &mut Gpu, tokens: u32| {
        let out = gpu.poisoned(tokens as usize * rows);
        gpu.launch(w, x, tokens, &Linear { out: out.address() });
        bf16_rows(&without_margin(gpu.download(out), tokens as usize * rows, &label), rows)
    };
    check(gpu, &label, BF16, run, |t| operands.product(t));
}

fn head(gpu: &mut Gpu, rows: usize, cols: usize) {
    let operands = Operands::new(gpu, rows, cols);
    let (w, x) = operands.on_device;
    let label = format!("head {rows}x{cols}");
    let run = |gpu: &mut Gpu, tokens: u32| {
        let out = gpu.poisoned(tokens as usize * rows);
        gpu.launch(w, x, tokens, &Head { out: out.address() });
        let raw = without_margin(gpu.download(out), tokens as usize * rows, &label);
        let value = |bits: &u16| f16::from_bits(*bits).to_f32();
        raw.chunks_exact(rows).map(|row| row.iter().map(value).collect()).collect()
    };
    check(gpu, &label, F16, run, |t| operands.product(t));
}

fn residual(gpu: &mut Gpu, rows: usize, cols: usize) {
    let operands = Operands::new(gpu, rows, cols);
    let (w, x) = operands.on_device;
    let before = gpu.random(TOKENS[TOKENS.len() - 1] as usize * rows, 2.0);
    let label = format!("residual {rows}x{cols}");
    let segments = rows.div_ceil(64);
    let run = |gpu: &mut Gpu, tokens: u32| {
        let elements = tokens as usize * rows;
        let mut start = before[..elements].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        start.extend([POISON; 256]);
        let out = gpu.upload(Element::Activation, &start);
        let sumsq = gpu.poisoned(tokens as usize * segments * 2);
        gpu.launch(w, x, tokens, &Residual { residual: out.address(), sumsq: sumsq.address() });
        let out = bf16_rows(&without_margin(gpu.download(out), elements, &label), rows);
        let sums = without_margin(gpu.download(sumsq), tokens as usize * segments * 2, &label);
        let sums: Vec<f32> = cast_slice::<u16, u8>(&sums)
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect();
        for (t, row) in out.iter().enumerate() {
            for (segment, values) in row.chunks(64).enumerate() {
                let want: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
                let got = f64::from(sums[t * segments + segment]);
                let close = (got - want).abs() <= 1e-5 * want;
                assert!(close, "{label}, {tokens} tokens: sum {segment} of token {t} is {got} for {want}");
            }
        }
        let with_sums = |(t, mut row): (usize, Vec<f32>)| {
            // Their bits must not depend on the tokens either; the values are checked above.
            row.extend(
                sums[t * segments..][..segments].iter().map(|sum| sum * 0.0 + f32::from_bits(sum.to_bits())),
            );
            row
        };
        out.into_iter().enumerate().map(with_sums).collect()
    };
    let expected = |t: usize| {
        let old = &before[t * rows..][..rows];
        operands.product(t).iter().zip(old).map(|(y, x)| y + f64::from(*x)).collect()
    };
    check(gpu, &label, BF16, run, expected);
}

/// Every other value of pairs of half-words, as f32.
fn floats(halves: &[u16]) -> Vec<f32> {
    halves
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[low, high]| f32::from_bits(u32::from(*high) << 16 | u32::from(*low)))
        .collect()
}

/// The columns of one of several ranks, as a matrix of its own with its inputs.
fn part_of(gpu: &mut Gpu, operands: &Operands, rank: usize, ranks: usize) -> Operands {
    let (whole, cols) = (operands.cols, operands.cols / ranks);
    let part = |rows: &[bf16]| -> Vec<bf16> {
        rows.chunks_exact(whole).flat_map(|row| row[rank * cols..][..cols].iter().copied()).collect()
    };
    let (w, x) = (part(&operands.w), part(&operands.x));
    let matrix = gpu.weight(&w, w.len() / cols, cols).sliced(SLICING.slices(whole) / ranks as u32);
    let behind = vec![bf16::NAN; 256 * cols];
    let on_device = (matrix, gpu.upload(Element::Activation, &[&x[..], &behind].concat()));
    Operands { cols, w, x, on_device }
}

/// Adds pairs, then pairs of pairs.
fn tree(mut sums: Vec<Vec<f32>>) -> Vec<f32> {
    while sums.len() > 1 {
        let added = |pair: &[Vec<f32>]| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect();
        sums = sums.chunks_exact(2).map(added).collect();
    }
    sums.remove(0)
}

/// What ranks make of their columns, added as a tree, is what one makes of all.
fn ranks_sums(gpu: &mut Gpu, rows: usize, cols: usize) {
    let operands = Operands::new(gpu, rows, cols);
    let tokens_max = TOKENS[TOKENS.len() - 1] as usize;
    let before = gpu.random(tokens_max * rows, 2.0);
    let label = format!("{:?} sums {rows}x{cols}", gpu.set);
    let residual = gpu.upload(Element::Activation, &before);
    let sumsq = gpu.poisoned(tokens_max * rows.div_ceil(64) * 2);
    let (w, x) = operands.on_device;
    let added = Residual { residual: residual.address(), sumsq: sumsq.address() };
    gpu.launch(w, x, tokens_max as u32, &added);
    let whole: Vec<u16> = gpu.download(residual);
    let counts = [2, 4, 8].into_iter().filter(|ranks| {
        *ranks <= SLICING.slices(cols) as usize && cols.is_multiple_of(ranks * SLICING.block)
    });
    for ranks in counts {
        let mut sums = Vec::new();
        for rank in 0..ranks {
            let part = part_of(gpu, &operands, rank, ranks);
            let (w, x) = part.on_device;
            let run = |gpu: &mut Gpu, tokens: u32| {
                let padded = rows.next_multiple_of(64); // whole segments
                let elements = tokens as usize * padded * 2;
                let out = gpu.poisoned(elements);
                gpu.launch(w, x, tokens, &RankSums::here(out.address()));
                let sums = floats(&without_margin(gpu.download(out), elements, &label));
                sums.chunks_exact(padded).map(|row| row[..rows].to_vec()).collect::<Vec<_>>()
            };
            check(gpu, &format!("{label}, rank {rank} of {ranks}"), F32, run, |t| part.product(t));
            sums.push(run(gpu, tokens_max as u32).concat());
        }
        let differs = tree(sums)
            .iter()
            .zip(&before)
            .zip(&whole)
            .position(|((sum, old), bits)| bf16::from_f32(old.to_f32() + sum).to_bits() != *bits);
        assert_eq!(differs, None, "{label}: the first output that differs, of {ranks} ranks");
    }
}

fn gate_up(gpu: &mut Gpu, intermediate: usize, cols: usize) {
    // As the loader stores them: 8 gates, their 8 ups, and zeros up to a multiple of 128 rows.
    let stored = (intermediate * 2).next_multiple_of(128);
    let mut operands = Operands::new(gpu, stored, cols);
    operands.w[intermediate * 2 * cols..].fill(bf16::ZERO);
    let w = gpu.weight(&operands.w, stored, cols);
    let x = operands.on_device.1;
    let (_, norm, scales) = operands.norm(gpu);
    let label = format!("gate_up 2x{intermediate}x{cols}");
    let run = |gpu: &mut Gpu, tokens: u32| {
        let out = gpu.poisoned(tokens as usize * intermediate);
        let epilogue = GateUp { norm, out: out.address(), intermediate: intermediate as u32, reserved: 0 };
        gpu.launch(w, x, tokens, &epilogue);
        bf16_rows(&without_margin(gpu.download(out), tokens as usize * intermediate, &label), intermediate)
    };
    let expected = |t: usize| {
        let y = operands.product(t);
        let output = |m: usize| {
            let gate = y[m / 8 * 16 + m % 8] * scales[t];
            gate / (1.0 + (-gate).exp()) * (y[m / 8 * 16 + 8 + m % 8] * scales[t])
        };
        (0..intermediate).map(output).collect()
    };
    check(gpu, &label, BF16, run, expected);
}

/// Heads of a decoder's attention.
#[derive(Clone, Copy)]
struct Heads {
    q: usize,
    kv: usize,
    dim: usize,
    page_size: usize,
}

/// Tokens at random positions, each at a place of its own in the pages.
fn places(gpu: &mut Gpu, tokens: usize, positions: u64, capacity: usize) -> Vec<Token> {
    let mut locations: Vec<u32> = (0..capacity as u32).collect();
    let mut seed = gpu.seed;
    let mut below = |limit: u64| {
        seed = splitmix64(seed);
        seed % limit
    };
    for i in (1..capacity).rev() {
        locations.swap(i, below(i as u64 + 1) as usize);
    }
    let token =
        |i: usize| Token { id: 0, slot: 0, position: below(positions) as u32, location: locations[i] };
    (0..tokens).map(token).collect()
}

/// What happens to q, k and v beside the product.
#[derive(Clone, Copy, Debug)]
struct Has {
    bias: bool,
    norms: bool,
    rope: bool,
}

const ALL: Has = Has { bias: true, norms: true, rope: true };

fn qkv(gpu: &mut Gpu, heads: Heads, cols: usize, has: Has) {
    let Heads { q, kv, dim, page_size } = heads;
    let (tokens_max, positions, words_before) = (TOKENS[TOKENS.len() - 1] as usize, 500, 24);
    let operands = Operands::new(gpu, (q + 2 * kv) * dim, cols);
    let (w, x) = operands.on_device;
    let (_, norm, scales) = operands.norm(gpu);
    let norms: Vec<bf16> =
        gpu.random(2 * dim, 0.5).iter().map(|x| bf16::from_f32(1.0 + x.to_f32())).collect();
    let [q_norm, k_norm] = [0, dim].map(|at| gpu.upload(Element::Activation, &norms[at..at + dim]));
    let biases = gpu.random((q + 2 * kv) * dim, 1.0);
    let bias = gpu.upload(Element::Activation, &biases);
    let given = |has: bool, buffer: Buffer| if has { buffer.address() } else { Address::NULL };
    let angle = |i: usize| (i / (dim / 2)) as f64 * 1e4f64.powf(-((i % (dim / 2)) as f64) / (dim / 2) as f64);
    let angles: Vec<f32> =
        (0..positions * dim / 2).flat_map(|i| [angle(i).cos() as f32, angle(i).sin() as f32]).collect();
    let rope = gpu.upload(Element::Float, &angles);
    let pages = (tokens_max + 100).div_ceil(page_size);
    let places = places(gpu, tokens_max, positions as u64, pages * page_size);
    let mut batch = vec![0u32; words_before];
    batch.extend_from_slice(cast_slice(&places));
    let batch = gpu.upload(Element::Word, &batch);
    let label = format!("qkv {q}+2*{kv} heads of {dim}, pages of {page_size}, {cols} columns, {has:?}");
    let page_elements = pages * kv * page_size * dim;
    let run = |gpu: &mut Gpu, tokens: u32| {
        let q_out = gpu.poisoned(tokens as usize * q * dim);
        let (k_out, v_out) = (gpu.poisoned(page_elements), gpu.poisoned(page_elements));
        let epilogue = Qkv {
            norm,
            head_eps: EPS,
            batch: batch.address(),
            bias: given(has.bias, bias),
            q_norm: given(has.norms, q_norm),
            k_norm: given(has.norms, k_norm),
            rope: given(has.rope, rope),
            q: q_out.address(),
            k: k_out.address(),
            v: v_out.address(),
            tokens_offset: words_before as u32,
            heads: q as u32,
            kv_heads: kv as u32,
            head_dim: dim as u32,
            page_shift: page_size.trailing_zeros(),
            fp8: 0,
        };
        gpu.launch(w, x, tokens, &epilogue);
        let in_fp8 = gpu.cuda.properties().hopper;
        let layout = fp8::layout(kv, dim, page_size as u32);
        let empty = vec![POISON_BYTE; pages * layout.page_bytes()];
        let [k_fp8, v_fp8] = [(); 2].map(|()| gpu.upload(Element::Word, &empty));
        let [k_wide, v_wide] = [(); 2].map(|()| gpu.poisoned(page_elements));
        let keeps_fp8 = gpu.gemm.keeps_fp8(w, tokens, gpu.share);
        if in_fp8 && keeps_fp8 {
            let (k, v) = (k_fp8.address(), v_fp8.address());
            gpu.launch(w, x, tokens, &Qkv { k, v, fp8: 1, ..epilogue });
        } else if in_fp8 {
            let (k, v) = (k_wide.address(), v_wide.address());
            gpu.launch(w, x, tokens, &Qkv { k, v, ..epilogue });
            let kv = KvLayer { k: k_fp8, v: v_fp8, wide: Some([k_wide, v_wide]) };
            gpu.encode(heads, batch, words_before, tokens, kv);
        }
        let queries = without_margin(gpu.download(q_out), tokens as usize * q * dim, &label);
        let mut out = bf16_rows(&queries, q * dim);
        for (what, pages, narrow, wide) in
            [(What::Keys, k_out, k_fp8, k_wide), (What::Values, v_out, v_fp8, v_wide)]
        {
            let pages = without_margin(gpu.download(pages), page_elements, &label);
            let written = pages.iter().filter(|bits| **bits != POISON).count();
            assert_eq!(written, tokens as usize * kv * dim, "{label}, {tokens} tokens: values in pages");
            let mut expected = empty.clone();
            for (t, row) in out.iter_mut().enumerate() {
                let location = places[t].location as usize;
                let kept = kept(&pages, heads, location);
                for (head, kept) in kept.chunks_exact(dim).enumerate() {
                    let place = [location / page_size, head, location % page_size];
                    fp8::put(what, &layout, place, &fp8::rounded(kept), &mut expected);
                }
                row.extend(kept);
            }
            if in_fp8 {
                let narrow: Vec<u8> = gpu.download(narrow);
                assert!(narrow == expected, "{label}, {tokens} tokens: {what:?} in fp8");
            }
            if in_fp8 && !keeps_fp8 {
                let wide = without_margin(gpu.download(wide), page_elements, &label);
                for (t, place) in places[..tokens as usize].iter().enumerate() {
                    let location = place.location as usize;
                    let rows = self::kept(&pages, heads, location);
                    let meant: Vec<f32> = rows.chunks_exact(dim).flat_map(fp8::meant).collect();
                    let widened = self::kept(&wide, heads, location);
                    assert!(widened == meant, "{label}, {tokens} tokens: {what:?} of token {t} widened");
                }
            }
        }
        out
    };
    let rotated = |t: usize| rope_row(&angles, places[t].position as usize, dim);
    let expected = |t: usize| {
        let added = |i: usize| if has.bias { f64::from(biases[i]) } else { 0.0 };
        let y: Vec<f64> =
            operands.product(t).iter().enumerate().map(|(i, y)| y * scales[t] + added(i)).collect();
        let head = |(h, y): (usize, &[f64])| {
            if h >= q + kv {
                return y.to_vec();
            }
            let norm = if h < q { &norms[..dim] } else { &norms[dim..] };
            let y = if has.norms { normed(y, norm) } else { y.to_vec() };
            if has.rope { turned(&y, &rotated(t)) } else { y }
        };
        y.chunks_exact(dim).enumerate().flat_map(head).collect()
    };
    check(gpu, &label, BF16, run, expected);
}

/// A token's `[kv, dim]` values in pages, whose 16-byte chunks are permuted within each row.
fn kept(pages: &[u16], heads: Heads, location: usize) -> Vec<f32> {
    let Heads { kv, dim, page_size, .. } = heads;
    let (page, row) = (location / page_size, location % page_size);
    let value = |i: usize| {
        let (head, d) = (i / dim, i % dim);
        let line = (page * kv + head) * page_size + row;
        bf16::from_bits(pages[line * dim + ((d / 8) ^ (row % 8)) * 8 + d % 8]).to_f32()
    };
    (0..kv * dim).map(value).collect()
}

fn rope_row(angles: &[f32], position: usize, dim: usize) -> Vec<(f64, f64)> {
    let row = &angles[position * dim..][..dim];
    row.chunks_exact(2).map(|pair| (f64::from(pair[0]), f64::from(pair[1]))).collect()
}

fn normed(x: &[f64], weight: &[bf16]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = (mean + f64::from(EPS)).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * scale * f64::from(*w)).collect()
}

/// Dims d and d + dim / 2 turned by the angle of d.
fn turned(x: &[f64], turns: &[(f64, f64)]) -> Vec<f64> {
    let half = x.len() / 2;
    let dim = |d: usize| {
        let (cos, sin) = turns[d % half];
        if d < half { x[d] * cos - x[d + half] * sin } else { x[d] * cos + x[d - half] * sin }
    };
    (0..x.len()).map(dim).collect()
}

/// Runs a case on the portable kernels, then on those of the device.
fn on_every_set(case: impl Fn(&mut Gpu)) {
    for set in [KernelSet::Portable, KernelSet::Auto] {
        case(&mut Gpu::new(set));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_linear_layers_rows_are_the_definitions_and_independent_of_the_batch() {
    on_every_set(|gpu| {
        for (rows, cols) in taken([(192, 192), (64, 64), (320, 72), (1024, 1024)]) {
            linear(gpu, rows, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn logits_are_the_definitions_and_independent_of_the_batch() {
    on_every_set(|gpu| {
        for (rows, cols) in taken([(768, 192), (1024, 64), (1001, 320), (4096, 1024)]) {
            head(gpu, rows, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn the_residual_stream_grows_by_the_product_and_its_squares_are_summed() {
    on_every_set(|gpu| {
        for (rows, cols) in taken([
            (192, 320),
            (64, 64),
            (192, 192),
            (1280, 1024),
            (2048, 512),
            (1024, 3072),
            LARGE,
            DEEP,
            (1024, 2048),
        ]) {
            residual(gpu, rows, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn ranks_sums_added_as_a_tree_have_the_bits_of_the_whole_product() {
    on_every_set(|gpu| {
        for (rows, cols) in
            taken([(1000, 896), (192, 320), (1024, 2048), (1024, 3072), (896, 4864), LARGE, DEEP])
        {
            ranks_sums(gpu, rows, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn slices_that_no_kernel_adds_are_refused() {
    on_every_set(|gpu| {
        let operands = Operands::new(gpu, 64, 128);
        let (w, x) = operands.on_device;
        let out = gpu.poisoned(64 * 2);
        let (x, sums) = (Rows { address: x.address(), there: 1 }, RankSums::here(out.address()));
        for slices in [0, 3, 4] {
            let launched = gpu.gemm.launch(gpu.cuda.launcher(), w.sliced(slices), x, 1, gpu.share, &sums);
            assert!(launched.unwrap_err().to_string().contains("slices of 128 columns"), "{slices}");
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn gate_and_up_meet_in_the_right_pairs() {
    on_every_set(|gpu| {
        let large = (LARGE.0, LARGE.1 / 2);
        let [small, medium, tall] = TALL;
        for (intermediate, cols) in
            taken([(320, 192), (32, 64), (3072, 1024), large, small, medium, tall, WIDE])
        {
            gate_up(gpu, intermediate, cols);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn queries_keys_and_values_are_normed_turned_and_put_in_their_places() {
    on_every_set(|gpu| {
        let heads = |q, kv, dim, page_size| Heads { q, kv, dim, page_size };
        for (heads, cols) in taken([
            (heads(2, 2, 128, 32), 320),
            (heads(2, 1, 64, 16), 64),
            (heads(3, 1, 64, 16), 192),
            (heads(16, 8, 128, 16), 1024),
            (heads(24, 8, 128, 16), LARGE.1 / 2),
            (heads(6, 2, 128, 16), 328),
            (heads(32, 8, 128, 16), LARGE.1 / 2),
        ]) {
            qkv(gpu, heads, cols, Has { bias: false, ..ALL });
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn biases_head_norms_and_rope_are_there_or_not() {
    let none = Has { bias: false, norms: false, rope: false };
    let bias = Has { bias: true, ..none };
    on_every_set(|gpu| {
        let heads = |q, kv, dim, page_size| Heads { q, kv, dim, page_size };
        for (heads, cols, has) in taken([
            (heads(9, 3, 64, 16), 576, Has { rope: true, ..none }),
            (heads(14, 2, 64, 16), 896, Has { rope: true, ..bias }),
            (heads(28, 4, 128, 16), 3584, Has { rope: true, ..bias }),
            (heads(16, 4, 128, 32), 2048, none),
            (heads(3, 1, 64, 16), 192, ALL),
            (heads(4, 2, 128, 16), 256, bias),
            (heads(4, 2, 128, 16), 256, Has { rope: false, ..ALL }),
        ]) {
            qkv(gpu, heads, cols, has);
        }
    });
}

#[test]
#[ignore = "needs a GPU"]
fn logits_beyond_f16_are_clamped() {
    on_every_set(|gpu| {
        let (rows, cols) = (128, 64);
        let w: Vec<bf16> = (0..rows * cols)
            .map(|i| bf16::from_f32(if i / cols % 2 == 0 { 200.0 } else { -200.0 }))
            .collect();
        let w = gpu.weight(&w, rows, cols);
        let x = gpu.upload(Element::Activation, &vec![bf16::from_f32(100.0); 16 * cols]);
        let out = gpu.poisoned(16 * rows);
        gpu.launch(w, x, 16, &Head { out: out.address() });
        let raw = without_margin(gpu.download(out), 16 * rows, "head");
        for (i, bits) in raw.iter().enumerate() {
            let want = if i % rows % 2 == 0 { 65504.0 } else { -65504.0 };
            assert_eq!(f16::from_bits(*bits).to_f32(), want, "output {i}");
        }
    });
}
