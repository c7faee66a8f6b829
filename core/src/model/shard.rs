//! How ranks share out a model, and in which order sums that they share are added.
//!
//! A rank is one of several devices that compute each step together (tensor parallelism: Shoeybi et al., 2019, Megatron-LM). Each
//! has the residual stream whole, and a part of every large matrix:
//!
//! ```text
//!   embedding, head    rows       by tokens of the vocabulary
//!   q; k, v            rows       by heads; a key head that several ranks' queries look at is copied
//!   o                  columns    by heads; or rows
//!   gate, up           rows       by the MLP's inner width, of every expert
//!   down               columns    likewise; or rows, an expert's always
//!   norms, router      whole
//! ```
//!
//! What o and down give is a sum over columns, which lie on several ranks. So that its bits do not depend on how many those are, it
//! is always the sum of the same slices of columns, added in the same binary tree; a rank's columns are a whole subtree.
//!
//! ```text
//!   columns   0 ─────────────────────────────────── cols
//!   slices    s0    s1    s2    s3    s4    s5    s6    s7      each summed from zero
//!               +           +           +           +
//!                     +                       +                 of 2 ranks, each has one of these
//!                                 +                             and both add them
//! ```
//!
//! Where there are more ranks than slices a rank has rows of the matrix, a share of the hidden width, and its sums are whole: ranks bring
//! together what o or down gets, each adds up its rows, and they bring together what the residual stream becomes. So it is with an expert's
//! down whatever the number of ranks: it is so small, and is rounded before its share of a token is taken, that slices would cost one device
//! more than they spare several.

use alloc::format;
use alloc::string::String;
use core::ops::Range;

use thiserror::Error;

use crate::spec::{
    Attention, DecoderSpec, Dims, Experts, Fp8, Inputs, LayerSpec, Mixer, Mlp, QkNorm, WeightFormat,
};

/// Ranks there can be.
pub const RANKS_MAX: u32 = 8;

/// How a backend cuts the columns of o or down into slices, whole blocks of columns each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slicing {
    /// As many slices as there are at most, a power of two.
    pub most: u32,
    /// Columns of a block.
    pub block: usize,
    /// Are a matrix's slices all as wide? Else slice i of n has blocks `i * blocks / n` to `(i + 1) * blocks / n`.
    pub equal: bool,
}

impl Slicing {
    /// Into how many slices so many columns are cut: a power of two, and fewer of a small matrix.
    pub fn slices(self, cols: usize) -> u32 {
        let fits = |slices: &u32| match self.equal {
            true => cols.is_multiple_of(*slices as usize * self.block),
            false => *slices as usize <= cols.div_ceil(self.block),
        };
        let halves = core::iter::successors(Some(self.most), |slices| Some(slices / 2));
        halves.take_while(|slices| *slices > 1).find(fits).unwrap_or(1)
    }

    /// What ranks share of o or down, whose columns, so many, are of what `by` says: those, where every rank gets a subtree of as many
    /// slices; else rows.
    pub fn cut(self, by: By, cols: usize, ranks: u32) -> Cut {
        let subtrees = self.slices(cols) >= ranks && cols.is_multiple_of(ranks as usize * self.block);
        if subtrees || ranks == 1 { Cut::Columns(by) } else { Cut::Rows(By::Hidden) }
    }

    /// Can such a matrix, with as many rows as the hidden width says, be shared out at all?
    fn check(self, what: &str, cols: usize, hidden: u32, ranks: u32) -> Result<(), Indivisible> {
        if matches!(self.cut(By::Inner, cols, ranks), Cut::Columns(_)) {
            return Ok(());
        }
        let (block, count) = (self.block, ranks as usize);
        if cols.is_multiple_of(count * GATHERED) && (hidden as usize).is_multiple_of(count * block) {
            return Ok(());
        }
        let slices = match self.slices(cols) {
            1 => "one slice".into(),
            slices => format!("{slices} slices"),
        };
        let (shares, rows) = (count * GATHERED, count * block);
        let what = format!(
            "{what} is a sum over {cols} columns, which are {slices} of whole blocks of {block}, for {hidden} outputs; rows \
             are shared where columns are a multiple of {shares} and outputs of {rows}"
        );
        Err(Indivisible { ranks, what })
    }
}

