//! The tensors of a checkpoint: their names, shapes and order, in one place.
//!
//! ```text
//!   model.embed_tokens.weight                          [vocab, hidden]
//!   model.layers.{i}.self_attn.{q,k,v}_proj.weight     [heads or kv_heads * head_dim, hidden]   fused: qkv
//!                    self_attn.{q,k,v}_proj.bias       [heads or kv_heads * head_dim]           where the spec has them
//!                    self_attn.qkv_proj.weight         q, k and v in one                        in their place, where the family
//!                    mlp.gate_up_proj.weight           gate and up in one                       has them fused
//!                    self_attn.{q,k}_norm.weight       [head_dim], or all heads' width          likewise
//!                    self_attn.o_proj.weight           [hidden, heads * head_dim]
//!                    mlp.{gate,up}_proj.weight         [intermediate, hidden]                   fused: gate_up
//!                    mlp.down_proj.weight              [hidden, intermediate]
//!                    mlp.gate.weight                   [experts, hidden]                        a router, and either
//!                    mlp.experts.{e}.{gate,up,down}_proj.weight     as above, or
//!                    mlp.experts.gate_up_proj          [experts, 2 * intermediate, hidden]
//!                    mlp.experts.down_proj             [experts, hidden, intermediate]
//!                    norms before and after            [hidden]    under the family's names, where the spec has them
//!   model.norm.weight                                  [hidden]
//!   lm_head.weight                                     [vocab, hidden]    where it is not tied to the embedding
//! ```
//!
//! A checkpoint made for embeddings may be of the decoder's body alone: its names have no `model.` before them, and a head that is
//! not tied it does not have.

use std::ops::Range;

use minisgl_core::spec::{Bias, DecoderSpec, Dims, Experts, LayerSpec, Mixer, Mlp, QkNorm};
use minisgl_core::tensor::HostTensor;

use crate::family::{LayerNames, Projections};

/// What an untied head is called.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Every tensor of a model, on the host.
#[derive(Clone, Debug)]
pub struct Tensors {
    /// `[vocab, hidden]`.
    pub embed: HostTensor,
    /// First layer first.
    pub layers: Vec<LayerTensors>,
    /// `[hidden]`, before the head.
    pub norm: HostTensor,
    /// `[vocab, hidden]`, where it is not tied to the embedding, nor left out.
    pub head: Option<HostTensor>,
}

/// The tensors of one decoder layer; those that its spec does not ask for are `None`.
#[derive(Clone, Debug)]
pub struct LayerTensors {
    /// `[hidden]`, of what attention gets.
    pub attention_norm: Option<HostTensor>,
    /// q, k, v, whose rows are stacked on the device.
    pub qkv: [HostTensor; 3],
    /// q, k, v, likewise.
    pub qkv_bias: Option<[HostTensor; 3]>,
    /// Of each query head `[head_dim]`, or of all together.
    pub q_norm: Option<HostTensor>,
    /// Of each key head `[head_dim]`, or of all together.
    pub k_norm: Option<HostTensor>,
    /// `[hidden, heads * head_dim]`.
    pub o: HostTensor,
    /// `[hidden]`, of what attention gives.
    pub attention_out_norm: Option<HostTensor>,
    /// `[hidden]`, of what the MLP gets.
    pub mlp_norm: Option<HostTensor>,
    /// What follows attention.
    pub mlp: MlpTensors,
    /// `[hidden]`, of what the MLP gives.
    pub mlp_out_norm: Option<HostTensor>,
}

/// The tensors of what follows attention.
#[derive(Clone, Debug)]
pub enum MlpTensors {
    /// One MLP.
    Dense {
        /// gate, up, whose rows are stacked on the device.
        gate_up: [HostTensor; 2],
        /// `[hidden, intermediate]`.
        down: HostTensor,
    },
    /// Many, of which each token gets some. Tensors are stacked on the device, whether the checkpoint has them so or not.
    Experts {
        /// `[experts, hidden]` in all.
        router: Vec<HostTensor>,
        /// `[experts * 2 * intermediate, hidden]` in all: gate, then up, of each expert.
        gate_up: Vec<HostTensor>,
        /// `[experts * hidden, intermediate]` in all.
        down: Vec<HostTensor>,
    },
}

