//! Matrix products `y[t, m] = sum over k of w[m, k] x[t, k]` with what follows them: which kernels make them, and their launches.
//!
//! ```text
//!   w, x ── shape.rs ──> how the sums are cut ── which kernels ──┬── portable.rs   any GPU
//!                                                                ├── few.rs        Hopper, few tokens
//!                                                                ├── many.rs       Hopper, many tokens
//!                                                                ├── fp8.rs        matrices in fp8, whose inputs stay as they are
//!                                                                └── rounded.rs    and those whose inputs are rounded to fp8
//!   ring.rs       how operands of few tokens come
//!   epilogue.rs   what the sums become                 product.rs     a product on its way to its kernel
//!   explained.rs  the same choices without a device
//! ```
//!
//! Invariant: how a sum is cut depends on the matrix alone, never on the number of tokens, so a token's bits are the
//! same in every batch. Which tile a launch gets is chosen here and is a matter of speed only.

mod epilogue;
mod explained;
mod few;
mod fp8;
mod many;
mod portable;
mod product;
mod ring;
mod rounded;
mod shape;

pub use epilogue::{Epilogue, GateUp, Head, Kind, Linear, Qkv, RankSums, Residual, RowNorm};
pub(super) use explained::{explained, explained_rounded, scaling, widening};
pub(super) use product::Form;
pub use product::{Rows, SmShare};
pub use rounded::Norm;

use minisgl_core::backend::Purpose;

use few::{Few, tilings};
use fp8::Fp8;
use many::Many;
use portable::Portable;
use product::Product;
use rounded::Rounded;
use shape::{BLOCK_COLS, Shape};

use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::Launcher;
use crate::weight::Weight;

/// Hopper's kernels.
#[derive(Debug)]
struct Hopper {
    few: Few,
    many: Many,
}

impl Hopper {
    fn launch<E: Epilogue>(&self, launcher: &Launcher, product: &Product<'_, E>) -> Result<(), CudaError> {
        match self.few.tiling(E::KIND, &product.shape, product.share) {
            Some(tiling) => self.few.launch(tiling, launcher, product, &self.many.partials),
            None if product.epilogue.is_fp8() => {
                Err(CudaError::Unsupported("products of many tokens store no fp8 keys and values".into()))
            }
            None => self.many.launch(launcher, product),
        }
    }
}
/// Do Hopper's products of queries, keys and values keep these in fp8 by themselves?
pub(super) fn keeps_fp8([rows, cols, tokens]: [u32; 3], share: SmShare, weights_fp8: bool) -> bool {
    let shape = Shape { rows, cols, tokens, slices: Kind::Qkv.slices(cols, 1) };
    match weights_fp8 {
        true => tokens <= fp8::TOKENS_MAX,
        false => tilings::there_is(Kind::Qkv, &shape, share),
    }
}

/// The kernels of the set in use.
#[derive(Debug)]
enum Set {
    Portable(Box<Portable>),
    Hopper(Box<Hopper>),
}

/// The kernels.
#[derive(Debug)]
pub struct Gemm {
    set: Set,
    /// For matrices in fp8, once [`Gemm::reserve_fp8`] took memory for it.
    fp8: Option<Fp8>,
    /// For those whose inputs are rounded, once [`Gemm::reserve_rounded`] did.
    rounded: Option<Rounded>,
}

impl Gemm {
    /// Looks up the kernels that the device runs, and takes memory for sums that are split.
    pub fn new(gpu: &mut Gpu) -> Result<Gemm, CudaError> {
        let set = if gpu.properties().hopper {
            let many = Many::new(gpu)?;
            Set::Hopper(Box::new(Hopper { few: Few::new(gpu.modules())?, many }))
        } else {
            Set::Portable(Box::new(Portable::new(gpu.modules())?))
        };
        Ok(Gemm { set, fp8: None, rounded: None })
    }

    /// How often blocks that meet in memory look for each other's sums before they leave their own to who comes last. Bits don't depend on
    /// it; unless this is called they look for some 70 us.
    pub fn look_for_others(&mut self, looks: u32) {
        if let Set::Hopper(hopper) = &mut self.set {
            hopper.few.looks = looks;
        }
    }

