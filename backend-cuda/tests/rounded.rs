//! Products whose inputs are rounded to e4m3, of matrices in e4m3, against core's definition in float64: fresh random operands, scales
//! of every form that checkpoints have, few tokens and many, which must agree in every bit.

#[path = "support/products.rs"]
mod products;
mod support;

use std::sync::Arc;

use bytemuck::cast_slice;
use half::bf16;
use minisgl_core::backend::{Device, Element, WeightRole};
use minisgl_core::batch::Token;
use minisgl_core::fp8;
use minisgl_core::spec::Inputs;
use minisgl_core::tensor::{HostTensor, Scales, TensorData};
use minisgl_cuda::ops::gemm::{Epilogue, GateUp, Norm, Qkv, Residual, RowNorm, Rows, SmShare};
use minisgl_cuda::{Address, Buffer, Weight};
use products::Gpu;
use support::taken;

/// Both sides of every tile's tokens, and some that tiles of 192 take.
const TOKENS: [u32; 15] = [1, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 384, 700, 1000];
const TOKENS_MAX: usize = 1000;
/// Tokens that are compared with the definition: of the first tile, and of the last.
const COMPARED: [usize; 5] = [0, 7, 15, 998, 999];
/// How far sums may be off, as a share of their norm. Tensor cores keep 13 bits or more of a sum over 128 to 512 columns, which begins
/// from zero: where terms have both signs that is some 2^-14 of what is summed, less of the whole row, and more of wider sums. Of 4,096
/// columns at once, or all of 12,288, 8e-4 and 17e-4 were measured.
const SUMS: f64 = 3e-4;
const WIDE_SUMS: f64 = 6e-4;
/// The same of outputs in bf16, half a unit in whose last place is 2^-9 at most.
const OUTPUTS: f64 = 4e-3;
/// And behind a norm, of which CPU and GPU make numbers that differ in their last bits: now and then one falls on the other side of
/// the middle between two codes, a sixteenth apart.
const NORMED: f64 = 1e-2;

/// Scales of tiles with inputs by groups, of rows with inputs by tokens, of the matrix with a scale of all inputs, and of tiles of which
/// 128 rows have more than two; of tiles and inputs by groups of which sums are as wide.
const FORMS: [([usize; 2], Inputs); 5] = [
    ([128, 128], Inputs::PerGroup(128)),
    ([1, 1 << 20], Inputs::PerToken),
    ([1 << 20, 1 << 20], Inputs::Static),
    ([8, 128], Inputs::PerGroup(128)),
    ([128, 256], Inputs::PerGroup(256)),
];
/// The scale of all inputs: the largest ones are cut.
const FIXED: f32 = 0.9 / 448.0;

fn gpu() -> Gpu {
    let mut gpu = Gpu::new();
    gpu.gemm.reserve_rounded(&mut gpu.cuda, TOKENS_MAX, 12_288).unwrap();
    gpu
}

/// Both operands of a product.
struct Operands {
    cols: usize,
    weight: Weight,
    /// What its elements mean.
    w: Vec<f32>,
    x: Buffer,
    inputs: Inputs,
    /// `[tokens, cols]`, as they are, and a norm's scales.
    plain: Vec<f32>,
    norm: (Weight, Vec<f32>),
    row_norm: (RowNorm, Vec<f32>),
}

impl Operands {
    fn new(gpu: &mut Gpu, role: WeightRole, [rows, cols]: [usize; 2], form: usize) -> Operands {
        let (block, inputs) = FORMS[form % FORMS.len()];
        let codes: Vec<u8> = (0..rows * cols)
            .map(|_| gpu.next() as u8)
            .map(|code| if code & 0x7f == fp8::NAN { code ^ 1 } else { code })
            .collect();
        let across = cols.div_ceil(block[1]);
        let values: Vec<f32> = (0..rows.div_ceil(block[0]) * across)
            .map(|_| 1e-4 + (gpu.next() >> 40) as f32 / (1 << 24) as f32 * 1e-3)
            .collect();
        let w = (0..rows * cols)
            .map(|i| fp8::decode(codes[i]) * values[i / cols / block[0] * across + i % cols / block[1]])
            .collect();
        let scales = Scales { values, block, inputs, input_scale: Some(FIXED) };
        let data =
            TensorData::Fp8 { range: 0..codes.len(), owner: Arc::new(codes), scales: Arc::new(scales) };
        let tensor = HostTensor { name: "w".into(), rows, cols, data };
        let weight = gpu.cuda.load_weight(role, &[tensor]).unwrap();
        let x = gpu.activations(TOKENS_MAX * cols);
        let plain = floats(&gpu.download(x));
        let norm = gpu.activations(cols);
        let norms = floats(&gpu.download(norm));
        let norm = (Weight::new(norm.address(), 1, cols), norms);
        let row_norm = gpu.norm(TOKENS_MAX, cols);
        Operands { cols, weight, w, x, inputs, plain, norm, row_norm }
    }