/// Ranks bring together whole multiples of so many columns: 16 bytes, which kernels copy at once.
pub const GATHERED: usize = 8;

/// One of several ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    /// Which one, from 0.
    pub index: u32,
    /// How many there are.
    pub count: u32,
}

/// What of a tensor goes by what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Every rank has all of it.
    Whole,
    /// Rows, by what they are of.
    Rows(By),
    /// Columns, likewise.
    Columns(By),
}

/// What the rows or columns of a tensor are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Tokens of the vocabulary.
    Vocabulary,
    /// Query heads.
    Heads,
    /// Key and value heads.
    KvHeads,
    /// The inner width of an MLP.
    Inner,
    /// The hidden width.
    Hidden,
}

/// A model that can't be shared out.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "the model can't be shared out among {ranks} ranks: {what}; give another --tensor-parallel, or leave it out"
)]
pub struct Indivisible {
    /// As many as were asked for.
    pub ranks: u32,
    /// What is in the way, with its numbers.
    pub what: String,
}

impl Rank {
    /// The only one.
    pub const ALONE: Rank = Rank { index: 0, count: 1 };

    /// Its share of `all`; shares differ by one at most.
    pub fn share(self, all: usize) -> Range<usize> {
        let bound = |index: u32| index as usize * all / self.count as usize;
        bound(self.index)..bound(self.index + 1)
    }

    /// Which of the ranks has `item` of `all` in its share.
    pub fn owner(self, item: usize, all: usize) -> u32 {
        let has = |index: &u32| Rank { index: *index, ..self }.share(all).contains(&item);
        (0..self.count).find(has).unwrap_or(self.index)
    }

    /// Its key and value heads, of so many.
    pub fn kv_heads(self, all: usize) -> Range<usize> {
        let first = self.index as usize * all / self.count as usize;
        first..first + all.div_ceil(self.count as usize)
    }

    /// Which part of `all` rows or columns it has, `dims` being those of the whole model.
    pub fn part(self, by: By, all: usize, dims: &Dims) -> Range<usize> {
        let head_dim = dims.head_dim as usize;
        let heads = |heads: Range<usize>| heads.start * head_dim..heads.end * head_dim;
        match by {
            By::Vocabulary | By::Inner | By::Hidden => self.share(all),
            By::Heads => heads(self.share(dims.heads as usize)),
            By::KvHeads => heads(self.kv_heads(dims.kv_heads as usize)),
        }
    }

    /// Slices among its columns of o or down, of which it has so many where ranks share columns.
    pub fn slices(self, cols: usize, slicing: Slicing) -> u32 {
        slicing.slices(cols * self.count as usize) / self.count
    }
}

