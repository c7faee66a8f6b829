//! The forward pass of Qwen3 over a backend's operations.
//!
//! ```text
//!   ids ─ embed ─> residual ─ [decoder layer] x L ─> residual, delta ─ final norm ─> gathered ─ head ─> logits ─ sample
//!                                   │ ^                            (last token of each sampled row)
//!                                   v │
//!                              KV pages of the layer
//! ```
//!
//! Weights are loaded once, by [`Qwen3::load`]; buffers are planned once, by [`Model::reserve`]. A step only enqueues.

use minisgl_core::backend::{
    Device, Dims, Element, KvCache, KvLayer, LayerBuffers, LayerWeights, Model, Ops, Purpose, Step,
    WeightRole,
};
use minisgl_core::batch::{Row, StepShape};
use minisgl_core::config::Limits;
use minisgl_core::tensor::HostTensor;

use crate::checkpoint::Checkpoint;
use crate::layout::LayerTensors;
use crate::rope;

/// A Qwen3 model on a device.
pub struct Qwen3<B: Ops> {
    dims: Dims,
    max_positions: u32,
    rope_theta: f64,
    activation_bytes: u64,
    weight_bytes: u64,
    embed: B::Weight,
    layers: Vec<LayerWeights<B::Weight>>,
    norm: B::Weight,
    head: B::Weight,
    planned: Option<Planned<B::Buffer>>,
}

/// What [`Model::reserve`] allocates.
struct Planned<Buf> {
    /// `[positions, head_dim / 2]` pairs of cosine and sine (floats).
    rope: Buf,
    kv: KvCache<Buf>,
    layer: LayerBuffers<Buf>,
    /// `[samples, hidden]`: the last token of each sampled row, normed.
    gathered: Buf,
    /// `[samples, vocab]`.
    logits: Buf,
}

impl<B: Ops> Qwen3<B> {
    /// Puts a checkpoint's weights on the device: q, k, v stacked, and gate, up; a tied head is the embedding itself.
    ///
    /// # Errors
    /// The device's own, out of memory above all.
    pub fn load(backend: &mut B, checkpoint: &Checkpoint) -> Result<Self, B::Error> {
        let (config, tensors) = (checkpoint.config(), checkpoint.tensors());
        let embed = load_one(backend, WeightRole::Embedding, &tensors.embed)?;
        let mut layers = Vec::with_capacity(tensors.layers.len());
        for layer in &tensors.layers {
            layers.push(load_layer(backend, layer)?);
        }
        let norm = load_one(backend, WeightRole::Norm, &tensors.norm)?;
        let head = match &tensors.head {
            Some(head) => load_one(backend, WeightRole::Linear, head)?,
            None => embed,
        };
        Ok(Qwen3 {
            dims: config.dims,
            max_positions: config.max_positions,
            rope_theta: config.rope_theta,
            activation_bytes: backend.info().activation_bytes as u64,
            weight_bytes: tensors.step_bytes(),
            embed,
            layers,
            norm,
            head,
            planned: None,
        })
    }

    /// The model's sizes.
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// Where a step leaves its logits, `[samples, vocab]`, for [`Ops::read_logits`]; `None` before
    /// [`Model::reserve`].
    pub fn logits_buffer(&self) -> Option<B::Buffer> {
        self.planned.as_ref().map(|planned| planned.logits)
    }

    fn planned(&self) -> &Planned<B::Buffer> {
        self.planned.as_ref().expect("the engine reserves before the first step")
    }
}

impl<B: Ops> Model<B> for Qwen3<B> {
    fn page_bytes(&self, page_size: u32) -> u64 {
        let kv_width = u64::from(self.dims.kv_heads) * u64::from(self.dims.head_dim);
        2 * u64::from(self.dims.layers) * kv_width * u64::from(page_size) * self.activation_bytes
    }

    fn vocab(&self) -> u32 {
        self.dims.vocab
    }

    fn max_positions(&self) -> u32 {
        self.max_positions
    }

    fn reserve(&mut self, backend: &mut B, limits: &Limits) -> Result<usize, B::Error> {
        let plan_words = backend.reserve(&self.dims, limits)?;
        let samples = limits.running as usize;
        let hidden = self.dims.hidden as usize;
        self.planned = Some(Planned {
            rope: upload_rope(backend, &self.dims, self.rope_theta, limits.sequence)?,
            kv: alloc_kv(backend, &self.dims, limits)?,
            layer: alloc_layer(backend, &self.dims, limits.step_tokens())?,
            gathered: backend.alloc(Purpose::Scratch, Element::Activation, samples * hidden)?,
            logits: backend.alloc(Purpose::Scratch, Element::Logit, samples * self.dims.vocab as usize)?,
        });
        Ok(plan_words)
    }

