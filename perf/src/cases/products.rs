//! Cases of the matrix products, each with its epilogue, beside cuBLASLt, which does the bare product.
//!
//! Weights and rows are numbers in [-1, 1) made on the device, so any element of the product can be computed on the
//! host; some are. In fp8 weights are codes, whose inputs are rounded before the clock starts. The rows' sums of squares are made up, so that norms scale by 1/10 and activations stay sane.

use half::bf16;
use minisgl_core::backend::{Device, Element, Purpose, WeightRole};
use minisgl_core::fp8;
use minisgl_core::spec::Inputs;
use minisgl_core::tensor::splitmix64;
use minisgl_cuda::ops::gemm::{
    Epilogue, GateUp, Gemm, Head, Norm, Qkv, RankSums, Residual, RowNorm, Rows, SmShare,
};
use minisgl_cuda::{Address, Buffer, Cuda, CudaError, SLICING, Weight};

use crate::case::{Call, Case, Check, Filter, Run};
use crate::check::relative_error;
use crate::cublaslt::{Blas, Shape};
use crate::model::{FP8_COLS, ModelShape};
use crate::random::{fp8_element, fp8_part, random, random_element, random_part};
use crate::step::{PAGE_SIZE, StepOf, activations, download_words, upload_words};

/// Seeds of the weights (gate's; up's is the next), the rows, the residual stream, the head norms and the biases.
const WEIGHTS: u64 = 1 << 40;
const ROWS: u64 = 2 << 40;
const STREAM: u64 = 3 << 40;
const NORMS: u64 = 4 << 40;
const BIASES: u64 = 8 << 40;
/// What the made-up sums of squares scale rows by.
const SCALE: f64 = 0.1;
/// Rows behind the tokens', as many as any tile has.
const ROWS_BEHIND: usize = 256;
/// Outputs that are checked.
const SAMPLES: usize = 64;
/// How inputs of weights in fp8 are rounded.
const ROUNDED: Inputs = Inputs::PerGroup(FP8_COLS);
/// What bf16 weights, rows and results allow, relative to the norm of the sampled outputs.
const ERROR_MAX: f64 = 0.01;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Product {
    Qkv,
    O,
    GateUp,
    Down,
    Head,
    /// One of two ranks' sums of o and of down.
    RankO,
    RankDown,
}

const PRODUCTS: [Product; 7] = [
    Product::Qkv,
    Product::O,
    Product::GateUp,
    Product::Down,
    Product::Head,
    Product::RankO,
    Product::RankDown,
];

/// A product at a number of tokens.
#[derive(Clone, Copy)]
struct Sizes {
    product: Product,
    model: ModelShape,
    tokens: usize,
    outputs: usize,
    inputs: usize,
    /// Are weights in fp8, and inputs rounded to it?
    fp8: bool,
}

pub(crate) fn cases(filter: &Filter) -> Vec<Case> {
    let mut cases = Vec::new();
    for model in filter.models() {
        for product in PRODUCTS {
            let prefill = if product == Product::Head { Vec::new() } else { filter.tokens() };
            let models = if product == Product::Qkv { model.and_biased() } else { vec![model] };
            let tokens: Vec<u32> = filter.rows().into_iter().chain(prefill).collect();
            let in_fp8 = matches!(product, Product::Qkv | Product::O | Product::GateUp | Product::Down);
            for model in models {
                let sizes = |tokens: &u32| Sizes::new(product, model, *tokens as usize);
                cases.extend(tokens.iter().map(|tokens| sizes(tokens).case()));
                if in_fp8 && !model.bias {
                    cases.extend(tokens.iter().map(|tokens| Sizes { fp8: true, ..sizes(tokens) }.case()));
                }
            }
        }
    }
    cases
}

impl Sizes {
    fn new(product: Product, model: ModelShape, tokens: usize) -> Sizes {
        let dims = model.dims();
        let (hidden, intermediate) = (dims.hidden as usize, dims.intermediate as usize);
        let (outputs, inputs) = match product {
            Product::Qkv => (dims.qkv_width(), hidden),
            Product::O => (hidden, dims.q_width()),
            Product::GateUp => (2 * intermediate, hidden),
            Product::Down => (hidden, intermediate),
            Product::Head => (dims.vocab as usize, hidden),
            Product::RankO => (hidden, dims.q_width() / 2),
            Product::RankDown => (hidden, intermediate / 2),
        };
        Sizes { product, model, tokens, outputs, inputs, fp8: false }
    }

