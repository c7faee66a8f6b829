//! A decoder's weights in one table: what each is made of, and what a device made of it.
//!
//! ```text
//!   Tensors ──> ModelWeights<Source> ── load ─────────────────────> ModelWeights<B::Weight>
//!   Tensors ──> ModelWeights<Source> ── reload, what is changed ───────^
//! ```
//!
//! Invariant: after [`ModelWeights::reload`] every weight is, bit for bit, what [`ModelWeights::load`] of the same tensors makes.

use std::collections::HashSet;
use std::convert::Infallible;
use std::slice;

use minisgl_core::backend::{ExpertWeights, LayerWeights, MlpWeights, Ops, WeightRole};
use minisgl_core::shard::{By, Cut, Rank, Slicing};
use minisgl_core::spec::{DecoderSpec, Dims, LayerSpec, NormForm};
use minisgl_core::tensor::HostTensor;

use crate::tensors::{LayerTensors, MlpTensors, Tensors};

/// One thing for each weight of a model.
pub(crate) struct ModelWeights<W> {
    /// `[vocab, hidden]`.
    pub embed: W,
    /// First layer first.
    pub layers: Vec<LayerWeights<W>>,
    /// `[hidden]`, before the head.
    pub norm: W,
    /// `[vocab, hidden]`, where it is not tied to the embedding.
    pub head: Option<W>,
}

/// What a weight is made of: tensors, whose rows are stacked.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    role: WeightRole,
    parts: &'a [HostTensor],
}

impl<'a> Source<'a> {
    fn one(role: WeightRole, tensor: &'a HostTensor) -> Self {
        Source { role, parts: slice::from_ref(tensor) }
    }

    fn is_among(&self, names: &HashSet<String>) -> bool {
        self.parts.iter().any(|part| names.contains(&part.name))
    }

    fn load<B: Ops>(&self, backend: &mut B) -> Result<B::Weight, B::Error> {
        backend.load(self.role, self.parts)
    }

    fn reload<B: Ops>(&self, backend: &mut B, weight: B::Weight) -> Result<(), B::Error> {
        backend.reload(weight, self.role, self.parts)
    }
}

/// How sums are cut, which ranks share out.
#[derive(Clone, Copy)]
struct Cutting {
    rank: Rank,
    slicing: Slicing,
    /// The rank's.
    dims: Dims,
}

impl Cutting {
    /// The role of o or down, of which so many columns are what a rank attends, or has within.
    fn of_sums(self, width: usize) -> WeightRole {
        let cols = width * self.rank.count as usize;
        match self.slicing.cut(By::Hidden, cols, self.rank.count) {
            Cut::Columns(_) => WeightRole::Sliced(self.rank.slices(width, self.slicing)),
            _ => WeightRole::SlicedRows(self.slicing.slices(cols)),
        }
    }

    /// That of experts' down, of which each rank has all columns.
    fn experts_down(self, parts: &[HostTensor]) -> WeightRole {
        WeightRole::ExpertsDown(self.slicing.slices(parts.first().map_or(0, |part| part.cols)))
    }
}

impl<'a> ModelWeights<Source<'a>> {
    /// What the weights of a model, or of a rank's part of it, are made of: q, k, v are stacked, and gate, up.
    pub fn of(spec: &DecoderSpec, tensors: &'a Tensors, rank: Rank, slicing: Slicing) -> Self {
        let layers = spec.layers.iter().zip(&tensors.layers);
        let cutting = Cutting { rank, slicing, dims: spec.dims };
        ModelWeights {
            embed: Source::one(WeightRole::Embedding, &tensors.embed),
            layers: layers
                .map(|(layer, tensors)| layer_sources(spec.norm, layer, tensors, cutting))
                .collect(),
            norm: Source::one(WeightRole::Norm(spec.norm), &tensors.norm),
            head: tensors.head.as_ref().map(|head| Source::one(WeightRole::Linear, head)),
        }
    }

