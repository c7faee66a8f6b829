//! Launches of `portable/experts_products.cu`, the products for any GPU: a block for each tile of rows and of pairs that there can be.

use super::layer::Products;
use super::routing::{Routing, THREADS, tiles_at_most};
use crate::error::CudaError;
use crate::launch::{Grid, Kernel};
use crate::module::Modules;

/// Rows of w that a block takes.
const TILE_ROWS: u32 = 128;
const BLOCK_COLS: u32 = 64;

/// The kernels for tiles of so many pairs.
#[derive(Clone, Copy, Debug)]
struct Tile {
    pairs: u32,
    stages: u32,
    gate_up: Kernel,
    down: Kernel,
}

impl Tile {
    fn new(
        modules: &Modules,
        [pairs, stages]: [u32; 2],
        gate_up: &'static str,
        down: &'static str,
    ) -> Result<Tile, CudaError> {
        let shared = Self::shared_bytes(pairs, stages);
        let find = |name| modules.kernel("experts_products", name, shared);
        Ok(Tile { pairs, stages, gate_up: find(gate_up)?, down: find(down)? })
    }

    fn shared_bytes(pairs: u32, stages: u32) -> u32 {
        stages * (TILE_ROWS + pairs) * BLOCK_COLS * 2
    }

    /// A block for each tile of rows and for as many tiles of pairs as there can be.
    fn grid(&self, rows: u32, routing: &Routing) -> Grid {
        let tiles = tiles_at_most(routing.pairs(), routing.experts, self.pairs);
        Grid::new(rows.div_ceil(TILE_ROWS), THREADS)
            .rows(tiles)
            .shared(Self::shared_bytes(self.pairs, self.stages))
            .dependent()
    }
}

/// The kernels, narrow tiles first.
#[derive(Debug)]
pub(super) struct Portable {
    tiles: [Tile; 3],
}

impl Portable {
    pub(super) fn new(modules: &Modules) -> Result<Portable, CudaError> {
        let tiles = [
            Tile::new(modules, [16, 4], "experts_gate_up_16", "experts_down_16")?,
            Tile::new(modules, [32, 4], "experts_gate_up_32", "experts_down_32")?,
            Tile::new(modules, [64, 3], "experts_gate_up_64", "experts_down_64")?,
        ];
        Ok(Portable { tiles })
    }

    pub(super) fn gate_up(&self, products: &Products<'_>) -> Result<(), CudaError> {
        let Products { launcher, layer, routing, activated, .. } = products;
        let (gate_up, x) = (layer.weights.gate_up.address(), layer.x);
        let tile = self.tile(routing);
        let grid = tile.grid(routing.stored, routing);
        launcher.launch(&tile.gate_up, grid, [*routing, &gate_up, &x, activated])
    }

    pub(super) fn down(&self, products: &Products<'_>) -> Result<(), CudaError> {
        let Products { launcher, layer, routing, activated, given } = products;
        let (down, tile) = (layer.weights.down.address(), self.tile(routing));
        let grid = tile.grid(routing.hidden, routing);
        launcher.launch(&tile.down, grid, [*routing, &down, activated, given])
    }

    /// The narrowest tile that holds what an expert gets on average, and half as many more.
    fn tile(&self, routing: &Routing) -> &Tile {
        let usual = routing.pairs() * 3 / 2 / routing.experts;
        self.tiles.iter().find(|tile| usual <= tile.pairs).unwrap_or(&self.tiles[2])
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::PORTABLE;

    use super::*;
    use crate::declared::threads_of;

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for pairs in [16, 32, 64] {
            for product in ["gate_up", "down"] {
                let kernel = format!("experts_{product}_{pairs}");
                assert_eq!(threads_of(PORTABLE, &kernel), THREADS, "{kernel}");
            }
        }
    }
}