    fn case(self) -> Case {
        let Sizes { tokens, outputs, inputs, .. } = self;
        let family = match self.product {
            Product::Qkv if self.fp8 => "gemm_fp8_qkv",
            Product::O if self.fp8 => "gemm_fp8_o",
            Product::GateUp if self.fp8 => "gemm_fp8_gate_up",
            Product::Down if self.fp8 => "gemm_fp8_down",
            Product::Qkv => "gemm_qkv",
            Product::O => "gemm_o",
            Product::GateUp => "gemm_gate_up",
            Product::Down => "gemm_down",
            Product::Head => "gemm_head",
            Product::RankO => "gemm_o_of_two",
            Product::RankDown => "gemm_down_of_two",
        };
        // silu(gate) * up halves the outputs; adding to the residual stream reads them too.
        let out_bytes = match self.product {
            Product::GateUp => tokens * outputs,
            Product::O | Product::Down | Product::RankO | Product::RankDown => tokens * outputs * 4,
            Product::Qkv | Product::Head => tokens * outputs * 2,
        };
        let bytes = (outputs + tokens) * inputs * if self.fp8 { 1 } else { 2 } + out_bytes;
        let bias = if self.model.bias { " bias" } else { "" };
        Case {
            family,
            shape: format!("model={} tokens={tokens} out={outputs} in={inputs}{bias}", self.model.name),
            bytes: bytes as f64,
            flops: self.shape().flops(),
            setup: Box::new(move |cuda, copies| self.setup(cuda, copies)),
        }
    }

    fn setup(self, cuda: &mut Cuda, copies: usize) -> Result<Run, CudaError> {
        let mut gemm = Gemm::new(cuda)?;
        let weights = (0..copies).map(|_| self.weights(cuda)).collect::<Result<Vec<_>, _>>()?;
        // As in a step, there are more rows than tokens.
        let there = self.tokens + ROWS_BEHIND;
        let x = Rows { address: random(cuda, there, self.inputs, ROWS)?.address(), there: there as u32 };
        if self.fp8 {
            gemm.reserve_rounded(cuda, there, self.inputs)?;
            let is_normed = matches!(self.product, Product::Qkv | Product::GateUp);
            let rows = self.norm(cuda)?;
            let norm = is_normed.then_some(Norm { weight: None, rows });
            gemm.inputs(cuda.launcher(), weights[0], norm, x, self.tokens as u32, x)?;
        }
        let baseline = self.baseline(cuda, weights.clone(), x.address)?;
        let operands = Operands { gemm, weights, x };
        let (call, check) = match self.product {
            Product::Qkv => self.qkv(cuda, operands)?,
            Product::O | Product::Down => self.residual(cuda, operands)?,
            Product::GateUp => self.gate_up(cuda, operands)?,
            Product::Head => self.head(cuda, operands)?,
            Product::RankO | Product::RankDown => self.sums(cuda, operands)?,
        };
        Ok(Run { call, check, baseline })
    }

    fn shape(&self) -> Shape {
        Shape { rows: self.tokens, outputs: self.outputs, inputs: self.inputs, fp8: self.fp8 }
    }

    fn weights(&self, cuda: &mut Cuda) -> Result<Weight, CudaError> {
        if self.fp8 {
            let role = if self.product == Product::GateUp { WeightRole::GateUp } else { WeightRole::Linear };
            return cuda.load_weight(role, &[fp8_part(self.outputs, self.inputs, ROUNDED)]);
        }
        if self.product == Product::GateUp {
            let part = |seed| random_part(self.outputs / 2, self.inputs, seed);
            return cuda.load_weight(WeightRole::GateUp, &[part(WEIGHTS), part(WEIGHTS + 1)]);
        }
        let weight = random(cuda, self.outputs, self.inputs, WEIGHTS)?;
        Ok(match self.product {
            Product::RankO | Product::RankDown => weight.sliced(SLICING.slices(2 * self.inputs) / 2),
            _ => weight,
        })
    }

    /// The bare product by cuBLASLt, where there is one.
    fn baseline(
        &self,
        cuda: &mut Cuda,
        weights: Vec<Weight>,
        x: Address,
    ) -> Result<Option<(&'static str, Call)>, CudaError> {
        let Some(blas) = Blas::open(cuda)? else { return Ok(None) };
        let shape = self.shape();
        // Codes of inputs are as good as any.
        let x = match self.fp8 {
            true => {
                let codes = fp8_part(self.tokens, self.inputs, ROUNDED);
                cuda.load_weight(WeightRole::Linear, &[codes])?.address()
            }
            false => x,
        };
        let out = cuda.alloc(Purpose::Scratch, Element::Activation, self.tokens * self.outputs)?.address();
        let Some(best) = blas.best(cuda, shape, weights[0].address(), x, out)? else { return Ok(None) };
        let call: Call = Box::new(move |launcher, call| {
            blas.multiply(launcher, &best, weights[call % weights.len()].address(), x, out)
        });
        Ok(Some(("cuBLASLt", call)))
    }

