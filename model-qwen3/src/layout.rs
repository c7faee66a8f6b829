//! The tensors of a Qwen3 checkpoint: their names, shapes and order, in one place.
//!
//! ```text
//!   model.embed_tokens.weight                          [vocab, hidden]
//!   model.layers.{i}.input_layernorm.weight            [hidden]
//!                    self_attn.{q,k,v}_proj.weight     [heads or kv_heads * head_dim, hidden]   fused: qkv
//!                    self_attn.{q,k}_norm.weight       [head_dim]
//!                    self_attn.o_proj.weight           [hidden, heads * head_dim]
//!                    post_attention_layernorm.weight   [hidden]
//!                    mlp.{gate,up}_proj.weight         [intermediate, hidden]                   fused: gate_up
//!                    mlp.down_proj.weight              [hidden, intermediate]
//!   model.norm.weight                                  [hidden]
//!   lm_head.weight                                     [vocab, hidden]    where it is not tied to the embedding
//! ```

use minisgl_core::backend::Dims;
use minisgl_core::tensor::{Dtype, HostTensor, TensorData};

/// Every tensor of a model, on the host.
#[derive(Clone, Debug)]
pub struct Tensors {
    /// `[vocab, hidden]`.
    pub embed: HostTensor,
    /// First layer first.
    pub layers: Vec<LayerTensors>,
    /// `[hidden]`, before the head.
    pub norm: HostTensor,
    /// `[vocab, hidden]`, where it is not tied to the embedding.
    pub head: Option<HostTensor>,
}

/// The tensors of one decoder layer.
#[derive(Clone, Debug)]
pub struct LayerTensors {
    /// `[hidden]`, before attention.
    pub input_norm: HostTensor,
    /// q, k, v, whose rows are stacked on the device.
    pub qkv: [HostTensor; 3],
    /// `[head_dim]`, of each query head.
    pub q_norm: HostTensor,
    /// `[head_dim]`, of each key head.
    pub k_norm: HostTensor,
    /// `[hidden, heads * head_dim]`.
    pub o: HostTensor,
    /// `[hidden]`, before the MLP.
    pub post_norm: HostTensor,
    /// gate, up, whose rows are stacked on the device.
    pub gate_up: [HostTensor; 2],
    /// `[hidden, intermediate]`.
    pub down: HostTensor,
}

/// A tensor's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `[n]`.
    Vector(usize),
    /// `[rows, cols]`.
    Matrix(usize, usize),
}

impl Tensors {
    /// Asks `find` for each tensor of a model by name and shape; the first error ends it.
    pub(crate) fn collect<E>(
        dims: &Dims,
        tied: bool,
        mut find: impl FnMut(&str, Shape) -> Result<HostTensor, E>,
    ) -> Result<Tensors, E> {
        let (vocab, hidden) = (dims.vocab as usize, dims.hidden as usize);
        let embed = find("model.embed_tokens.weight", Shape::Matrix(vocab, hidden))?;
        let mut layers = Vec::new();
        for i in 0..dims.layers {
            layers.push(LayerTensors::collect(dims, |name, shape| {
                find(&format!("model.layers.{i}.{name}.weight"), shape)
            })?);
        }
        let norm = find("model.norm.weight", Shape::Vector(hidden))?;
        let head = if tied { None } else { Some(find("lm_head.weight", Shape::Matrix(vocab, hidden))?) };
        Ok(Tensors { embed, layers, norm, head })
    }

    /// Bytes that one decode step reads: every layer and the head, as they are stored on the host.
    pub(crate) fn step_bytes(&self) -> u64 {
        let layers = self.layers.iter().flat_map(LayerTensors::iter);
        let head = self.head.as_ref().unwrap_or(&self.embed);
        layers.chain([&self.norm, head]).map(bytes).sum()
    }

    /// All of them, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = &HostTensor> {
        let layers = self.layers.iter().flat_map(LayerTensors::iter);
        [&self.embed, &self.norm].into_iter().chain(layers).chain(&self.head)
    }
}

impl LayerTensors {
    fn collect<E>(
        dims: &Dims,
        mut find: impl FnMut(&str, Shape) -> Result<HostTensor, E>,
    ) -> Result<LayerTensors, E> {
        let (hidden, mlp) = (dims.hidden as usize, dims.intermediate as usize);
        let head_dim = dims.head_dim as usize;
        let (q, kv) = (dims.q_width(), dims.kv_heads as usize * head_dim);
        Ok(LayerTensors {
            input_norm: find("input_layernorm", Shape::Vector(hidden))?,
            qkv: [
                find("self_attn.q_proj", Shape::Matrix(q, hidden))?,
                find("self_attn.k_proj", Shape::Matrix(kv, hidden))?,
                find("self_attn.v_proj", Shape::Matrix(kv, hidden))?,
            ],
            q_norm: find("self_attn.q_norm", Shape::Vector(head_dim))?,
            k_norm: find("self_attn.k_norm", Shape::Vector(head_dim))?,
            o: find("self_attn.o_proj", Shape::Matrix(hidden, q))?,
            post_norm: find("post_attention_layernorm", Shape::Vector(hidden))?,
            gate_up: [
                find("mlp.gate_proj", Shape::Matrix(mlp, hidden))?,
                find("mlp.up_proj", Shape::Matrix(mlp, hidden))?,
            ],
            down: find("mlp.down_proj", Shape::Matrix(hidden, mlp))?,
        })
    }

    fn iter(&self) -> impl Iterator<Item = &HostTensor> {
        let vectors = [&self.input_norm, &self.q_norm, &self.k_norm, &self.post_norm];
        vectors.into_iter().chain(&self.qkv).chain(&self.gate_up).chain([&self.o, &self.down])
    }
}

/// Bytes of a tensor as the host has it.
fn bytes(tensor: &HostTensor) -> u64 {
    let element = match &tensor.data {
        TensorData::Bytes { dtype, .. } => dtype.bytes(),
        TensorData::Uniform { .. } => Dtype::Bf16.bytes(),
    };
    (tensor.rows * tensor.cols * element) as u64
}

impl Shape {
    /// As checkpoints write it.
    pub(crate) fn dims(self) -> Vec<usize> {
        match self {
            Shape::Vector(n) => vec![n],
            Shape::Matrix(rows, cols) => vec![rows, cols],
        }
    }

    /// Rows and columns; a vector is one row.
    pub(crate) fn rows_cols(self) -> (usize, usize) {
        match self {
            Shape::Vector(n) => (1, n),
            Shape::Matrix(rows, cols) => (rows, cols),
        }
    }
}
