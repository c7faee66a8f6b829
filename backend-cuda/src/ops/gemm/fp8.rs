//! Products with matrices in fp8, whose elements are widened to the bf16 numbers that they mean (`fp8_ring.cuh`).
//!
//! ```text
//!   up to 256 tokens    kernels that widen tiles in registers: half the bytes are read
//!   more                the matrix is widened in memory, then multiplied as any of bf16
//! ```
//!
//! Either way sums are those of a matrix of such numbers, bit by bit.
//!
//! Invariant: the room for a widened matrix holds the largest one, and who multiplies it starts when it is whole.

use super::{BLOCK_COLS, Epilogue, Hopper, Kind, Product, Shape};
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::Address;
use crate::module::Modules;
use crate::param::plain_params;
use crate::tensor_map::TensorMap;
use crate::weight::{Fp8Tiles, Weight};

/// Tokens of a block's tile, for ever more tokens, and most that these kernels take.
const TILES: [u32; 4] = [16, 32, 64, 128];
pub(super) const TOKENS_MAX: u32 = 256;
/// Rows of w of a block.
const ROWS: u32 = Fp8Tiles::ROWS as u32;
/// Warpgroup that multiplies, a warp that fetches and one that computes scales.
const THREADS: u32 = 192;
/// Bytes of shared memory that a block may take: two fit a multiprocessor.
const SHARED: u32 = 112 << 10;
/// Threads of a block that widens a tile in memory.
const WIDENING_THREADS: u32 = 256;

/// A matrix as `fp8_ring.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Fp8Matrix {
    tiles: Address,
    across: u32,
    reserved: u32,
}

plain_params!(Fp8Matrix);

impl Fp8Matrix {
    fn new(w: Weight) -> Fp8Matrix {
        Fp8Matrix { tiles: w.address(), across: w.cols().div_ceil(Fp8Tiles::COLS) as u32, reserved: 0 }
    }
}

/// A block's tile, so many tokens by 64 rows of w, a slice of the columns.
#[derive(Clone, Copy, Debug)]
struct Tile {
    tokens: u32,
    /// Neighbouring tiles of rows that meet in a cluster: a head's 128.
    together: u32,
}

impl Tile {
    fn stage_bytes(self) -> u32 {
        self.tokens * BLOCK_COLS * 2 + Fp8Tiles::BYTES as u32
    }

    /// The ring, two barriers a stage, a scale a token, and what aligns the ring to 1024 bytes.
    fn shared(self, stages: u32) -> u32 {
        stages * (self.stage_bytes() + 16) + self.tokens * 4 + 1024
    }

    /// As many as a slice has blocks of columns, if they fit; the sums lie over them afterwards.
    fn stages(self, shape: &Shape) -> u32 {
        let fit = (SHARED - self.shared(0)) / (self.stage_bytes() + 16);
        let sum_bytes = self.tokens * (ROWS + 4) * 4;
        let wanted = shape.cols.div_ceil(BLOCK_COLS).div_ceil(shape.slices);
        wanted.min(fit).max(sum_bytes.div_ceil(self.stage_bytes()))
    }

    /// Clusters with the same rows of w are neighbours, so that w comes from memory once.
    fn grid(self, shape: &Shape, stages: u32) -> Grid {
        let cluster = self.together * shape.slices;
        Grid::new(shape.tokens.div_ceil(self.tokens) * cluster, THREADS)
            .rows(shape.rows.div_ceil(ROWS).div_ceil(self.together))
            .cluster(cluster)
            .shared(self.shared(stages))
            .dependent()
    }
}

/// The kernels.
#[derive(Debug)]
pub(super) struct Fp8 {
    /// By [`TILES`]: of queries, keys and values those for any model and for [`Epilogue::is_normed`], which keep keys and values in
    /// bf16 and in fp8; of rows that are added; of ranks' sums; of gate and up.
    qkv: [[Kernel; 4]; 4],
    residual: [Kernel; 4],
    sums: [Kernel; 4],
    gate_up: [Kernel; 4],
    widen: Kernel,
    scale: Kernel,
    /// Room for a matrix in bf16, and of how many elements.
    wide: Address,
    room: usize,
}

macro_rules! names {
    ($name:literal) => {
        [
            concat!($name, "_64x16"),
            concat!($name, "_64x32"),
            concat!($name, "_64x64"),
            concat!($name, "_64x128"),
        ]
    };
}

/// Names of the kernels for queries, keys and values, and the module of each.
const QKV: [(&str, [&str; 4]); 4] = [
    ("gemm_fp8_qkv", names!("fp8_qkv")),
    ("gemm_fp8_qkv", names!("fp8_qkv_normed")),
    ("gemm_fp8_qkv_fp8", names!("fp8_qkv_fp8")),
    ("gemm_fp8_qkv_fp8", names!("fp8_qkv_fp8_normed")),
];
const RESIDUAL: [&str; 4] = names!("fp8_residual");
const SUMS: [&str; 4] = names!("fp8_sums");
const GATE_UP: [&str; 4] = names!("fp8_gate_up");