    /// Sums of squares that make every row's scale [`SCALE`].
    fn norm(&self, cuda: &mut Cuda) -> Result<RowNorm, CudaError> {
        let (hidden, segments) = (self.inputs as u32, self.inputs.div_ceil(64));
        let segment = (self.inputs as f64 / SCALE.powi(2) / segments as f64) as f32;
        let sumsq = upload_words(cuda, &vec![segment.to_bits(); self.tokens * segments])?.address();
        Ok(RowNorm { sumsq, segments: segments as u32, hidden, eps: 1e-6 })
    }

    /// Element `(token, output)` of the product with the weights of `seed`.
    fn sum(&self, seed: u64, token: usize, output: usize) -> f64 {
        if self.fp8 {
            let mut x: Vec<f32> =
                (0..self.inputs).map(|k| random_element(self.inputs, ROWS, token, k) as f32).collect();
            x.chunks_mut(FP8_COLS as usize).for_each(fp8::quantize_group);
            // Of gate and up, one part with the rows of both.
            let row = if seed == WEIGHTS { output } else { self.outputs / 2 + output };
            let term = |(k, x): (usize, &f32)| fp8_element(self.inputs, row, k) * f64::from(*x);
            return x.iter().enumerate().map(term).sum();
        }
        let term =
            |k| random_element(self.inputs, seed, output, k) * random_element(self.inputs, ROWS, token, k);
        (0..self.inputs).map(term).sum()
    }

    /// Places `(token, output)` that are checked, spread over all.
    fn samples(&self, outputs: usize) -> Vec<(usize, usize)> {
        let draw = |i: usize, below: usize| (splitmix64(i as u64) % below as u64) as usize;
        (0..SAMPLES).map(|i| (draw(2 * i, self.tokens), draw(2 * i + 1, outputs))).collect()
    }

    fn head(self, cuda: &mut Cuda, operands: Operands) -> Result<(Call, Check), CudaError> {
        let elements = self.tokens * self.outputs;
        let out = cuda.alloc(Purpose::Scratch, Element::Logit, elements)?;
        let check: Check = Box::new(move |cuda| {
            let words = download_words(cuda, out, elements / 2)?;
            let logits: &[half::f16] = bytemuck::cast_slice(&words);
            let pairs = self.samples(self.outputs).into_iter().map(|(token, output)| {
                let logit = f64::from(logits[token * self.outputs + output].to_f32());
                (logit, self.sum(WEIGHTS, token, output))
            });
            Ok(relative_error(pairs, ERROR_MAX))
        });
        Ok((operands.times(self.tokens, Head { out: out.address() }), check))
    }

    fn residual(self, cuda: &mut Cuda, operands: Operands) -> Result<(Call, Check), CudaError> {
        let residual = random(cuda, self.tokens, self.outputs, STREAM)?;
        let segments = self.outputs.div_ceil(64);
        let sumsq = cuda.alloc(Purpose::Scratch, Element::Float, self.tokens * segments)?.address();
        let check: Check = Box::new(move |cuda| {
            let values = activations(cuda, residual.into(), self.tokens * self.outputs)?;
            let pairs = self.samples(self.outputs).into_iter().map(|(token, output)| {
                let before = random_element(self.outputs, STREAM, token, output);
                (values[token * self.outputs + output].to_f64(), before + self.sum(WEIGHTS, token, output))
            });
            Ok(relative_error(pairs, ERROR_MAX))
        });
        let epilogue = Residual { residual: residual.address(), sumsq };
        Ok((operands.times(self.tokens, epilogue), check))
    }

    fn sums(self, cuda: &mut Cuda, operands: Operands) -> Result<(Call, Check), CudaError> {
        let width = self.outputs.next_multiple_of(64); // whole segments
        let elements = self.tokens * width;
        let out = cuda.alloc(Purpose::Scratch, Element::Float, elements)?;
        let check: Check = Box::new(move |cuda| {
            let words = download_words(cuda, out, elements)?;
            let pairs = self.samples(self.outputs).into_iter().map(|(token, output)| {
                let sum = f32::from_bits(words[token * width + output]);
                (f64::from(sum), self.sum(WEIGHTS, token, output))
            });
            Ok(relative_error(pairs, ERROR_MAX))
        });
        Ok((operands.times(self.tokens, RankSums::here(out.address())), check))
    }

