//! The kernels that multiply codes, and which of them a product takes.

use crate::ops::gemm::epilogue::Kind;
use crate::ops::gemm::many::Tile;
use crate::ops::gemm::product::Block;
use crate::ops::gemm::ring::{Ring, Sliced};
use crate::ops::gemm::shape::Shape;
use crate::weight::Fp8Codes;

/// Rows of gate and up that make one round of Qwen3-8B's blocks, of few tokens.
const TALL: u32 = 192;

/// A kind of product's kernels.
pub(super) struct Kernels {
    /// Which of all.
    pub(super) index: usize,
    /// Those for few tokens by their blocks, ever more tokens: of 128 qkv's alone is quicker than tiles of many.
    pub(super) few: Vec<(Block, &'static str)>,
    /// Tiles of many tokens, where 128 rows have two scales at most.
    pub(super) many: Vec<(Tile, &'static str)>,
    /// Where they have more.
    pub(super) grained: (Tile, &'static str),
}

impl Kernels {
    pub(super) fn of(kind: Kind) -> Option<Kernels> {
        match kind {
            Kind::Qkv => Some(Kernels {
                index: 0,
                few: vec![
                    (Block::new(128, 16), "rounded_few_qkv_128x16"),
                    (Block::new(128, 32), "rounded_few_qkv_128x32"),
                    (Block::new(128, 64), "rounded_few_qkv_128x64"),
                    (Block::new(128, 128), "rounded_few_qkv_128x128"),
                ],
                many: vec![(Tile::ROUNDED, "rounded_many_qkv_narrow")],
                grained: (Tile::ROUNDED, "rounded_many_grained_qkv_narrow"),
            }),
            Kind::Residual => Some(Kernels {
                index: 1,
                few: vec![
                    (Block::new(64, 16), "rounded_few_residual_64x16"),
                    (Block::new(64, 32), "rounded_few_residual_64x32"),
                    (Block::new(64, 64), "rounded_few_residual_64x64"),
                ],
                many: vec![
                    (Tile::ROUNDED, "rounded_many_residual_narrow"),
                    (Tile::ROUNDED_SHORT, "rounded_many_split_residual_short"),
                    (Tile::ROUNDED_JOINT[0], "rounded_many_joint_residual_short"),
                    (Tile::ROUNDED_JOINT[1], "rounded_many_joint_residual_narrow"),
                    (Tile::ROUNDED_JOINT[2], "rounded_many_joint_residual_middle"),
                ],
                grained: (Tile::ROUNDED, "rounded_many_grained_residual_narrow"),
            }),
            Kind::GateUp => Some(Kernels {
                index: 2,
                few: vec![
                    (Block::new(128, 16), "rounded_few_gate_up_128x16"),
                    (Block::new(128, 32), "rounded_few_gate_up_128x32"),
                    (Block::new(128, 64), "rounded_few_gate_up_128x64"),
                    (Block::new(192, 16), "rounded_few_gate_up_192x16"),
                    (Block::new(192, 32), "rounded_few_gate_up_192x32"),
                    (Block::new(192, 64), "rounded_few_gate_up_192x64"),
                ],
                many: vec![
                    (Tile::ROUNDED, "rounded_many_gate_up_narrow"),
                    (Tile::ROUNDED_MIDDLE, "rounded_many_gate_up_middle"),
                    (Tile::ROUNDED_TALL, "rounded_many_gate_up_tall"),
                ],
                grained: (Tile::ROUNDED, "rounded_many_grained_gate_up_narrow"),
            }),
            Kind::RankSums | Kind::Head | Kind::Linear => None,
        }
    }

    /// Those for many tokens of a matrix whose groups have scales in pairs, or not.
    pub(super) fn tiles(self, pairs: bool) -> Vec<(Tile, &'static str)> {
        if pairs { self.many } else { vec![self.grained] }
    }
}

/// The kinds that have kernels.
pub(super) const KINDS: [Kind; 3] = [Kind::Qkv, Kind::Residual, Kind::GateUp];

/// What such a block of the kernels for few tokens is launched with, with 64 rows of w for each of its warpgroups.
pub(super) fn few(kind: Kind, block: Block) -> Sliced {
    let Block { rows, tokens } = block;
    let alone = rows == TALL || tokens == 128 || tokens == 64 && kind == Kind::Qkv;
    let ring = Ring::of(block).with_scales(tokens + rows / Fp8Codes::GROUP as u32);
    Sliced { ring, alone, spread: false }
}

/// The same for a product, on a device that takes so many `blocks` at once that have a multiprocessor to themselves.
pub(super) fn few_of(kind: Kind, block: Block, shape: &Shape, blocks: u32) -> Sliced {
    Sliced { spread: shape.rows.div_ceil(block.rows) * shape.slices <= blocks, ..few(kind, block) }
}

/// Which of these kernels for few tokens a product takes, if one does. A tile of 128 tokens has a multiprocessor to itself: on a device that
/// takes fewer `blocks` of these at once than there are, kernels for many tokens are done first. So they are of o and down from 33 tokens
/// on, if 128 rows have scales in pairs, for which they have tiles of 64 tokens. Blocks of [`TALL`] rows are taken where the device takes
/// all of them at once, and none of those of 128.
pub(super) fn chosen(
    kind: Kind,
    shape: &Shape,
    few: &[(Block, &str)],
    blocks: u32,
    pairs: bool,
) -> Option<usize> {
    let there = |rows| shape.rows.div_ceil(rows) * shape.slices;
    let is_tall = kind == Kind::GateUp && there(128) > blocks && there(TALL) <= blocks;
    let suits = |block: Block| shape.tokens <= block.tokens && (block.rows == TALL) == is_tall;
    let chosen = few.iter().position(|(block, _)| suits(*block))?;
    let Block { rows, tokens } = few[chosen].0;
    let is_one_round_only = tokens == 128 || tokens == 64 && kind == Kind::Residual && pairs;
    (!is_one_round_only || there(rows) <= blocks).then_some(chosen)
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::threads_of;

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for kind in KINDS {
            let kernels = Kernels::of(kind).unwrap();
            for (block, name) in &kernels.few {
                let ring = few(kind, *block).ring;
                assert_eq!(threads_of(HOPPER, name), ring.threads(), "{name}");
                assert!(name.ends_with(&format!("_{}x{}", ring.block.rows, ring.block.tokens)), "{name}");
            }
            for (tile, name) in kernels.many.into_iter().chain([kernels.grained]) {
                assert_eq!(threads_of(HOPPER, name), tile.threads(), "{name}");
            }
        }
    }

    #[test]
    fn a_ring_holds_the_sums_that_lie_over_it_and_blocks_fit_a_multiprocessor() {
        for (rows, cols, slices) in [(6144, 2048, 2), (64, 64, 1), (4096, 6144, 2), (24_576, 2048, 1)] {
            for kind in KINDS {
                for (block, _) in Kernels::of(kind).unwrap().few {
                    let (shape, few) = (Shape { rows, cols, tokens: block.tokens, slices }, few(kind, block));
                    assert!(few.ring.holds(few.stages(&shape), few.shared_max()), "{shape:?}");
                }
            }
        }
    }
}