    /// `y[t, :]` by the definition, with or without a norm.
    fn product(&self, t: usize, normed: bool) -> Vec<f64> {
        let mut x = self.plain[t * self.cols..][..self.cols].to_vec();
        if normed {
            let (RowNorm { segments, eps, .. }, sums) = &self.row_norm;
            let sum: f32 = sums[t * *segments as usize..][..*segments as usize].iter().sum();
            let inverse = 1.0 / (sum / self.cols as f32 + eps).sqrt();
            x.iter_mut().zip(&self.norm.1).for_each(|(x, norm)| *x = *x * inverse * norm);
        }
        match self.inputs {
            Inputs::PerGroup(width) => x.chunks_mut(width as usize).for_each(fp8::quantize_group),
            Inputs::PerToken => fp8::quantize_group(&mut x),
            Inputs::Static => fp8::quantize(&mut x, FIXED),
            Inputs::Plain => {}
        }
        let dot = |row: &[f32]| row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        self.w.chunks(self.cols).map(dot).collect()
    }

    fn launch<E: Epilogue>(&self, gpu: &mut Gpu, tokens: u32, normed: bool, epilogue: &E) {
        let x = Rows { address: self.x.address(), there: TOKENS_MAX as u32 };
        let norm = Norm { weight: Some(self.norm.0), rows: self.row_norm.0 };
        let (gemm, launcher) = (&gpu.gemm, gpu.cuda.launcher());
        let x = gemm.inputs(launcher, self.weight, normed.then_some(norm), x, tokens, x).unwrap();
        gemm.launch(launcher, self.weight, x, tokens, SmShare::Whole, epilogue).unwrap();
        gpu.cuda.synchronize().unwrap();
    }
}

fn floats(words: &[u32]) -> Vec<f32> {
    let halves = words.iter().flat_map(|word| [*word as u16, (*word >> 16) as u16]);
    halves.map(|bits| bf16::from_bits(bits).to_f32()).collect()
}

/// The difference's norm as a share of the expected one's.
fn error(got: impl Iterator<Item = f64>, expected: &[f64]) -> f64 {
    let squares = got.zip(expected).map(|(got, expected)| (got - expected).powi(2)).sum::<f64>();
    (squares / expected.iter().map(|x| x * x).sum::<f64>()).sqrt()
}

/// Runs a product for every number of tokens: what it writes of a token, as the words `of(token)`, must be the same in all.
fn agree(
    label: &str,
    of: impl Fn(usize) -> std::ops::Range<usize>,
    mut run: impl FnMut(u32) -> Vec<u32>,
) -> Vec<u32> {
    let all = run(TOKENS_MAX as u32);
    for tokens in taken(TOKENS) {
        let some = run(tokens);
        for t in 0..tokens as usize {
            assert!(some[of(t)] == all[of(t)], "{label}: token {t} of {tokens} differs");
        }
    }
    all
}

