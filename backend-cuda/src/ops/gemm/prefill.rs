//! Launches of `gemm_prefill.cu`: products of many tokens.
//!
//! ```text
//!            a block's tile            blocks of a cluster    of
//!   narrow   128 rows x 128 tokens     2 along the rows       every product
//!   middle   128      x 192            2 along the rows       the model's
//!   square   128      x 128            2 x 2                  the model's
//!   wide     256      x 128            2 along the tokens     gate and up, where the whole sum is one slice
//! ```
//!
//! A cluster takes tile after tile. Invariant: a block's shared memory fits a multiprocessor, and the kernel lays it out as
//! [`Tile::shared`] counts it.

use super::{BLOCK_COLS, Block, Epilogue, Kind, Product, Shape};
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::module::Modules;
use crate::tensor_map::TensorMap;

/// A tile's kernel, and how many clusters of it the device takes at once.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    tile: Tile,
    kernel: Kernel,
    clusters: u32,
}

/// Hopper's kernels for many tokens: clusters, a block a multiprocessor, take tile after tile.
#[derive(Debug)]
pub(super) struct Prefill {
    /// By [`Kind`].
    kernels: [Vec<Loaded>; 5],
}

/// What a cluster works on at a time.
#[derive(Clone, Copy, Debug)]
struct Tile {
    /// Blocks of a cluster along the rows of w, and along the tokens.
    blocks: [u32; 2],
    /// Rows of w in a block.
    rows: u32,
    /// Warpgroups of a block that multiply, 64 tokens each.
    groups: u32,
    stages: u32,
    /// Its time, in any unit.
    cost: u32,
}

impl Tile {
    const NARROW: Tile = Tile { blocks: [2, 1], rows: 128, groups: 2, stages: 5, cost: 6 };
    const MIDDLE: Tile = Tile { blocks: [2, 1], rows: 128, groups: 3, stages: 4, cost: 8 };
    const SQUARE: Tile = Tile { blocks: [2, 2], rows: 128, groups: 2, stages: 5, cost: 5 };
    /// Its sums leave no registers for those of another slice.
    const WIDE: Tile = Tile { blocks: [1, 2], rows: 256, groups: 2, stages: 4, cost: 10 };

    fn cluster(self) -> u32 {
        self.blocks[0] * self.blocks[1]
    }

    /// Of a block.
    fn tokens(self) -> u32 {
        64 * self.groups
    }

    fn count(self, shape: &Shape) -> u32 {
        let [rows, tokens] = [self.blocks[0] * self.rows, self.blocks[1] * self.tokens()];
        shape.rows.div_ceil(rows) * shape.tokens.div_ceil(tokens)
    }

    /// The time of a launch that `clusters` share: each takes as many tiles as the last one to end.
    fn time(self, shape: &Shape, clusters: u32) -> u32 {
        self.count(shape).div_ceil(clusters) * self.cost
    }

    /// Does it hold the product's slices, and would no block of a cluster lie behind the last token?
    fn suits(self, shape: &Shape) -> bool {
        (self.rows == 128 || shape.slices == 1) && shape.tokens > (self.blocks[1] - 1) * self.tokens()
    }

    /// The warpgroups that multiply, and the one that fetches.
    fn threads(self) -> u32 {
        128 * self.groups + 128
    }

    /// Shared memory: the ring, 4 KiB of outputs a warp (2 of wide ones), 16 bytes a token twice, barriers, the ends of 8
    /// slices, and what aligns the ring to 1024 bytes.
    fn shared(self) -> u32 {
        let stage = (self.tokens() + self.rows) * BLOCK_COLS * 2;
        let outputs = if self.rows == 128 { 4 << 10 } else { 2 << 10 };
        let barriers = 2 * self.stages + 4 + 4 * self.groups;
        self.stages * stage + 4 * self.groups * outputs + self.tokens() * 32 + barriers * 8 + 8 * 4 + 1024
    }

    fn grid(self, clusters: u32) -> Grid {
        let grid = Grid::new(clusters * self.cluster(), self.threads()).cluster(self.cluster());
        grid.shared(self.shared()).dependent()
    }
}

impl Prefill {
    /// Tokens whose outputs a warp stores.
    const WARP_TOKENS: u32 = 16;

