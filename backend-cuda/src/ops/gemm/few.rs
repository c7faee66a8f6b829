//! Launches of `gemm_few.cuh`'s, `gemm_apart.cuh`'s, `gemm_pair.cuh`'s and `gemm_batch.cuh`'s kernels: products of few tokens.
//!
//! ```text
//!   tokens         a block's work                          blocks that work together
//!   up to 64       64 rows of w or more, most a slice      mostly a cluster has all slices; some as below
//!   65 to 256      gate and up, some qkv: all columns      two or three with neighbouring tokens fetch w for each other
//!                  qkv, o, down: a slice of the columns,   a cluster has all slices, and of some two blocks each, with
//!                  or two                                  neighbouring tokens or rows of w, which fetch what both need;
//!                                                          or only these two, and all slices meet in memory
//!   33 to 192      gate and up of small models             two with neighbouring rows of w fetch tokens for each other
//!   up to 64,      gate and up of large ones, a share of   the same
//!   129 to 256     all rows; o and down of these, of 129 on
//! ```
//!
//! Invariant: a block's shared memory is what its tiling allows, and its sums fit the ring that they lie over.

mod tiling;
pub(super) mod tilings;

use super::epilogue::{Epilogue, Kind};
use super::many::Partials;
use super::product::{Product, SmShare};
use super::shape::Shape;
use crate::error::CudaError;
use crate::launch::{Kernel, Launcher};
use crate::module::Modules;
pub(super) use tiling::Tiling;

/// A tiling with its kernels.
#[derive(Debug)]
pub(super) struct Loaded {
    tiling: Tiling,
    kernel: Kernel,
    normed: Option<Kernel>,
    /// The two for keys and values in fp8, of queries, keys and values.
    fp8: Option<[Kernel; 2]>,
}

/// By [`Kind`].
type Kinds = [Vec<Loaded>; 5];

/// Hopper's kernels for few tokens.
#[derive(Debug)]
pub(super) struct Few {
    /// For matrices that fit L2, in the order of [`tilings::fitting::of`].
    fitting: Kinds,
    /// For larger ones, in the order of [`tilings::large::of`].
    large: Kinds,
    /// For half of each multiprocessor, in the order of [`tilings::half::of`].
    half: Kinds,
    /// How often a block whose tile meets in memory looks for the others' sums before it leaves them its own.
    pub(super) looks: u32,
}

impl Few {
    /// 70 us, several times what a block works up to its last product. All begin together, unless other kernels keep some of them from
    /// a multiprocessor.
    const LOOKS: u32 = 100;

    pub(super) fn new(modules: &Modules) -> Result<Few, CudaError> {
        Ok(Few {
            fitting: Self::load(modules, tilings::fitting::of)?,
            large: Self::load(modules, tilings::large::of)?,
            half: Self::load(modules, tilings::half::of)?,
            looks: Self::LOOKS,
        })
    }

    fn load(modules: &Modules, of: fn(Kind) -> &'static [Tiling]) -> Result<Kinds, CudaError> {
        let load = |module, kind| {
            let load = |tiling: &Tiling| {
                let find = |name| modules.kernel(module, name, tiling.shared);
                let normed = tiling.normed.map(find).transpose()?;
                let in_fp8 = |[kernel, normed]: [_; 2]| {
                    let find = |name| modules.kernel("gemm_few_qkv_fp8", name, tiling.shared);
                    Ok([find(kernel)?, find(normed)?])
                };
                let fp8 = tiling.fp8.map(in_fp8).transpose()?;
                Ok(Loaded { tiling: *tiling, kernel: find(tiling.kernel)?, normed, fp8 })
            };
            of(kind).iter().map(load).collect::<Result<Vec<_>, CudaError>>()
        };
        Ok([
            load("gemm_few_qkv", Kind::Qkv)?,
            load("gemm_few_residual", Kind::Residual)?,
            load("gemm_few_sums", Kind::RankSums)?,
            load("gemm_few_gate_up", Kind::GateUp)?,
            load("gemm_few_head", Kind::Head)?,
        ])
    }

    /// The tiling for the shape; none where another kernel is the quicker one.
    pub(super) fn tiling(&self, kind: Kind, shape: &Shape, share: SmShare) -> Option<&Loaded> {
        let index = tilings::index(tilings::all(kind, shape, share), kind, shape, share)?;
        let loaded = match share {
            SmShare::Whole if shape.fits_l2() => &self.fitting,
            SmShare::Whole => &self.large,
            SmShare::Half => &self.half,
        };
        loaded.get(kind as usize)?.get(index)
    }

    pub(super) fn launch<E: Epilogue>(
        &self,
        Loaded { tiling, kernel, normed, fp8 }: &Loaded,
        launcher: &Launcher,
        product: &Product<'_, E>,
        partials: &Partials,
    ) -> Result<(), CudaError> {
        let Product { shape, epilogue, .. } = product;
        let (kernel, normed) = match fp8 {
            Some([kernel, normed]) if epilogue.is_fp8() => (kernel, Some(normed)),
            _ => (kernel, normed.as_ref()),
        };
        let kernel = normed.filter(|_| epilogue.is_normed()).unwrap_or(kernel);
        let stages = tiling.stages(shape);
        let grid = tiling.grid(shape, stages);
        let [w, x] = product.maps(tiling.fetched())?;
        if tiling.meets_in_memory() {
            return launcher.launch(kernel, grid, [&w, &x, shape, &stages, *epilogue, partials, &self.looks]);
        }
        launcher.launch(kernel, grid, [&w, &x, shape, &stages, *epilogue])
    }
}
