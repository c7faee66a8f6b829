//! A layer as a chain of kernels: what each is launched with, of which rows.

use minisgl_core::backend::{LayerWeights, MlpWeights, Step};
use minisgl_core::batch::{StepShape, TOKEN_WORDS};
use minisgl_core::spec::{Dims, LayerSpec, Mlp};

use super::Operations;
use super::exchange::Exchange;
use super::experts::{Ahead, ExpertLayer};
use super::gemm::{GateUp, Norm, Qkv, Residual, RowNorm, Rows, SmShare};
use super::halves::{Division, Part};
use super::operands::{Buffers, Layer, SEGMENT, rows_from};
use super::shared_rows::SharedRows;
use crate::error::CudaError;
use crate::launch::Launcher;
use crate::memory::{Address, Buffer};
use crate::weight::Weight;

impl Operations {
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
                kernel.launch(launcher, step, layers.clone(), &self.buffers, work, eps)?;
                if let Some(last) = layers.last() {
                    self.after_attention(launcher, &last, Part::Second)?;
                }
            }
            (Division::Rows, _) => self.divided_layers(launcher, layers)?,
            _ => layers.try_for_each(|layer| self.chain(launcher, &layer, Part::Whole))?,
        }
        debug_assert!(self.exchange.as_ref().is_none_or(Exchange::is_even), "an odd number of exchanges");
        Ok(())
    }

    /// Each half in a lane of its own (halves.rs): the second's begins behind the first product of all, so the halves are apart, and both end
    /// here, for what follows is for all rows.
    fn divided_layers<'a>(
        &self,
        launcher: &Launcher,
        layers: impl Iterator<Item = Layer<'a>>,
    ) -> Result<(), CudaError> {
        for (i, layer) in layers.enumerate() {
            self.before_attention(launcher, &layer, Part::First)?;
            if i == 0 {
                launcher.fork()?;
            }
            self.attend(launcher, &layer, Part::First)?;
            self.after_attention(launcher, &layer, Part::First)?;
            launcher.beside(|launcher| self.chain(launcher, &layer, Part::Second))?;
        }
        launcher.join()
    }

    /// What a part's products may take: half where the other part's run beside them.
    fn sm_share(&self, shape: StepShape, part: Part) -> SmShare {
        match (self.division(shape), part) {
            (Division::Rows, Part::First | Part::Second) => SmShare::Half,
            _ => SmShare::Whole,
        }
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
        let (count, share) = (tokens.len() as u32, self.sm_share(layer.step.shape, part));
        let LayerWeights { qkv, attention_norm, .. } = layer.weights;
        let norm = Norm { weight: *attention_norm, rows: self.norm(tokens.start) };
        let scaled = self.scaled(tokens.start);
        let x = match self.norm_ahead(layer.index.wrapping_sub(1), layer.weights).is_some() {
            true => scaled,
            false => self.gemm.inputs(launcher, *qkv, Some(norm), residual, count, scaled)?,
        };
        self.gemm.launch(launcher, *qkv, x, count, share, &epilogue)?;
        match &self.fp8_pages {
            Some(pages) if !in_fp8 => pages.encode(launcher, layer.step, tokens, layer.kv),
            _ => Ok(()),
        }
    }

    /// By whose scale the experts of layer `index` multiply what the next layer takes first, where they do.
    fn norm_ahead(&self, index: usize, next: &LayerWeights<Weight>) -> Option<Weight> {
        let experts = self.layers.get(index).and_then(LayerSpec::experts);
        let is_scaled = next.qkv.is_fp8() && next.qkv.codes().is_none() && self.buffers.scaled.elements() > 0;
        next.attention_norm.filter(|_| experts.is_some() && is_scaled)
    }

    /// Where rows of the residual stream are left times a norm's scale.
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
        let (from, count, gemm) = (tokens.start, tokens.len() as u32, &self.gemm);
        let residual = rows_from(buffers.residual, self.dims.hidden as usize, from);
        let attended = rows_from(buffers.attended, self.dims.q_width(), from);
        let share = self.sm_share(step.shape, part);
        // What o and down do: `+=`, or where others have columns or rows too, what they exchange besides. `width`: columns of `x`.
        let add = |w: Weight, x: Rows, width: usize| match &self.exchange {
            None => {
                let x = gemm.inputs(launcher, w, None, x, count, x)?;
                let added = Residual { residual: residual.address, sumsq: self.sumsq_of(from) };
                gemm.launch(launcher, w, x, count, share, &added)
            }
            Some(exchange) => match &self.shared_rows {
                Some(rows) if SharedRows::takes(width, exchange.rank()) => {
                    rows.add(launcher, (gemm, exchange), w, x, self.stream(count))
                }
                rows => {
                    rows.iter().for_each(SharedRows::forget);
                    gemm.launch(launcher, w, x, count, share, &exchange.sums(count)?)?;
                    exchange.reduce(launcher, self.stream(count))
                }
            },
        };
        add(weights.o, attended, self.dims.q_width())?;
        let (gate_up, down) = match weights.mlp {
            MlpWeights::Dense { gate_up, down } => (gate_up, down),
            MlpWeights::Experts(_) => return self.add_experts(launcher, layer),
        };
        let mlp = self.dims.intermediate;
        let activated = rows_from(buffers.activated, mlp as usize, from);
        let gated = GateUp { norm: self.norm(from), out: activated.address, intermediate: mlp, reserved: 0 };
        let norm = Norm { weight: weights.mlp_norm, rows: self.norm(from) };
        let x = gemm.inputs(launcher, gate_up, Some(norm), residual, count, self.scaled(from))?;
        gemm.launch(launcher, gate_up, x, count, share, &gated)?;
        add(down, activated, mlp as usize)
    }

    /// What a layer's experts add; steps of models with experts are not divided.
    fn add_experts(&self, launcher: &Launcher, layer: &Layer) -> Result<(), CudaError> {
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
        let norm_ahead = layer.next.and_then(|next| self.norm_ahead(layer.index, next));
        let scaled = self.buffers.scaled.address();
        let ahead = norm_ahead.map_or(Ahead::NOTHING, |norm| Ahead { norm: norm.address(), scaled });
        let layer_of_experts =
            ExpertLayer { spec, weights, norm, row_norm, residual, x, sumsq, ahead, exchange };
        self.shared_rows.iter().for_each(SharedRows::forget);
        experts.launch(launcher, layer.step, &layer_of_experts)
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
        let share = self.sm_share(layer.step.shape, part);
        self.fp8_pages.is_some() && self.gemm.keeps_fp8(layer.weights.qkv, tokens, share)
    }
}
