//! A decoder layer's weights, and how each matrix is going to be used.

use crate::spec::NormForm;

/// Weights of one decoder layer; those that its spec does not ask for are `None`.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeights<W> {
    /// `[hidden]`, of what attention gets.
    pub attention_norm: Option<W>,
    /// `[qkv_width, hidden]`: rows of q, then k, then v.
    pub qkv: W,
    /// `[qkv_width]`.
    pub qkv_bias: Option<W>,
    /// `[head_dim]`, of each query head.
    pub q_norm: Option<W>,
    /// `[head_dim]`, of each key head.
    pub k_norm: Option<W>,
    /// `[hidden, q_width]`.
    pub o: W,
    /// `[hidden]`, of what attention gives.
    pub attention_out_norm: Option<W>,
    /// `[hidden]`, of what the MLP gets.
    pub mlp_norm: Option<W>,
    /// What follows attention.
    pub mlp: MlpWeights<W>,
    /// `[hidden]`, of what the MLP gives.
    pub mlp_out_norm: Option<W>,
}

impl<W> LayerWeights<W> {
    /// One for each of these, first to last; the first error ends it.
    ///
    /// # Errors
    /// That of `each`.
    pub fn try_map<'a, V, E>(
        &'a self,
        mut each: impl FnMut(&'a W) -> Result<V, E>,
    ) -> Result<LayerWeights<V>, E> {
        let mut maybe = |weight: &'a Option<W>| weight.as_ref().map(&mut each).transpose();
        let (attention_norm, attention_out_norm) =
            (maybe(&self.attention_norm)?, maybe(&self.attention_out_norm)?);
        let (mlp_norm, mlp_out_norm) = (maybe(&self.mlp_norm)?, maybe(&self.mlp_out_norm)?);
        let (q_norm, k_norm) = (maybe(&self.q_norm)?, maybe(&self.k_norm)?);
        let qkv_bias = maybe(&self.qkv_bias)?;
        Ok(LayerWeights {
            attention_norm,
            qkv: each(&self.qkv)?,
            qkv_bias,
            q_norm,
            k_norm,
            o: each(&self.o)?,
            attention_out_norm,
            mlp_norm,
            mlp: match &self.mlp {
                MlpWeights::Dense { gate_up, down } => {
                    MlpWeights::Dense { gate_up: each(gate_up)?, down: each(down)? }
                }
                MlpWeights::Experts(ExpertWeights { router, gate_up, down }) => {
                    let (router, gate_up, down) = (each(router)?, each(gate_up)?, each(down)?);
                    MlpWeights::Experts(ExpertWeights { router, gate_up, down })
                }
            },
            mlp_out_norm,
        })
    }
}

impl<W: Copy> LayerWeights<W> {
    /// The norms of which a backend may multiply the scale into a matrix, each with that matrix; see [`Ops::fold_norm`](super::Ops::fold_norm).
    pub fn folds(&self) -> impl Iterator<Item = (W, W)> {
        let folds = [(self.attention_norm, self.qkv), (self.mlp_norm, self.mlp.gate_up())];
        folds.into_iter().filter_map(|(norm, linear)| Some((norm?, linear)))
    }
}

/// Weights of what follows attention; see [`crate::spec::Mlp`].
#[derive(Clone, Copy, Debug)]
pub enum MlpWeights<W> {
    /// One MLP.
    Dense {
        /// `[2 * intermediate, hidden]`: rows of gate, then up.
        gate_up: W,
        /// `[hidden, intermediate]`.
        down: W,
    },
    /// Many, of which each token gets some.
    Experts(ExpertWeights<W>),
}

/// Weights of a layer's experts.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<W> {
    /// `[experts, hidden]`.
    pub router: W,
    /// `[experts * 2 * intermediate, hidden]`: of each expert, rows of gate, then up.
    pub gate_up: W,
    /// `[experts * hidden, intermediate]`.
    pub down: W,
}

impl<W: Copy> MlpWeights<W> {
    /// What its norm's rows are multiplied with, and nothing else is, but for a router.
    pub fn gate_up(&self) -> W {
        match *self {
            MlpWeights::Dense { gate_up, .. } | MlpWeights::Experts(ExpertWeights { gate_up, .. }) => gate_up,
        }
    }
}

/// How a matrix is going to be used, so that a backend may store it as its kernels like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightRole {
    /// `[width]`: a norm's scale.
    Norm(NormForm),
    /// `[width]`: what is added to a linear layer's outputs.
    Bias,
    /// `[vocab, hidden]`: gathered by token id; the head too where the two are tied.
    Embedding,
    /// `[out, in]`: a linear layer.
    Linear,
    /// Such a layer whose columns, of which a rank may have a share, are summed in so many slices, a power of two, which are added in a
    /// binary tree: see [`crate::shard`].
    Sliced(u32),
    /// `[2 * intermediate, hidden]`: gate rows, then up rows.
    GateUp,
    /// As many such matrices, stacked, as there are experts.
    ExpertsGateUp(u32),
    /// One of which a rank has a share of the rows and all columns, summed in so many slices.
    SlicedRows(u32),
    /// Experts' down, `[experts * rows, intermediate]`, stacked, of which a rank has a share of each one's rows and all columns, likewise.
    ExpertsDown(u32),
}
