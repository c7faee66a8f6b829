//! The buffers between a layer's operations.

use minisgl_core::backend::Purpose;
use minisgl_core::config::Limits;
use minisgl_core::shard::Rank;
use minisgl_core::spec::DecoderSpec;

use crate::error::CpuError;
use crate::experts::ExpertBuffers;
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
        let (dims, experts) = (&spec.dims, ExpertBuffers::new(memory, spec, limits, rank)?);
        let logits = match rank.count {
            1 => 0,
            _ => limits.logit_rows() * rank.share(dims.vocab as usize).len(),
        };
        let logits = memory.alloc(Purpose::Scratch, logits)?;
        let mut alloc = |width: usize| memory.alloc(Purpose::Scratch, limits.step_tokens() * width);
        Ok(Activations {
            residual: alloc(dims.hidden as usize)?,
            delta: alloc(dims.hidden as usize)?,
            normed: alloc(dims.hidden as usize)?,
            qkv: alloc(dims.qkv_width())?,
            attended: alloc(dims.q_width())?,
            activated: alloc(spec.activated_width() as usize)?,
            experts,
            logits,
        })
    }
}
