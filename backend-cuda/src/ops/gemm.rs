//! Matrix products `y[t, m] = sum over k of w[m, k] x[t, k]` with what follows them: launches of `gemm.cu`.
//!
//! ```text
//!   epilogue   y becomes                                               columns summed in
//!   Qkv        queries; keys and values in their pages                 2 slices
//!   Residual   added to the residual stream, with its partial squares  8
//!   GateUp     silu(gate) * up                                         2
//!   Head       f16 logits                                              1
//!   Linear     bf16 rows                                               1
//! ```
//!
//! Invariant: how a sum is cut depends on the matrix alone, never on the number of tokens, so a token's bits are the
//! same in every batch. Which tile a launch gets is chosen here and is a matter of speed only.

use std::ffi::c_void;

use crate::context::Properties;
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher, Param};
use crate::memory::Address;
use crate::module::Modules;
use crate::tensor_map::TensorMap;
use crate::weight::Weight;

/// Columns of a block; slices are whole blocks.
const BLOCK_COLS: u32 = 64;

/// Where a normed row's scale comes from.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RowNorm {
    /// `[tokens, segments]` f32: sums of squares of 64 elements each.
    pub sumsq: Address,
    /// `ceil(hidden / 64)`.
    pub segments: u32,
    /// Width of the rows.
    pub hidden: u32,
    /// Epsilon of the norm.
    pub eps: f32,
}

/// Normed rows times q, k and v: head norms and rope, queries to `q`, keys and values to their pages.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Qkv {
    /// The rows' norm.
    pub norm: RowNorm,
    /// Epsilon of the head norms.
    pub head_eps: f32,
    /// The packed batch.
    pub batch: Address,
    /// `[head_dim]` bf16.
    pub q_norm: Address,
    /// `[head_dim]` bf16.
    pub k_norm: Address,
    /// `[positions, head_dim / 2]` (cos, sin) f32.
    pub rope: Address,
    /// `[tokens, heads * head_dim]` bf16.
    pub q: Address,
    /// `[pages + 1, kv_heads, page_size, head_dim]` bf16, 16-byte chunk c of row t at chunk `c ^ (t % 8)`.
    pub k: Address,
    /// As `k`.
    pub v: Address,
    /// First word of the batch's tokens.
    pub tokens_offset: u32,
    /// Query heads.
    pub heads: u32,
    /// Key heads, and as many value heads.
    pub kv_heads: u32,
    /// 64 or 128.
    pub head_dim: u32,
    /// A page holds `1 << page_shift` tokens.
    pub page_shift: u32,
    /// Makes the struct a multiple of 8 bytes.
    pub reserved: u32,
}

/// Rows added to the residual stream.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Residual {
    /// `[tokens, rows of w]` bf16.
    pub residual: Address,
    /// `[tokens, ceil(rows of w / 64)]` f32: sums of squares of 64 elements of the new residual each.
    pub sumsq: Address,
}

/// Normed rows times gate and up, whose rows take turns in blocks of 8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GateUp {
    /// The rows' norm.
    pub norm: RowNorm,
    /// `[tokens, intermediate]` bf16.
    pub out: Address,
    /// Width of the MLP; the stored matrix may be padded beyond it.
    pub intermediate: u32,
    /// Makes the struct a multiple of 8 bytes.
    pub reserved: u32,
}

/// Logits.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// `[samples, rows of w]` f16, clamped to its range.
    pub out: Address,
}

/// Plain rows.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[tokens, rows of w]` bf16.
    pub out: Address,
}

/// Which epilogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Qkv`].
    Qkv,
    /// [`Residual`].
    Residual,
    /// [`GateUp`].
    GateUp,
    /// [`Head`].
    Head,
    /// [`Linear`].
    Linear,
}

impl Kind {
    /// Slices that a sum over `cols` columns is cut into.
    fn slices(self, cols: u32) -> u32 {
        let wanted = match self {
            Kind::Qkv | Kind::GateUp => 2,
            Kind::Residual => 8,
            Kind::Head | Kind::Linear => 1,
        };
        wanted.min(cols.div_ceil(BLOCK_COLS))
    }
}

/// What a product's sums become.
pub trait Epilogue: Param {
    /// Which it is.
    const KIND: Kind;
}

/// The sizes of a product, as `epilogue.cuh` declares them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: u32,
    cols: u32,
    tokens: u32,
    slices: u32,
}