    fn gate_up(self, cuda: &mut Cuda, operands: Operands) -> Result<(Call, Check), CudaError> {
        let intermediate = self.outputs / 2;
        let out = cuda.alloc(Purpose::Scratch, Element::Activation, self.tokens * intermediate)?;
        let epilogue = GateUp {
            norm: self.norm(cuda)?,
            out: out.address(),
            intermediate: intermediate as u32,
            reserved: 0,
        };
        let check: Check = Box::new(move |cuda| {
            let values = activations(cuda, out, self.tokens * intermediate)?;
            let pairs = self.samples(intermediate).into_iter().map(|(token, output)| {
                let gate = SCALE * self.sum(WEIGHTS, token, output);
                let up = SCALE * self.sum(WEIGHTS + 1, token, output);
                (values[token * intermediate + output].to_f64(), gate / (1.0 + (-gate).exp()) * up)
            });
            Ok(relative_error(pairs, ERROR_MAX))
        });
        Ok((operands.times(self.tokens, epilogue), check))
    }

    fn qkv(self, cuda: &mut Cuda, operands: Operands) -> Result<(Call, Check), CudaError> {
        let dims = self.model.dims();
        let (width, head_dim) = (dims.q_width(), dims.head_dim as usize);
        let step = StepOf::decode(&vec![1; self.tokens], dims.vocab).upload(cuda, 0, |_, _, _| {})?;
        // A model has biases or head norms.
        let (bias, norms) = match self.model.bias {
            true => (random(cuda, 1, self.outputs, BIASES)?.address(), Address::NULL),
            false => (Address::NULL, random(cuda, 1, head_dim, NORMS)?.address()),
        };
        // Angle 0: the rotation leaves every pair as it is.
        let rope: Vec<u32> = [1.0f32, 0.0].iter().cycle().take(head_dim).map(|part| part.to_bits()).collect();
        let rope = upload_words(cuda, &rope)?;
        let q = cuda.alloc(Purpose::Scratch, Element::Activation, self.tokens * width)?;
        let elements = (self.tokens + 1) * (dims.kv_heads * PAGE_SIZE * dims.head_dim) as usize;
        let kv = |cuda: &mut Cuda| {
            Ok::<_, CudaError>(cuda.alloc(Purpose::Scratch, Element::Activation, elements)?.address())
        };
        let epilogue = Qkv {
            norm: self.norm(cuda)?,
            head_eps: 1e-6,
            batch: step.batch.address(),
            bias,
            q_norm: norms,
            k_norm: norms,
            rope: rope.address(),
            q: q.address(),
            k: kv(cuda)?,
            v: kv(cuda)?,
            tokens_offset: step.layout.tokens as u32,
            heads: dims.heads,
            kv_heads: dims.kv_heads,
            head_dim: dims.head_dim,
            page_shift: PAGE_SIZE.trailing_zeros(),
            fp8: 0,
        };
        Ok((operands.times(self.tokens, epilogue), self.check_queries(q, head_dim, width)))
    }

    /// Some heads' queries: normed rows times weights, then biases added or normed again by head.
    fn check_queries(self, q: Buffer, head_dim: usize, width: usize) -> Check {
        Box::new(move |cuda| {
            let values = activations(cuda, q, self.tokens * width)?;
            let heads = self.samples(width).into_iter().take(8);
            let pairs = heads.flat_map(|(token, output)| {
                let first = output / head_dim * head_dim;
                let sums: Vec<f64> =
                    (first..first + head_dim).map(|row| SCALE * self.sum(WEIGHTS, token, row)).collect();
                let squares: f64 = sums.iter().map(|sum| sum * sum).sum();
                let scale = 1.0 / (squares / head_dim as f64 + 1e-6).sqrt();
                let got = values[token * width + first..][..head_dim].to_vec();
                let wanted = sums.into_iter().enumerate().map(move |(i, sum)| match self.model.bias {
                    true => sum + random_element(self.outputs, BIASES, 0, first + i),
                    false => sum * scale * random_element(head_dim, NORMS, 0, i),
                });
                got.into_iter().map(bf16::to_f64).zip(wanted)
            });
            Ok(relative_error(pairs, ERROR_MAX))
        })
    }
}

/// What a case multiplies.
struct Operands {
    gemm: Gemm,
    /// Copies of the matrix.
    weights: Vec<Weight>,
    x: Rows,
}

impl Operands {
    /// Call number n multiplies by copy n of the matrix, on whole multiprocessors: what the halves of a divided step launch is timed
    /// in steps alone (`decode_step`).
    fn times<E: Epilogue + Copy + 'static>(self, tokens: usize, epilogue: E) -> Call {
        let Operands { gemm, weights, x } = self;
        Box::new(move |launcher, call| {
            gemm.launch(launcher, weights[call % weights.len()], x, tokens as u32, SmShare::Whole, &epilogue)
        })
    }
}
