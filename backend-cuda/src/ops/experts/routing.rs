//! What the kernels of a layer with experts share: who chose whom, and where that lies.

use half::f16;
use minisgl_core::shard::Rank;

use crate::memory::Address;
use crate::ops::gemm::RowNorm;
use crate::param::plain_params;

/// Experts of a layer that the kernels take at most: 8 for each lane of a warp.
pub const COUNT_MAX: u32 = 256;
/// Experts of a token that they take at most.
pub const PER_TOKEN_MAX: u32 = 16;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;

/// What the kernels of a layer share, as `experts.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    /// Of the kernels for any GPU.
    pub(super) logits: Address,
    /// `[tokens]` f32: the scale by row of the norm.
    pub scales: Address,
    /// `[tokens, per_token]` u16, ascending, and up to 7 more to read: experts, 0xffff for nobody.
    pub chosen: Address,
    pub(super) shares: Address,
    pub(super) begins: Address,
    pub(super) pairs: Address,
    /// `[experts, ceil(tokens / 32)]`: a bit for each token that chose an expert, 0 between layers; null where there are lists.
    pub bits: Address,
    /// Null, or two u64 to count in: as [`minisgl_core::stats::ExpertsRead`].
    pub(super) read: Address,
    pub(super) tokens: u32,
    pub(super) experts: u32,
    pub(super) per_token: u32,
    pub(super) hidden: u32,
    pub(super) intermediate: u32,
    /// Rows of an expert's gate and up as they are stored.
    pub(super) stored: u32,
    pub(super) normalized: u32,
    pub(super) nobody: u32,
    /// `[tokens, hidden]` f16, as [`experts_input`] has them: the residual stream times the norm's scale by column, where that is not in gate
    /// and up; or null.
    pub(super) scaled: Address,
}

impl Routing {
    /// Pairs of a token and one of its experts.
    pub(super) fn pairs(&self) -> u32 {
        self.tokens * self.per_token
    }

    /// That of down and of what is behind it: all columns, and a rank's share of the rows.
    pub(super) fn of_down(&self, rank: Rank) -> Routing {
        let (hidden, intermediate) = (self.hidden / rank.count, self.intermediate * rank.count);
        Routing { hidden, intermediate, ..*self }
    }
}

/// What the next layer's first product takes, where it is of fp8, as `experts.cuh` declares it: the new residual stream times its norm's
/// scale by column. Null: it takes the stream itself.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// `[hidden]` bf16.
    pub norm: Address,
    /// `[tokens, hidden]` bf16.
    pub scaled: Address,
}

impl Ahead {
    /// It takes the stream.
    pub const NOTHING: Ahead = Ahead { norm: Address::NULL, scaled: Address::NULL };
}

plain_params!(Routing, RowNorm, Ahead);

/// What experts in fp8 are applied to are this part of what they stand for: see `experts_f16.cuh`.
const INPUTS_UNIT: f32 = 64.0;

/// The bits of an input of experts in fp8.
pub fn experts_input(x: f32) -> u16 {
    let most = f16::MAX.to_f32();
    f16::from_f32((x / INPUTS_UNIT).clamp(-most, most)).to_bits()
}

/// Tiles of `tile` pairs that as many pairs need at most, dealt out to experts in any way: each expert has a tile that is not
/// full at most.
pub(super) fn tiles_at_most(pairs: u32, experts: u32, tile: u32) -> u32 {
    let begun = pairs.min(experts);
    begun + (pairs - begun) / tile
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::{assert_declared, constant};

    #[test]
    fn both_sides_declare_the_same() {
        assert_eq!(constant("experts/experts_f16.cuh", "EXPERTS_INPUTS_UNIT") as f32, INPUTS_UNIT);
        assert_declared!(&["experts/experts.cuh"], "Ahead", Ahead { norm, scaled });
        assert_declared!(
            &["experts/experts.cuh"],
            "Routing",
            Routing {
                logits,
                scales,
                chosen,
                shares,
                begins,
                pairs,
                bits,
                read,
                tokens,
                experts,
                per_token,
                hidden,
                intermediate,
                stored,
                normalized,
                nobody,
                scaled,
            }
        );
    }

    #[test]
    fn there_are_blocks_for_every_way_to_deal_pairs_out() {
        for (pairs, experts) in [(1, 8), (8, 128), (64, 8), (100, 7), (2048, 128), (4000, 3)] {
            for tile in [16, 32, 64, 256] {
                let most = tiles_at_most(pairs, experts, tile);
                // One pair for each but the last, which has the rest; and as even as can be.
                let others = (experts - 1).min(pairs - 1);
                let worst = others + (pairs - others).div_ceil(tile);
                let even: u32 = (0..experts)
                    .map(|e| (pairs / experts + u32::from(e < pairs % experts)).div_ceil(tile))
                    .sum();
                assert!(
                    worst.max(even) <= most && most <= pairs,
                    "{pairs} pairs, {experts} experts, tiles of {tile}"
                );
            }
        }
    }
}
