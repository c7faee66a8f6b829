//! Products with matrices in fp8, whose elements are widened to the bf16 numbers that they mean (`fp8_ring.cuh`).
//!
//! ```text
//!   up to 256 tokens    kernels that widen tiles in registers: half the bytes are read
//!   more                the matrix is widened in memory, then multiplied as any of bf16
//! ```
//!
//! Either way sums are those of a matrix of such numbers, bit by bit.
//!
//! Invariant: the memory for a widened matrix holds the largest one, and who multiplies it starts when it is whole.

use std::array;

use super::epilogue::{Epilogue, Kind};
use super::few::Tiling;
use super::many::Many;
use super::product::{Block, Explained, Form, Product};
use super::ring::{Ring, Sliced};
use super::shape::Shape;
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::Address;
use crate::module::Modules;
use crate::param::plain_params;
use crate::tensor_map::TensorMap;
use crate::weight::{Fp8Tiles, Weight};

/// The most tokens that these kernels take.
pub(super) const TOKENS_MAX: u32 = 256;
/// Rows of w of a warpgroup.
const ROWS: u32 = Fp8Tiles::ROWS as u32;
/// Threads of a block that widens a tile in memory, and of one that multiplies a token with a norm's scale.
const WIDENING_THREADS: u32 = 256;
const SCALING_THREADS: u32 = 128;

/// A matrix as `fp8_ring.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Fp8Matrix {
    tiles: Address,
    across: u32,
    down: u32,
}

plain_params!(Fp8Matrix);

impl Fp8Matrix {
    fn new(w: Weight) -> Fp8Matrix {
        let across = w.cols().div_ceil(Fp8Tiles::COLS) as u32;
        let down = (w.rows().next_multiple_of(2 * Fp8Tiles::ROWS) / Fp8Tiles::ROWS) as u32;
        Fp8Matrix { tiles: w.address(), across, down }
    }
}

/// Tokens of a block's tile, for ever more tokens. Not every matrix takes the last.
const TOKENS: [u32; 5] = [16, 32, 64, 128, 192];
/// Tiles of the others, more tokens being several of the last.
const OTHERS: usize = 4;

/// The block of tile `index` of tokens, with 64 rows of w for each of its warpgroups: the more rows, the less often tokens are fetched
/// from L2, and the more warps widen.
fn tile(kind: Kind, index: usize) -> Sliced {
    let tokens = TOKENS[index];
    let (groups, alone) = match (kind, tokens) {
        // Rows of gate and up are many: blocks of 192 are enough for all multiprocessors, and those of 128 more than a round.
        (Kind::GateUp, 128) => (3, true),
        // Those of o and down are few.
        (Kind::Residual | Kind::RankSums, 128) => (1, false),
        (Kind::Qkv, 64..) | (_, 192..) => (2, true),
        _ => (2, false),
    };
    let block = Block::new(groups * ROWS, tokens);
    Sliced { ring: Ring::with_w(block, groups * Fp8Tiles::BYTES as u32), alone, spread: false }
}

/// Which tile of tokens a product takes. 129 to 192 are one where its blocks are done at once and those of two tiles are not, or are of half
/// as many rows, for which tokens are fetched from L2 twice as often.
fn index(kind: Kind, shape: &Shape) -> usize {
    let blocks = shape.rows.div_ceil(2 * ROWS) * shape.slices;
    let is_one = match kind {
        Kind::Qkv => (Tiling::SINGLE / 2 + 1..=Tiling::SINGLE).contains(&blocks),
        Kind::Residual | Kind::RankSums => blocks <= Tiling::SINGLE,
        _ => false,
    };
    let tiles = if is_one { &TOKENS[..] } else { &TOKENS[..OTHERS] };
    tiles.iter().position(|tile| shape.tokens <= *tile).unwrap_or(OTHERS - 1)
}

/// The kernels.
#[derive(Debug)]
pub(super) struct Fp8 {
    /// By [`TOKENS`]: of queries, keys and values those for any model and for [`Epilogue::is_normed`], which keep keys and values in
    /// bf16 and in fp8; of rows that are added; of ranks' sums; of gate and up.
    qkv: [[Kernel; TOKENS.len()]; 4],
    residual: [Kernel; TOKENS.len()],
    sums: [Kernel; TOKENS.len()],
    gate_up: [Kernel; OTHERS],
    widen: Kernel,
    scale: Kernel,
    /// Where a matrix is widened, and of how many elements.
    wide: Address,
    wide_elements: usize,
}

