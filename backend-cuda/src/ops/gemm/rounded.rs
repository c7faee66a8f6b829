//! Products whose both operands are e4m3 codes: inputs are rounded first, then multiplied on the tensor cores for fp8 (`rounded.cuh`).
//!
//! ```text
//!   x bf16 ── norm, scales, codes ──> codes, scales ──┬── up to 64 tokens   kernels that read the matrix at memory's rate
//!             (fp8_inputs.cu)           (qkv: 128)          └── more        those of many tokens, in tiles of 128 by 64 to 192, or 192 by 128
//! ```
//!
//! To a product's kernels and plans a row of codes is one of half as many words of 16 bits ([`Weight::words`]): blocks of 64 of these, rings and tiles
//! are those of bf16. A sum is of two slices at most ([`slices`]).
//!
//! Invariant: a token's codes lie in a place of its own until its product has ended.

mod explained;
mod kernels;

use minisgl_core::backend::Purpose;

use self::kernels::{KINDS, Kernels, chosen, few, few_of};
use super::epilogue::{Epilogue, Kind, RowNorm};
use super::many::{Loaded, Many, Partials};
use super::product::{Block, Product, Rows};
use super::shape::{BLOCK_COLS, fits_l2};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::Address;
use crate::module::Modules;
use crate::param::{Param, plain_params};
use crate::tensor_map::TensorMap;
use crate::weight::{Codes, Fp8Codes, Rounding, Weight};

pub(super) use self::explained::explained;

/// The most slices of a sum.
pub(super) const SLICES_MAX: u32 = 2;
/// Threads of a block that rounds inputs, and columns that it rounds at once.
const ROUNDING_THREADS: u32 = 256;
const ROUNDED: u32 = ROUNDING_THREADS / 32 * 256;
/// So many tokens, and more, fill the device with a block each.
const ROUNDED_WHOLE: u32 = 1024;

/// What is rounded, as `fp8_inputs.cu` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Fp8Inputs {
    x: Address,
    norm: Address,
    row_norm: RowNorm,
    codes: Address,
    scales: Address,
    fixed: Address,
    cols: u32,
    pitch: u32,
    group: u32,
    reserved: u32,
}

/// Where both operands' scales lie, as `rounded.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct CodeScales {
    x: Address,
    w: Address,
    pitch: u32,
    groups: u32,
    shift: u32,
    reserved: u32,
}

/// An epilogue, and the scales of w's rows, or null, as `rounded.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RoundedOf<E> {
    epilogue: E,
    row_scales: Address,
}

plain_params!(Fp8Inputs, CodeScales);

impl<E: Epilogue> Param for RoundedOf<E> {
    fn raw(&self) -> (*const std::ffi::c_void, usize) {
        ((&raw const *self).cast(), size_of::<Self>())
    }
}

/// A norm that inputs have before they are rounded.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// Its scales, where they are not in the matrix's columns.
    pub weight: Option<Weight>,
    /// The rows'.
    pub rows: RowNorm,
}

/// Where the inputs of any product of a model lie once they are rounded.
#[derive(Clone, Copy, Debug)]
struct Scratch {
    /// `[tokens, width]`.
    codes: Address,
    /// `[ceil(width / 128), pitch]` f32.
    scales: Address,
    tokens: u32,
    pitch: u32,
    width: u32,
}

/// The kernels.
#[derive(Debug)]
pub(super) struct Rounded {
    round: Kernel,
    /// By kind, in the order of [`Kernels::few`].
    few: [Vec<Kernel>; 3],
    many: [Vec<Loaded>; 3],
    /// The same for matrices of which 128 rows have more than two scales.
    grained: [Vec<Loaded>; 3],
    scratch: Scratch,
}

