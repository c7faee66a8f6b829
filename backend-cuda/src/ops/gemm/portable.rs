//! The kernels for any GPU (`gemm.cu`): one for few tokens and one for many of each kind of product.

use super::epilogue::{Epilogue, Kind};
use super::product::{Explained, Product};
use super::shape::{BLOCK_COLS, Shape};
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::module::Modules;

/// The kernels for any GPU.
#[derive(Debug)]
pub(super) struct Portable {
    /// For few tokens and for many; by [`Kind`].
    kernels: [[Kernel; 2]; 6],
}

impl Portable {
    const TILE_ROWS: u32 = 128;
    const TILE_TOKENS: [u32; 2] = [16, 64];
    const STAGES: u32 = 3;
    const THREADS: u32 = 256;

    pub(super) fn new(modules: &Modules) -> Result<Portable, CudaError> {
        let find = |name, tokens| modules.kernel("gemm", name, Portable::shared(tokens));
        let pair = |kind| {
            let [few, many] = Self::names(kind);
            Ok::<_, CudaError>([find(few, Self::TILE_TOKENS[0])?, find(many, Self::TILE_TOKENS[1])?])
        };
        let kernels = [
            pair(Kind::Qkv)?,
            pair(Kind::Residual)?,
            pair(Kind::RankSums)?,
            pair(Kind::GateUp)?,
            pair(Kind::Head)?,
            pair(Kind::Linear)?,
        ];
        Ok(Portable { kernels })
    }

    /// Of the kernels for few tokens and for many.
    fn names(kind: Kind) -> [&'static str; 2] {
        match kind {
            Kind::Qkv => ["gemm_qkv_16", "gemm_qkv_64"],
            Kind::Residual => ["gemm_residual_16", "gemm_residual_64"],
            Kind::RankSums => ["gemm_sums_16", "gemm_sums_64"],
            Kind::GateUp => ["gemm_gate_up_16", "gemm_gate_up_64"],
            Kind::Head => ["gemm_head_16", "gemm_head_64"],
            Kind::Linear => ["gemm_linear_16", "gemm_linear_64"],
        }
    }

    fn shared(tile_tokens: u32) -> u32 {
        Self::STAGES * (Self::TILE_ROWS + tile_tokens) * BLOCK_COLS * 2
    }

    /// Of the kernels for few tokens and for many, which one a product takes.
    fn size(shape: &Shape) -> usize {
        usize::from(shape.tokens > Self::TILE_TOKENS[0])
    }

    fn grid(shape: &Shape) -> Grid {
        let tile_tokens = Self::TILE_TOKENS[Self::size(shape)];
        Grid::new(shape.rows.div_ceil(Self::TILE_ROWS), Self::THREADS)
            .rows(shape.tokens.div_ceil(tile_tokens))
            .shared(Self::shared(tile_tokens))
    }

    pub(super) fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        product: &Product<'_, E>,
    ) -> Result<(), CudaError> {
        let Product { w, x, shape, epilogue, .. } = product;
        let kernel = &self.kernels[E::KIND as usize][Self::size(shape)];
        launcher.launch(kernel, Self::grid(shape), [w, &x.address, shape, *epilogue])
    }

    pub(super) fn explained(kind: Kind, shape: &Shape) -> Explained {
        let (rows, tokens) = (Self::TILE_ROWS, Self::TILE_TOKENS[Self::size(shape)]);
        let slices = shape.slices;
        Explained {
            kernel: Self::names(kind)[Self::size(shape)],
            grid: Self::grid(shape),
            work: format!("a block: {rows} rows of w, {tokens} tokens, all columns in {slices} slices"),
        }
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::PORTABLE;

    use super::*;
    use crate::declared::threads_of;

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for kind in [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head, Kind::Linear] {
            for name in Portable::names(kind) {
                assert_eq!(threads_of(PORTABLE, name), Portable::THREADS, "{name}");
            }
        }
    }
}