    /// Looks up the kernels, and how many clusters of each the device takes.
    pub(super) fn new(modules: &Modules, launcher: &Launcher) -> Result<Prefill, CudaError> {
        let load = |tile: Tile, name| {
            let kernel = modules.kernel("gemm_prefill", name, tile.shared())?;
            // Where none has room the launch will say so.
            let clusters = launcher.clusters_at_once(&kernel, tile.grid(1))?.max(1);
            Ok(Loaded { tile, kernel, clusters })
        };
        let three = |narrow, middle, square| {
            Ok::<_, CudaError>(vec![
                load(Tile::NARROW, narrow)?,
                load(Tile::MIDDLE, middle)?,
                load(Tile::SQUARE, square)?,
            ])
        };
        let mut kernels = [
            three("prefill_qkv_narrow", "prefill_qkv_middle", "prefill_qkv_square")?,
            three("prefill_residual_narrow", "prefill_residual_middle", "prefill_residual_square")?,
            three("prefill_gate_up_narrow", "prefill_gate_up_middle", "prefill_gate_up_square")?,
            three("prefill_head_narrow", "prefill_head_middle", "prefill_head_square")?,
            vec![load(Tile::NARROW, "prefill_linear_narrow")?],
        ];
        kernels[Kind::GateUp as usize].push(load(Tile::WIDE, "prefill_gate_up_wide")?);
        Ok(Prefill { kernels })
    }

    /// Do the product's tiles fill a quarter of the device?
    pub(super) fn fills_a_quarter(&self, kind: Kind, shape: &Shape) -> bool {
        let fills = |loaded: &Loaded| loaded.tile.count(shape) >= loaded.clusters / 4;
        self.kernels[kind as usize].first().is_some_and(fills)
    }

    /// The quickest tile that there is for the product. Wider tiles move fewer bytes for each operation, but leave more of the
    /// device idle at the end; so do clusters of four, which do not find room on every multiprocessor.
    fn quickest(&self, kind: Kind, shape: &Shape) -> Option<&Loaded> {
        let there = self.kernels[kind as usize].iter().filter(|loaded| loaded.tile.suits(shape));
        there.min_by_key(|Loaded { tile, clusters, .. }| tile.time(shape, *clusters))
    }

    pub(super) fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        product: &Product<'_, E>,
    ) -> Result<(), CudaError> {
        let Product { shape, epilogue, .. } = product;
        let &Shape { rows, cols, tokens, .. } = shape;
        let quickest = self.quickest(E::KIND, shape).ok_or(CudaError::NoTile { rows, cols, tokens })?;
        let Loaded { tile, kernel, clusters } = quickest;
        let grid = tile.grid(tile.count(shape).min(*clusters));
        let [along_rows, along_tokens] = tile.blocks;
        let [w, x] = product.maps(Block::new(tile.rows / along_tokens, tile.tokens() / along_rows))?;
        // The copy engine takes rows that are a multiple of 16 bytes; a kernel stores others without it.
        let (out, width) = epilogue.outputs(shape.rows);
        let out = match width % 8 {
            0 => TensorMap::rows_of_bf16(out, shape.tokens as usize, width as usize, Self::WARP_TOKENS)?,
            _ => x,
        };
        launcher.launch(kernel, grid, [&w, &x, &out, shape, *epilogue])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_fits_a_multiprocessor() {
        for tile in [Tile::NARROW, Tile::MIDDLE, Tile::SQUARE, Tile::WIDE] {
            assert!(tile.shared() <= 227 << 10, "{tile:?} takes {} bytes", tile.shared());
            assert!(tile.threads() <= 1024, "{tile:?}");
        }
    }

    /// On a device of 132 multiprocessors, 30 clusters of four find room.
    #[test]
    fn each_tile_is_the_quickest_of_some_shape() {
        let quickest = |rows, cols, tokens, slices| {
            let shape = Shape { rows, cols, tokens, slices };
            let tiles = [(Tile::NARROW, 66), (Tile::MIDDLE, 66), (Tile::SQUARE, 30), (Tile::WIDE, 66)];
            let there = tiles.into_iter().filter(|(tile, _)| tile.suits(&shape));
            let (tile, _) = there.min_by_key(|(tile, clusters)| tile.time(&shape, *clusters)).unwrap();
            (tile.blocks, tile.rows, tile.groups)
        };
        let is = |tile: Tile| (tile.blocks, tile.rows, tile.groups);
        assert_eq!(quickest(7168, 5120, 128, 2), is(Tile::NARROW));
        assert_eq!(quickest(4096, 1024, 16_384, 2), is(Tile::MIDDLE));
        assert_eq!(quickest(34_816, 5120, 256, 1), is(Tile::SQUARE));
        assert_eq!(quickest(34_816, 5120, 16_384, 1), is(Tile::WIDE));
        // Of the kernels' tests.
        assert_eq!(quickest(8064, 1600, 1000, 1), is(Tile::WIDE));
    }
}