impl Rounded {
    /// Looks them up, and takes memory for `tokens` rows of inputs of at most `width` columns.
    pub(super) fn new(gpu: &mut Gpu, tokens: usize, width: usize) -> Result<Rounded, CudaError> {
        let width = width.next_multiple_of(Fp8Codes::BLOCK_COLS as usize);
        // Whole tiles of 128 tokens and of 192 find their scales.
        let pitch = tokens.next_multiple_of(384);
        let blocks = width / Fp8Codes::BLOCK_COLS as usize;
        let scratch = Scratch {
            codes: gpu.allocate(Purpose::Scratch, tokens * width)?,
            scales: gpu.allocate(Purpose::Scratch, blocks * pitch * 4)?,
            tokens: tokens as u32,
            pitch: pitch as u32,
            width: width as u32,
        };
        let load_few = |modules: &Modules, kind| {
            let kernels = Kernels::of(kind).ok_or_else(|| none(kind))?;
            let load = |(block, name): &(Block, &'static str)| {
                modules.kernel("gemm_rounded_few", name, few(kind, *block).shared_max())
            };
            kernels.few.iter().map(load).collect::<Result<Vec<_>, _>>()
        };
        let modules = gpu.modules();
        let [qkv, residual, gate_up] = KINDS.map(|kind| load_few(modules, kind));
        let few = [qkv?, residual?, gate_up?];
        let round = modules.kernel("fp8_inputs", "fp8_inputs", 0)?;
        let mut many = |kind, pairs| {
            let kernels = Kernels::of(kind).ok_or_else(|| none(kind))?;
            let load = |tile| Loaded::new(gpu, "gemm_rounded_many", tile);
            kernels.tiles(pairs).into_iter().map(load).collect::<Result<Vec<_>, _>>()
        };
        let [qkv, residual, gate_up] = KINDS.map(|kind| many(kind, true));
        let many_of_pairs = [qkv?, residual?, gate_up?];
        let [qkv, residual, gate_up] = KINDS.map(|kind| many(kind, false));
        let grained = [qkv?, residual?, gate_up?];
        Ok(Rounded { round, few, many: many_of_pairs, grained, scratch })
    }

    /// Rounds the first `tokens` rows of `x` as `w` asks for.
    pub(super) fn inputs(
        &self,
        launcher: &Launcher,
        w: Weight,
        norm: Option<Norm>,
        x: Rows,
        tokens: u32,
    ) -> Result<(), CudaError> {
        let (Some(codes), Scratch { tokens: most, pitch, width, .. }) = (w.codes(), self.scratch) else {
            return Err(CudaError::NotReserved);
        };
        let cols = w.cols() as u32;
        if tokens > most || cols > width {
            return Err(CudaError::NotReserved);
        }
        let no_norm = RowNorm { sumsq: Address::NULL, segments: 0, hidden: cols, eps: 0.0 };
        let inputs = Fp8Inputs {
            x: x.address,
            norm: norm.and_then(|norm| norm.weight).map_or(Address::NULL, |weight| weight.address()),
            row_norm: norm.map_or(no_norm, |norm| norm.rows),
            codes: self.scratch.codes,
            scales: self.scratch.scales,
            fixed: match codes.rounding {
                Rounding::Fixed => w.address().offset(w.codes_layout().input_scale_at()),
                Rounding::Groups(_) | Rounding::Rows => Address::NULL,
            },
            cols,
            pitch,
            group: match codes.rounding {
                Rounding::Groups(width) => width,
                Rounding::Rows | Rounding::Fixed => 0,
            },
            reserved: 0,
        };
        launcher.launch(&self.round, rounding(cols, tokens, codes.rounding), [&inputs])
    }