    /// Puts all of them on the device.
    pub fn load<B: Ops>(&self, backend: &mut B) -> Result<ModelWeights<B::Weight>, B::Error> {
        let embed = self.embed.load(backend)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let weights = layer.try_map(|source| source.load(backend))?;
            for (norm, linear) in weights.folds() {
                backend.fold_norm(norm, linear)?;
            }
            layers.push(weights);
        }
        let norm = self.norm.load(backend)?;
        let head = self.head.map(|head| head.load(backend)).transpose()?;
        backend.end_loading()?;
        Ok(ModelWeights { embed, layers, norm, head })
    }

    /// Puts those of which a tensor is changed in the place of `weights`, which are on the device.
    pub fn reload<B: Ops>(
        &self,
        backend: &mut B,
        weights: &ModelWeights<B::Weight>,
        changed: &HashSet<String>,
    ) -> Result<(), B::Error> {
        for (source, weight) in self.ends().zip(weights.ends()) {
            if source.is_among(changed) {
                source.reload(backend, weight)?;
            }
        }
        for (sources, weights) in self.layers.iter().zip(&weights.layers) {
            for (source, weight) in all_of(sources).into_iter().zip(all_of(weights)) {
                if source.is_among(changed) {
                    source.reload(backend, *weight)?;
                }
            }
            for ((norm, linear), (norm_weight, linear_weight)) in sources.folds().zip(weights.folds()) {
                let (norm, is_linear_changed) = (norm.is_among(changed), linear.is_among(changed));
                if norm && !is_linear_changed {
                    linear.reload(backend, linear_weight)?; // The scale that it had may be in its columns.
                }
                if norm || is_linear_changed {
                    backend.fold_norm(norm_weight, linear_weight)?;
                }
            }
        }
        backend.end_loading()
    }
}

impl<W: Copy> ModelWeights<W> {
    /// Those that belong to no layer.
    fn ends(&self) -> impl Iterator<Item = W> {
        [self.embed, self.norm].into_iter().chain(self.head)
    }
}

/// All weights of a layer, in one order whatever they are.
fn all_of<W>(layer: &LayerWeights<W>) -> Vec<&W> {
    let mut all = Vec::new();
    let Ok(_) = layer.try_map(|weight| {
        all.push(weight);
        Ok::<(), Infallible>(())
    });
    all
}

fn layer_sources<'a>(
    form: NormForm,
    spec: &LayerSpec,
    tensors: &'a LayerTensors,
    cutting: Cutting,
) -> LayerWeights<Source<'a>> {
    let norm = |tensor: &'a Option<HostTensor>| {
        tensor.as_ref().map(|tensor| Source::one(WeightRole::Norm(form), tensor))
    };
    LayerWeights {
        attention_norm: norm(&tensors.attention_norm),
        qkv: Source { role: WeightRole::Linear, parts: &tensors.qkv },
        qkv_bias: tensors.qkv_bias.as_ref().map(|parts| Source { role: WeightRole::Bias, parts }),
        q_norm: norm(&tensors.q_norm),
        k_norm: norm(&tensors.k_norm),
        o: Source::one(cutting.of_sums(cutting.dims.q_width()), &tensors.o),
        attention_out_norm: norm(&tensors.attention_out_norm),
        mlp_norm: norm(&tensors.mlp_norm),
        mlp: mlp_sources(spec, &tensors.mlp, cutting),
        mlp_out_norm: norm(&tensors.mlp_out_norm),
    }
}

fn mlp_sources<'a>(spec: &LayerSpec, tensors: &'a MlpTensors, cutting: Cutting) -> MlpWeights<Source<'a>> {
    match tensors {
        MlpTensors::Dense { gate_up, down } => MlpWeights::Dense {
            gate_up: Source { role: WeightRole::GateUp, parts: gate_up },
            down: Source::one(cutting.of_sums(cutting.dims.intermediate as usize), down),
        },
        MlpTensors::Experts { router, gate_up, down } => {
            let count = spec.experts().map_or(0, |experts| experts.count);
            MlpWeights::Experts(ExpertWeights {
                router: Source { role: WeightRole::Linear, parts: router },
                gate_up: Source { role: WeightRole::ExpertsGateUp(count), parts: gate_up },
                down: Source { role: cutting.experts_down(down), parts: down },
            })
        }
    }
}