macro_rules! names {
    ($name:literal) => {
        [
            concat!($name, "_128x16"),
            concat!($name, "_128x32"),
            concat!($name, "_128x64"),
            concat!($name, "_128x128"),
            concat!($name, "_128x192"),
        ]
    };
}

/// Names of the kernels for queries, keys and values, and the module of each.
const QKV: [(&str, [&str; TOKENS.len()]); 4] = [
    ("gemm_fp8_qkv", names!("fp8_qkv")),
    ("gemm_fp8_qkv", names!("fp8_qkv_normed")),
    ("gemm_fp8_qkv_fp8", names!("fp8_qkv_fp8")),
    ("gemm_fp8_qkv_fp8", names!("fp8_qkv_fp8_normed")),
];
const RESIDUAL: [&str; TOKENS.len()] = [
    "fp8_residual_128x16",
    "fp8_residual_128x32",
    "fp8_residual_128x64",
    "fp8_residual_64x128",
    "fp8_residual_128x192",
];
const SUMS: [&str; TOKENS.len()] =
    ["fp8_sums_128x16", "fp8_sums_128x32", "fp8_sums_128x64", "fp8_sums_64x128", "fp8_sums_128x192"];
const GATE_UP: [&str; OTHERS] =
    ["fp8_gate_up_128x16", "fp8_gate_up_128x32", "fp8_gate_up_128x64", "fp8_gate_up_192x128"];

impl Fp8 {
    /// Looks them up. `wide` takes the largest matrix, of so many elements, in bf16.
    pub(super) fn new(modules: &Modules, wide: Address, wide_elements: usize) -> Result<Fp8, CudaError> {
        let load = |kind: Kind, module: &'static str, index: usize, name: &'static str| {
            modules.kernel(module, name, tile(kind, index).shared_max())
        };
        let all = |kind: Kind, (module, names): (&'static str, [&'static str; TOKENS.len()])| {
            let [a, b, c, d, e] = array::from_fn(|index| load(kind, module, index, names[index]));
            Ok::<_, CudaError>([a?, b?, c?, d?, e?])
        };
        let [a, b, c, d] = QKV.map(|qkv| all(Kind::Qkv, qkv));
        let [e, f, g, h] =
            array::from_fn(|index| load(Kind::GateUp, "gemm_fp8_gate_up", index, GATE_UP[index]));
        Ok(Fp8 {
            qkv: [a?, b?, c?, d?],
            residual: all(Kind::Residual, ("gemm_fp8_residual", RESIDUAL))?,
            sums: all(Kind::RankSums, ("gemm_fp8_sums", SUMS))?,
            gate_up: [e?, f?, g?, h?],
            widen: modules.kernel("fp8_weights", "fp8_weights_widen", 0)?,
            scale: modules.kernel("fp8_weights", "fp8_weights_scale", 0)?,
            wide,
            wide_elements,
        })
    }

    /// The kernel of a product of few tokens, and its tile.
    fn few<E: Epilogue>(&self, shape: &Shape, epilogue: &E) -> Result<(&Kernel, Sliced), CudaError> {
        let index = index(E::KIND, shape);
        let kernels: &[Kernel] = match E::KIND {
            Kind::Qkv => &self.qkv[2 * usize::from(epilogue.is_fp8()) + usize::from(epilogue.is_normed())],
            Kind::Residual => &self.residual,
            Kind::RankSums => &self.sums,
            Kind::GateUp => &self.gate_up,
            Kind::Head | Kind::Linear => {
                return Err(CudaError::Unsupported("the head's matrix is fp8".into()));
            }
        };
        Ok((&kernels[index], tile(E::KIND, index)))
    }

    /// Multiplies with `w`, of which the product says no more than its sizes.
    pub(super) fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        many: &Many,
        w: Weight,
        product: Product<'_, E>,
    ) -> Result<(), CudaError> {
        let Product { shape, x, epilogue, .. } = &product;
        let is_of_layer = !matches!(E::KIND, Kind::Head | Kind::Linear);
        if !is_of_layer || shape.rows as usize * shape.cols as usize > self.wide_elements {
            return Err(CudaError::Unsupported(
                "a matrix in fp8 that is none of a layer's, as a head in fp8; use --backend cpu".into(),
            ));
        }
        let matrix = Fp8Matrix::new(w);
        if shape.tokens > TOKENS_MAX {
            let grid = widening(shape.rows, shape.cols);
            launcher.launch(&self.widen, grid, [&matrix, &shape.rows, &shape.cols, &self.wide])?;
            return many.launch(launcher, &Product { w: self.wide, is_fresh: true, ..product });
        }
        let (kernel, tile) = self.few(shape, *epilogue)?;
        let stages = tile.stages(shape);
        let tokens = tile.ring.block.tokens;
        let x = TensorMap::rows_of_bf16(x.address, x.there as usize, shape.cols as usize, tokens)?;
        launcher.launch(kernel, tile.grid(shape), [&matrix, &x, shape, &stages, *epilogue])
    }

    /// `out[t, c] = x[t, c] * norm[c]` for so many tokens: a norm's scale, which can't be folded into codes.
    pub(super) fn scale(
        &self,
        launcher: &Launcher,
        x: Address,
        norm: Weight,
        tokens: u32,
        out: Address,
    ) -> Result<(), CudaError> {
        launcher.launch(&self.scale, scaling(tokens), [&x, &norm.address(), &(norm.cols() as u32), &out])
    }
}