impl DecoderSpec {
    /// What one of so many ranks of a backend computes: a decoder of fewer heads and narrower MLPs, over the whole vocabulary.
    ///
    /// # Errors
    /// Names what can't be divided, with its numbers.
    pub fn shard(&self, ranks: u32, slicing: Slicing) -> Result<DecoderSpec, Indivisible> {
        if ranks == 1 {
            return Ok(self.clone());
        }
        let refused = |what: String| Err(Indivisible { ranks, what });
        if !ranks.is_power_of_two() || ranks > RANKS_MAX {
            return refused(format!(
                "ranks are 1, 2, 4 or {RANKS_MAX}, for sums over them are added in pairs"
            ));
        }
        let Dims { heads, kv_heads, vocab, .. } = self.dims;
        if !heads.is_multiple_of(ranks) {
            return refused(format!("it has {heads} query heads"));
        }
        if !kv_heads.is_multiple_of(ranks) && !ranks.is_multiple_of(kv_heads) {
            return refused(format!("it has {kv_heads} key heads"));
        }
        if vocab < ranks {
            return refused(format!("its vocabulary has {vocab} tokens"));
        }
        slicing.check("attention's output", self.dims.q_width(), self.dims.hidden, ranks)?;
        if let WeightFormat::Fp8(Fp8 { inputs: Inputs::PerGroup(group), .. }) = self.weights {
            let dense = self.layers.iter().filter(|layer| layer.experts().is_none());
            let widths = dense.map(|_| self.dims.intermediate).chain([self.dims.q_width() as u32]);
            let shared =
                |width: &u32| matches!(slicing.cut(By::Inner, *width as usize, ranks), Cut::Columns(_));
            let widths = widths.filter(shared);
            if let Some(width) = widths.map(|width| width / ranks).find(|width| !width.is_multiple_of(group))
            {
                return refused(format!(
                    "inputs are rounded in groups of {group} columns, and a rank has {width}; with --plain-inputs they are not rounded"
                ));
            }
        }
        let mut shard = self.clone();
        for layer in &mut shard.layers {
            *layer = layer.shard(&self.dims, ranks, slicing)?;
        }
        shard.dims = Dims {
            heads: heads / ranks,
            kv_heads: kv_heads.div_ceil(ranks),
            intermediate: self.dims.intermediate / ranks,
            ..self.dims
        };
        Ok(shard)
    }
}

