//! Launches of `gemm_prefill.cu`: products of many tokens.
//!
//! ```text
//!   tile                      warpgroups   of
//!   128 tokens x 2 x 128 rows     2        every product
//!   192                           3        the model's
//!   256                           4        head
//! ```
//!
//! A cluster of two blocks takes tile after tile, a block 128 of the rows. Invariant: a block's shared memory fits a
//! multiprocessor, and the kernel lays it out as [`Tile::shared`] counts it.

use super::{BLOCK_COLS, Block, Epilogue, Kind, Product, Shape};
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::module::Modules;
use crate::tensor_map::TensorMap;

/// Hopper's kernels for many tokens: clusters of two blocks, one a multiprocessor, take tile after tile.
#[derive(Debug)]
pub(super) struct Prefill {
    /// By [`Kind`], then as [`Prefill::TILES`]; not every product has every tile.
    kernels: [[Option<Kernel>; 3]; 5],
    clusters: u32,
}

/// What a cluster works on at a time, 256 rows of w by some tokens; a block has half of the rows.
#[derive(Clone, Copy, Debug)]
struct Tile {
    /// Warpgroups that multiply, 64 tokens each.
    groups: u32,
    stages: u32,
    /// Its time, in any unit.
    cost: u32,
}

impl Tile {
    const fn new(groups: u32, stages: u32, cost: u32) -> Tile {
        Tile { groups, stages, cost }
    }

    fn tokens(self) -> u32 {
        64 * self.groups
    }

    fn count(self, shape: &Shape) -> u32 {
        shape.rows.div_ceil(Prefill::CLUSTER * Prefill::ROWS) * shape.tokens.div_ceil(self.tokens())
    }

    /// The warpgroups that multiply, and the one that fetches.
    fn threads(self) -> u32 {
        128 * self.groups + 128
    }

    /// Shared memory: the ring, 4 KiB of outputs a warp, 16 bytes a token twice, barriers, the ends of 8 slices, and what
    /// aligns the ring to 1024 bytes.
    fn shared(self) -> u32 {
        let stage = (self.tokens() + Prefill::ROWS) * BLOCK_COLS * 2;
        let barriers = 2 * self.stages + 4 + 4 * self.groups;
        self.stages * stage + self.groups * (4 << 12) + self.tokens() * 32 + barriers * 8 + 8 * 4 + 1024
    }
}

impl Prefill {
    const CLUSTER: u32 = 2;
    const ROWS: u32 = 128;
    /// Tokens whose outputs a warp stores.
    const WARP_TOKENS: u32 = 16;
    /// Wider tiles move fewer bytes for each operation, but leave more of the device idle at the end.
    const TILES: [Tile; 3] = [Tile::new(2, 5, 3), Tile::new(3, 4, 4), Tile::new(4, 3, 5)];

    pub(super) fn new(modules: &Modules, multiprocessors: u32) -> Result<Prefill, CudaError> {
        let find =
            |tile: usize, name| modules.kernel("gemm_prefill", name, Self::TILES[tile].shared()).map(Some);
        let kernels = [
            [find(0, "prefill_qkv_128")?, find(1, "prefill_qkv_192")?, None],
            [find(0, "prefill_residual_128")?, find(1, "prefill_residual_192")?, None],
            [find(0, "prefill_gate_up_128")?, find(1, "prefill_gate_up_192")?, None],
            [find(0, "prefill_head_128")?, find(1, "prefill_head_192")?, find(2, "prefill_head_256")?],
            [find(0, "prefill_linear_128")?, None, None],
        ];
        Ok(Prefill { kernels, clusters: multiprocessors / Self::CLUSTER })
    }

    /// Do the product's tiles fill a quarter of the device?
    pub(super) fn fills_a_quarter(&self, shape: &Shape) -> bool {
        Self::TILES[0].count(shape) >= self.clusters / 4
    }

    /// The quickest tile that there is for the product: each cluster takes as many as the last one to end.
    fn tile(&self, kind: Kind, shape: &Shape) -> Option<(Tile, &Kernel)> {
        let there = Self::TILES.into_iter().zip(&self.kernels[kind as usize]);
        let there = there.filter_map(|(tile, kernel)| Some((tile, kernel.as_ref()?)));
        there.min_by_key(|(tile, _)| tile.count(shape).div_ceil(self.clusters) * tile.cost)
    }

    pub(super) fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        product: &Product<'_, E>,
    ) -> Result<(), CudaError> {
        let Product { shape, epilogue, .. } = product;
        let Some((tile, kernel)) = self.tile(E::KIND, shape) else { return Ok(()) };
        let clusters = tile.count(shape).min(self.clusters);
        let grid = Grid::new(clusters * Self::CLUSTER, tile.threads())
            .cluster(Self::CLUSTER)
            .shared(tile.shared())
            .dependent();
        let [w, x] = product.maps(Block::new(Self::ROWS, tile.tokens() / Self::CLUSTER))?;
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
        for tile in Prefill::TILES {
            assert!(tile.shared() <= 227 << 10, "{tile:?} takes {} bytes", tile.shared());
            assert!(tile.threads() <= 1024, "{tile:?}");
        }
    }
}
