//! The tiles of products of many tokens, and which is the quickest for a product.
//!
//! Invariant: a block has a multiprocessor to itself, and a box of the copy engine at most 256 rows.

use super::Partials;
use crate::launch::Grid;
use crate::ops::gemm::epilogue::Kind;
use crate::ops::gemm::product::{Block, Explained};
use crate::ops::gemm::shape::{BLOCK_COLS, Shape};

/// What a cluster works on at a time.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops::gemm) struct Tile {
    /// Blocks of a cluster along the rows of w, along the tokens, and along the columns, of which two have half each.
    blocks: [u32; 3],
    /// Rows of w in a block.
    pub(super) rows: u32,
    /// Warpgroups of a block that multiply, 64 tokens each.
    groups: u32,
    /// The time of a block of columns, in units of some 50 ns.
    cost: u32,
    /// What it takes more where L2 does not hold the matrix, of tiles whose blocks fetch nothing for each other.
    far: u32,
    /// A cluster takes one of so many slices of a tile at a time; with 1, a whole tile, however many slices it has.
    pub(super) split: u32,
    /// What a turn takes beside its columns: the epilogue, in which nothing is multiplied (told of q, k, v, gate and up), or leaving a slice in
    /// memory and adding the last.
    adding: u32,
    /// Do the first two of four slices leave their sum in memory while the others are made? Then a slice has four blocks or more.
    pub(super) aside: bool,
    /// Do its threads have registers for one slice's sums alone, though its rows are no more than 128?
    one_slice: bool,
}

impl Tile {
    const NARROW: Tile = Tile {
        blocks: [2, 1, 1],
        rows: 128,
        groups: 2,
        cost: 6,
        far: 0,
        split: 1,
        adding: 0,
        aside: false,
        one_slice: false,
    };
    const MIDDLE: Tile = Tile { groups: 3, cost: 8, ..Tile::NARROW };
    /// Its warpgroups' registers hold two sets of sums.
    const ASIDE: Tile = Tile { adding: 26, aside: true, ..Tile::MIDDLE };
    const SQUARE: Tile = Tile { blocks: [2, 2, 1], cost: 5, ..Tile::NARROW };
    /// Its sums leave no registers for those of another slice.
    const WIDE: Tile = Tile { blocks: [1, 2, 1], rows: 256, cost: 10, ..Tile::NARROW };
    /// Nor do those of these, whose rows are what makes one round of 132 blocks, or two, of a large model's gate and up.
    const TALL: [Tile; 7] = [
        Tile { rows: 288, cost: 12, adding: 66, ..Tile::NARROW },
        Tile { rows: 208, cost: 9, adding: 52, ..Tile::NARROW }, // a little quicker than the next
        Tile { rows: 224, cost: 9, adding: 52, ..Tile::NARROW },
        Tile { rows: 192, cost: 8, adding: 50, ..Tile::NARROW },
        Tile { rows: 144, cost: 7, adding: 40, ..Tile::NARROW },
        Tile { rows: 144, cost: 9, adding: 44, ..Tile::MIDDLE },
        Tile { rows: 192, cost: 12, adding: 60, ..Tile::MIDDLE },
    ];
    /// Shared memory that a block takes: all that one can have. The kernel makes as many stages of it as fit.
    pub(in crate::ops::gemm) const SHARED: u32 = 227 << 10;
    /// What the copy engine takes.
    const BOX_ROWS: u32 = 256;
    /// In four slices, which is how o's and down's sums are cut. There w comes from memory, not from L2, which takes longer.
    const SPLIT: [Tile; 3] = [
        Tile { split: 4, cost: 9, adding: 80, ..Tile::NARROW },
        Tile { split: 4, cost: 12, adding: 130, ..Tile::MIDDLE },
        Tile { split: 4, cost: 13, adding: 200, ..Tile::WIDE },
    ];
    /// Of o and down where whole tiles would leave much of the device idle.
    const JOINT: [Tile; 3] = [
        Tile { blocks: [1, 1, 2], groups: 1, cost: 6, far: 2, ..Tile::NARROW },
        Tile { blocks: [1, 1, 2], cost: 7, far: 2, adding: 16, ..Tile::NARROW },
        Tile { blocks: [1, 1, 2], cost: 9, far: 1, adding: 56, ..Tile::MIDDLE },
    ];
    /// In two, which is what a rank of two has of them.
    const HALVED: [Tile; 3] = [
        Tile { split: 2, ..Tile::SPLIT[0] },
        Tile { split: 2, ..Tile::SPLIT[1] },
        Tile { split: 2, ..Tile::SPLIT[2] },
    ];