impl LayerSpec {
    fn shard(&self, dims: &Dims, ranks: u32, slicing: Slicing) -> Result<LayerSpec, Indivisible> {
        let refused = |what: &str| Err(Indivisible { ranks, what: what.into() });
        match self.mixer {
            Mixer::Attention(Attention { qk_norm: QkNorm::FullWidth, .. }) => {
                return refused("it norms the queries of all heads together");
            }
            Mixer::GatedDelta { .. } => return refused("it has layers that mix tokens without attention"),
            Mixer::Attention(_) => {}
        }
        let mlp = match self.mlp {
            Mlp::Dense(activation) => {
                slicing.check("an MLP's output", dims.intermediate as usize, dims.hidden, ranks)?;
                Mlp::Dense(activation)
            }
            Mlp::Experts(experts) => {
                for (what, width) in [("inner", experts.intermediate), ("hidden", dims.hidden)] {
                    if !width.is_multiple_of(ranks) {
                        let what = format!("its experts' {what} width is {width}");
                        return Err(Indivisible { ranks, what });
                    }
                }
                Mlp::Experts(Experts { intermediate: experts.intermediate / ranks, ..experts })
            }
        };
        Ok(LayerSpec { mlp, ..*self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Activation, ScaleBlock};
    use alloc::string::ToString;
    use alloc::vec::Vec;

    const DIMS: Dims = Dims {
        layers: 1,
        hidden: 64,
        heads: 8,
        kv_heads: 2,
        head_dim: 32,
        intermediate: 384,
        vocab: 103,
        norm_eps: 1e-6,
    };

    /// The CPU's, and one of unequal slices.
    const EQUAL: Slicing = Slicing { most: 8, block: 16, equal: true };
    const BLOCKS: Slicing = Slicing { most: 4, block: 64, equal: false };

    fn ranks(count: u32) -> impl Iterator<Item = Rank> {
        (0..count).map(move |index| Rank { index, count })
    }

    #[test]
    fn slices_depend_on_the_matrix_alone_and_ranks_have_them_all() {
        let slices = |slicing: Slicing, cols: [usize; 7]| cols.map(|cols| slicing.slices(cols));
        assert_eq!(slices(EQUAL, [4096, 384, 192, 320, 224, 48, 100]), [8, 8, 4, 4, 2, 1, 1]);
        assert_eq!(slices(BLOCKS, [4096, 256, 200, 192, 128, 65, 64]), [4, 4, 4, 2, 2, 2, 1]);
        for (slicing, counts) in [(EQUAL, &[1, 2, 4, 8][..]), (BLOCKS, &[1, 2, 4])] {
            for count in counts {
                let slices = |rank: Rank| rank.slices(4096 / *count as usize, slicing);
                assert!(ranks(*count).all(|rank| slices(rank) == slicing.most / count));
            }
        }
    }

    #[test]
    fn a_ranks_slices_begin_and_end_where_those_of_the_whole_matrix_do() {
        let begins = |slices: usize, cols: usize| {
            let blocks = cols.div_ceil(BLOCKS.block);
            (0..=slices).map(move |slice| slice * blocks / slices)
        };
        // o and down of Qwen2.5-0.5B, Qwen3's 0.6B, 1.7B, 8B, 14B, 32B, and an expert's down.
        for cols in [896, 4864, 2048, 3072, 6144, 4096, 12_288, 5120, 17_408, 8192, 25_600, 768] {
            for count in [1u32, 2, 4, 8] {
                let divisible = count <= 4 && cols % (64 * count as usize) == 0;
                let columns = BLOCKS.cut(By::Inner, cols, count) == Cut::Columns(By::Inner);
                assert_eq!(columns, divisible, "{cols} of {count}");
                for rank in ranks(count).filter(|_| divisible) {
                    let (part, whole) = (rank.share(cols), BLOCKS.slices(cols) as usize);
                    let own = rank.slices(part.len(), BLOCKS) as usize;
                    let (first, of_rank) = (part.start / BLOCKS.block, begins(own, part.len()));
                    let of_whole = begins(whole, cols).skip(rank.index as usize * own).take(own + 1);
                    assert!(of_rank.map(|begin| first + begin).eq(of_whole), "{cols} of {rank:?}");
                }
            }
        }
    }

    #[test]
    fn ranks_round_whole_groups_of_inputs_or_say_how_many_columns_they_have() {
        let experts = Experts {
            activation: Activation::Silu,
            count: 8,
            per_token: 2,
            intermediate: 96,
            normalized: true,
        };
        let of_experts = LayerSpec { mlp: Mlp::Experts(experts), ..LayerSpec::plain() };
        let shard = |dims, layer, group, ranks| {
            let fp8 = Fp8 { block: ScaleBlock::Row, inputs: Inputs::PerGroup(group) };
            let spec = DecoderSpec { weights: WeightFormat::Fp8(fp8), ..DecoderSpec::uniform(dims, layer) };
            spec.shard(ranks, EQUAL).map(|_| ()).map_err(|error| error.to_string())
        };
        // o has 256 columns, down 384.
        assert_eq!(shard(DIMS, LayerSpec::plain(), 64, 2), Ok(()));
        let refused = |result: Result<(), String>, columns: &str| {
            let text = result.unwrap_err();
            assert!(
                text.contains("groups of 128") && text.contains(columns) && text.contains("--plain-inputs"),
                "{text}"
            );
        };
        refused(shard(DIMS, LayerSpec::plain(), 128, 4), "a rank has 96");
        // An expert's down is shared by rows, whatever its width.
        refused(shard(DIMS, of_experts, 128, 4), "a rank has 64");
        assert_eq!(shard(DIMS, of_experts, 128, 2), Ok(()));
        assert_eq!(shard(Dims { intermediate: 320, ..DIMS }, of_experts, 128, 2), Ok(()));
    }

    #[test]
    fn experts_that_cannot_be_shared_out_are_refused_with_their_widths() {
        let activation = Activation::Silu;
        let experts = Experts { activation, count: 8, per_token: 2, intermediate: 96, normalized: true };
        let layer = |experts| LayerSpec { mlp: Mlp::Experts(experts), ..LayerSpec::plain() };
        let shard = |dims, experts| DecoderSpec::uniform(dims, layer(experts)).shard(8, EQUAL);
        let refused = |dims, experts| shard(dims, experts).unwrap_err().to_string();
        let inner = refused(DIMS, Experts { intermediate: 100, ..experts });
        assert!(inner.contains("experts' inner width is 100") && inner.contains("8 ranks"), "{inner}");
        let hidden = refused(Dims { hidden: 68, ..DIMS }, experts);
        assert!(hidden.contains("experts' hidden width is 68") && hidden.contains("8 ranks"), "{hidden}");
        assert_eq!(shard(DIMS, experts).unwrap().layers[0].experts().map(|it| it.intermediate), Some(12));
    }

    #[test]
    fn ranks_have_every_row_once_and_key_heads_that_their_queries_look_at() {
        for count in [1, 2, 4, 8] {
            for (by, all) in [(By::Vocabulary, 103), (By::Inner, 384), (By::Heads, 256)] {
                let parts: Vec<_> = ranks(count).map(|rank| rank.part(by, all, &DIMS)).collect();
                assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, all));
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
                if by == By::Vocabulary {
                    let owner = |item| Rank::owner(Rank { index: 0, count }, item, all) as usize;
                    assert!((0..all).all(|item| parts[owner(item)].contains(&item)));
                }
            }
            for rank in ranks(count) {
                let (heads, kv) = (rank.share(8), rank.kv_heads(2));
                assert!(heads.clone().all(|head| kv.contains(&(head / 4))), "{rank:?}: {heads:?}, {kv:?}");
                assert_eq!(kv.len() as u32, DIMS.kv_heads.div_ceil(count));
            }
        }
    }

