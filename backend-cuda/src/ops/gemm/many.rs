//! Launches of `gemm_many.cuh`: products of many tokens.
//!
//! ```text
//!            a block's tile            blocks of a cluster    of
//!   narrow   128 rows x 128 tokens     2 along the rows       every product
//!   middle   128      x 192            2 along the rows       the model's; of four slices, the first two's sums wait in memory
//!   square   128      x 128            2 x 2                  the model's
//!   wide     256      x 128            2 along the tokens     gate and up, and q, k, v whose sum is one slice; the head; split sums
//!   tall     144, …, 288   x 128       2 along the rows       gate and up
//!            144, 192      x 192       2 along the rows       the same
//!   joint    128      x 64, 128, 192   2 along the columns    split sums
//! ```
//!
//! A cluster takes tile after tile. Where few rows and tokens make few tiles of o and down, two blocks of a cluster have half of a tile's
//! columns each, and swap half of their sums (`joint.cuh`); or, of many columns, a cluster takes slice after slice of tiles: the sum is
//! split among clusters, who leave their slices in memory, and the last adds them (`split.cuh`). Who takes whole
//! tiles adds pairs of slices, then the pairs, for which there are three sets of sums: two warpgroups have registers for them, of
//! three each leaves one set in memory meanwhile.
//! Invariant: a block has a multiprocessor to itself, and a box of the copy engine at most 256 rows.

mod tile;

use minisgl_core::backend::Purpose;

use super::epilogue::{Epilogue, Kind};
use super::product::Product;
use super::shape::Shape;
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Kernel, Launcher};
use crate::memory::Address;
use crate::param::plain_params;
use crate::tensor_map::TensorMap;

pub(super) use tile::Tile;

/// A tile's kernel, and how many clusters of it the device takes at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded {
    pub(super) tile: Tile,
    pub(super) kernel: Kernel,
    pub(super) clusters: u32,
}

impl Loaded {
    /// Looks up a tile's kernel in a module.
    pub(super) fn new(
        gpu: &mut Gpu,
        module: &'static str,
        (tile, name): (Tile, &'static str),
    ) -> Result<Loaded, CudaError> {
        let kernel = gpu.modules().kernel(module, name, Tile::SHARED)?;
        // Where none has room the launch will say so.
        let clusters = gpu.launcher().clusters_at_once(&kernel, tile.grid(1))?.max(1);
        let aside = (tile.cluster() * tile.rows * tile.tokens()) as usize * 4;
        let clusters = if tile.aside { clusters.min((Partials::BYTES / aside) as u32) } else { clusters };
        Ok(Loaded { tile, kernel, clusters })
    }

    /// The quickest of these for the product.
    pub(super) fn quickest<'a>(all: &'a [Loaded], shape: &Shape) -> Result<&'a Loaded, CudaError> {
        let &Shape { rows, cols, tokens, .. } = shape;
        let index = Tile::quickest(all.iter().map(|loaded| (loaded.tile, loaded.clusters)), shape);
        index.and_then(|index| all.get(index)).ok_or(CudaError::NoTile { rows, cols, tokens })
    }
}

/// Hopper's kernels for many tokens: clusters, a block a multiprocessor, take tile after tile.
#[derive(Debug)]
pub(super) struct Many {
    /// By [`Kind`].
    kernels: [Vec<Loaded>; 6],
    pub(super) partials: Partials,
}

/// Where clusters leave sums, as `split.cuh` declares it: of slices that others add (also `gemm_apart.cuh`'s blocks), or those that a block
/// itself takes up again.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Partials {
    /// Sums of all tiles' slices, f32.
    sums: Address,
    /// Words: how many slices of a warp's share of a tile are there. Zero between launches.
    arrived: Address,
}

plain_params!(Partials);

impl Partials {
    /// Bytes of sums. A tile of 256 rows and tokens takes a megabyte in four slices.
    pub(super) const BYTES: usize = 24 << 20;
    /// Bytes of a warp's sums: 16 tokens by 128 rows. (Tiles of 64 rows have half of that, and two slices, not four.)
    const WARP_BYTES: usize = 16 * 128 * 4;

    fn new(gpu: &mut Gpu) -> Result<Partials, CudaError> {
        let sums = gpu.allocate(Purpose::Scratch, Self::BYTES)?;
        let arrived_bytes = Self::BYTES / Self::WARP_BYTES * 4;
        let arrived = gpu.allocate(Purpose::Scratch, arrived_bytes)?;
        gpu.zero(arrived, arrived_bytes)?;
        Ok(Partials { sums, arrived })
    }
}

impl Many {
    /// Tokens whose outputs a warp stores.
    pub(super) const WARP_TOKENS: u32 = 16;

    /// Looks up the kernels, and how many clusters of each the device takes.
    pub(super) fn new(gpu: &mut Gpu) -> Result<Many, CudaError> {
        let partials = Partials::new(gpu)?;
        let mut load = |tile| Loaded::new(gpu, "gemm_many", tile);
        let mut of_kind = |kind| Tile::of(kind).into_iter().map(&mut load).collect::<Result<Vec<_>, _>>();
        let kernels = [
            of_kind(Kind::Qkv)?,
            of_kind(Kind::Residual)?,
            of_kind(Kind::RankSums)?,
            of_kind(Kind::GateUp)?,
            of_kind(Kind::Head)?,
            of_kind(Kind::Linear)?,
        ];
        Ok(Many { kernels, partials })
    }

    pub(super) fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        product: &Product<'_, E>,
    ) -> Result<(), CudaError> {
        let Product { shape, epilogue, .. } = product;
        let Loaded { tile, kernel, clusters } = Loaded::quickest(&self.kernels[E::KIND as usize], shape)?;
        let grid = tile.grid(tile.launched(shape, *clusters)).dependent_if(!product.is_fresh);
        let [w, x] = product.maps(tile.fetched())?;
        // The copy engine takes rows that are a multiple of 16 bytes; a kernel stores others without it.
        let out = match epilogue.outputs(shape.rows) {
            Some((out, width)) if width % 8 == 0 => {
                TensorMap::rows_of_bf16(out, shape.tokens as usize, width as usize, Self::WARP_TOKENS)?
            }
            _ => x,
        };
        match tile.split > 1 || tile.aside {
            true => launcher.launch(kernel, grid, [&w, &x, &out, shape, *epilogue, &self.partials]),
            false => launcher.launch(kernel, grid, [&w, &x, &out, shape, *epilogue]),
        }
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::{assert_declared, threads_of};

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with_and_take_these_parameters() {
        for kind in [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head, Kind::Linear] {
            for (tile, name) in Tile::of(kind) {
                assert_eq!(threads_of(HOPPER, name), tile.threads(), "{name}");
            }
        }
        assert_declared!(&["hopper/gemm/split.cuh"], "Partials", Partials { sums, arrived });
    }
}