    /// Of codes (`gemm_rounded_many.cu`): a block of 128 columns takes no less for being multiplied in half the time.
    pub(in crate::ops::gemm) const ROUNDED: Tile = Tile { cost: 9, ..Tile::NARROW };
    pub(in crate::ops::gemm) const ROUNDED_MIDDLE: Tile = Tile { cost: 12, one_slice: true, ..Tile::MIDDLE };
    /// Its rows make one round of Qwen3-8B's gate and up of 128 tokens.
    pub(in crate::ops::gemm) const ROUNDED_TALL: Tile = Tile { rows: 192, cost: 14, ..Tile::NARROW };
    /// Its rows give down of 128 tokens twice the blocks.
    pub(in crate::ops::gemm) const ROUNDED_SHORT: Tile =
        Tile { rows: 64, cost: 7, adding: 30, ..Tile::HALVED[0] };
    /// Both slices of o's and down's tiles at once, where whole tiles are few.
    pub(in crate::ops::gemm) const ROUNDED_JOINT: [Tile; 3] = [
        Tile { cost: 8, adding: 0, far: 0, ..Tile::JOINT[0] },
        Tile { cost: 10, adding: 0, far: 0, ..Tile::JOINT[1] },
        Tile { cost: 14, adding: 8, far: 0, ..Tile::JOINT[2] },
    ];

    /// The tiles that a kind of product has, and their kernels.
    pub(super) fn of(kind: Kind) -> Vec<(Tile, &'static str)> {
        let three = |names: [&'static str; 3]| {
            [Tile::NARROW, Tile::MIDDLE, Tile::SQUARE].into_iter().zip(names).collect::<Vec<_>>()
        };
        let mut tiles = match kind {
            Kind::Qkv => vec![
                (Tile { adding: 37, ..Tile::NARROW }, "many_qkv_narrow"),
                (Tile { adding: 45, ..Tile::MIDDLE }, "many_qkv_middle"),
                (Tile { adding: 37, ..Tile::SQUARE }, "many_qkv_square"),
                (Tile { adding: 70, ..Tile::WIDE }, "many_qkv_wide"),
            ],
            Kind::Residual => {
                vec![
                    (Tile::NARROW, "many_residual_narrow"),
                    (Tile::ASIDE, "many_residual_middle"),
                    (Tile::SQUARE, "many_residual_square"),
                ]
            }
            Kind::RankSums => three(["many_sums_narrow", "many_sums_middle", "many_sums_square"]),
            Kind::GateUp => vec![
                (Tile { adding: 32, ..Tile::NARROW }, "many_gate_up_narrow"),
                (Tile { adding: 32, ..Tile::MIDDLE }, "many_gate_up_middle"),
                (Tile { adding: 32, ..Tile::SQUARE }, "many_gate_up_square"),
                (Tile { adding: 50, ..Tile::WIDE }, "many_gate_up_wide"),
            ],
            Kind::Head => three(["many_head_narrow", "many_head_middle", "many_head_square"]),
            Kind::Linear => vec![(Tile::NARROW, "many_linear_narrow")],
        };
        let tall = [
            "many_gate_up_288x128",
            "many_gate_up_208x128",
            "many_gate_up_224x128",
            "many_gate_up_192x128",
            "many_gate_up_144x128",
            "many_gate_up_144x192",
            "many_gate_up_192x192",
        ];
        let split = ["split_residual_narrow", "split_residual_middle", "split_residual_wide"];
        let joint = ["joint_residual_short", "joint_residual_narrow", "joint_residual_middle"];
        let joint_sums = ["joint_sums_short", "joint_sums_narrow", "joint_sums_middle"];
        let halved = ["split_sums_narrow", "split_sums_middle", "split_sums_wide"];
        match kind {
            Kind::GateUp => {
                tiles.extend(Tile::TALL.into_iter().zip(tall));
            }
            Kind::Head => tiles.push((Tile::WIDE, "many_head_wide")),
            Kind::Residual => {
                tiles.extend(Tile::SPLIT.into_iter().zip(split));
                tiles.extend(Tile::JOINT.into_iter().zip(joint));
            }
            Kind::RankSums => {
                tiles.extend(Tile::HALVED.into_iter().zip(halved));
                tiles.extend(Tile::JOINT.into_iter().zip(joint_sums));
            }
            Kind::Qkv | Kind::Linear => {}
        }
        tiles
    }

