//! A decoder layer, one operation after the other.
//!
//! ```text
//!   residual ─┬─ norm ─ qkv ─ heads ─ attention ─ o ─ norm ─┐        ┌─ norm ─ gate, up ─ down ─ norm ─┐
//!             └────────────────────────────────────────────(+)───────┴────────────────────────────────(+)── residual
//! ```
//!
//! What a layer adds last waits in `delta` until the next one, or the final norm, adds it. Which of the norms there are is
//! the layer's affair; of those behind, both or neither.

use minisgl_core::backend::{ExpertWeights, KvLayer, LayerWeights, MlpWeights, Step};
use minisgl_core::shard::{By, Cut};
use minisgl_core::spec::{Activation, Attention, Dims, Experts, LayerSpec, Mixer, Mlp};

use crate::activations::Activations;
use crate::command::{Attend, Command, Heads};
use crate::device::Cpu;
use crate::error::CpuError;
use crate::experts::RunExperts;
use crate::matmul::SLICING;
use crate::memory::Buffer;
use crate::weights::Weight;

impl Cpu {
    /// A whole layer; see the module.
    pub(crate) fn layer(
        &mut self,
        step: &Step<Buffer>,
        layer: usize,
        weights: &LayerWeights<Weight>,
        rope: Option<Buffer>,
        kv: KvLayer<Buffer>,
    ) -> Result<(), CpuError> {
        let (spec, b) = (self.layer_spec(layer)?, self.activations()?);
        let LayerSpec { mixer: Mixer::Attention(attention), .. } = spec else {
            return Err(CpuError::NotReserved); // `supports` lets no other layer through
        };
        let (tokens, attended_width) = (step.shape.tokens, self.dims()?.q_width() as u32);
        let pending = (layer > 0).then_some(b.delta);
        let x = self.add_and_norm(tokens, b.residual, pending, weights.attention_norm, b.normed)?;
        self.linear(tokens, x, weights.qkv, b.qkv)?;
        if let Some(bias) = weights.qkv_bias {
            self.enqueue(Command::AddBias { tokens, x: b.qkv, bias })?;
        }
        let (q_norm, k_norm) = (weights.q_norm, weights.k_norm);
        let rotated = attention.rope.map_or(0, |rope| rope.rotated);
        self.heads(Heads { step: *step, qkv: b.qkv, q_norm, k_norm, rope, rotated, kv })?;
        self.attention(step, &attention, b.qkv, kv, b.attended)?;
        self.linear_of_ranks(tokens, (b.attended, attended_width), weights.o, b.delta)?;
        let (added, free) = match weights.attention_out_norm {
            None => (b.delta, b.normed),
            Some(norm) => {
                self.rms_norm(tokens, b.delta, norm, b.normed)?;
                (b.normed, b.delta)
            }
        };
        let x = self.add_and_norm(tokens, b.residual, Some(added), weights.mlp_norm, free)?;
        self.mlp(step, &spec.mlp, &weights.mlp, x, added)?;
        match weights.mlp_out_norm {
            None => Ok(()),
            Some(norm) => self.rms_norm(tokens, added, norm, free),
        }
    }

    /// What follows attention: `out = mlp(x)`.
    fn mlp(
        &mut self,
        step: &Step<Buffer>,
        spec: &Mlp,
        weights: &MlpWeights<Weight>,
        x: Buffer,
        out: Buffer,
    ) -> Result<(), CpuError> {
        let (tokens, activated) = (step.shape.tokens, self.activations()?.activated);
        let inner = self.dims()?.intermediate;
        match (spec, weights) {
            (Mlp::Dense(activation), MlpWeights::Dense { gate_up, down }) => {
                self.gate_up(tokens, *activation, x, *gate_up, activated)?;
                self.linear_of_ranks(tokens, (activated, inner), *down, out)
            }
            (Mlp::Experts(experts), MlpWeights::Experts(weights)) => {
                self.experts(step, experts, weights, x, out)
            }
            _ => Err(CpuError::NotReserved), // the weights are those of the spec that was reserved
        }
    }

