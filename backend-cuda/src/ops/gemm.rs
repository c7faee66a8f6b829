//! Matrix products `y[t, m] = sum over k of w[m, k] x[t, k]` with what follows them: launches of `gemm.cu`.
//!
//! ```text
//!   epilogue   y becomes                                               columns summed in
//!   Qkv        queries; keys and values in their pages                 2 slices
//!   Residual   added to the residual stream, with its partial squares  4
//!   RankSums   f32 sums, of a rank's columns                           4 of all ranks'
//!   GateUp     silu(gate) * up                                         2; 1 of a matrix that L2 does not hold
//!   Head       f16 logits                                              1
//!   Linear     bf16 rows                                               1
//! ```
//!
//! Slices are added in pairs, then pairs of pairs, so that a rank's columns of o and down, which it shares with others, are a whole
//! subtree ([`minisgl_core::shard`]).
//!
//! Invariant: how a sum is cut depends on the matrix alone, never on the number of tokens, so a token's bits are the
//! same in every batch. Which tile a launch gets is chosen here and is a matter of speed only.

mod decode;
mod fp8;
mod prefill;
mod rounded;

use decode::{Decode, Tiling};
use fp8::Fp8;
use prefill::{Prefill, Tile};
use rounded::Rounded;

pub use rounded::Norm;

use super::described::Described;
use minisgl_core::backend::Purpose;
use minisgl_core::shard::{RANKS_MAX, Rank};
use minisgl_core::spec::Inputs;

use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::Address;
use crate::module::Modules;
use crate::param::{Param, plain_params};
use crate::tensor_map::TensorMap;
use crate::weight::{Fp8Codes, Rounding, SLICING, Weight};

/// Columns of a block; slices are whole blocks.
const BLOCK_COLS: u32 = SLICING.block as u32;

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

/// Normed rows times q, k and v: biases, head norms and rope (null where a model has none), queries to `q`, keys and values
/// to their pages.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Qkv {
    /// The rows' norm.
    pub norm: RowNorm,
    /// Epsilon of the head norms.
    pub head_eps: f32,
    /// The packed batch.
    pub batch: Address,
    /// `[rows of w]` bf16, or null.
    pub bias: Address,
    /// `[head_dim]` bf16, or null.
    pub q_norm: Address,
    /// `[head_dim]` bf16, or null.
    pub k_norm: Address,
    /// `[positions, head_dim / 2]` (cos, sin) f32, or null.
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
    /// 1: keys and values are kept in fp8, as `fp8_rows.cuh` says, which Hopper's kernels for few tokens do.
    pub fp8: u32,
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

/// What a rank has of the sums of rows that are added to the residual stream, on its way to whom adds it up.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RankSums {
    /// By rank: where f32 sums for that one go, segments of 64 outputs.
    pub to: [Address; RANKS_MAX as usize],
    /// How many ranks there are, a power of two.
    pub ranks: u32,
    /// Its logarithm.
    pub ranks_log2: u32,
    /// 1: each segment goes to the rank that adds it up; 0: all go to all.
    pub shared: u32,
    /// Makes the struct a multiple of 8 bytes.
    pub reserved: u32,
}

impl RankSums {
    /// All of them to these ranks' memory, or to each its share.
    pub fn new(to: [Address; RANKS_MAX as usize], ranks: u32, shared: bool) -> RankSums {
        RankSums { to, ranks, ranks_log2: ranks.trailing_zeros(), shared: shared.into(), reserved: 0 }
    }

    /// To one place, `[tokens, rows of w]` in whole segments.
    pub fn here(out: Address) -> RankSums {
        let mut to = [Address::NULL; RANKS_MAX as usize];
        to[0] = out;
        RankSums::new(to, 1, false)
    }
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
    /// [`RankSums`].
    RankSums,
    /// [`GateUp`].
    GateUp,
    /// [`Head`].
    Head,
    /// [`Linear`].
    Linear,
}

impl Kind {
    /// Slices that a sum over `cols` columns is cut into, for `rows` rows of w, those of all ranks, which has so many where ranks
    /// share its columns.
    fn slices(self, rows: u32, cols: u32, shared: u32) -> u32 {
        match self {
            // Its rows fill the device, and one sum a thread leaves registers for wider tiles.
            Kind::GateUp if !fits_l2(rows, cols) => 1,
            Kind::Qkv | Kind::GateUp => cols.div_ceil(BLOCK_COLS).min(2),
            Kind::Residual | Kind::RankSums => shared,
            Kind::Head | Kind::Linear => 1,
        }
    }

    /// The most of them that its kernels add.
    fn slices_max(self) -> u32 {
        match self {
            Kind::Residual => SLICING.most,
            Kind::RankSums => SLICING.most / 2,
            Kind::Qkv | Kind::GateUp => 2,
            Kind::Head | Kind::Linear => 1,
        }
    }
}

