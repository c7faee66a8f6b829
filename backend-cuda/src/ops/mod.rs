//! Core's operations on CUDA: a decoder layer is five kernels, the same for prefill and decode.
//!
//! ```text
//!             ┌─────────────── residual [tokens, hidden], sumsq [tokens, hidden / 64] ───────────────┐
//!   embed ──> │ qkv: norm, product, head norms, rope, KV store ─> attention ─> o: product, += ─┐     │
//!             │ gate_up: norm, product, silu · up ─> down: product, += ────────────────────────┘ ... │ ──> final_norm
//!             └──────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The residual stream is complete between kernels: whoever adds to it also writes the partial sums of its squares, in
//! segments of 64 elements, from which the next product takes its rows' norms. The norms' scales were multiplied into
//! the matrices when they were loaded.
//!
//! A layer with experts has `experts.rs` in place of gate_up and down. Where keys and values are kept in fp8, rows of many tokens
//! go by way of wide pages (`fp8_pages.rs`).
//!
//! A decode step of many rows is divided: its rows, into halves side by side (`halves.rs`), or the multiprocessors, of which some
//! attend while others multiply, in one kernel (`layers.rs`).
//!
//! Of several ranks each has a part of the heads and widths (`exchange.rs`): o and down leave sums over its columns, which a kernel behind
//! each adds up over all ranks and to the residual stream; of more ranks than slices each has rows of them (`shared_rows.rs`). Embedded
//! rows and logits pass between them, too, and what a matrix that is cut by rows gets.
//!
//! Here is what the families are set up with, and a step's two ends; `chain.rs` launches its layers' kernels.
//!
//! Invariant: one token's bits depend on that token's sequence alone; see each family.

pub mod attention;
mod chain;
mod described;
pub mod embed;
pub mod exchange;
pub mod experts;
pub mod explain;
pub mod fp8_pages;
pub mod gemm;
pub mod halves;
pub mod layers;
mod operands;
pub mod sampling;
pub mod shared_rows;
mod supports;

use minisgl_core::backend::{Purpose, Step};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{DecoderSpec, Dims, Fp8, Inputs, LayerSpec, WeightFormat};

use self::attention::Attention;
use self::embed::Ends;
use self::exchange::{Exchange, Stream};
use self::experts::Experts;
use self::fp8_pages::Fp8Pages;
use self::gemm::{Gemm, Head, SmShare};
use self::halves::{Division, Halves};
use self::layers::LayersKernel;
use self::operands::SEGMENT;
pub use self::operands::{Buffers, Layer, rows_from};
use self::sampling::Sampling;
use self::shared_rows::SharedRows;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::Launcher;
use crate::memory::{Address, Buffer};
use crate::weight::{Weight, gate_up_rows};

/// The families of kernels, set up for one model and its capacities.
#[derive(Debug)]
pub struct Operations {
    /// The model's sizes.
    pub dims: Dims,
    layers: Vec<LayerSpec>,
    /// What a layer's kernels hand to each other.
    pub buffers: Buffers,
    halves: Halves,
    layers_kernel: Option<LayersKernel>,
    /// The step's two ends.
    pub ends: Ends,
    /// Matrix products.
    pub gemm: Gemm,
    experts: Option<Experts>,
    /// Paged attention.
    pub attention: Attention,
    /// Where keys and values are kept in fp8.
    fp8_pages: Option<Fp8Pages>,
    /// Drawing tokens.
    pub sampling: Sampling,
    /// To the other ranks, where there are some.
    exchange: Option<Exchange>,
    shared_rows: Option<SharedRows>,
    /// `[tokens, ceil(hidden / 64)]` f32: partial sums of squares of the residual stream.
    pub sumsq: Address,
}

impl Operations {
    /// Looks the kernels up and allocates what steps within `limits` need.
    pub fn new(gpu: &mut Gpu, spec: &DecoderSpec, limits: &Limits) -> Result<Operations, CudaError> {
        let dims = &spec.dims;
        let segments = dims.hidden.div_ceil(SEGMENT) as usize;
        let format = spec.kv.unwrap_or(gpu.info().kv);
        let in_fp8 = format == KvFormat::Fp8;
        let link = gpu.link.clone();
        let is_dense = |layer: &LayerSpec| layer.experts().is_none();
        let mlp = if spec.layers.iter().any(is_dense) { dims.intermediate } else { 0 };
        let summed = Dims { intermediate: mlp, ..*dims };
        Ok(Operations {
            dims: *dims,
            layers: spec.layers.clone(),
            buffers: Buffers::new(gpu, spec, limits.step_tokens())?,
            // Both halves of a step would wait for other ranks in the same inboxes.
            halves: Halves::new(spec, gpu.properties().hopper && link.is_none()),
            layers_kernel: LayersKernel::new(gpu, spec, format, limits)?,
            ends: Ends::new(gpu.modules())?,
            gemm: Self::products(gpu, spec, limits.step_tokens())?,
            experts: Experts::new(gpu, spec, limits)?,
            attention: Attention::new(gpu, dims, spec.window(), format, limits)?,
            fp8_pages: in_fp8.then(|| Fp8Pages::new(gpu.modules(), dims, spec.window())).transpose()?,
            sampling: Sampling::new(gpu, limits.running)?,
            exchange: link
                .map(|link| {
                    let inner = Experts::inner(spec) * link.rank().count as usize;
                    let inner = inner.max(SharedRows::width(&summed, link.rank()));
                    Exchange::new(gpu, &link, dims, limits, inner)
                })
                .transpose()?,
            shared_rows: SharedRows::new(gpu, &summed, limits.step_tokens())?,
            sumsq: gpu.allocate(Purpose::Scratch, limits.step_tokens() * segments * 4)?,
        })
    }