    /// Which of such tiles, of which the device takes so many clusters at once, is the quickest for the product. Wider tiles move
    /// fewer bytes for each operation, but leave more of the device idle at the end; so do clusters of four, which do not find
    /// room on every multiprocessor.
    pub(in crate::ops::gemm) fn quickest(
        tiles: impl Iterator<Item = (Tile, u32)>,
        shape: &Shape,
    ) -> Option<usize> {
        let there = tiles.enumerate().filter(|(_, (tile, _))| tile.suits(shape));
        there.min_by_key(|(_, (tile, clusters))| tile.time(shape, *clusters)).map(|(index, _)| index)
    }

    /// What a product is launched as on a device that takes so many clusters of a size at once.
    pub(in crate::ops::gemm) fn explained(
        kind: Kind,
        shape: &Shape,
        clusters_of: fn(u32) -> u32,
    ) -> Option<Explained> {
        Self::explained_of(Self::of(kind), shape, clusters_of)
    }

    /// The same of these tiles and their kernels.
    pub(in crate::ops::gemm) fn explained_of(
        tiles: Vec<(Tile, &'static str)>,
        shape: &Shape,
        clusters_of: fn(u32) -> u32,
    ) -> Option<Explained> {
        let clusters = |tile: Tile| clusters_of(tile.cluster());
        let (tile, kernel) =
            tiles[Self::quickest(tiles.iter().map(|(tile, _)| (*tile, clusters(*tile))), shape)?];
        let count = tile.count(shape);
        let (columns, split) = match (tile.blocks[2], tile.split) {
            (2, _) => ("half of the columns", String::new()),
            (_, 1) => ("all columns", String::new()),
            (_, slices) => ("a slice of the columns at a time", format!(" of {slices} slices")),
        };
        Some(Explained {
            kernel,
            grid: tile.grid(tile.launched(shape, clusters(tile))),
            work: format!(
                "a block: {} rows of w, {} tokens, {columns}; {count} tiles{split} for {} clusters",
                tile.rows,
                tile.tokens(),
                tile.launched(shape, clusters(tile)),
            ),
        })
    }

    pub(in crate::ops::gemm) fn cluster(self) -> u32 {
        self.blocks.iter().product()
    }

    /// Of a block.
    pub(in crate::ops::gemm) fn tokens(self) -> u32 {
        64 * self.groups
    }

    pub(in crate::ops::gemm) fn count(self, shape: &Shape) -> u32 {
        let [rows, tokens] = [self.blocks[0] * self.rows, self.blocks[1] * self.tokens()];
        shape.rows.div_ceil(rows) * shape.tokens.div_ceil(tokens)
    }

    /// What clusters take in turn: tiles, or their slices.
    pub(in crate::ops::gemm) fn turns(self, shape: &Shape) -> u32 {
        self.count(shape) * self.split
    }

    /// The time of a launch that `clusters` share: each takes as many turns as the last one to end.
    fn time(self, shape: &Shape, clusters: u32) -> u64 {
        let blocks = shape.cols.div_ceil(BLOCK_COLS).div_ceil(self.split * self.blocks[2]);
        let cost = if shape.fits_l2() { self.cost } else { self.cost + self.far };
        u64::from(self.turns(shape).div_ceil(clusters)) * u64::from(blocks * cost + self.adding)
    }

    /// Does it hold the product's slices, one after the other or in memory, and would no block of a cluster lie behind the last
    /// token?
    fn suits(self, shape: &Shape) -> bool {
        let holds = match self.split {
            1 if self.blocks[2] == 2 => shape.slices.is_multiple_of(2),
            1 if self.aside => shape.slices < 4 || shape.cols >= 4 * shape.slices * BLOCK_COLS,
            1 => self.rows == 128 && !self.one_slice || shape.slices == 1,
            split => split == shape.slices && self.partial_bytes(shape) <= Partials::BYTES,
        };
        holds && shape.tokens > (self.blocks[1] - 1) * self.tokens()
    }

    /// Bytes of all tiles' slices.
    fn partial_bytes(self, shape: &Shape) -> usize {
        self.turns(shape) as usize * (self.cluster() * self.rows * self.tokens()) as usize * 4
    }

    /// The warpgroups that multiply, and the one that fetches.
    pub(in crate::ops::gemm) fn threads(self) -> u32 {
        128 * self.groups + 128
    }

    /// Of these clusters at once, how many a launch has: who shares out a tile's columns takes no other tile.
    pub(in crate::ops::gemm) fn launched(self, shape: &Shape, clusters: u32) -> u32 {
        let turns = self.turns(shape);
        if self.blocks[2] == 2 { turns } else { turns.min(clusters) }
    }

    pub(in crate::ops::gemm) fn grid(self, clusters: u32) -> Grid {
        let grid = Grid::new(clusters * self.cluster(), self.threads()).cluster(self.cluster());
        grid.shared(Self::SHARED).dependent()
    }

    /// The rows of w and the tokens that a block fetches at once. It has its part of what the cluster shares, and takes that in
    /// two where a box would be too large.
    pub(in crate::ops::gemm) fn fetched(self) -> Block {
        let [along_rows, along_tokens, _] = self.blocks;
        let part = self.rows / along_tokens;
        Block::new(if part > Self::BOX_ROWS { part / 2 } else { part }, self.tokens() / along_rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_is_fetched_in_boxes_of_whole_swizzles() {
        let tiles = [Tile::NARROW, Tile::MIDDLE, Tile::ASIDE, Tile::SQUARE, Tile::WIDE];
        for tile in tiles.into_iter().chain(Tile::TALL).chain(Tile::SPLIT).chain(Tile::JOINT) {
            let Block { rows, tokens } = tile.fetched();
            for (box_rows, all) in [(rows, tile.rows), (tokens, tile.tokens())] {
                assert!(box_rows <= Tile::BOX_ROWS && box_rows % 8 == 0 && all % box_rows == 0, "{tile:?}");
            }
        }
    }

    /// On a device of 132 multiprocessors, 30 clusters of four find room.
    #[test]
    fn each_tile_is_the_quickest_of_some_shape() {
        let is = |tile: Tile| (tile.blocks, tile.rows, tile.groups, tile.split);
        let quickest = |rows, cols, tokens, slices| {
            let shape = Shape { rows, cols, tokens, slices };
            let kind = match slices {
                1 => Kind::GateUp,
                2 => Kind::Qkv,
                _ => Kind::Residual,
            };
            let tiles = Tile::of(kind);
            let all = tiles.iter().map(|(tile, _)| (*tile, if tile.cluster() == 4 { 30 } else { 66 }));
            is(tiles[Tile::quickest(all, &shape).unwrap()].0)
        };
        assert_eq!(quickest(7168, 5120, 128, 2), is(Tile::NARROW));
        assert_eq!(quickest(7168, 5120, 256, 2), is(Tile::SQUARE));
        assert_eq!(quickest(7168, 5120, 16_384, 2), is(Tile::MIDDLE));
        assert_eq!(quickest(34_816, 5120, 16_384, 1), is(Tile::WIDE));
        // Of Qwen3-0.6B, whose q, k and v are one slice, too.
        let qkv = |tokens| {
            let (shape, tiles) = (Shape { rows: 4096, cols: 1024, tokens, slices: 1 }, Tile::of(Kind::Qkv));
            let all = tiles.iter().map(|(tile, _)| (*tile, if tile.cluster() == 4 { 30 } else { 66 }));
            is(tiles[Tile::quickest(all, &shape).unwrap()].0)
        };
        let [narrow, middle, wide] = [Tile::NARROW, Tile::MIDDLE, Tile::WIDE].map(is);
        assert_eq!([512, 768, 1024, 1472, 2048, 8192].map(qkv), [narrow, middle, wide, middle, wide, wide]);
        let gate_up = [512, 768, 1024, 1472, 2048].map(|tokens| quickest(6144, 1024, tokens, 1));
        assert_eq!(gate_up, [is(Tile::TALL[3]), is(Tile::TALL[6]), is(Tile::TALL[3]), middle, wide]);
        // gate_up of Qwen3's 8B, Llama's 8B, and Qwen2.5's 7B; that of a rank of two of Qwen3-14B and 32B.
        let [large, between, medium, small, least, long, longer] = Tile::TALL;
        assert_eq!(
            [64, 128, 136].map(|tokens| quickest(17_408, 5120, tokens, 1)),
            [is(least), is(least), is(long)]
        );
        assert_eq!(quickest(24_576, 4096, 128, 1), is(small));
        assert_eq!(quickest(28_672, 4096, 128, 1), is(medium));
        assert_eq!(quickest(37_888, 3584, 128, 1), is(large));
        assert_eq!(quickest(37_888, 3584, 192, 1), is(long));
        assert_eq!(quickest(24_576, 4096, 192, 1), is(longer));
        assert_eq!([128, 256].map(|tokens| quickest(25_600, 5120, tokens, 1)), [is(between); 2]);
        // Of Llama's 1B and 8B, and Qwen2.5's 7B.
        let [short, narrow, middle] = Tile::JOINT;
        assert_eq!([300, 512].map(|tokens| quickest(1024, 2048, tokens, 4)), [is(short); 2]);
        assert_eq!([640, 1024].map(|tokens| quickest(1024, 3072, tokens, 4)), [is(narrow); 2]);
        assert_eq!(quickest(4096, 12_288, 300, 4), is(middle));
        let [narrow, middle, wide] = Tile::SPLIT;
        assert_eq!(quickest(2048, 8192, 256, 4), is(narrow));
        assert_eq!(quickest(3584, 18_944, 192, 4), is(middle));
        assert_eq!(quickest(4096, 14_336, 256, 4), is(wide));
        // Qwen3-8B's down takes the widest tiles though a sum waits in memory; its o, of fewer columns, does not.
        let residual = |cols| {
            let shape = Shape { rows: 4096, cols, tokens: 16_384, slices: 4 };
            let tiles = [(Tile::NARROW, 66), (Tile::ASIDE, 66), (Tile::SQUARE, 30)];
            is(tiles[Tile::quickest(tiles.into_iter(), &shape).unwrap()].0)
        };
        assert_eq!([4096, 12_288].map(residual), [is(Tile::SQUARE), is(Tile::ASIDE)]);
        // Many tokens, and Qwen3-14B's rows, give enough clusters whole tiles.
        assert_eq!(quickest(3584, 18_944, 16_384, 4), is(Tile::SQUARE));
        assert_eq!(quickest(5120, 17_408, 256, 4), is(Tile::SQUARE));
        // Of the kernels' tests.
        assert_eq!(quickest(8064, 1600, 1000, 1), is(Tile::WIDE));
        assert_eq!([128, 192].map(|tokens| quickest(20_096, 640, tokens, 1)), [is(small), is(longer)]);
        assert_eq!(quickest(26_112, 512, 128, 1), is(between));
        assert_eq!(quickest(27_808, 512, 128, 1), is(medium));
        assert_eq!(quickest(17_920, 704, 128, 1), is(least));
        assert_eq!([128, 192].map(|tokens| quickest(34_048, 384, tokens, 1)), [is(large), is(long)]);
    }
}
