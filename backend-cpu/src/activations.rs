//! The buffers between a layer's operations.

use minisgl_core::backend::Purpose;
use minisgl_core::config::Limits;
use minisgl_core::shard::{By, Cut, Rank};
use minisgl_core::spec::{DecoderSpec, LayerSpec};

use crate::error::CpuError;
use crate::experts::ExpertBuffers;
use crate::matmul::SLICING;
use crate::memory::{Buffer, Memory};

/// Each for as many tokens as a step may have.
#[derive(Clone, Copy, Debug)]
pub struct Activations {
    /// `[tokens, hidden]`: the residual stream, but for `delta`.
    pub residual: Buffer,
    /// `[tokens, hidden]`: what the layer before adds to it.
    pub delta: Buffer,
    /// `[tokens, hidden]`: the residual stream, normed.
    pub normed: Buffer,
    /// `[tokens, qkv_width]`.
    pub qkv: Buffer,
    /// `[tokens, q_width]`: what attention gives.
    pub attended: Buffer,
    /// `[tokens, intermediate]`: what `down` gets; of several experts, of one after the other.
    pub activated: Buffer,
    /// What experts need besides.
    pub experts: Option<ExpertBuffers>,
    /// `[tokens, all ranks' widest input]`: what o or down gets where each rank has rows of it; else empty.
    pub joined: Buffer,
    /// `[tokens, share of hidden]`: what these rows give.
    pub own: Buffer,
    /// `[logit rows, share of the vocabulary]`: a rank's own logits; empty where there is one alone.
    pub logits: Buffer,
}

impl Activations {
    pub(crate) fn new(
        memory: &mut Memory,
        spec: &DecoderSpec,
        limits: &Limits,
        rank: Rank,
    ) -> Result<Activations, CpuError> {
        let (dims, experts) = (&spec.dims, ExpertBuffers::new(memory, spec, limits)?);
        let logits = match rank.count {
            1 => 0,
            _ => limits.logit_rows() * rank.share(dims.vocab as usize).len(),
        };
        let logits = memory.alloc(Purpose::Scratch, logits)?;
        let joined = joined_width(spec, rank);
        let own = if joined > 0 { rank.share(dims.hidden as usize).len() } else { 0 };
        let mut alloc = |width: usize| memory.alloc(Purpose::Scratch, limits.step_tokens() * width);
        Ok(Activations {
            residual: alloc(dims.hidden as usize)?,
            delta: alloc(dims.hidden as usize)?,
            normed: alloc(dims.hidden as usize)?,
            qkv: alloc(dims.qkv_width())?,
            attended: alloc(dims.q_width())?,
            activated: alloc(spec.activated_width() as usize)?,
            experts,
            joined: alloc(joined)?,
            own: alloc(own)?,
            logits,
        })
    }
}

/// How wide what ranks bring together for o or down is at most: of those whose rows they share. `spec` is a rank's.
fn joined_width(spec: &DecoderSpec, rank: Rank) -> usize {
    let has_experts = |layer: &LayerSpec| layer.experts().is_some();
    let experts = spec.layers.iter().any(has_experts);
    let mlp = if spec.layers.iter().all(has_experts) { 0 } else { spec.dims.intermediate as usize };
    let widths = [spec.dims.q_width(), mlp];
    let by_rows = |width: &usize| matches!(SLICING.cut(By::Hidden, *width, rank.count), Cut::Rows(_));
    let dense = widths.map(|width| width * rank.count as usize).into_iter().filter(by_rows);
    let activated = spec.activated_width() as usize * rank.count as usize;
    dense.chain((experts && rank.count > 1).then_some(activated)).max().unwrap_or(0)
}
