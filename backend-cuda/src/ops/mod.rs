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
//! each adds up over all ranks and to the residual stream. Embedded rows and logits pass between them, too, and what experts' down gets.
//!
//! Invariant: one token's bits depend on that token's sequence alone; see each family.

pub mod attention;
mod described;
pub mod embed;
pub mod exchange;
pub mod experts;
pub mod explain;
pub mod fp8_pages;
pub mod gemm;
pub mod halves;
pub mod layers;
pub mod sampling;
mod supports;

use std::ops::Range;

use half::f16;
use minisgl_core::backend::{
    Device, Element, KvLayer, LayerWeights, MlpWeights, Ops, Purpose, Queue, Sampler, Step, WeightRole,
};
use minisgl_core::batch::{Row, StepShape, TOKEN_WORDS};
use minisgl_core::config::Limits;
use minisgl_core::kv::KvFormat;
use minisgl_core::spec::{DecoderSpec, Dims, Fp8, Inputs, LayerSpec, Mlp, Unsupported, WeightFormat};
use minisgl_core::tensor::HostTensor;

use self::attention::Attention;
use self::embed::Ends;
use self::exchange::{Exchange, Stream};
use self::experts::{ExpertLayer, Experts};
use self::fp8_pages::Fp8Pages;
use self::gemm::{GateUp, Gemm, Head, Norm, Qkv, Residual, RowNorm, Rows, SmShare};
use self::halves::{Division, Halves, Part};
use self::layers::LayersKernel;
use self::sampling::Sampling;
use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::Launcher;
use crate::memory::{Address, Buffer};
use crate::weight::{Weight, gate_up_rows};

/// Elements whose squares are summed together.
const SEGMENT: u32 = 64;

/// What a layer's kernels hand to each other, each for as many tokens as a step may have.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    /// `[tokens, hidden]`: the residual stream.
    pub residual: Buffer,
    /// `[tokens, q_width]`: queries; keys and values go straight to their pages.
    pub q: Buffer,
    /// `[tokens, q_width]`: what attention gives.
    pub attended: Buffer,
    /// `[tokens, intermediate]`: silu(gate) * up, where a layer has no experts.
    pub activated: Buffer,
    /// `[tokens, hidden]`: the residual stream times a norm's scale, where weights are fp8 and inputs stay as they are.
    pub scaled: Buffer,
}

impl Buffers {
    fn new(cuda: &mut Cuda, spec: &DecoderSpec, tokens: usize) -> Result<Buffers, CudaError> {
        let dims = &spec.dims;
        let is_dense = |layer: &LayerSpec| layer.experts().is_none();
        let mlp = if spec.layers.iter().any(is_dense) { dims.intermediate } else { 0 };
        let is_scaled = matches!(spec.weights, WeightFormat::Fp8(fp8) if fp8.inputs == Inputs::Plain);
        let scaled = if is_scaled { dims.hidden } else { 0 };
        let mut alloc = |width: usize| cuda.alloc(Purpose::Scratch, Element::Activation, tokens * width);
        Ok(Buffers {
            residual: alloc(dims.hidden as usize)?,
            q: alloc(dims.q_width())?,
            attended: alloc(dims.q_width())?,
            activated: alloc(mlp as usize)?,
            scaled: alloc(scaled as usize)?,
        })
    }
}

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
    /// `[tokens, ceil(hidden / 64)]` f32: partial sums of squares of the residual stream.
    pub sumsq: Address,
}

impl Operations {
    /// Looks the kernels up and allocates what steps within `limits` need.
    pub fn new(cuda: &mut Cuda, spec: &DecoderSpec, limits: &Limits) -> Result<Operations, CudaError> {
        let dims = &spec.dims;
        let segments = dims.hidden.div_ceil(SEGMENT) as usize;
        let format = spec.kv.unwrap_or(cuda.info().kv);
        let in_fp8 = format == KvFormat::Fp8;
        let link = cuda.link.clone();
        Ok(Operations {
            dims: *dims,
            layers: spec.layers.clone(),
            buffers: Buffers::new(cuda, spec, limits.step_tokens())?,
            // Both halves of a step would wait for other ranks in the same inboxes.
            halves: Halves::new(spec, cuda.properties().hopper && link.is_none()),
            layers_kernel: LayersKernel::new(cuda, spec, format, limits)?,
            ends: Ends::new(cuda.modules())?,
            gemm: Self::products(cuda, spec, limits.step_tokens())?,
            experts: Experts::new(cuda, spec, limits)?,
            attention: Attention::new(cuda, dims, spec.window(), format, limits)?,
            fp8_pages: in_fp8.then(|| Fp8Pages::new(cuda.modules(), dims, spec.window())).transpose()?,
            sampling: Sampling::new(cuda, limits.running)?,
            exchange: link
                .map(|link| {
                    let inner = Experts::inner(spec) * link.rank().count as usize;
                    Exchange::new(cuda, &link, dims, limits, inner)
                })
                .transpose()?,
            sumsq: cuda.allocate(Purpose::Scratch, limits.step_tokens() * segments * 4)?,
        })
    }