/// A tensor's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `[n]`: one row.
    Vector(usize),
    /// `[n]`, a part of a longer one: n rows of one element.
    Column(usize),
    /// `[rows, cols]`.
    Matrix(usize, usize),
    /// `[n, rows, cols]`: as many matrices.
    Stack(usize, usize, usize),
    /// Rows `first..first + rows` of `[of, cols]`: one of several matrices in a tensor.
    Part { first: usize, rows: usize, of: usize, cols: usize },
}

impl Tensors {
    /// Asks `find` for each tensor of a model by name and shape; the first error ends it. Where there are two ways to write
    /// something, `has` says whether there is a tensor of a name.
    pub(crate) fn collect<E>(
        spec: &DecoderSpec,
        names: &LayerNames,
        has: impl Fn(&str) -> bool,
        mut find: impl FnMut(&str, Shape) -> Result<HostTensor, E>,
    ) -> Result<Tensors, E> {
        let (vocab, hidden) = (spec.dims.vocab as usize, spec.dims.hidden as usize);
        let is_body = has("embed_tokens.weight") && !has("model.embed_tokens.weight");
        let body = if is_body { "" } else { "model." };
        let embed = find(&format!("{body}embed_tokens.weight"), Shape::Matrix(vocab, hidden))?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (i, layer) in spec.layers.iter().enumerate() {
            let full = |name: &str| format!("{body}layers.{i}.{name}");
            let has = |name: &str| has(&full(name));
            layers.push(LayerTensors::collect(&spec.dims, layer, names, has, |name, shape| {
                find(&full(name), shape)
            })?);
        }
        let norm = find(&format!("{body}norm.weight"), Shape::Vector(hidden))?;
        let has_head = !spec.tied && (!is_body || has(HEAD));
        let head = has_head.then(|| find(HEAD, Shape::Matrix(vocab, hidden))).transpose()?;
        Ok(Tensors { embed, layers, norm, head })
    }

    /// Bytes of all of them, as they are stored on the host.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|tensor| tensor.bytes() as u64).sum()
    }

    /// Bytes that one decode step reads: every layer and the head, as they are stored on the host. Of experts all are counted,
    /// as many rows read them.
    pub fn step_bytes(&self) -> u64 {
        let layers = self.layers.iter().flat_map(LayerTensors::iter);
        let head = self.head.as_ref().unwrap_or(&self.embed);
        layers.chain([&self.norm, head]).map(|tensor| tensor.bytes() as u64).sum()
    }

    /// Bytes of all layers' experts, routers not included, as they are stored on the host.
    pub fn expert_bytes(&self) -> u64 {
        let experts = self.layers.iter().map(|layer| match &layer.mlp {
            MlpTensors::Dense { .. } => 0,
            MlpTensors::Experts { gate_up, down, .. } => {
                gate_up.iter().chain(down).map(|tensor| tensor.bytes() as u64).sum()
            }
        });
        experts.sum()
    }

    /// All of them, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = &HostTensor> {
        let layers = self.layers.iter().flat_map(LayerTensors::iter);
        [&self.embed, &self.norm].into_iter().chain(layers).chain(&self.head)
    }
}

impl Tensors {
    /// Those whose rows are stacked to one matrix, or to matrices of the same inputs.
    pub(crate) fn stacks(&self) -> impl Iterator<Item = &[HostTensor]> {
        self.layers.iter().flat_map(|layer| {
            let [one, other] = match &layer.mlp {
                MlpTensors::Dense { gate_up, .. } => [&gate_up[..], &[]],
                MlpTensors::Experts { gate_up, down, .. } => [&gate_up[..], &down[..]],
            };
            [&layer.qkv[..], one, other]
        })
    }

    /// Those of linear layers, the embedding's and the head's.
    pub(crate) fn matrices_mut(&mut self) -> impl Iterator<Item = &mut HostTensor> {
        let layers = self.layers.iter_mut().flat_map(LayerTensors::matrices_mut);
        layers.chain([&mut self.embed]).chain(&mut self.head)
    }

    /// Gives each matrix of experts a tensor of its own, where it lies, if the checkpoint has them stacked.
    pub(crate) fn unstack_experts(&mut self) {
        for layer in &mut self.layers {
            if let MlpTensors::Experts { router, gate_up, down } = &mut layer.mlp {
                let experts = router.iter().map(|tensor| tensor.rows).sum();
                unstack(gate_up, 2 * experts);
                unstack(down, experts);
            }
        }
    }

    /// Those of layers' linear layers, routers not included.
    pub(crate) fn linear_mut(&mut self) -> impl Iterator<Item = &mut HostTensor> {
        self.layers.iter_mut().flat_map(|layer| {
            layer.qkv.iter_mut().chain([&mut layer.o]).chain(layer.mlp.without_router_mut())
        })
    }
}