    /// What o and down do: `out`, `[tokens, hidden]`, becomes `weight @ x`, on each of several ranks all of it. `x` is `[tokens, width]`,
    /// a rank's share of what the matrix gets.
    fn linear_of_ranks(
        &mut self,
        tokens: u32,
        (x, width): (Buffer, u32),
        weight: Weight,
        out: Buffer,
    ) -> Result<(), CpuError> {
        let ranks = self.rank().count;
        let cols = width * ranks;
        if matches!(SLICING.cut(By::Hidden, cols as usize, ranks), Cut::Columns(_)) {
            self.linear(tokens, x, weight, out)?;
            return if ranks == 1 { Ok(()) } else { self.enqueue(Command::SumRanks { tokens, x: out }) };
        }
        let (Activations { joined, own, .. }, Dims { hidden, .. }) = (self.activations()?, self.dims()?);
        self.enqueue(Command::JoinColumns { rows: tokens, cols, share: x, out: joined })?;
        self.linear(tokens, joined, weight, own)?;
        self.enqueue(Command::JoinColumns { rows: tokens, cols: hidden, share: own, out })
    }

    /// `residual += pending`, if there is any; then its norm in `out`, if there is one. Gives the buffer that holds the result.
    fn add_and_norm(
        &mut self,
        tokens: u32,
        residual: Buffer,
        pending: Option<Buffer>,
        norm: Option<Weight>,
        out: Buffer,
    ) -> Result<Buffer, CpuError> {
        match (pending, norm) {
            (None, None) => Ok(residual),
            (Some(delta), None) => self.enqueue(Command::Add { tokens, residual, delta }).map(|()| residual),
            (None, Some(norm)) => self.rms_norm(tokens, residual, norm, out).map(|()| out),
            (Some(delta), Some(norm)) => self.add_rms_norm(tokens, residual, delta, norm, out).map(|()| out),
        }
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight` for `tokens` rows (Zhang and Sennrich, 2019).
    ///
    /// # Errors
    /// As [`CpuError`] says; likewise below.
    pub fn rms_norm(&mut self, tokens: u32, x: Buffer, weight: Weight, out: Buffer) -> Result<(), CpuError> {
        self.enqueue(Command::RmsNorm { tokens, x, weight, out })
    }

    /// `residual += delta`, then `out = rms_norm(residual)`.
    pub fn add_rms_norm(
        &mut self,
        tokens: u32,
        residual: Buffer,
        delta: Buffer,
        weight: Weight,
        out: Buffer,
    ) -> Result<(), CpuError> {
        self.enqueue(Command::AddRmsNorm { tokens, residual, delta, weight, out })
    }

    /// `out[t] = weight @ x[t]` for `tokens` rows.
    pub fn linear(&mut self, tokens: u32, x: Buffer, weight: Weight, out: Buffer) -> Result<(), CpuError> {
        self.enqueue(Command::Linear { tokens, x, weight, out })
    }

    /// Norms and turns query and key heads in place in `qkv` (rope: Su et al., 2021, halves turned as in Hugging Face's
    /// models); keys and values are also stored at each token's location.
    pub fn heads(&mut self, heads: Heads) -> Result<(), CpuError> {
        self.enqueue(Command::Heads(heads))
    }

    /// Causal attention of each token over its slot's pages. Reads q from `qkv`; writes `[tokens, q_width]`.
    pub fn attention(
        &mut self,
        step: &Step<Buffer>,
        spec: &Attention,
        qkv: Buffer,
        kv: KvLayer<Buffer>,
        out: Buffer,
    ) -> Result<(), CpuError> {
        let (window, scale) = (spec.window, spec.scale);
        self.enqueue(Command::Attend(Attend { step: *step, window, scale, qkv, kv, out }))
    }

    /// What a layer's experts give each token; see [`Experts`].
    pub fn experts(
        &mut self,
        step: &Step<Buffer>,
        experts: &Experts,
        weights: &ExpertWeights<Weight>,
        x: Buffer,
        out: Buffer,
    ) -> Result<(), CpuError> {
        let Activations { activated, experts: buffers, joined, own, .. } = self.activations()?;
        let (step, experts, weights) = (*step, *experts, *weights);
        let buffers = buffers.ok_or(CpuError::NotReserved)?;
        self.enqueue(Command::Experts(RunExperts {
            step,
            experts,
            weights,
            x,
            activated,
            joined,
            own,
            out,
            buffers,
        }))
    }

    /// `out = activation(gate) * up` with `gate, up = weight @ x` (Shazeer, 2020).
    pub fn gate_up(
        &mut self,
        tokens: u32,
        activation: Activation,
        x: Buffer,
        weight: Weight,
        out: Buffer,
    ) -> Result<(), CpuError> {
        self.enqueue(Command::GateUp { tokens, activation, x, weight, out })
    }
}