impl Shape {
    /// How the copy engine fetches both operands' share of a block.
    fn maps(&self, w: Address, x: Address, block: Block) -> Result<[TensorMap; 2], CudaError> {
        let cols = self.cols as usize;
        Ok([
            TensorMap::rows_of_bf16(w, self.rows as usize, cols, block.rows)?,
            TensorMap::rows_of_bf16(x, self.tokens as usize, cols, block.tokens)?,
        ])
    }
}

macro_rules! struct_params {
    ($($type:ty),*) => {$(
        impl Param for $type {
            fn raw(&self) -> (*const c_void, usize) {
                ((self as *const Self).cast(), size_of::<Self>())
            }
        }
    )*};
}
struct_params!(Qkv, Residual, GateUp, Head, Linear, Shape);

macro_rules! epilogues {
    ($($type:ident),*) => {$(
        impl Epilogue for $type {
            const KIND: Kind = Kind::$type;
        }
    )*};
}
epilogues!(Qkv, Residual, GateUp, Head, Linear);

/// The kernels for any GPU.
#[derive(Debug)]
struct Portable {
    /// For few tokens and for many; by [`Kind`].
    kernels: [[Kernel; 2]; 5],
}

impl Portable {
    const TILE_ROWS: u32 = 128;
    const TILE_TOKENS: [u32; 2] = [16, 64];
    const STAGES: u32 = 3;
    const THREADS: u32 = 256;

    fn new(modules: &Modules) -> Result<Portable, CudaError> {
        let find = |name, tokens| modules.kernel("gemm", name, Portable::shared(tokens));
        let pair = |few, many| Ok([find(few, Self::TILE_TOKENS[0])?, find(many, Self::TILE_TOKENS[1])?]);
        let kernels = [
            pair("gemm_qkv_16", "gemm_qkv_64")?,
            pair("gemm_residual_16", "gemm_residual_64")?,
            pair("gemm_gate_up_16", "gemm_gate_up_64")?,
            pair("gemm_head_16", "gemm_head_64")?,
            pair("gemm_linear_16", "gemm_linear_64")?,
        ];
        Ok(Portable { kernels })
    }

    fn shared(tile_tokens: u32) -> u32 {
        Self::STAGES * (Self::TILE_ROWS + tile_tokens) * BLOCK_COLS * 2
    }

    fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        w: Address,
        x: Address,
        shape: &Shape,
        epilogue: &E,
    ) -> Result<(), CudaError> {
        let size = usize::from(shape.tokens > Self::TILE_TOKENS[0]);
        let tile_tokens = Self::TILE_TOKENS[size];
        let grid = Grid::new(shape.rows.div_ceil(Self::TILE_ROWS), Self::THREADS)
            .rows(shape.tokens.div_ceil(tile_tokens))
            .shared(Self::shared(tile_tokens));
        let kernel = &self.kernels[E::KIND as usize][size];
        launcher.launch(kernel, grid, [&w, &x, shape, epilogue])
    }
}

/// What a block of a Hopper kernel works on: rows of w by tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    rows: u32,
    tokens: u32,
}

impl Block {
    const fn new(rows: u32, tokens: u32) -> Block {
        Block { rows, tokens }
    }

    fn stage_bytes(self) -> u32 {
        (self.rows + self.tokens) * BLOCK_COLS * 2
    }

    /// Warpgroups that multiply, and the warp that fetches.
    fn threads(self) -> u32 {
        self.rows * 2 + 32
    }

    /// Shared memory: the ring, two barriers a stage, a scale a token, and what aligns the ring to 1024 bytes.
    fn shared(self, stages: u32) -> u32 {
        stages * (self.stage_bytes() + 16) + self.tokens * 4 + 1024
    }
}

/// Hopper's kernels for few tokens: the slices of a sum are added across a cluster.
#[derive(Debug)]
struct Decode {
    /// By [`Kind`], then as [`Decode::BLOCKS`].
    kernels: [[Kernel; 4]; 4],
}

impl Decode {
    const BLOCKS: [Block; 4] =
        [Block::new(64, 16), Block::new(64, 64), Block::new(64, 128), Block::new(128, 128)];
    /// Two blocks fit a multiprocessor's shared memory.
    const SHARED_MAX: u32 = 112 << 10;
    /// The head's blocks are many and short: more of them side by side hide their ends.
    const SHARED_HEAD: u32 = 56 << 10;