/// One tensor of `matrices` of as many rows each becomes as many windows of it.
fn unstack(tensors: &mut Vec<HostTensor>, matrices: usize) {
    if let [stack] = &tensors[..] {
        let rows = stack.rows / matrices.max(1);
        *tensors = (0..matrices).map(|i| stack.window(i * rows..(i + 1) * rows, 0..stack.cols)).collect();
    }
}

impl LayerTensors {
    fn matrices_mut(&mut self) -> impl Iterator<Item = &mut HostTensor> {
        self.qkv.iter_mut().chain([&mut self.o]).chain(self.mlp.iter_mut())
    }

    fn collect<E>(
        dims: &Dims,
        layer: &LayerSpec,
        names: &LayerNames,
        has: impl Fn(&str) -> bool,
        mut find: impl FnMut(&str, Shape) -> Result<HostTensor, E>,
    ) -> Result<LayerTensors, E> {
        let hidden = dims.hidden as usize;
        let (q, kv) = (dims.q_width(), dims.kv_width());
        let (bias, qk_norm) = match layer.mixer {
            Mixer::Attention(attention) => (attention.bias, attention.qk_norm),
            Mixer::GatedDelta { .. } => (Bias::None, QkNorm::None),
        };
        let norm_width = |all: usize| match qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some(dims.head_dim as usize),
            QkNorm::FullWidth => Some(all),
        };
        let (before, after) = (layer.norms.before(), layer.norms.after());
        let mut weight = |name: &str, shape| find(&format!("{name}.weight"), shape);
        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        let [q_at, k_at, v_at] = names.projections.of("self_attn.qkv_proj", qkv, hidden);
        let qkv = [weight(q_at.0, q_at.1)?, weight(k_at.0, k_at.1)?, weight(v_at.0, v_at.1)?];
        let mut vector = |name: &str, width: Option<usize>| {
            width.map(|width| weight(name, Shape::Vector(width))).transpose()
        };
        let attention_norm = vector(names.attention_norm, before.then_some(hidden))?;
        let q_norm = vector("self_attn.q_norm", norm_width(q))?;
        let k_norm = vector("self_attn.k_norm", norm_width(kv))?;
        let attention_out_norm = vector(names.attention_out_norm, after.then_some(hidden))?;
        let mlp_norm = vector(names.mlp_norm, before.then_some(hidden))?;
        let mlp_out_norm = vector(names.mlp_out_norm, after.then_some(hidden))?;
        Ok(LayerTensors {
            attention_norm,
            qkv,
            q_norm,
            k_norm,
            o: weight("self_attn.o_proj", Shape::Matrix(hidden, q))?,
            attention_out_norm,
            mlp_norm,
            mlp: match layer.mlp {
                Mlp::Dense(_) => MlpTensors::dense(dims, names.projections, &mut find)?,
                Mlp::Experts(experts) => MlpTensors::experts(hidden, &experts, has, &mut find)?,
            },
            mlp_out_norm,
            qkv_bias: match bias {
                Bias::None => None,
                Bias::Qkv | Bias::QkvAndO => Some([
                    find("self_attn.q_proj.bias", Shape::Column(q))?,
                    find("self_attn.k_proj.bias", Shape::Column(kv))?,
                    find("self_attn.v_proj.bias", Shape::Column(kv))?,
                ]),
            },
        })
    }

    fn iter(&self) -> impl Iterator<Item = &HostTensor> {
        let norms = [&self.attention_norm, &self.q_norm, &self.k_norm, &self.attention_out_norm];
        let norms = norms.into_iter().chain([&self.mlp_norm, &self.mlp_out_norm]).flatten();
        let matrices = self.qkv.iter().chain([&self.o]).chain(self.mlp.iter());
        norms.chain(matrices).chain(self.qkv_bias.iter().flatten())
    }
}

impl MlpTensors {
    fn dense<E>(
        dims: &Dims,
        projections: Projections,
        mut find: impl FnMut(&str, Shape) -> Result<HostTensor, E>,
    ) -> Result<MlpTensors, E> {
        let (hidden, mlp) = (dims.hidden as usize, dims.intermediate as usize);
        let gate_up = [("mlp.gate_proj.weight", mlp), ("mlp.up_proj.weight", mlp)];
        let [gate, up] = projections.of("mlp.gate_up_proj.weight", gate_up, hidden);
        Ok(MlpTensors::Dense {
            gate_up: [find(gate.0, gate.1)?, find(up.0, up.1)?],
            down: find("mlp.down_proj.weight", Shape::Matrix(hidden, mlp))?,
        })
    }