    #[test]
    fn what_cannot_be_shared_out_is_refused_with_its_numbers() {
        let refusal = |dims, ranks| {
            DecoderSpec::uniform(dims, LayerSpec::plain()).shard(ranks, EQUAL).unwrap_err().to_string()
        };
        let said = |dims, ranks, what: &str| {
            let text = refusal(dims, ranks);
            assert!(text.contains(what) && text.contains(&ranks.to_string()), "{text}");
        };
        said(DIMS, 3, "1, 2, 4 or 8");
        said(DIMS, 16, "1, 2, 4 or 8");
        said(Dims { heads: 10, kv_heads: 10, ..DIMS }, 4, "10 query heads");
        said(Dims { heads: 12, kv_heads: 3, ..DIMS }, 4, "3 key heads");
        said(Dims { vocab: 3, ..DIMS }, 4, "3 tokens");
        said(
            Dims { intermediate: 192, ..DIMS },
            8,
            "192 columns, which are 4 slices of whole blocks of 16, for 64 outputs",
        );
        said(Dims { intermediate: 100, ..DIMS }, 2, "100 columns, which are one slice");
        let spec = DecoderSpec::uniform(Dims { heads: 16, ..DIMS }, LayerSpec::plain());
        let refused = spec.shard(8, BLOCKS).unwrap_err().to_string();
        assert!(
            refused.contains("512 columns, which are 4 slices of whole blocks of 64, for 64 outputs"),
            "{refused}"
        );
        // Wide enough for rows of whole blocks.
        let wide = Dims { hidden: 512, intermediate: 1536, ..DIMS };
        let shard = DecoderSpec::uniform(wide, LayerSpec::plain()).shard(8, BLOCKS).unwrap();
        assert_eq!((shard.dims.hidden, shard.dims.intermediate, shard.dims.heads), (512, 192, 1));
        assert_eq!(BLOCKS.cut(By::Inner, 1536, 8), Cut::Rows(By::Hidden));
        assert_eq!(BLOCKS.cut(By::Inner, 1536, 4), Cut::Columns(By::Inner));
        let spec = DecoderSpec::uniform(DIMS, LayerSpec::plain()).shard(4, EQUAL).unwrap();
        let Dims { heads, kv_heads, intermediate, vocab, hidden, .. } = spec.dims;
        assert_eq!((heads, kv_heads, intermediate, vocab, hidden), (2, 1, 96, 103, 64));
    }
}