/// What a product's sums become.
pub trait Epilogue: Param + Copy {
    /// Which it is.
    const KIND: Kind;

    /// Where rows of outputs in 16 bits lie, one a token, and how many outputs a row has, for `rows` rows of w. Keys and values lie
    /// elsewhere.
    fn outputs(&self, rows: u32) -> Option<(Address, u32)>;

    /// Are keys and values kept in fp8?
    fn is_fp8(&self) -> bool {
        false
    }

    /// Are there head norms and rope, and no bias? Few rows have kernels of their own for that (`QkvNormed` in
    /// `epilogue.cuh`).
    fn is_normed(&self) -> bool {
        false
    }
}

/// MiB of the largest matrix that L2 holds beside the activations. `gemm_prefill.cuh` draws the same line.
const L2_MIB: u64 = 24;

fn fits_l2(rows: u32, cols: u32) -> bool {
    u64::from(rows) * u64::from(cols) * 2 <= L2_MIB << 20
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
    /// A rank's part of gate and up counts as what it is of, by which its sums are cut.
    fn fits_l2(&self, kind: Kind) -> bool {
        match kind {
            Kind::GateUp => self.slices > 1 || self.cols <= BLOCK_COLS,
            _ => fits_l2(self.rows, self.cols),
        }
    }
}

plain_params!(Qkv, Residual, RankSums, GateUp, Head, Linear, Shape);

/// Rows of activations in memory, `[there, columns of w]` bf16, whose first ones a product takes. Of those behind them it reads
/// what its last tile has places for, and nothing comes of that: the copy engine is quicker to fetch a row that is there than to
/// make up zeros for one that is not.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Where the first begins.
    pub address: Address,
    /// How many there are.
    pub there: u32,
}

/// What a kernel may take of each SM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmShare {
    /// All of it.
    Whole,
    /// Half of it, because something runs beside the kernel.
    Half,
}

/// A product to be launched.
#[derive(Debug)]
struct Product<'a, E> {
    w: Address,
    /// The kernel before writes w.
    is_fresh: bool,
    x: Rows,
    shape: Shape,
    share: SmShare,
    epilogue: &'a E,
}

impl<E: Epilogue> Product<'_, E> {
    /// How the copy engine fetches both operands' share of a block.
    fn maps(&self, block: Block) -> Result<[TensorMap; 2], CudaError> {
        let (Shape { rows, cols, .. }, Rows { address, there }) = (self.shape, self.x);
        Ok([
            TensorMap::rows_of_bf16(self.w, rows as usize, cols as usize, block.rows)?,
            TensorMap::rows_of_bf16(address, there as usize, cols as usize, block.tokens)?,
        ])
    }
}

impl Epilogue for Qkv {
    const KIND: Kind = Kind::Qkv;

    fn outputs(&self, _: u32) -> Option<(Address, u32)> {
        Some((self.q, self.heads * self.head_dim))
    }

    fn is_fp8(&self) -> bool {
        self.fp8 != 0
    }

    fn is_normed(&self) -> bool {
        let there = [self.q_norm, self.k_norm, self.rope];
        self.bias == Address::NULL && there.into_iter().all(|pointer| pointer != Address::NULL)
    }
}

impl Epilogue for Residual {
    const KIND: Kind = Kind::Residual;

    fn outputs(&self, rows: u32) -> Option<(Address, u32)> {
        Some((self.residual, rows))
    }
}

impl Epilogue for RankSums {
    const KIND: Kind = Kind::RankSums;

    fn outputs(&self, _: u32) -> Option<(Address, u32)> {
        None
    }
}

impl Epilogue for GateUp {
    const KIND: Kind = Kind::GateUp;

    fn outputs(&self, _: u32) -> Option<(Address, u32)> {
        Some((self.out, self.intermediate))
    }
}

impl Epilogue for Head {
    const KIND: Kind = Kind::Head;

    fn outputs(&self, rows: u32) -> Option<(Address, u32)> {
        Some((self.out, rows))
    }
}

impl Epilogue for Linear {
    const KIND: Kind = Kind::Linear;

    fn outputs(&self, rows: u32) -> Option<(Address, u32)> {
        Some((self.out, rows))
    }
}

/// The kernels for any GPU.
#[derive(Debug)]
struct Portable {
    /// For few tokens and for many; by [`Kind`].
    kernels: [[Kernel; 2]; 6],
}

impl Portable {
    const TILE_ROWS: u32 = 128;
    const TILE_TOKENS: [u32; 2] = [16, 64];
    const STAGES: u32 = 3;
    const THREADS: u32 = 256;