    /// Stacked, if there is a tensor of such a name, else one by one.
    fn experts<E>(
        hidden: usize,
        experts: &Experts,
        has: impl Fn(&str) -> bool,
        mut find: impl FnMut(&str, Shape) -> Result<HostTensor, E>,
    ) -> Result<MlpTensors, E> {
        const STACKED: [&str; 2] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];
        let (count, mlp) = (experts.count as usize, experts.intermediate as usize);
        let router = vec![find("mlp.gate.weight", Shape::Matrix(count, hidden))?];
        let [gate_up, down] = if STACKED.into_iter().any(has) {
            [
                vec![find(STACKED[0], Shape::Stack(count, 2 * mlp, hidden))?],
                vec![find(STACKED[1], Shape::Stack(count, hidden, mlp))?],
            ]
        } else {
            let mut all = [Vec::with_capacity(2 * count), Vec::with_capacity(count)];
            for expert in 0..count {
                let mut find = |part: &str, rows, cols| {
                    find(&format!("mlp.experts.{expert}.{part}_proj.weight"), Shape::Matrix(rows, cols))
                };
                all[0].push(find("gate", mlp, hidden)?);
                all[0].push(find("up", mlp, hidden)?);
                all[1].push(find("down", hidden, mlp)?);
            }
            all
        };
        Ok(MlpTensors::Experts { router, gate_up, down })
    }

    fn iter(&self) -> impl Iterator<Item = &HostTensor> {
        let (router, gate_up, down) = match self {
            MlpTensors::Dense { gate_up, down } => (&[][..], &gate_up[..], std::slice::from_ref(down)),
            MlpTensors::Experts { router, gate_up, down } => (&router[..], &gate_up[..], &down[..]),
        };
        router.iter().chain(gate_up).chain(down)
    }

    fn parts_mut(&mut self) -> [&mut [HostTensor]; 3] {
        match self {
            MlpTensors::Dense { gate_up, down } => [&mut [], gate_up, std::slice::from_mut(down)],
            MlpTensors::Experts { router, gate_up, down } => [router, gate_up, down],
        }
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut HostTensor> {
        self.parts_mut().into_iter().flatten()
    }

    fn without_router_mut(&mut self) -> impl Iterator<Item = &mut HostTensor> {
        self.parts_mut().into_iter().skip(1).flatten()
    }
}

impl Projections {
    /// Where matrices of these names and rows, and of as many columns, are found, each by its name and shape; `fused` is what
    /// they are called together.
    fn of<'a, const N: usize>(
        self,
        fused: &'a str,
        matrices: [(&'a str, usize); N],
        cols: usize,
    ) -> [(&'a str, Shape); N] {
        let of = matrices.iter().map(|(_, rows)| rows).sum();
        let mut first = 0;
        matrices.map(|(name, rows)| {
            let part = Shape::Part { first, rows, of, cols };
            first += rows;
            match self {
                Projections::Apart => (name, Shape::Matrix(rows, cols)),
                Projections::Fused => (fused, part),
            }
        })
    }
}

impl Shape {
    /// As checkpoints write it.
    pub(crate) fn dims(self) -> Vec<usize> {
        match self {
            Shape::Vector(n) | Shape::Column(n) => vec![n],
            Shape::Matrix(rows, cols) => vec![rows, cols],
            Shape::Stack(n, rows, cols) => vec![n, rows, cols],
            Shape::Part { of, cols, .. } => vec![of, cols],
        }
    }

    /// Rows and columns.
    pub(crate) fn rows_cols(self) -> (usize, usize) {
        match self {
            Shape::Vector(n) => (1, n),
            Shape::Column(n) => (n, 1),
            Shape::Matrix(rows, cols) => (rows, cols),
            Shape::Stack(n, rows, cols) => (n * rows, cols),
            Shape::Part { rows, cols, .. } => (rows, cols),
        }
    }

    /// Where it lies in the bytes of the tensor that has it.
    pub(crate) fn within(self, tensor: Range<usize>) -> Range<usize> {
        match self {
            Shape::Part { first, rows, of, .. } => {
                let row = tensor.len() / of;
                tensor.start + first * row..tensor.start + (first + rows) * row
            }
            _ => tensor,
        }
    }
}
