//! What the kernels of a layer work on, and hand to each other.

use minisgl_core::backend::{Element, KvLayer, LayerWeights, Purpose, Step};
use minisgl_core::spec::{DecoderSpec, Inputs, LayerSpec, WeightFormat};

use super::gemm::Rows;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::memory::Buffer;
use crate::weight::Weight;

/// Elements of the residual stream whose squares are summed together: `segment.cuh` has the same.
pub(super) const SEGMENT: u32 = 64;

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
    /// `[tokens, hidden]`: the residual stream times a norm's scale, where weights are fp8 and inputs stay as they are; experts' in f16.
    pub scaled: Buffer,
}

impl Buffers {
    pub(super) fn new(gpu: &mut Gpu, spec: &DecoderSpec, tokens: usize) -> Result<Buffers, CudaError> {
        let dims = &spec.dims;
        let is_dense = |layer: &LayerSpec| layer.experts().is_none();
        let mlp = if spec.layers.iter().any(is_dense) { dims.intermediate } else { 0 };
        let is_scaled = matches!(spec.weights, WeightFormat::Fp8(fp8) if fp8.inputs == Inputs::Plain);
        let scaled = if is_scaled { dims.hidden } else { 0 };
        let mut alloc = |width: usize| gpu.alloc(Purpose::Scratch, Element::Activation, tokens * width);
        Ok(Buffers {
            residual: alloc(dims.hidden as usize)?,
            q: alloc(dims.q_width())?,
            attended: alloc(dims.q_width())?,
            activated: alloc(mlp as usize)?,
            scaled: alloc(scaled as usize)?,
        })
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
    /// The next layer's; of the last layer alone there is none, for the next takes what this one leaves ready for it.
    pub next: Option<&'a LayerWeights<Weight>>,
    /// `[positions, head_dim / 2]` (cos, sin) f32; `None` where the layer rotates nothing.
    pub rope: Option<Buffer>,
    /// Its keys' and values' pages.
    pub kv: KvLayer<Buffer>,
}

#[cfg(test)]
mod tests {
    use super::SEGMENT;
    use crate::declared::constant;

    #[test]
    fn the_kernels_sum_squares_of_as_many() {
        assert_eq!(constant("segment.cuh", "SEGMENT"), SEGMENT);
    }
}
