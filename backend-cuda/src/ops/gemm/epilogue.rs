//! What a product's sums become: the epilogues, as the files in `epilogue/` declare their parameters.
//!
//! ```text
//!   Qkv        queries; keys and values in their pages
//!   Residual   added to the residual stream, with its partial squares
//!   RankSums   f32 sums, of a rank's columns
//!   GateUp     silu(gate) * up
//!   Head       f16 logits
//!   Linear     bf16 rows
//! ```
//!
//! Invariant: a struct here has the fields of the kernels' in their order; a test reads them out of the CUDA source.

use minisgl_core::shard::RANKS_MAX;

use crate::memory::Address;
use crate::param::{Param, plain_params};

/// Where a normed row's scale comes from.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RowNorm {
    /// `[tokens, segments]` f32: sums of squares of 64 elements each.
    pub sumsq: Address,
    /// `ceil(hidden / 64)`.
    pub segments: u32,
    /// Width of the rows.
    pub hidden: u32,
    /// Epsilon of the norm.
    pub eps: f32,
}

/// Normed rows times q, k and v: biases, head norms and rope (null where a model has none), queries to `q`, keys and values
/// to their pages.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Qkv {
    /// The rows' norm.
    pub norm: RowNorm,
    /// Epsilon of the head norms.
    pub head_eps: f32,
    /// The packed batch.
    pub batch: Address,
    /// `[rows of w]` bf16, or null.
    pub bias: Address,
    /// `[head_dim]` bf16, or null.
    pub q_norm: Address,
    /// `[head_dim]` bf16, or null.
    pub k_norm: Address,
    /// `[positions, head_dim / 2]` (cos, sin) f32, or null.
    pub rope: Address,
    /// `[tokens, heads * head_dim]` bf16.
    pub q: Address,
    /// `[pages + 1, kv_heads, page_size, head_dim]` bf16, 16-byte chunk c of row t at chunk `c ^ (t % 8)`.
    pub k: Address,
    /// As `k`.
    pub v: Address,
    /// First word of the batch's tokens.
    pub tokens_offset: u32,
    /// Query heads.
    pub heads: u32,
    /// Key heads, and as many value heads.
    pub kv_heads: u32,
    /// 64 or 128.
    pub head_dim: u32,
    /// A page holds `1 << page_shift` tokens.
    pub page_shift: u32,
    /// 1: keys and values are kept in fp8, as `fp8_rows.cuh` says, which Hopper's kernels for few tokens do.
    pub fp8: u32,
}

/// Rows added to the residual stream.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    /// `[tokens, rows of w]` bf16.
    pub residual: Address,
    /// `[tokens, ceil(rows of w / 64)]` f32: sums of squares of 64 elements of the new residual each.
    pub sumsq: Address,
}

/// What a rank has of the sums of rows that are added to the residual stream, on its way to whom adds it up.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RankSums {
    /// By rank: where f32 sums for that one go, segments of 64 outputs.
    pub to: [Address; RANKS_MAX as usize],
    /// How many ranks there are, a power of two.
    pub ranks: u32,
    /// Its logarithm.
    pub ranks_log2: u32,
    /// 1: each segment goes to the rank that adds it up; 0: all go to all.
    pub shared: u32,
    /// Makes the struct a multiple of 8 bytes.
    pub reserved: u32,
}

impl RankSums {
    /// All of them to these ranks' memory, or to each its share.
    pub fn new(to: [Address; RANKS_MAX as usize], ranks: u32, shared: bool) -> RankSums {
        RankSums { to, ranks, ranks_log2: ranks.trailing_zeros(), shared: shared.into(), reserved: 0 }
    }

    /// To one place, `[tokens, rows of w]` in whole segments.
    pub fn here(out: Address) -> RankSums {
        let mut to = [Address::NULL; RANKS_MAX as usize];
        to[0] = out;
        RankSums::new(to, 1, false)
    }
}

/// Normed rows times gate and up, whose rows take turns in blocks of 8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GateUp {
    /// The rows' norm.
    pub norm: RowNorm,
    /// `[tokens, intermediate]` bf16.
    pub out: Address,
    /// Width of the MLP; the stored matrix may be padded beyond it.
    pub intermediate: u32,
    /// Makes the struct a multiple of 8 bytes.
    pub reserved: u32,
}

