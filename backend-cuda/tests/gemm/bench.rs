//! A product's operands on the device and what holds its outputs: every case multiplies the first `tokens` rows of one random matrix
//! for a list of token counts. The largest run is compared with the definition in f64, every other run with the largest, bit by bit.
//! Outputs are poisoned before, and what lies behind them must still be poison after; what lies behind the last row of x is NaN.

use std::time::{SystemTime, UNIX_EPOCH};

use bytemuck::{Pod, cast_slice};
use half::bf16;
use minisgl_core::backend::{Device, Element, Purpose, Queue};
use minisgl_core::tensor::{splitmix64, uniform_element};
use minisgl_cuda::ops::gemm::{Epilogue, Gemm, RowNorm, Rows, SmShare};
use minisgl_cuda::{Buffer, Cuda, KernelSet, Options, Weight};

use crate::support::taken;

/// Both sides of every tile of every kernel. Sanitizers see every fourth.
pub const TOKENS: [u32; 32] = [
    1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 40, 48, 49, 64, 65, 96, 100, 128, 129, 144, 145, 176, 192, 200,
    209, 224, 240, 256, 257, 384, 1000,
];
/// What an output holds before; a NaN in bf16, f16 and f32.
pub const POISON: u16 = 0x7fff;
pub const EPS: f32 = 1e-6;

/// The device with its kernels.
pub struct Gpu {
    pub cuda: Cuda,
    pub gemm: Gemm,
    pub set: KernelSet,
    pub share: SmShare,
    pub seed: u64,
}

impl Gpu {
    pub fn new(set: KernelSet) -> Gpu {
        let mut cuda = Cuda::new(&Options { kernels: set, ..Options::default() }).expect("a GPU");
        let gemm = Gemm::new(&mut cuda).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Gpu { cuda, gemm, set, share: SmShare::Whole, seed: splitmix64(now.as_nanos() as u64) }
    }

    /// `count` numbers in `[-size, size)`.
    pub fn random(&mut self, count: usize, size: f32) -> Vec<bf16> {
        self.seed = splitmix64(self.seed);
        (0..count as u64).map(|i| uniform_element(self.seed, i, -size, size)).collect()
    }

    pub fn upload<T: Pod>(&mut self, element: Element, values: &[T]) -> Buffer {
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

    pub fn download<T: Pod>(&mut self, buffer: Buffer) -> Vec<T> {
        let words = buffer.bytes() / 4;
        let mut pinned = self.cuda.alloc_pinned(words).unwrap();
        self.cuda.download(Queue::Compute, buffer, words, &mut pinned).unwrap();
        cast_slice(self.cuda.words(&pinned).unwrap()).to_vec()
    }

    /// An output of `elements` elements and a margin, all poison.
    pub fn poisoned(&mut self, elements: usize) -> Buffer {
        self.upload(Element::Activation, &vec![POISON; elements.next_multiple_of(2) + 256])
    }

    pub fn weight(&mut self, values: &[bf16], rows: usize, cols: usize) -> Weight {
        Weight::new(self.upload(Element::Activation, values).address(), rows, cols)
    }

    pub fn launch<E: Epilogue>(&mut self, w: Weight, x: Buffer, tokens: u32, epilogue: &E) {
        let launcher = self.cuda.launcher();
        let x = Rows { address: x.address(), there: (x.elements() / w.cols()) as u32 };
        self.gemm.launch(launcher, w, x, tokens, self.share, epilogue).unwrap();
        self.cuda.synchronize().unwrap();
    }
}

pub fn cast_slice_mut(words: &mut [u32]) -> &mut [u8] {
    bytemuck::cast_slice_mut(words)
}

/// The output's values; what lies behind them must be poison.
pub fn without_margin(raw: Vec<u16>, elements: usize, label: &str) -> Vec<u16> {
    let touched = (elements..raw.len()).find(|i| raw[*i] != POISON);
    assert_eq!(touched, None, "{label}: written beyond the output of {elements} elements");
    raw[..elements].to_vec()
}

/// A matrix product's operands.
pub struct Operands {
    pub cols: usize,
    /// `[rows, cols]`
    pub w: Vec<bf16>,
    /// `[tokens, cols]`
    pub x: Vec<bf16>,
    pub on_device: (Weight, Buffer),
}

impl Operands {
    pub fn new(gpu: &mut Gpu, rows: usize, cols: usize) -> Operands {
        let tokens = TOKENS[TOKENS.len() - 1] as usize;
        let (w, x) = (gpu.random(rows * cols, (3.0 / cols as f32).sqrt()), gpu.random(tokens * cols, 1.0));
        // What a tile reads behind the last token is nobody's.
        let behind = vec![bf16::NAN; 256 * cols];
        let on_device =
            (gpu.weight(&w, rows, cols), gpu.upload(Element::Activation, &[&x[..], &behind].concat()));
        Operands { cols, w, x, on_device }
    }

    /// `y[t, :]`, without an epilogue.
    pub fn product(&self, t: usize) -> Vec<f64> {
        let x: Vec<f64> = self.x[t * self.cols..][..self.cols].iter().map(|x| f64::from(*x)).collect();
        let dot = |row: &[bf16]| row.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum();
        self.w.chunks_exact(self.cols).map(dot).collect()
    }

    /// Random sums of squares, `[tokens, segments]`, near those of `x`, and each token's scale.
    pub fn norm(&self, gpu: &mut Gpu) -> (Buffer, RowNorm, Vec<f64>) {
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
pub fn check(
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
pub fn check_values(label: &str, got: &[f32], want: &[f64], bound: f64) {
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

pub fn bf16_rows(raw: &[u16], width: usize) -> Vec<Vec<f32>> {
    let value = |bits: &u16| bf16::from_bits(*bits).to_f32();
    raw.chunks_exact(width).map(|row| row.iter().map(value).collect()).collect()
}

/// Rounding to bf16, 8 significant bits, errs by 2^-8 of a value at most; the sums' order adds little. A row may be
/// ruled by a single value, so no average counts here.
pub const BF16: f64 = 1.0 / 256.0;
/// Sums of products of bf16 in f32.
pub const F32: f64 = 1e-4;
/// Rounding to f16: 2^-12.
pub const F16: f64 = 4e-4;

/// Runs a case on the portable kernels, then on those of the device.
pub fn on_every_set(case: impl Fn(&mut Gpu)) {
    for set in [KernelSet::Portable, KernelSet::Auto] {
        case(&mut Gpu::new(set));
    }
}