    fn new(modules: &Modules) -> Result<Decode, CudaError> {
        let row = |module, names: [&'static str; 4]| -> Result<[Kernel; 4], CudaError> {
            let find = |name| modules.kernel(module, name, Self::SHARED_MAX);
            Ok([find(names[0])?, find(names[1])?, find(names[2])?, find(names[3])?])
        };
        macro_rules! row {
            ($kind:literal) => {
                row(
                    concat!("gemm_decode_", $kind),
                    [
                        concat!("decode_", $kind, "_64x16"),
                        concat!("decode_", $kind, "_64x64"),
                        concat!("decode_", $kind, "_64x128"),
                        concat!("decode_", $kind, "_128x128"),
                    ],
                )?
            };
        }
        let kernels = [row!("qkv"), row!("residual"), row!("gate_up"), row!("head")];
        Ok(Decode { kernels })
    }

    /// The block for this many tokens, an index into [`Decode::BLOCKS`].
    fn block(tokens: u32) -> usize {
        match tokens {
            0..=16 => 0,
            17..=64 => 1,
            65..=128 => 2,
            _ => 3,
        }
    }

    /// Stages of the ring: as many as a slice has blocks of columns, if they fit.
    fn stages(kind: Kind, block: Block, shape: &Shape) -> u32 {
        let limit = if kind == Kind::Head { Self::SHARED_HEAD } else { Self::SHARED_MAX };
        let fit = (limit - block.shared(0)) / (block.shared(1) - block.shared(0));
        let wanted = shape.cols.div_ceil(BLOCK_COLS).div_ceil(shape.slices);
        // The sums lie over the ring afterwards, and need three stages.
        wanted.min(fit).max(3)
    }

    fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        w: Address,
        x: Address,
        shape: &Shape,
        epilogue: &E,
    ) -> Result<(), CudaError> {
        let size = Self::block(shape.tokens);
        let block = Self::BLOCKS[size];
        let stages = Self::stages(E::KIND, block, shape);
        // A head's 128 rows meet in one cluster.
        let tiles = if E::KIND == Kind::Qkv { 128 / block.rows } else { 1 };
        let cluster = tiles * shape.slices;
        let grid = Grid::new(shape.rows.div_ceil(tiles * block.rows) * cluster, block.threads())
            .rows(shape.tokens.div_ceil(block.tokens))
            .cluster(cluster)
            .shared(block.shared(stages))
            .dependent();
        let [w, x] = shape.maps(w, x, block)?;
        launcher.launch(&self.kernels[E::KIND as usize][size], grid, [&w, &x, shape, &stages, epilogue])
    }
}

/// Hopper's kernels for many tokens: a block a multiprocessor takes tile after tile.
#[derive(Debug)]
struct Prefill {
    /// By [`Kind`].
    kernels: [Kernel; 5],
    multiprocessors: u32,
}

impl Prefill {
    const TILE: Block = Block::new(128, 160);
    const THREADS: u32 = 512;
    /// The ring's 4 stages, the sums of a tile, 10 barriers, and what aligns the ring to 1024 bytes.
    const SHARED: u32 = 4 * (128 + 160) * BLOCK_COLS * 2 + 160 * 130 * 4 + 160 * 4 + 10 * 8 + 1024;

    fn new(modules: &Modules, multiprocessors: u32) -> Result<Prefill, CudaError> {
        let find = |name| modules.kernel("gemm_prefill", name, Self::SHARED);
        let kernels = [
            find("prefill_qkv")?,
            find("prefill_residual")?,
            find("prefill_gate_up")?,
            find("prefill_head")?,
            find("prefill_linear")?,
        ];
        Ok(Prefill { kernels, multiprocessors })
    }

    fn tiles(shape: &Shape) -> u32 {
        shape.rows.div_ceil(Self::TILE.rows) * shape.tokens.div_ceil(Self::TILE.tokens)
    }

    fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        w: Address,
        x: Address,
        shape: &Shape,
        epilogue: &E,
    ) -> Result<(), CudaError> {
        let blocks = Self::tiles(shape).min(self.multiprocessors);
        let grid = Grid::new(blocks, Self::THREADS).shared(Self::SHARED).dependent();
        let [w, x] = shape.maps(w, x, Self::TILE)?;
        launcher.launch(&self.kernels[E::KIND as usize], grid, [&w, &x, shape, epilogue])
    }
}