/// Logits.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// `[samples, rows of w]` f16, clamped to its range.
    pub out: Address,
}

/// Plain rows.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[tokens, rows of w]` bf16.
    pub out: Address,
}

/// Which epilogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Qkv`].
    Qkv,
    /// [`Residual`].
    Residual,
    /// [`RankSums`].
    RankSums,
    /// [`GateUp`].
    GateUp,
    /// [`Head`].
    Head,
    /// [`Linear`].
    Linear,
}

/// What a product's sums become.
pub trait Epilogue: Param + Copy {
    /// Which it is.
    const KIND: Kind;

    /// Where rows of outputs in 16 bits lie, one a token, and how many outputs a row has, for `rows` rows of w. Keys and values lie
    /// elsewhere.
    fn outputs(&self, rows: u32) -> Option<(Address, u32)>;

    /// Are keys and values kept in fp8?
    fn is_fp8(&self) -> bool {
        false
    }

    /// Are there head norms and rope, and no bias? Few rows have kernels of their own for that (`QkvNormed` in
    /// `epilogue/qkv.cuh`).
    fn is_normed(&self) -> bool {
        false
    }
}

plain_params!(Qkv, Residual, RankSums, GateUp, Head, Linear);

impl Epilogue for Qkv {
    const KIND: Kind = Kind::Qkv;

    fn outputs(&self, _: u32) -> Option<(Address, u32)> {
        Some((self.q, self.heads * self.head_dim))
    }

    fn is_fp8(&self) -> bool {
        self.fp8 != 0
    }

    fn is_normed(&self) -> bool {
        let there = [self.q_norm, self.k_norm, self.rope];
        self.bias == Address::NULL && there.into_iter().all(|pointer| pointer != Address::NULL)
    }
}

impl Epilogue for Residual {
    const KIND: Kind = Kind::Residual;

    fn outputs(&self, rows: u32) -> Option<(Address, u32)> {
        Some((self.residual, rows))
    }
}

impl Epilogue for RankSums {
    const KIND: Kind = Kind::RankSums;

    fn outputs(&self, _: u32) -> Option<(Address, u32)> {
        None
    }
}

impl Epilogue for GateUp {
    const KIND: Kind = Kind::GateUp;

    fn outputs(&self, _: u32) -> Option<(Address, u32)> {
        Some((self.out, self.intermediate))
    }
}

impl Epilogue for Head {
    const KIND: Kind = Kind::Head;

    fn outputs(&self, rows: u32) -> Option<(Address, u32)> {
        Some((self.out, rows))
    }
}

impl Epilogue for Linear {
    const KIND: Kind = Kind::Linear;

    fn outputs(&self, rows: u32) -> Option<(Address, u32)> {
        Some((self.out, rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::assert_declared;

    #[test]
    fn parameters_have_the_fields_that_the_kernels_declare() {
        let files = &[
            "epilogue/row_norm.cuh",
            "epilogue/qkv.cuh",
            "epilogue/residual.cuh",
            "epilogue/rank_sums.cuh",
            "epilogue/gate_up.cuh",
            "epilogue/stored.cuh",
        ];
        assert_declared!(files, "RowNorm", RowNorm { sumsq, segments, hidden, eps });
        assert_declared!(
            files,
            "QkvOf",
            Qkv {
                norm,
                head_eps,
                batch,
                bias,
                q_norm,
                k_norm,
                rope,
                q,
                k,
                v,
                tokens_offset,
                heads,
                kv_heads,
                head_dim,
                page_shift,
                fp8,
            }
        );
        assert_declared!(files, "Residual", Residual { residual, sumsq });
        assert_declared!(files, "RankSums", RankSums { to, ranks, ranks_log2, shared, reserved });
        assert_declared!(files, "GateUp", GateUp { norm, out, intermediate, reserved });
        assert_declared!(files, "Head", Head { out });
        assert_declared!(files, "Linear", Linear { out });
    }
}