    /// Looks up the kernels for matrices in fp8, and takes memory for one of so many elements in bf16.
    pub fn reserve_fp8(&mut self, gpu: &mut Gpu, elements: usize) -> Result<(), CudaError> {
        let wide = gpu.allocate(Purpose::Scratch, elements * 2)?;
        self.fp8 = Some(Fp8::new(gpu.modules(), wide, elements)?);
        Ok(())
    }

    /// Looks up the kernels for matrices in fp8 whose inputs are rounded, and takes memory for `tokens` rows of these, of at most
    /// `width` columns.
    pub fn reserve_rounded(&mut self, gpu: &mut Gpu, tokens: usize, width: usize) -> Result<(), CudaError> {
        self.rounded = Some(Rounded::new(gpu, tokens, width)?);
        Ok(())
    }

    /// What a product with `w` takes of the first `tokens` rows of `x`: of fp8 these times their norm's scales, in `scaled`, which any
    /// other matrix has in its columns. Where inputs are rounded, the product to be launched next takes what is rounded here.
    pub fn inputs(
        &self,
        launcher: &Launcher,
        w: Weight,
        norm: Option<Norm>,
        x: Rows,
        tokens: u32,
        scaled: Rows,
    ) -> Result<Rows, CudaError> {
        if w.codes().is_some() {
            let rounded = self.rounded.as_ref().ok_or(CudaError::NotReserved)?;
            return rounded.inputs(launcher, w, norm, x, tokens).map(|()| x);
        }
        match (&self.fp8, norm.and_then(|norm| norm.weight)) {
            (Some(fp8), Some(norm)) if w.is_fp8() => {
                fp8.scale(launcher, x.address, norm, tokens, scaled.address)?;
                Ok(scaled)
            }
            _ => Ok(x),
        }
    }

    /// Do products of queries, keys and values with so many tokens keep these in fp8 by themselves ([`Qkv::fp8`])?
    pub fn keeps_fp8(&self, w: Weight, tokens: u32, share: SmShare) -> bool {
        let sizes = [w.rows() as u32, w.cols() as u32, tokens];
        matches!(self.set, Set::Hopper(_)) && w.codes().is_none() && keeps_fp8(sizes, share, w.is_fp8())
    }

    /// Multiplies the first `tokens` rows of `x` by `w`, whose columns are a multiple of 8. The portable kernels take whatever
    /// share there is.
    pub fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        w: Weight,
        x: Rows,
        tokens: u32,
        share: SmShare,
        epilogue: &E,
    ) -> Result<(), CudaError> {
        let (rows, cols) = (w.rows() as u32, w.words() as u32);
        let (slices, most) = match w.codes() {
            Some(_) => (rounded::slices(E::KIND, rows, cols, w.slices()), rounded::SLICES_MAX),
            None => (E::KIND.slices(cols, w.slices()), E::KIND.slices_max()),
        };
        let shape = Shape { rows, cols, tokens, slices };
        if tokens == 0 {
            return Ok(());
        }
        let most = most.min(cols.div_ceil(BLOCK_COLS));
        if !slices.is_power_of_two() || slices > most {
            return Err(CudaError::Slices { cols, slices, most });
        }
        let product = Product { w: w.address(), is_fresh: false, x, shape, share, epilogue };
        match &self.set {
            Set::Hopper(hopper) if w.codes().is_some() => {
                let rounded = self.rounded.as_ref().ok_or(CudaError::NotReserved)?;
                rounded.launch(launcher, &hopper.many.partials, w, &product)
            }
            Set::Hopper(hopper) if w.is_fp8() => {
                let fp8 = self.fp8.as_ref().ok_or(CudaError::NotReserved)?;
                fp8.launch(launcher, &hopper.many, w, product)
            }
            Set::Portable(_) if w.is_fp8() => {
                Err(CudaError::Unsupported("fp8 weights have kernels for Hopper alone".into()))
            }
            Set::Portable(_) if epilogue.is_fp8() => {
                Err(CudaError::Unsupported("fp8 keys and values have kernels for Hopper alone".into()))
            }
            Set::Portable(portable) => portable.launch(launcher, &product),
            Set::Hopper(hopper) => hopper.launch(launcher, &product),
        }
    }
}
