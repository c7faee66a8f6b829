//! How a model's query heads share its key and value heads, and what a block takes of them at once.

use minisgl_core::spec::Dims;
use minisgl_kernels::attention::Prefill;

/// How a model's query heads share its key and value heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) head_dim: u32,
    pub(super) kv_heads: u32,
    /// Query heads of a key and value head.
    pub(super) group: u32,
    /// Key and value heads that a decode block takes at once.
    pub(super) at_once: u32,
}

impl Heads {
    /// Of a model that `supports.rs` lets through, for Hopper's kernels or the portable ones.
    pub(super) fn new(dims: &Dims, hopper: bool) -> Heads {
        let Dims { head_dim, heads, kv_heads, .. } = *dims;
        let group = heads / kv_heads;
        // Two heads of 64 dims keep a block's warps as busy as one of 128, where a product's eight columns hold their queries.
        let two = hopper && head_dim == 64 && kv_heads.is_multiple_of(2) && [2, 4].contains(&group);
        Heads { head_dim, kv_heads, group, at_once: if two { 2 } else { 1 } }
    }

    /// Items of a row in a decode step: a key and value head with up to eight of its query heads, or two with all of theirs.
    pub(super) fn items(self) -> u32 {
        self.kv_heads / self.at_once * self.group.div_ceil(8)
    }

    /// Items that `tokens` tokens in `rows` rows make at most in a prefill step.
    pub(super) fn items_max(self, prefill: &Prefill, tokens: u32, rows: u32) -> u32 {
        tokens / prefill.item_tokens(self.group) + rows
    }

    /// Bytes of a token's queries.
    pub(super) fn q_row_bytes(self) -> usize {
        (self.kv_heads * self.group * self.head_dim) as usize * 2
    }

    /// Bytes of a partial result: o, m and l of the queries of an item, in pairs.
    pub(super) fn partial_bytes(self) -> usize {
        let pairs = (self.at_once * self.group.min(8)).div_ceil(2) as usize;
        pairs * (self.head_dim as usize / 2 + 1) * 16
    }
}