    /// The step's first tokens of the residual stream.
    fn stream(&self, tokens: u32) -> Stream {
        Stream { residual: self.buffers.residual.address(), sumsq: self.sumsq, tokens }
    }

    fn products(cuda: &mut Cuda, spec: &DecoderSpec, tokens: usize) -> Result<Gemm, CudaError> {
        let dims = &spec.dims;
        let mut gemm = Gemm::new(cuda)?;
        let WeightFormat::Fp8(Fp8 { inputs, .. }) = spec.weights else { return Ok(gemm) };
        if inputs != Inputs::Plain {
            let width = dims.q_width().max(dims.hidden.max(dims.intermediate) as usize);
            gemm.reserve_rounded(cuda, tokens, width)?;
        } else {
            let mlp = gate_up_rows(dims.intermediate as usize).max(dims.intermediate as usize);
            let most = dims.qkv_width().max(dims.q_width()).max(mlp);
            gemm.reserve_fp8(cuda, most * dims.hidden as usize)?;
        }
        Ok(gemm)
    }

    /// Where a product of normed rows takes their norms from.
    fn norm(&self, first_token: u32) -> RowNorm {
        let Dims { hidden, norm_eps: eps, .. } = self.dims;
        RowNorm { sumsq: self.sumsq_of(first_token), segments: hidden.div_ceil(SEGMENT), hidden, eps }
    }

    fn sumsq_of(&self, token: u32) -> Address {
        self.sumsq.offset(token as usize * self.dims.hidden.div_ceil(SEGMENT) as usize * 4)
    }

    /// `in_fp8`: the product keeps keys and values so. Else it leaves them in the wide pages, if there are such.
    fn qkv(&self, layer: &Layer, first_token: u32, in_fp8: bool) -> Qkv {
        let Layer { step, weights, rope, kv, .. } = layer;
        let address = |weight: Option<Weight>| weight.map_or(Address::NULL, |weight| weight.address());
        let Dims { heads, kv_heads, head_dim, norm_eps, .. } = self.dims;
        let [k, v] = kv.wide.filter(|_| !in_fp8).unwrap_or([kv.k, kv.v]);
        Qkv {
            norm: self.norm(first_token),
            head_eps: norm_eps,
            batch: step.batch.address(),
            bias: address(weights.qkv_bias),
            q_norm: address(weights.q_norm),
            k_norm: address(weights.k_norm),
            rope: rope.map_or(Address::NULL, |table| table.address()),
            q: rows_from(self.buffers.q, self.dims.q_width(), first_token).address,
            k: k.address(),
            v: v.address(),
            tokens_offset: step.layout.tokens as u32 + first_token * TOKEN_WORDS as u32,
            heads,
            kv_heads,
            head_dim,
            page_shift: step.page_size.trailing_zeros(),
            fp8: in_fp8.into(),
        }
    }

    /// Do the products of the part's queries, keys and values keep these in fp8?
    fn keeps_fp8(&self, layer: &Layer, part: Part) -> bool {
        let tokens = part.tokens(layer.step.shape).len() as u32;
        self.fp8_pages.is_some() && self.gemm.keeps_fp8(layer.weights.qkv, tokens, Self::sm_share(part))
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

    /// The layers' kernels.
    pub fn layers<'a>(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        mut layers: impl Iterator<Item = Layer<'a>> + Clone,
    ) -> Result<(), CudaError> {
        match (self.division(step.shape), &self.layers_kernel) {
            (Division::Multiprocessors, Some(kernel)) => {
                if let Some(first) = layers.clone().next() {
                    self.before_attention(launcher, &first, Part::Whole)?;
                }
                let (work, eps) = (self.attention.halves(step), self.dims.norm_eps);
                kernel.launch(launcher, step, layers, &self.buffers, work, eps)?;
            }
            (Division::Rows, _) => {
                layers.try_for_each(|layer| self.layer_in_halves(launcher, &layer))?;
                // What follows is for all rows.
                launcher.join()?;
            }
            _ => layers.try_for_each(|layer| self.chain(launcher, &layer, Part::Whole))?,
        }
        debug_assert!(self.exchange.as_ref().is_none_or(Exchange::is_even), "an odd number of exchanges");
        Ok(())
    }