    fn plan(&self, backend: &B, shape: StepShape, rows: &[Row], words: &mut [u32]) {
        backend.plan(shape, rows, words);
    }

    fn forward(
        &mut self,
        backend: &mut B,
        step: &Step<B::Buffer>,
        tokens: B::Buffer,
    ) -> Result<(), B::Error> {
        let planned = self.planned();
        let buffers = &planned.layer;
        backend.begin_step(step)?;
        backend.embed(step, self.embed, buffers.residual)?;
        for (i, (weights, kv)) in self.layers.iter().zip(&planned.kv).enumerate() {
            backend.decoder_layer(step, i == 0, weights, planned.rope, *kv, buffers)?;
        }
        // A step that is one unfinished chunk of a prompt leaves keys and values, and no token.
        if step.shape.samples == 0 {
            return Ok(());
        }
        backend.final_norm(step, buffers.residual, buffers.delta, self.norm, planned.gathered)?;
        backend.logits(step, planned.gathered, self.head, planned.logits)?;
        backend.sample(step, planned.logits, tokens)
    }

    fn logprobs(
        &mut self,
        backend: &mut B,
        step: &Step<B::Buffer>,
        tokens: B::Buffer,
        out: B::Buffer,
    ) -> Result<(), B::Error> {
        backend.logprobs(step, self.planned().logits, tokens, out)
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }
}

fn load_one<B: Ops>(backend: &mut B, role: WeightRole, tensor: &HostTensor) -> Result<B::Weight, B::Error> {
    backend.load(role, std::slice::from_ref(tensor))
}

fn load_layer<B: Ops>(backend: &mut B, tensors: &LayerTensors) -> Result<LayerWeights<B::Weight>, B::Error> {
    let weights = LayerWeights {
        input_norm: load_one(backend, WeightRole::Norm, &tensors.input_norm)?,
        qkv: backend.load(WeightRole::Linear, &tensors.qkv)?,
        q_norm: load_one(backend, WeightRole::Norm, &tensors.q_norm)?,
        k_norm: load_one(backend, WeightRole::Norm, &tensors.k_norm)?,
        o: load_one(backend, WeightRole::Linear, &tensors.o)?,
        post_norm: load_one(backend, WeightRole::Norm, &tensors.post_norm)?,
        gate_up: backend.load(WeightRole::GateUp, &tensors.gate_up)?,
        down: load_one(backend, WeightRole::Linear, &tensors.down)?,
    };
    backend.fold_norm(weights.input_norm, weights.qkv)?;
    backend.fold_norm(weights.post_norm, weights.gate_up)?;
    Ok(weights)
}

/// `[pages + 1, kv_heads, page_size, head_dim]` keys and as many values for each layer.
fn alloc_kv<B: Ops>(backend: &mut B, dims: &Dims, limits: &Limits) -> Result<KvCache<B::Buffer>, B::Error> {
    let rows = (limits.pages as usize + 1) * dims.kv_heads as usize * limits.page_size as usize;
    let elements = rows * dims.head_dim as usize;
    let mut alloc = || backend.alloc(Purpose::KvCache, Element::Activation, elements);
    (0..dims.layers).map(|_| Ok(KvLayer { k: alloc()?, v: alloc()? })).collect()
}

fn alloc_layer<B: Device>(
    backend: &mut B,
    dims: &Dims,
    tokens: usize,
) -> Result<LayerBuffers<B::Buffer>, B::Error> {
    let mut alloc = |width: usize| backend.alloc(Purpose::Scratch, Element::Activation, tokens * width);
    Ok(LayerBuffers {
        residual: alloc(dims.hidden as usize)?,
        delta: alloc(dims.hidden as usize)?,
        normed: alloc(dims.hidden as usize)?,
        qkv: alloc(dims.qkv_width())?,
        attended: alloc(dims.q_width())?,
        activated: alloc(dims.intermediate as usize)?,
    })
}

fn upload_rope<B: Device>(
    backend: &mut B,
    dims: &Dims,
    theta: f64,
    positions: u32,
) -> Result<B::Buffer, B::Error> {
    let floats = positions as usize * dims.head_dim as usize;
    let buffer = backend.alloc(Purpose::Scratch, Element::Float, floats)?;
    let mut staging = backend.alloc_pinned(floats)?;
    rope::fill(theta, dims.head_dim as usize, backend.words_mut(&mut staging)?);
    backend.upload(&mut staging, 0..floats, buffer)?;
    // The staging memory goes when this returns; the copy must be done by then.
    backend.synchronize()?;
    Ok(buffer)
}