impl Fp8 {
    /// Looks them up. `wide` is room for the largest matrix, of so many elements, in bf16.
    pub(super) fn new(modules: &Modules, wide: Address, room: usize) -> Result<Fp8, CudaError> {
        let load = |module: &'static str, names: [&'static str; 4]| {
            let [a, b, c, d] = names.map(|name| modules.kernel(module, name, SHARED));
            Ok::<_, CudaError>([a?, b?, c?, d?])
        };
        let [a, b, c, d] = QKV.map(|(module, names)| load(module, names));
        Ok(Fp8 {
            qkv: [a?, b?, c?, d?],
            residual: load("gemm_fp8_residual", RESIDUAL)?,
            sums: load("gemm_fp8_sums", SUMS)?,
            gate_up: load("gemm_fp8_gate_up", GATE_UP)?,
            widen: modules.kernel("fp8_weights", "fp8_weights_widen", 0)?,
            scale: modules.kernel("fp8_weights", "fp8_weights_scale", 0)?,
            wide,
            room,
        })
    }

    /// The kernel of a product of few tokens, and its tile.
    fn few<E: Epilogue>(&self, shape: &Shape, epilogue: &E) -> Result<(&Kernel, Tile), CudaError> {
        let index = TILES.iter().position(|tokens| shape.tokens <= *tokens).unwrap_or(TILES.len() - 1);
        let (kernels, together) = match E::KIND {
            Kind::Qkv => {
                (&self.qkv[2 * usize::from(epilogue.is_fp8()) + usize::from(epilogue.is_normed())], 2)
            }
            Kind::Residual => (&self.residual, 1),
            Kind::RankSums => (&self.sums, 1),
            Kind::GateUp => (&self.gate_up, 1),
            Kind::Head | Kind::Linear => {
                return Err(CudaError::Unsupported("the head's matrix is fp8".into()));
            }
        };
        Ok((&kernels[index], Tile { tokens: TILES[index], together }))
    }

    /// Multiplies with `w`, of which the product says no more than its sizes.
    pub(super) fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        hopper: &Hopper,
        w: Weight,
        product: Product<'_, E>,
    ) -> Result<(), CudaError> {
        let Product { shape, x, epilogue, .. } = &product;
        let is_of_layer = !matches!(E::KIND, Kind::Head | Kind::Linear);
        if !is_of_layer || shape.rows as usize * shape.cols as usize > self.room {
            return Err(CudaError::Unsupported(
                "a matrix in fp8 that is none of a layer's, as a head in fp8; use --backend cpu".into(),
            ));
        }
        let matrix = Fp8Matrix::new(w);
        if shape.tokens > TOKENS_MAX {
            let tiles = [matrix.across, shape.rows.div_ceil(ROWS)];
            let grid = Grid::new(tiles[0], WIDENING_THREADS).rows(tiles[1]).dependent();
            launcher.launch(&self.widen, grid, [&matrix, &shape.rows, &shape.cols, &self.wide])?;
            return hopper.prefill.launch(launcher, &Product { w: self.wide, is_fresh: true, ..product });
        }
        let (kernel, tile) = self.few(shape, *epilogue)?;
        let stages = tile.stages(shape);
        let x = TensorMap::rows_of_bf16(x.address, x.there as usize, shape.cols as usize, tile.tokens)?;
        launcher.launch(kernel, tile.grid(shape, stages), [&matrix, &x, shape, &stages, *epilogue])
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
        const ROW_THREADS: u32 = 128;
        let grid = Grid::new(tokens, ROW_THREADS).dependent();
        launcher.launch(&self.scale, grid, [&x, &norm.address(), &(norm.cols() as u32), &out])
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;

    use super::*;
    use crate::declared::{assert_declared, threads_of};

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for name in QKV.into_iter().flat_map(|(_, names)| names).chain(RESIDUAL).chain(SUMS).chain(GATE_UP) {
            assert_eq!(threads_of(HOPPER, name), THREADS, "{name}");
        }
        assert_eq!(threads_of(HOPPER, "fp8_weights_widen"), WIDENING_THREADS);
    }

    #[test]
    fn the_host_and_the_kernels_mean_the_same_by_a_matrix() {
        assert_declared!(&["hopper/fp8_ring.cuh"], "Fp8Matrix", Fp8Matrix { tiles, across, reserved });
    }

    #[test]
    fn a_ring_holds_the_sums_that_lie_over_it_and_two_blocks_fit_a_multiprocessor() {
        for (rows, cols, slices) in [(6144, 4096, 2), (64, 64, 1), (4096, 12_288, 4), (24_576, 4096, 1)] {
            for tokens in TILES {
                let (shape, tile) = (Shape { rows, cols, tokens, slices }, Tile { tokens, together: 1 });
                let stages = tile.stages(&shape);
                assert!(stages * tile.stage_bytes() >= tokens * (ROWS + 4) * 4);
                assert!(tile.shared(stages) <= SHARED, "{shape:?}");
            }
        }
    }
}