    fn layer_in_halves(&self, launcher: &Launcher, layer: &Layer) -> Result<(), CudaError> {
        self.before_attention(launcher, layer, Part::First)?;
        if layer.index == 0 {
            launcher.fork()?;
        }
        self.attend(launcher, layer, Part::First)?;
        self.after_attention(launcher, layer, Part::First)?;
        launcher.beside(|launcher| self.chain(launcher, layer, Part::Second))
    }

    /// What a part's products may take.
    fn sm_share(part: Part) -> SmShare {
        if part == Part::Whole { SmShare::Whole } else { SmShare::Half }
    }

    fn chain(&self, launcher: &Launcher, layer: &Layer, part: Part) -> Result<(), CudaError> {
        self.before_attention(launcher, layer, part)?;
        self.attend(launcher, layer, part)?;
        self.after_attention(launcher, layer, part)
    }

    /// The first kernel of a layer, behind one that scales or rounds its inputs where weights are fp8, and before one that encodes where it left keys
    /// and values in the wide pages.
    pub fn before_attention(&self, launcher: &Launcher, layer: &Layer, part: Part) -> Result<(), CudaError> {
        let tokens = part.tokens(layer.step.shape);
        let residual = rows_from(self.buffers.residual, self.dims.hidden as usize, tokens.start);
        let in_fp8 = self.keeps_fp8(layer, part);
        let epilogue = self.qkv(layer, tokens.start, in_fp8);
        let (count, share) = (tokens.len() as u32, Self::sm_share(part));
        let LayerWeights { qkv, attention_norm, .. } = layer.weights;
        let norm = Norm { weight: *attention_norm, rows: self.norm(tokens.start) };
        let x = self.gemm.inputs(launcher, *qkv, Some(norm), residual, count, self.scaled(tokens.start))?;
        self.gemm.launch(launcher, *qkv, x, count, share, &epilogue)?;
        match &self.fp8_pages {
            Some(pages) if !in_fp8 => pages.encode(launcher, layer.step, tokens, layer.kv),
            _ => Ok(()),
        }
    }

    /// Room for rows of the residual stream times a norm's scale.
    fn scaled(&self, first_token: u32) -> Rows {
        let (scaled, hidden) = (self.buffers.scaled, self.dims.hidden as usize);
        let there = (scaled.elements() / hidden) as u32;
        Rows {
            address: scaled.address().offset(first_token as usize * hidden * 2),
            there: there.saturating_sub(first_token),
        }
    }

    /// The second, behind one that widens what prefill rows see of fp8.
    fn attend(&self, launcher: &Launcher, layer: &Layer, part: Part) -> Result<(), CudaError> {
        let (Buffers { q, attended, .. }, Layer { step, kv, .. }) = (self.buffers, layer);
        if let Some(pages) = self.fp8_pages.as_ref().filter(|_| step.shape.prefill_rows > 0) {
            pages.widen(launcher, step, self.keeps_fp8(layer, part), *kv)?;
        }
        self.attention.attend(launcher, step, part, q, *kv, attended)
    }