/// What widens a matrix in memory.
pub(super) fn widening(rows: u32, cols: u32) -> Grid {
    Grid::new(cols.div_ceil(Fp8Tiles::COLS as u32), WIDENING_THREADS).rows(rows.div_ceil(ROWS)).dependent()
}

/// What multiplies so many tokens with a norm's scale.
pub(super) fn scaling(tokens: u32) -> Grid {
    Grid::new(tokens, SCALING_THREADS).dependent()
}

/// What a product of few tokens is launched as.
pub(super) fn explained(kind: Kind, shape: &Shape, form: Form) -> Option<Explained> {
    let index = index(kind, shape);
    let kernel = match kind {
        Kind::Qkv => QKV[2 * usize::from(form.kv_fp8) + usize::from(form.normed)].1[index],
        Kind::Residual => RESIDUAL[index],
        Kind::RankSums => SUMS[index],
        Kind::GateUp => GATE_UP[index],
        Kind::Head | Kind::Linear => return None,
    };
    (shape.tokens <= TOKENS_MAX).then(|| tile(kind, index).explained(kernel, shape))
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::{assert_declared, threads_of};

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        let of_kind = |kind, names: &'static [&'static str]| {
            (0..).zip(names).map(move |(i, name)| (tile(kind, i).ring, *name))
        };
        let qkv = QKV.iter().flat_map(|(_, names)| of_kind(Kind::Qkv, names));
        let added = of_kind(Kind::Residual, &RESIDUAL).chain(of_kind(Kind::RankSums, &SUMS));
        for (ring, name) in qkv.chain(added).chain(of_kind(Kind::GateUp, &GATE_UP)) {
            assert_eq!(threads_of(HOPPER, name), ring.threads(), "{name}");
            assert!(name.ends_with(&format!("_{}x{}", ring.block.rows, ring.block.tokens)), "{name}");
        }
        assert_eq!(threads_of(HOPPER, "fp8_weights_widen"), WIDENING_THREADS);
        assert_eq!(threads_of(HOPPER, "fp8_weights_scale"), SCALING_THREADS);
    }

    #[test]
    fn the_host_and_the_kernels_mean_the_same_by_a_matrix() {
        assert_declared!(&["hopper/fp8/fp8_ring.cuh"], "Fp8Matrix", Fp8Matrix { tiles, across, down });
    }

    #[test]
    fn a_ring_holds_the_sums_that_lie_over_it_and_blocks_fit_a_multiprocessor() {
        for (rows, cols, slices) in [(6144, 4096, 2), (64, 64, 1), (4096, 12_288, 4), (24_576, 4096, 1)] {
            for (index, tokens) in TOKENS.into_iter().enumerate() {
                let kinds = [Kind::Qkv, Kind::Residual, Kind::GateUp];
                for kind in kinds.into_iter().take(if index < OTHERS { 3 } else { 2 }) {
                    let (shape, tile) = (Shape { rows, cols, tokens, slices }, tile(kind, index));
                    assert!(tile.ring.holds(tile.stages(&shape), tile.shared_max()), "{shape:?}");
                }
            }
        }
    }
}