#[test]
#[ignore = "needs a GPU"]
fn rows_that_are_added_are_those_of_the_definition() {
    let gpu = &mut gpu();
    let shapes = [(192, 320), (1000, 1104), (64, 64), (1024, 3072), (4096, 4096), (4096, 12_288)];
    for (i, (rows, cols)) in taken(shapes).enumerate() {
        for form in [i, i + 1] {
            // As a model of one rank has them.
            let role = WeightRole::Sliced(minisgl_cuda::SLICING.slices(cols));
            let operands = Operands::new(gpu, role, [rows, cols], form);
            // What is added to is about minus the product, so that the sum shows what bf16 would hide of it.
            let mut before = vec![bf16::ONE; TOKENS_MAX * rows];
            let expected = COMPARED.map(|t| operands.product(t, false));
            for (t, expected) in COMPARED.into_iter().zip(&expected) {
                let before = &mut before[t * rows..][..rows];
                before.iter_mut().zip(expected).for_each(|(before, y)| *before = bf16::from_f64(-y));
            }
            let label = format!("residual {rows}x{cols}, form {}", form % FORMS.len());
            let all = agree(
                &label,
                |t| t * rows / 2..(t + 1) * rows / 2,
                |tokens| {
                    let residual = gpu.upload(Element::Activation, &before);
                    let sumsq = gpu.upload(Element::Float, &vec![f32::NAN; TOKENS_MAX * rows.div_ceil(64)]);
                    let added = Residual { residual: residual.address(), sumsq: sumsq.address() };
                    operands.launch(gpu, tokens, false, &added);
                    let segments = rows.div_ceil(64);
                    let sums = gpu.download(sumsq);
                    let written = &sums[..tokens as usize * segments];
                    assert!(written.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{label}");
                    gpu.download(residual)
                },
            );
            let after = floats(&all);
            for (t, expected) in COMPARED.into_iter().zip(&expected) {
                let rows = t * rows..(t + 1) * rows;
                let got = rows.map(|i| f64::from(after[i]) - before[i].to_f64());
                let error = error(got, expected);
                let bound = if FORMS[form % FORMS.len()].0[1] == 128 { SUMS } else { WIDE_SUMS };
                assert!(error < bound, "{label}, token {t}: off by {error} of its norm");
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gates_and_ups_are_those_of_the_definition() {
    let gpu = &mut gpu();
    let shapes = [(128, 256), (3000, 1104), (384, 128), (3072, 1024), (12_288, 4096)];
    for (i, (intermediate, cols)) in taken(shapes).enumerate() {
        let operands = Operands::new(gpu, WeightRole::GateUp, [2 * intermediate, cols], i);
        let label = format!("gate and up {intermediate}x{cols}, form {}", i % FORMS.len());
        let all = agree(
            &label,
            |t| t * intermediate / 2..(t + 1) * intermediate / 2,
            |tokens| {
                let out = gpu.upload(Element::Activation, &vec![u32::MAX; TOKENS_MAX * intermediate / 2]);
                let norm = operands.row_norm.0;
                let gated =
                    GateUp { norm, out: out.address(), intermediate: intermediate as u32, reserved: 0 };
                operands.launch(gpu, tokens, true, &gated);
                gpu.download(out)
            },
        );
        let got = floats(&all);
        for t in COMPARED {
            let y = operands.product(t, true);
            let (gates, ups) = y.split_at(intermediate);
            let expected: Vec<f64> =
                gates.iter().zip(ups).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            let got = got[t * intermediate..][..intermediate].iter().map(|y| f64::from(*y));
            let error = error(got, &expected);
            assert!(error < 2.0 * NORMED, "{label}, token {t}: off by {error} of its norm");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn queries_keys_and_values_are_those_of_the_definition() {
    let gpu = &mut gpu();
    let largest = (32, 8, 128, 4096);
    let shapes = [(2, 1, 128, 320), (4, 2, 64, 128), (16, 8, 128, 1024), largest, largest];
    for (i, (heads, kv_heads, head_dim, cols)) in taken(shapes).enumerate() {
        let rows = (heads + 2 * kv_heads) * head_dim;
        let operands = Operands::new(gpu, WeightRole::Linear, [rows, cols], i);
        let token = |i: u32| Token { id: 0, slot: 0, position: i % 64, location: i };
        let tokens: Vec<Token> = (0..TOKENS_MAX as u32).map(token).collect();
        let batch = gpu.upload(Element::Word, cast_slice::<Token, u32>(&tokens));
        let label = format!("qkv {rows}x{cols}, form {}", i % FORMS.len());
        for normed in [false, true] {
            let words = |heads: usize| heads * head_dim / 2;
            let all = agree(
                &label,
                |t| t * words(heads)..(t + 1) * words(heads),
                |tokens| {
                    let mut out =
                        |heads: usize| gpu.upload(Element::Activation, &vec![u32::MAX; 1024 * words(heads)]);
                    let [q, k, v] = [out(heads), out(kv_heads), out(kv_heads)];
                    let epilogue = Qkv {
                        norm: operands.row_norm.0,
                        head_eps: 1e-6,
                        batch: batch.address(),
                        bias: Address::NULL,
                        q_norm: Address::NULL,
                        k_norm: Address::NULL,
                        rope: Address::NULL,
                        q: q.address(),
                        k: k.address(),
                        v: v.address(),
                        tokens_offset: 0,
                        heads: heads as u32,
                        kv_heads: kv_heads as u32,
                        head_dim: head_dim as u32,
                        page_shift: 4,
                        fp8: 0,
                    };
                    operands.launch(gpu, tokens, normed, &epilogue);
                    // Keys and values of so many tokens, too, which lie in pages of 16.
                    let kept: Vec<u32> = [k, v].map(|out| gpu.download(out)).concat();
                    let pages = tokens.div_ceil(16) as usize;
                    assert!(kept[..(pages - 1) * 16 * words(kv_heads)].iter().all(|word| *word != u32::MAX));
                    gpu.download(q)
                },
            );
            let got = floats(&all);
            for t in COMPARED {
                let y = operands.product(t, normed);
                let expected = &y[..heads * head_dim];
                let got = got[t * heads * head_dim..][..heads * head_dim].iter().map(|y| f64::from(*y));
                let (error, bound) = (error(got, expected), if normed { NORMED } else { OUTPUTS });
                assert!(error < bound, "{label}, token {t}: off by {error} of its norm");
            }
        }
    }
}