    /// The others.
    pub fn after_attention(&self, launcher: &Launcher, layer: &Layer, part: Part) -> Result<(), CudaError> {
        let (Layer { step, weights, .. }, buffers) = (layer, &self.buffers);
        let tokens = part.tokens(step.shape);
        let (first, count, gemm) = (tokens.start, tokens.len() as u32, &self.gemm);
        let residual = rows_from(buffers.residual, self.dims.hidden as usize, first);
        let attended = rows_from(buffers.attended, self.dims.q_width(), first);
        let share = Self::sm_share(part);
        // What o and down do: `+=`, or where others have columns too, the sums and their exchange.
        let add = |w: Weight, x: Rows| match &self.exchange {
            None => {
                let x = gemm.inputs(launcher, w, None, x, count, x)?;
                let added = Residual { residual: residual.address, sumsq: self.sumsq_of(first) };
                gemm.launch(launcher, w, x, count, share, &added)
            }
            Some(exchange) => {
                gemm.launch(launcher, w, x, count, share, &exchange.sums(count)?)?;
                exchange.reduce(launcher, self.stream(count))
            }
        };
        add(weights.o, attended)?;
        let (gate_up, down) = match weights.mlp {
            MlpWeights::Dense { gate_up, down } => (gate_up, down),
            MlpWeights::Experts(_) => return self.experts(launcher, layer),
        };
        let mlp = self.dims.intermediate;
        let activated = rows_from(buffers.activated, mlp as usize, first);
        let gated = GateUp { norm: self.norm(first), out: activated.address, intermediate: mlp, reserved: 0 };
        let norm = Norm { weight: weights.mlp_norm, rows: self.norm(first) };
        let x = gemm.inputs(launcher, gate_up, Some(norm), residual, count, self.scaled(first))?;
        gemm.launch(launcher, gate_up, x, count, share, &gated)?;
        add(down, activated)
    }

    /// What a layer's experts add; steps of models with experts are not divided.
    fn experts(&self, launcher: &Launcher, layer: &Layer) -> Result<(), CudaError> {
        let spec = self.layers.get(layer.index).map(|layer| layer.mlp);
        let (Some(Mlp::Experts(spec)), MlpWeights::Experts(weights), Some(experts), Some(norm)) =
            (spec, &layer.weights.mlp, &self.experts, layer.weights.mlp_norm)
        else {
            return Err(CudaError::NotReserved); // the weights are those of the spec that was reserved
        };
        let (residual, sumsq) = (self.buffers.residual.address(), self.sumsq);
        let (norm, row_norm) = (norm.address(), self.norm(0));
        let x = if weights.gate_up.is_fp8() { self.buffers.scaled.address() } else { residual };
        let exchange = self.exchange.as_ref();
        let layer_of_experts = ExpertLayer { spec, weights, norm, row_norm, residual, x, sumsq, exchange };
        experts.launch(launcher, layer.step, &layer_of_experts)
    }
}

/// A buffer's rows of activations `width` wide from row `index` on.
pub fn rows_from(buffer: Buffer, width: usize, index: u32) -> Rows {
    let address = buffer.address().offset(index as usize * width * 2);
    Rows { address, there: (buffer.elements() / width) as u32 - index }
}

/// A decoder layer in a step: what its kernels work on.
pub struct Layer<'a> {
    /// Which one of the model's.
    pub index: usize,
    /// The step.
    pub step: &'a Step<Buffer>,
    /// Its own.
    pub weights: &'a LayerWeights<Weight>,
    /// `[positions, head_dim / 2]` (cos, sin) f32; `None` where the layer rotates nothing.
    pub rope: Option<Buffer>,
    /// Its keys' and values' pages.
    pub kv: KvLayer<Buffer>,
}

impl Cuda {
    fn operations(&self) -> Result<&Operations, CudaError> {
        self.operations.as_ref().ok_or(CudaError::NotReserved)
    }
}

impl Sampler for Cuda {
    fn sample(&mut self, step: &Step<Buffer>, logits: Buffer, tokens: Buffer) -> Result<(), CudaError> {
        let Operations { sampling, dims, .. } = self.operations()?;
        sampling.sample(&self.launcher, step, logits, dims.vocab, tokens)
    }

    fn logprobs(
        &mut self,
        step: &Step<Buffer>,
        logits: Buffer,
        tokens: Buffer,
        out: Buffer,
    ) -> Result<(), CudaError> {
        let Operations { sampling, dims, .. } = self.operations()?;
        sampling.logprobs(&self.launcher, step, logits, dims.vocab, tokens, out)
    }
}

impl Ops for Cuda {
    type Weight = Weight;

    fn supports(&self, spec: &DecoderSpec) -> Result<(), Unsupported> {
        self.properties().supports(spec, self.rank())
    }

    fn widens(&self, kept: KvFormat) -> bool {
        kept == KvFormat::Fp8
    }

