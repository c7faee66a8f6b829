//! A rank's part of a model's tensors: which of them is cut, and along what, as [`minisgl_core::shard`] draws it.

use minisgl_core::shard::{By, Cut, Rank, Slicing};
use minisgl_core::spec::{DecoderSpec, Dims, LayerSpec};
use minisgl_core::tensor::HostTensor;

use crate::tensors::{LayerTensors, MlpTensors, Tensors};

/// Cuts tensors of a model of these sizes.
#[derive(Clone, Copy)]
struct Sharder<'a> {
    rank: Rank,
    whole: &'a Dims,
    slicing: Slicing,
}

impl Tensors {
    /// A rank's part; `whole` is the model, which [`DecoderSpec::shard`] has found divisible. Nothing is copied: the parts are read
    /// where they lie.
    pub(crate) fn shard(&self, rank: Rank, whole: &DecoderSpec, slicing: Slicing) -> Tensors {
        let sharder = Sharder { rank, whole: &whole.dims, slicing };
        let layers = self.layers.iter().zip(&whole.layers);
        Tensors {
            embed: sharder.cut(&self.embed, Cut::Rows(By::Vocabulary)),
            layers: layers.map(|(layer, spec)| layer.shard(sharder, spec)).collect(),
            norm: sharder.cut(&self.norm, Cut::Whole),
            head: self.head.as_ref().map(|head| sharder.cut(head, Cut::Rows(By::Vocabulary))),
        }
    }
}

impl LayerTensors {
    fn shard(&self, sharder: Sharder<'_>, spec: &LayerSpec) -> LayerTensors {
        const QKV: [Cut; 3] = [Cut::Rows(By::Heads), Cut::Rows(By::KvHeads), Cut::Rows(By::KvHeads)];
        let qkv = |parts: &[HostTensor; 3]| std::array::from_fn(|i| sharder.cut(&parts[i], QKV[i]));
        LayerTensors {
            attention_norm: self.attention_norm.clone(),
            qkv: qkv(&self.qkv),
            qkv_bias: self.qkv_bias.as_ref().map(qkv),
            // Of each head alone: models that norm all heads together are not shared out.
            q_norm: self.q_norm.clone(),
            k_norm: self.k_norm.clone(),
            o: sharder.cut(&self.o, sharder.of_sums(&self.o, By::Heads)),
            attention_out_norm: self.attention_out_norm.clone(),
            mlp_norm: self.mlp_norm.clone(),
            mlp: self.mlp.shard(sharder, spec),
            mlp_out_norm: self.mlp_out_norm.clone(),
        }
    }
}

impl MlpTensors {
    fn shard(&self, sharder: Sharder<'_>, spec: &LayerSpec) -> MlpTensors {
        match self {
            MlpTensors::Dense { gate_up, down } => MlpTensors::Dense {
                gate_up: std::array::from_fn(|i| sharder.cut(&gate_up[i], Cut::Rows(By::Inner))),
                down: sharder.cut(down, sharder.of_sums(down, By::Inner)),
            },
            MlpTensors::Experts { router, gate_up, down } => {
                let each = |stacks: &[HostTensor], rows: usize| {
                    stacks.iter().flat_map(|stack| sharder.cut_each(stack, rows)).collect()
                };
                let inner = spec.experts().map_or(1, |experts| experts.intermediate) as usize;
                MlpTensors::Experts {
                    router: router.clone(),
                    gate_up: each(gate_up, inner),
                    down: each(down, sharder.whole.hidden as usize),
                }
            }
        }
    }
}

impl Sharder<'_> {
    /// How o or down is cut.
    fn of_sums(self, tensor: &HostTensor, by: By) -> Cut {
        self.slicing.cut(by, tensor.cols, self.rank.count)
    }

    fn cut(self, tensor: &HostTensor, cut: Cut) -> HostTensor {
        let (rows, cols) = (0..tensor.rows, 0..tensor.cols);
        match cut {
            Cut::Whole => tensor.clone(),
            Cut::Rows(by) => tensor.window(self.rank.part(by, tensor.rows, self.whole), cols),
            Cut::Columns(by) => tensor.window(rows, self.rank.part(by, tensor.cols, self.whole)),
        }
    }

    /// The share of each of the matrices of `rows` rows, of experts, that are stacked in a tensor.
    fn cut_each(self, stack: &HostTensor, rows: usize) -> impl Iterator<Item = HostTensor> {
        let share = self.rank.share(rows);
        let firsts = (0..stack.rows).step_by(rows.max(1));
        firsts.map(move |first| stack.window(first + share.start..first + share.end, 0..stack.cols))
    }
}