    fn new(modules: &Modules) -> Result<Portable, CudaError> {
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

    fn launch<E: Epilogue>(&self, launcher: &Launcher, product: &Product<'_, E>) -> Result<(), CudaError> {
        let Product { w, x, shape, epilogue, .. } = product;
        let kernel = &self.kernels[E::KIND as usize][Self::size(shape)];
        launcher.launch(kernel, Self::grid(shape), [w, &x.address, shape, *epilogue])
    }

    fn explained(kind: Kind, shape: &Shape) -> Explained {
        let (rows, tokens) = (Self::TILE_ROWS, Self::TILE_TOKENS[Self::size(shape)]);
        let slices = shape.slices;
        Explained {
            kernel: Self::names(kind)[Self::size(shape)],
            grid: Self::grid(shape),
            work: format!("a block: {rows} rows of w, {tokens} tokens, all columns in {slices} slices"),
        }
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
}

/// Hopper's kernels.
#[derive(Debug)]
struct Hopper {
    decode: Decode,
    prefill: Prefill,
}

impl Hopper {
    fn launch<E: Epilogue>(&self, launcher: &Launcher, product: &Product<'_, E>) -> Result<(), CudaError> {
        match self.decode.tiling(E::KIND, &product.shape, product.share) {
            Some(tiling) => Decode::launch(tiling, launcher, product),
            None if product.epilogue.is_fp8() => {
                Err(CudaError::Unsupported("products of many tokens store no fp8 keys and values".into()))
            }
            None => self.prefill.launch(launcher, product),
        }
    }
}

/// What a product is launched as, and what of it a block does.
pub(super) struct Explained {
    pub(super) kernel: &'static str,
    pub(super) grid: Grid,
    pub(super) work: String,
}

/// What decides about a product's kernel beside its sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    /// See [`Epilogue::is_normed`].
    pub(super) normed: bool,
    /// Are keys and values kept in fp8?
    pub(super) kv_fp8: bool,
    /// Is the matrix, and its inputs as they are?
    pub(super) weights_fp8: bool,
    /// How many ranks have parts of it.
    pub(super) ranks: u32,
}

/// What a product of a rank's `[rows, cols]` with so many tokens is launched as on a device.
pub(super) fn explained(
    device: &Described,
    kind: Kind,
    [rows, cols, tokens]: [u32; 3],
    share: SmShare,
    form: Form,
) -> Option<Explained> {
    let shared = Rank { index: 0, count: form.ranks }.slices(cols as usize, SLICING);
    let slices = kind.slices(rows * form.ranks, cols, shared);
    let shape = Shape { rows, cols, tokens, slices };
    if !device.hopper {
        return Some(Portable::explained(kind, &shape));
    }
    let few = match form.weights_fp8 {
        true => fp8::explained(kind, &shape, form),
        false => Tiling::explained(kind, &shape, share, form),
    };
    few.or_else(|| Tile::explained(kind, &shape, device.clusters))
}

/// What rounds the inputs of a product with a matrix of codes, and what that is launched as.
pub(super) fn explained_rounded(
    device: &Described,
    kind: Kind,
    [rows, cols, tokens]: [u32; 3],
    inputs: Inputs,
) -> Option<[Explained; 2]> {
    let words = cols / 2;
    let layout = Fp8Codes { rows: rows as usize, cols: cols as usize };
    let slices = kind.slices(rows, words, layout.slices());
    let shape = Shape { rows, cols: words, tokens, slices };
    rounded::explained(kind, &shape, Rounding::of(inputs)?, device.clusters)
}

/// How many blocks widen a matrix of `[rows, cols]` in fp8 for so many tokens, if they are too many for kernels that do it.
pub(super) fn widening(rows: u32, cols: u32, tokens: u32) -> Option<Grid> {
    (tokens > fp8::TOKENS_MAX).then(|| fp8::widening(rows, cols))
}

/// What multiplies so many tokens with a norm's scale, for matrices in fp8.
pub(super) fn scaling(tokens: u32) -> Grid {
    fp8::scaling(tokens)
}

/// Do Hopper's products of queries, keys and values keep these in fp8 by themselves?
pub(super) fn keeps_fp8([rows, cols, tokens]: [u32; 3], share: SmShare, weights_fp8: bool) -> bool {
    let shape = Shape { rows, cols, tokens, slices: Kind::Qkv.slices(rows, cols, 1) };
    match weights_fp8 {
        true => tokens <= fp8::TOKENS_MAX,
        false => Tiling::there_is(Kind::Qkv, &shape, share),
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
    /// For matrices in fp8, once [`Gemm::reserve_fp8`] made room.
    fp8: Option<Fp8>,
    /// For those whose inputs are rounded, once [`Gemm::reserve_rounded`] did.
    rounded: Option<Rounded>,
    /// That have the other rows of gate and up.
    ranks: u32,
}

impl Gemm {
    /// Looks up the kernels that the device runs, and takes memory for sums that are split.
    pub fn new(cuda: &mut Cuda) -> Result<Gemm, CudaError> {
        let set = if cuda.properties().hopper {
            let prefill = Prefill::new(cuda)?;
            Set::Hopper(Box::new(Hopper { decode: Decode::new(cuda.modules())?, prefill }))
        } else {
            Set::Portable(Box::new(Portable::new(cuda.modules())?))
        };
        Ok(Gemm { set, fp8: None, rounded: None, ranks: cuda.rank().count })
    }

    /// Looks up the kernels for matrices in fp8, and takes memory for one of so many elements in bf16.
    pub fn reserve_fp8(&mut self, cuda: &mut Cuda, elements: usize) -> Result<(), CudaError> {
        let wide = cuda.allocate(Purpose::Scratch, elements * 2)?;
        self.fp8 = Some(Fp8::new(cuda.modules(), wide, elements)?);
        Ok(())
    }

    /// Looks up the kernels for matrices in fp8 whose inputs are rounded, and takes memory for `tokens` rows of these, of at most
    /// `width` columns.
    pub fn reserve_rounded(&mut self, cuda: &mut Cuda, tokens: usize, width: usize) -> Result<(), CudaError> {
        self.rounded = Some(Rounded::new(cuda, tokens, width)?);
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
        let slices = E::KIND.slices(rows * self.ranks, cols, w.slices());
        let shape = Shape { rows, cols, tokens, slices };
        if tokens == 0 {
            return Ok(());
        }
        let most = E::KIND.slices_max().min(cols.div_ceil(BLOCK_COLS));
        if !slices.is_power_of_two() || slices > most {
            return Err(CudaError::Slices { cols, slices, most });
        }
        let product = Product { w: w.address(), is_fresh: false, x, shape, share, epilogue };
        match &self.set {
            Set::Hopper(hopper) if w.codes().is_some() => {
                let rounded = self.rounded.as_ref().ok_or(CudaError::NotReserved)?;
                rounded.launch(launcher, &hopper.prefill.partials, w, &product)
            }
            Set::Hopper(hopper) if w.is_fp8() => {
                let fp8 = self.fp8.as_ref().ok_or(CudaError::NotReserved)?;
                fp8.launch(launcher, hopper, w, product)
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

#[cfg(test)]
mod tests {
    use minisgl_kernels::PORTABLE;

    use super::*;
    use crate::declared::{assert_declared, source, threads_of};

    #[test]
    fn parameters_have_the_fields_that_the_kernels_declare() {
        let files = &["epilogue.cuh"];
        assert_declared!(files, "RowNorm", RowNorm { sumsq, segments, hidden, eps });
        assert_declared!(
            files,
            "QkvOf",
            Qkv {
                norm,
                head_eps,
                batch,
                bias,
                q_norm,
                k_norm,
                rope,
                q,
                k,
                v,
                tokens_offset,
                heads,
                kv_heads,
                head_dim,
                page_shift,
                fp8,
            }
        );
        assert_declared!(files, "Residual", Residual { residual, sumsq });
        assert_declared!(files, "RankSums", RankSums { to, ranks, ranks_log2, shared, reserved });
        assert_declared!(files, "GateUp", GateUp { norm, out, intermediate, reserved });
        assert_declared!(files, "Head", Head { out });
        assert_declared!(files, "Linear", Linear { out });
        assert_declared!(files, "Shape", Shape { rows, cols, tokens, slices });
    }

    #[test]
    fn both_sides_think_the_same_matrices_fit_l2() {
        let line = format!("(size_t)shape.rows * shape.cols * 2 <= {L2_MIB}u << 20");
        assert!(source("hopper/gemm_prefill.cuh").contains(&line));
    }

    #[test]
    fn portable_kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        for kind in [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head, Kind::Linear] {
            for name in Portable::names(kind) {
                assert_eq!(threads_of(PORTABLE, name), Portable::THREADS, "{name}");
            }
        }
    }

    #[test]
    fn no_slice_is_empty() {
        for kind in [Kind::Qkv, Kind::Residual, Kind::GateUp, Kind::Head, Kind::Linear] {
            for cols in (8u32..4096).step_by(8) {
                for rows in [128, 1024, 32_768] {
                    let slices = kind.slices(rows, cols, SLICING.slices(cols as usize));
                    let blocks = cols.div_ceil(BLOCK_COLS).min(kind.slices_max());
                    assert!((1..=blocks).contains(&slices), "{kind:?}, {rows} x {cols}");
                    assert!(slices.is_power_of_two(), "{kind:?}, {rows} x {cols}");
                }
            }
        }
    }
}