    fn reserve(&mut self, spec: &DecoderSpec, limits: &Limits) -> Result<usize, CudaError> {
        let operations = Operations::new(self, spec, limits)?;
        let plan_words = operations.attention.plan_words(limits);
        self.operations = Some(operations);
        Ok(plan_words)
    }

    fn load(&mut self, role: WeightRole, parts: &[HostTensor]) -> Result<Weight, CudaError> {
        self.load_weight(role, parts)
    }

    fn reload(&mut self, weight: Weight, role: WeightRole, parts: &[HostTensor]) -> Result<(), CudaError> {
        self.reload_weight(weight, role, parts)
    }

    fn end_loading(&mut self) -> Result<(), CudaError> {
        self.free_staging();
        self.synchronize()
    }

    fn fold_norm(&mut self, norm: Weight, linear: Weight) -> Result<(), CudaError> {
        self.scale_columns(norm, linear)
    }

    fn plan(&self, shape: StepShape, rows: &[Row], words: &mut [u32]) {
        if let Some(operations) = &self.operations {
            operations.plan(shape, rows, words);
        }
    }

    fn begin_step(&mut self, step: &Step<Buffer>) -> Result<(), CudaError> {
        self.launcher.begin_step();
        let Operations { ends, exchange, .. } = self.operations()?;
        exchange.iter().for_each(Exchange::begin_step);
        ends.begin_step(&self.launcher, step)
    }

    fn embed(&mut self, step: &Step<Buffer>, table: Weight) -> Result<(), CudaError> {
        let operations = self.operations()?;
        let Operations { ends, dims, buffers, sumsq, exchange, .. } = operations;
        if let Some(exchange) = exchange {
            let stream = operations.stream(step.shape.tokens);
            return exchange.embed(&self.launcher, step, table.address(), stream);
        }
        ends.embed(&self.launcher, step, table.address(), dims.hidden, buffers.residual, *sumsq)
    }

    fn decoder_layers(
        &mut self,
        step: &Step<Buffer>,
        weights: &[LayerWeights<Weight>],
        ropes: &[Option<Buffer>],
        kv: &[KvLayer<Buffer>],
    ) -> Result<(), CudaError> {
        let all = weights.iter().zip(ropes).zip(kv).enumerate();
        let layers =
            all.map(|(index, ((weights, rope), kv))| Layer { index, step, weights, rope: *rope, kv: *kv });
        self.operations()?.layers(&self.launcher, step, layers)
    }

    fn final_norm(&mut self, step: &Step<Buffer>, weight: Weight, out: Buffer) -> Result<(), CudaError> {
        let Operations { ends, dims, buffers, .. } = self.operations()?;
        let (weight, residual) = (weight.address(), buffers.residual);
        ends.final_norm(&self.launcher, step, residual, weight, dims.hidden, dims.norm_eps, out)
    }

    fn logits(&mut self, step: &Step<Buffer>, x: Buffer, head: Weight, out: Buffer) -> Result<(), CudaError> {
        let (Operations { gemm, exchange, .. }, samples) = (self.operations()?, step.shape.samples);
        let out = out.address();
        let head_into = |out| {
            let x = rows_from(x, head.cols(), 0);
            gemm.launch(&self.launcher, head, x, samples, SmShare::Whole, &Head { out })
        };
        match exchange {
            None => head_into(out),
            Some(exchange) => {
                head_into(exchange.share().address())?;
                exchange.gather_logits(&self.launcher, samples, out)
            }
        }
    }

    fn read_logits(&mut self, logits: Buffer, vocab: u32, rows: Range<usize>) -> Result<Vec<f32>, CudaError> {
        let vocab = vocab as usize;
        let elements = rows.start * vocab..rows.end * vocab;
        let halves = elements.len();
        // Pinned memory comes in words, and a row may begin and end within one: take the words around it.
        let around = elements.start / 2 * 2..elements.end.next_multiple_of(2).min(logits.elements());
        let mut staging = self.alloc_pinned(around.len().div_ceil(2))?;
        let skipped = elements.start - around.start;
        self.download_bytes(Queue::Compute, logits.slice(around), &mut staging)?;
        let words = self.words(&staging)?;
        let values: &[f16] = bytemuck::cast_slice(words);
        Ok(values[skipped..skipped + halves].iter().map(|value| value.to_f32()).collect())
    }
}