    /// Multiplies the rows that were rounded last with `w`, of which the product says no more than its sizes.
    pub(super) fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        partials: &Partials,
        w: Weight,
        product: &Product<'_, E>,
    ) -> Result<(), CudaError> {
        let (shape, layout) = (product.shape, w.codes_layout());
        let Kernels { index, few: blocks_of, .. } = Kernels::of(E::KIND).ok_or_else(|| none(E::KIND))?;
        let Codes { by_rows, pairs, summed, .. } = w.codes().ok_or(CudaError::NotReserved)?;
        let many = if pairs { &self.many[index] } else { &self.grained[index] };
        let scales = CodeScales {
            x: self.scratch.scales,
            w: w.address().offset(layout.scales_at()),
            pitch: self.scratch.pitch,
            groups: layout.groups() as u32,
            shift: (summed / Fp8Codes::BLOCK_COLS).ilog2(),
            reserved: 0,
        };
        let row_scales = if by_rows { w.address().offset(layout.row_scales_at()) } else { Address::NULL };
        let epilogue = RoundedOf { epilogue: *product.epilogue, row_scales };
        let maps = |rows: u32, tokens: u32| {
            let cols = shape.cols as usize;
            let there = self.scratch.tokens as usize;
            Ok::<_, CudaError>([
                TensorMap::rows_of_bf16(w.address(), shape.rows as usize, cols, rows)?,
                TensorMap::rows_of_bf16(self.scratch.codes, there, cols, tokens)?,
            ])
        };
        let at_once = |tile: &Loaded| tile.clusters * tile.tile.cluster();
        let blocks = many.first().map_or(0, at_once);
        if let Some(chosen) = chosen(E::KIND, &shape, &blocks_of, blocks, pairs) {
            let (few, kernel) =
                (few_of(E::KIND, blocks_of[chosen].0, &shape, blocks), &self.few[index][chosen]);
            let (Block { rows, tokens }, stages) = (few.ring.block, few.stages(&shape));
            let [w, x] = maps(rows, tokens)?;
            return launcher.launch(kernel, few.grid(&shape), [&w, &x, &shape, &stages, &scales, &epilogue]);
        }
        let Loaded { tile, kernel, clusters } = Loaded::quickest(many, &shape)?;
        let fetched = tile.fetched();
        let [w, x] = maps(fetched.rows, fetched.tokens)?;
        let (out, width) = product.epilogue.outputs(shape.rows).ok_or_else(|| none(E::KIND))?;
        let out = TensorMap::rows_of_bf16(out, shape.tokens as usize, width as usize, Many::WARP_TOKENS)?;
        let grid = tile.grid(tile.launched(&shape, *clusters));
        launcher.launch(kernel, grid, [&w, &x, &out, &shape, &scales, &epilogue, partials])
    }
}

/// Slices that sums over so many words of a row of codes are cut into, where the columns of o and down have so many. By two of them few
/// rows of w fill the device: a matrix that L2 does not hold has enough of gates and ups. `rows` are all the matrix's: ranks share none of codes.
pub(super) fn slices(kind: Kind, rows: u32, words: u32, shared: u32) -> u32 {
    match kind {
        Kind::GateUp if !fits_l2(rows, words) => 1,
        Kind::Qkv | Kind::GateUp => words.div_ceil(BLOCK_COLS).min(SLICES_MAX),
        Kind::Residual | Kind::RankSums | Kind::Head | Kind::Linear => shared,
    }
}

fn none(kind: Kind) -> CudaError {
    CudaError::Unsupported(format!("{kind:?} has no kernels for rounded inputs; use --plain-inputs"))
}

/// What rounds so many tokens of so many columns: a block a token where its largest magnitude is that of all its columns, or where blocks are many,
/// so that what is next is on its way while one part is rounded.
fn rounding(cols: u32, tokens: u32, rounding: Rounding) -> Grid {
    let parts = match rounding {
        Rounding::Rows => 1,
        Rounding::Groups(_) | Rounding::Fixed if tokens >= ROUNDED_WHOLE => 1,
        Rounding::Groups(_) | Rounding::Fixed => cols.div_ceil(ROUNDED),
    };
    Grid::new(tokens, ROUNDING_THREADS).rows(parts).dependent()
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::{assert_declared, threads_of};

    #[test]
    fn the_host_and_the_kernels_mean_the_same_by_inputs_and_scales() {
        assert_declared!(
            &["hopper/fp8/fp8_inputs.cu", "epilogue/row_norm.cuh"],
            "Fp8Inputs",
            Fp8Inputs { x, norm, row_norm, codes, scales, fixed, cols, pitch, group, reserved }
        );
        assert_eq!(threads_of(HOPPER, "fp8_inputs"), ROUNDING_THREADS);
        assert_declared!(
            &["hopper/fp8/rounded.cuh"],
            "CodeScales",
            CodeScales { x, w, pitch, groups, shift, reserved }
        );
    }
}