    /// The step's first tokens of the residual stream.
    fn stream(&self, tokens: u32) -> Stream {
        Stream { residual: self.buffers.residual.address(), sumsq: self.sumsq, tokens }
    }

    fn products(gpu: &mut Gpu, spec: &DecoderSpec, tokens: usize) -> Result<Gemm, CudaError> {
        let dims = &spec.dims;
        let mut gemm = Gemm::new(gpu)?;
        let WeightFormat::Fp8(Fp8 { inputs, .. }) = spec.weights else { return Ok(gemm) };
        if inputs != Inputs::Plain {
            let width = dims.q_width().max(dims.hidden.max(dims.intermediate) as usize);
            gemm.reserve_rounded(gpu, tokens, width)?;
        } else {
            let mlp = gate_up_rows(dims.intermediate as usize).max(dims.intermediate as usize);
            let most = dims.qkv_width().max(dims.q_width()).max(mlp);
            gemm.reserve_fp8(gpu, most * dims.hidden as usize)?;
        }
        Ok(gemm)
    }

    /// Derives a step's plan from its rows.
    pub fn plan(&self, shape: StepShape, rows: &[Row], words: &mut [u32]) {
        self.attention.plan(shape, self.division(shape), rows, words);
    }

    /// What is divided in a step of this shape.
    pub fn division(&self, shape: StepShape) -> Division {
        if self.layers_kernel.is_some() && LayersKernel::takes(shape) {
            Division::Multiprocessors
        } else if self.halves.divide(shape) {
            Division::Rows
        } else {
            Division::None
        }
    }

    /// See [`minisgl_core::backend::Device::take_batch`].
    pub(crate) fn take_batch(
        &self,
        launcher: &Launcher,
        halves: Buffer,
        turn: Buffer,
        to: Buffer,
    ) -> Result<(), CudaError> {
        self.ends.take_batch(launcher, halves, turn, to)
    }

    /// The beginning of every step.
    pub(crate) fn begin_step(&self, launcher: &Launcher, step: &Step<Buffer>) -> Result<(), CudaError> {
        self.exchange.iter().for_each(Exchange::begin_step);
        self.shared_rows.iter().for_each(SharedRows::forget);
        self.ends.begin_step(launcher, step)
    }

    /// The residual stream becomes the step's tokens' rows of `table`.
    pub(crate) fn embed(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        table: Weight,
    ) -> Result<(), CudaError> {
        if let Some(exchange) = &self.exchange {
            return exchange.embed(launcher, step, table.address(), self.stream(step.shape.tokens));
        }
        let (hidden, residual) = (self.dims.hidden, self.buffers.residual);
        self.ends.embed(launcher, step, table.address(), hidden, residual, self.sumsq)
    }

    /// `out` becomes the normed rows of the residual stream that are sampled.
    pub(crate) fn final_norm(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        weight: Weight,
        out: Buffer,
    ) -> Result<(), CudaError> {
        let Dims { hidden, norm_eps, .. } = self.dims;
        self.ends.final_norm(launcher, step, self.buffers.residual, weight.address(), hidden, norm_eps, out)
    }

    /// `out` becomes all ranks' logits of the normed rows `x`.
    pub(crate) fn logits(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        x: Buffer,
        head: Weight,
        out: Buffer,
    ) -> Result<(), CudaError> {
        let (samples, out) = (step.shape.samples, out.address());
        let head_into = |out| {
            let x = rows_from(x, head.cols(), 0);
            self.gemm.launch(launcher, head, x, samples, SmShare::Whole, &Head { out })
        };
        match &self.exchange {
            None => head_into(out),
            Some(exchange) => {
                head_into(exchange.share().address())?;
                exchange.gather_logits(launcher, samples, out)
            }
        }
    }

    /// See [`minisgl_core::backend::Sampler::sample`].
    pub(crate) fn sample(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        logits: Buffer,
        tokens: Buffer,
    ) -> Result<(), CudaError> {
        self.sampling.sample(launcher, step, logits, self.dims.vocab, tokens)
    }

    /// See [`minisgl_core::backend::Sampler::logprobs`].
    pub(crate) fn logprobs(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        logits: Buffer,
        tokens: Buffer,
        out: Buffer,
    ) -> Result<(), CudaError> {
        self.sampling.logprobs(launcher, step, logits, self.dims.vocab, tokens, out)
    }

    /// A layer's experts, where the model has layers with such.
    pub(crate) fn experts(&self) -> Option<&Experts> {
        self.experts.as_ref()
    }
}