/// Hopper's kernels.
#[derive(Debug)]
struct Hopper {
    decode: Decode,
    prefill: Prefill,
}

impl Hopper {
    /// Tokens above which tiles that take all columns in turn are quicker than clusters that share them out.
    const DECODE_TOKENS_MAX: u32 = 256;
    /// The same for the head, whose many rows of w fill the device with tiles at once.
    const DECODE_TOKENS_MAX_HEAD: u32 = 64;

    /// Is the kernel for many tokens the quicker one? A product with few rows keeps its cluster until the tiles of tokens
    /// fill the device. A plain product has no other.
    fn is_for_many(&self, kind: Kind, shape: &Shape) -> bool {
        let many = shape.tokens > Self::DECODE_TOKENS_MAX;
        match kind {
            Kind::Linear => true,
            Kind::Head => shape.tokens > Self::DECODE_TOKENS_MAX_HEAD,
            Kind::Residual => many && Prefill::tiles(shape) >= self.prefill.multiprocessors / 2,
            Kind::Qkv | Kind::GateUp => many,
        }
    }
}

/// The kernels.
#[derive(Debug)]
pub struct Gemm {
    portable: Portable,
    hopper: Option<Hopper>,
}

impl Gemm {
    /// Looks up the kernels that the device runs.
    pub fn new(modules: &Modules, properties: &Properties) -> Result<Gemm, CudaError> {
        let hopper = || -> Result<Hopper, CudaError> {
            let prefill = Prefill::new(modules, properties.multiprocessors)?;
            Ok(Hopper { decode: Decode::new(modules)?, prefill })
        };
        let hopper = if properties.hopper { Some(hopper()?) } else { None };
        Ok(Gemm { portable: Portable::new(modules)?, hopper })
    }

    /// Multiplies `tokens` rows `x` `[tokens, columns of w]` bf16 by `w`, whose columns are a multiple of 8.
    pub fn launch<E: Epilogue>(
        &self,
        launcher: &Launcher,
        w: Weight,
        x: Address,
        tokens: u32,
        epilogue: &E,
    ) -> Result<(), CudaError> {
        let (rows, cols) = (w.rows() as u32, w.cols() as u32);
        let shape = Shape { rows, cols, tokens, slices: E::KIND.slices(cols) };
        if tokens == 0 {
            return Ok(());
        }
        let w = w.address();
        let Some(hopper) = &self.hopper else {
            return self.portable.launch(launcher, w, x, &shape, epilogue);
        };
        if hopper.is_for_many(E::KIND, &shape) {
            hopper.prefill.launch(launcher, w, x, &shape, epilogue)
        } else {
            hopper.decode.launch(launcher, w, x, &shape, epilogue)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a block's sums in shared memory: rows padded by 4 floats.
    fn sum_bytes(block: Block) -> u32 {
        block.tokens * (block.rows + 4) * 4
    }

    #[test]
    fn two_decode_blocks_fit_a_multiprocessor_and_the_ring_holds_their_sums() {
        let kinds = [Kind::Qkv, Kind::Residual, Kind::GateUp, Kind::Head];
        let cases = kinds.into_iter().flat_map(|kind| [64, 192, 3072, 17408].map(|cols| (kind, cols)));
        for (kind, cols) in cases {
            let shape = Shape { rows: 1024, cols, tokens: 1, slices: kind.slices(cols) };
            for block in Decode::BLOCKS {
                let stages = Decode::stages(kind, block, &shape);
                assert!(block.shared(stages) <= Decode::SHARED_MAX, "{kind:?}, {cols} columns, {block:?}");
                assert!(
                    sum_bytes(block) <= stages * block.stage_bytes(),
                    "{kind:?}, {cols} columns, {block:?}"
                );
            }
        }
    }

    #[test]
    fn no_slice_is_empty() {
        for kind in [Kind::Qkv, Kind::Residual, Kind::GateUp, Kind::Head, Kind::Linear] {
            for cols in (8u32..4096).step_by(8) {
                assert!(
                    (1..=cols.div_ceil(BLOCK_COLS)).contains(&kind.slices(cols)),
                    "{kind:?}, {cols} columns"
                );
            }
        }
    }
}
