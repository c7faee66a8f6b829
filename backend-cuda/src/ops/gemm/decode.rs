//! Launches of `gemm_decode.cuh`'s and `gemm_pair.cuh`'s kernels: products of few tokens.
//!
//! ```text
//!   tokens         a block's work                          blocks that work together
//!   up to 64       64 rows of w, a slice of the columns    a cluster has all slices
//!   65 to 256      qkv, gate and up: all columns           two or three with neighbouring tokens fetch w for each other
//!                  o, down: a slice of the columns, or two  a cluster has all slices; of a rank's sums two have neighbouring
//!                                                           tokens too, and fetch w for each other
//! ```
//!
//! Matrices that L2 does not hold have tilings of their own, and so have products that leave half of each multiprocessor to
//! others.
//!
//! Invariant: a block's shared memory is what its tiling allows, and its sums fit the ring that they lie over.

use super::epilogue::{Epilogue, Kind};
use super::product::{Block, Explained, Form, Product, SmShare};
use super::shape::{BLOCK_COLS, Shape};
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::module::Modules;

impl Block {
    fn stage_bytes(self) -> u32 {
        (self.rows + self.tokens) * BLOCK_COLS * 2
    }

    /// Bytes of the sums of a slice: rows padded by 4 floats.
    fn sum_bytes(self) -> u32 {
        self.tokens * (self.rows + 4) * 4
    }

    /// Warpgroups that multiply, the warp that fetches and the one that computes scales.
    fn threads(self) -> u32 {
        self.rows * 2 + 64
    }

    /// Shared memory: the ring, two barriers a stage, a scale a token, and what aligns the ring to 1024 bytes.
    fn shared(self, stages: u32) -> u32 {
        stages * (self.stage_bytes() + 16) + self.tokens * 4 + 1024
    }
}

/// How blocks of a decode product work together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Team {
    /// A cluster shares out the slices of the sum, of this many neighbouring row tiles.
    Slices { tiles: u32 },
    /// So many blocks with neighbouring tiles of tokens fetch w together; each has the whole sum.
    Tokens { blocks: u32 },
}

/// The kernels of a tile of queries, keys and values: for any model and for [`Epilogue::is_normed`], with keys and values in bf16
/// and in fp8.
macro_rules! qkv {
    ($team:literal, $tile:literal) => {
        [
            [concat!($team, "_qkv_", $tile), concat!($team, "_qkv_normed_", $tile)],
            [concat!($team, "_qkv_fp8_", $tile), concat!($team, "_qkv_fp8_normed_", $tile)],
        ]
    };
}

/// A decode kernel and the launches it is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    kernel: &'static str,
    /// The kernel for [`Epilogue::is_normed`], where that is another one.
    normed: Option<&'static str>,
    /// Both for [`Epilogue::is_fp8`], of a module of their own.
    fp8: Option<[&'static str; 2]>,
    block: Block,
    team: Team,
    /// Quickest up to this many tokens,
    tokens_max: u32,
    /// up to so many blocks: where more are needed, larger ones are quicker;
    blocks_max: u32,
    /// from so many on: of fewer, whose tiles are large, the multiprocessors that are left idle cost more than the tiles save;
    blocks_min: u32,
    /// from so many columns on: of fewer, the way to the first ones and the sums' exchange are most of a block's time, and two
    /// blocks a multiprocessor hide each other's;
    cols_min: u32,
    /// and up to so many: of more, clusters that split the sum in memory are quicker.
    cols_max: u32,
    /// Slices that a block sums: one, or a pair.
    own: u32,
    /// Do two blocks with neighbouring tiles of tokens, and a slice in common, fetch w for each other?
    paired: bool,
    /// Bytes of shared memory that a block may take.
    shared: u32,
}

impl Tiling {
    /// Two blocks fit a multiprocessor's shared memory.
    const HALF: u32 = 112 << 10;
    /// One block does. Of a matrix that L2 holds, more bytes on their way are a loss.
    const MOST: u32 = 162 << 10;
    /// All that a block can have.
    const ALL: u32 = 227 << 10;
    /// The head's blocks are many and short: more of them side by side hide their ends.
    const QUARTER: u32 = 56 << 10;
    /// Blocks that an H100 takes at once in clusters of four, which leave some multiprocessors free: one each, and two thirds of that;
    /// one and a half; two.
    const ONE_EACH: u32 = 120;
    const MANY: u32 = 80;
    const SOME_TWO: u32 = 198;
    const TWO_EACH: u32 = 240;
    /// The same, of other blocks.
    const SINGLE: u32 = 132;
    const TWO_SINGLE: u32 = 264;
    const MANY_COLUMNS: u32 = 8192;
    const FEW_COLUMNS: u32 = 4096;

    /// Tiles of so many rows of w by so many tokens, for up to `tokens_max`; the ring has as many stages as fit `shared`, or as a
    /// block needs. Those below say no more than what differs.
    const fn slices(kernel: &'static str, rows: u32, tokens: u32, tokens_max: u32, shared: u32) -> Tiling {
        Tiling {
            kernel,
            normed: None,
            fp8: None,
            block: Block::new(rows, tokens),
            team: Team::Slices { tiles: 1 },
            tokens_max,
            blocks_max: u32::MAX,
            blocks_min: 0,
            cols_min: 0,
            cols_max: u32::MAX,
            own: 1,
            paired: false,
            shared,
        }
    }

    /// A rank's sums of one slice, with a neighbour that has the next tokens.
    const fn sums_paired(kernel: &'static str, rows: u32, tokens: u32, tokens_max: u32) -> Tiling {
        Tiling { paired: true, ..Self::slices(kernel, rows, tokens, tokens_max, Self::ALL) }
            .up_to(Self::ONE_EACH)
    }

    /// The same for launches of few blocks.
    const fn up_to(self, blocks_max: u32) -> Tiling {
        Tiling { blocks_max, ..self }
    }

    /// And of more than a few.
    const fn from(self, blocks_min: u32) -> Tiling {
        Tiling { blocks_min, ..self }
    }

    /// The same for matrices of many columns, as down's are.
    const fn of_many_columns(self) -> Tiling {
        Tiling { cols_min: Self::MANY_COLUMNS, ..self }
    }

    /// The same for matrices of few columns, as o's are, by blocks that sum two slices each.
    const fn of_two_slices(self) -> Tiling {
        Tiling { own: 2, cols_max: Self::FEW_COLUMNS, ..self }
    }

    /// A head's 128 rows meet in one cluster.
    const fn heads(kernels: [[&'static str; 2]; 2], tokens: u32, tokens_max: u32) -> Tiling {
        let (team, shared) = (Team::Slices { tiles: 2 }, Self::HALF);
        let [[kernel, normed], fp8] = kernels;
        let tiling = Tiling::slices(kernel, 64, tokens, tokens_max, shared);
        Tiling { normed: Some(normed), fp8: Some(fp8), team, ..tiling }
    }

    const fn pair(kernel: &'static str, rows: u32, tokens: u32, tokens_max: u32, shared: u32) -> Tiling {
        Tiling {
            team: Team::Tokens { blocks: 2 },
            ..Tiling::slices(kernel, rows, tokens, tokens_max, shared)
        }
    }

    /// A pair of blocks of two whole heads.
    const fn head_pair(kernels: [[&'static str; 2]; 2], tokens: u32, tokens_max: u32, shared: u32) -> Tiling {
        let [[kernel, normed], fp8] = kernels;
        let tiling = Self::pair(kernel, 128, tokens, tokens_max, shared);
        Tiling { normed: Some(normed), fp8: Some(fp8), ..tiling }
    }

    /// Three such blocks, for matrices of so few heads that there is room for all of them at once.
    const fn head_trio(kernels: [[&'static str; 2]; 2], tokens: u32, tokens_max: u32) -> Tiling {
        let team = Team::Tokens { blocks: 3 };
        Tiling { team, ..Self::head_pair(kernels, tokens, tokens_max, Self::ALL) }.up_to(Self::ONE_EACH)
    }

    /// Tilings of a kind, for ever more tokens, where w fits L2. The first that suits is taken.
    fn of(kind: Kind) -> &'static [Tiling] {
        const QKV: &[Tiling] = &[
            Tiling::heads(qkv!("decode", "64x16"), 16, 16),
            Tiling::heads(qkv!("decode", "64x32"), 32, 32),
            Tiling::heads(qkv!("decode", "64x48"), 48, 48),
            Tiling::heads(qkv!("decode", "64x64"), 64, 64),
            Tiling::head_pair(qkv!("pair", "128x32"), 32, 128, Tiling::MOST),
            Tiling::head_pair(qkv!("pair", "128x64"), 64, 256, Tiling::MOST),
        ];
        const RESIDUAL: &[Tiling] = &[
            Tiling::slices("decode_residual_64x16", 64, 16, 16, Tiling::HALF),
            Tiling::slices("decode_residual_64x32", 64, 32, 64, Tiling::HALF).up_to(Tiling::SOME_TWO),
            Tiling::slices("decode_residual_64x64", 64, 64, 192, Tiling::HALF).up_to(Tiling::SOME_TWO),
            Tiling::slices("decode_residual_64x128", 64, 128, 128, Tiling::HALF).up_to(Tiling::SOME_TWO),
            Tiling::slices("decode_residual_128x88", 128, 88, 256, Tiling::MOST).up_to(Tiling::ONE_EACH),
            Tiling::slices("decode_residual_64x64_2", 64, 64, 256, Tiling::HALF)
                .of_two_slices()
                .up_to(Tiling::TWO_SINGLE),
        ];
        const SUMS: &[Tiling] = &[
            Tiling::slices("decode_sums_64x16", 64, 16, 16, Tiling::HALF),
            Tiling::slices("decode_sums_64x32", 64, 32, 64, Tiling::HALF).up_to(Tiling::SOME_TWO),
            Tiling::slices("decode_sums_64x64", 64, 64, 192, Tiling::HALF).up_to(Tiling::SOME_TWO),
            Tiling::slices("decode_sums_64x128", 64, 128, 128, Tiling::HALF).up_to(Tiling::SOME_TWO),
            Tiling::slices("decode_sums_128x88", 128, 88, 256, Tiling::MOST).up_to(Tiling::ONE_EACH),
            Tiling::slices("decode_sums_64x64_2", 64, 64, 256, Tiling::HALF)
                .of_two_slices()
                .up_to(Tiling::TWO_SINGLE),
        ];
        const GATE_UP: &[Tiling] = &[
            Tiling::slices("decode_gate_up_64x16", 64, 16, 16, Tiling::HALF),
            Tiling::slices("decode_gate_up_64x32", 64, 32, 32, Tiling::HALF),
            Tiling::slices("decode_gate_up_64x48", 64, 48, 48, Tiling::HALF),
            Tiling::slices("decode_gate_up_64x64", 64, 64, 64, Tiling::HALF),
            Tiling::pair("pair_gate_up_192x32", 192, 32, 128, Tiling::MOST),
            Tiling::pair("pair_gate_up_192x64", 192, 64, 256, Tiling::MOST),
        ];
        // More tokens than that, and tiles that take all columns in turn are quicker: its many rows of w fill the device.
        const HEAD: &[Tiling] = &[
            Tiling::slices("decode_head_64x16", 64, 16, 16, Tiling::QUARTER),
            Tiling::slices("decode_head_64x32", 64, 32, 32, Tiling::QUARTER),
            Tiling::slices("decode_head_64x64", 64, 64, 64, Tiling::QUARTER),
        ];
        match kind {
            Kind::Qkv => QKV,
            Kind::Residual => RESIDUAL,
            Kind::RankSums => SUMS,
            Kind::GateUp => GATE_UP,
            Kind::Head => HEAD,
            Kind::Linear => &[],
        }
    }

    /// The same where it does not: a block has more tokens, so that w goes through L2 to fewer blocks, and w's rows fill
    /// the device by themselves, so that tiles that take all columns in turn are quicker sooner.
    fn of_large(kind: Kind) -> &'static [Tiling] {
        const QKV: &[Tiling] = &[
            Tiling::heads(qkv!("decode", "64x16"), 16, 16),
            Tiling::heads(qkv!("decode", "64x32"), 32, 32),
            Tiling::head_pair(qkv!("pair", "128x32"), 32, 64, Tiling::ALL),
            Tiling::head_pair(qkv!("pair", "128x64"), 64, 128, Tiling::ALL).up_to(Tiling::ONE_EACH),
            Tiling::head_trio(qkv!("trio", "128x64"), 64, 192),
            Tiling::head_trio(qkv!("trio", "128x88"), 88, 256),
        ];
        const RESIDUAL: &[Tiling] = &[
            Tiling::slices("decode_residual_64x16", 64, 16, 16, Tiling::HALF),
            Tiling::slices("decode_residual_64x32", 64, 32, 32, Tiling::HALF),
            Tiling::slices("decode_residual_64x64", 64, 64, 64, Tiling::HALF),
            Tiling::slices("decode_residual_128x128", 128, 128, 128, Tiling::ALL)
                .up_to(Tiling::ONE_EACH)
                .of_many_columns(),
            Tiling::slices("decode_residual_64x128", 64, 128, 128, Tiling::HALF).up_to(Tiling::TWO_EACH),
            Tiling::slices("decode_residual_192x128", 192, 128, 128, Tiling::ALL),
            Tiling::slices("decode_residual_128x96_2", 128, 96, 192, Tiling::ALL)
                .of_two_slices()
                .up_to(Tiling::SINGLE),
            Tiling::slices("decode_residual_128x128_2", 128, 128, 256, Tiling::ALL)
                .of_two_slices()
                .up_to(Tiling::SINGLE),
            Tiling::slices("decode_residual_192x144", 192, 144, 144, Tiling::ALL).up_to(Tiling::ONE_EACH),
            Tiling::slices("decode_residual_192x192", 192, 192, 192, Tiling::ALL)
                .up_to(Tiling::ONE_EACH)
                .from(Tiling::MANY),
        ];
        const SUMS: &[Tiling] = &[
            Tiling::slices("decode_sums_64x16", 64, 16, 16, Tiling::HALF),
            Tiling::slices("decode_sums_64x32", 64, 32, 32, Tiling::HALF),
            Tiling::slices("decode_sums_64x64", 64, 64, 64, Tiling::HALF),
            Tiling::slices("decode_sums_128x128", 128, 128, 128, Tiling::ALL)
                .up_to(Tiling::ONE_EACH)
                .of_many_columns(),
            Tiling::slices("decode_sums_64x128", 64, 128, 128, Tiling::HALF).up_to(Tiling::TWO_EACH),
            Tiling::slices("decode_sums_192x128", 192, 128, 128, Tiling::ALL),
            Tiling::sums_paired("decode_sums_192x72_paired", 192, 72, 144),
            Tiling::sums_paired("decode_sums_192x96_paired", 192, 96, 192),
            Tiling::sums_paired("decode_sums_192x128_paired", 192, 128, 256),
            Tiling::slices("decode_sums_128x96_2", 128, 96, 192, Tiling::ALL)
                .of_two_slices()
                .up_to(Tiling::SINGLE),
            Tiling::slices("decode_sums_128x128_2", 128, 128, 256, Tiling::ALL)
                .of_two_slices()
                .up_to(Tiling::SINGLE),
        ];
        const GATE_UP: &[Tiling] = &[
            Tiling::slices("decode_gate_up_64x16", 64, 16, 16, Tiling::HALF),
            Tiling::slices("decode_gate_up_64x32", 64, 32, 32, Tiling::HALF),
            Tiling::slices("decode_gate_up_64x48", 64, 48, 48, Tiling::HALF).up_to(Tiling::TWO_SINGLE),
            // All columns: where one round of blocks has all rows, the fewest fetch the tokens.
            Tiling::slices("decode_gate_up_192x48", 192, 48, 48, Tiling::ALL).up_to(Tiling::SINGLE),
            Tiling::slices("decode_gate_up_64x64", 64, 64, 64, Tiling::HALF).up_to(Tiling::TWO_SINGLE),
        ];
        match kind {
            Kind::Qkv => QKV,
            Kind::Residual => RESIDUAL,
            Kind::RankSums => SUMS,
            Kind::GateUp => GATE_UP,
            Kind::Head | Kind::Linear => Tiling::of(kind),
        }
    }

    /// The same for half of each multiprocessor: few blocks, which all find room at once beside others'.
    fn of_half(kind: Kind) -> &'static [Tiling] {
        const QKV: &[Tiling] = &[
            Tiling::heads(qkv!("decode", "64x32"), 32, 32),
            Tiling::heads(qkv!("decode", "64x64"), 64, 64),
            Tiling::heads(qkv!("decode", "64x128"), 128, 128),
        ];
        const RESIDUAL: &[Tiling] = &[
            Tiling::slices("decode_residual_64x32", 64, 32, 64, Tiling::HALF),
            Tiling::slices("decode_residual_64x128", 64, 128, 128, Tiling::HALF),
        ];
        const GATE_UP: &[Tiling] = &[
            Tiling::slices("decode_gate_up_64x32", 64, 32, 32, Tiling::HALF),
            Tiling::slices("decode_gate_up_128x64", 128, 64, 64, Tiling::HALF),
            Tiling::slices("decode_gate_up_128x128", 128, 128, 128, Tiling::HALF),
        ];
        match kind {
            Kind::Qkv => QKV,
            Kind::Residual => RESIDUAL,
            Kind::GateUp => GATE_UP,
            // Whole in divided steps, which ranks have none of.
            Kind::RankSums | Kind::Head | Kind::Linear => Tiling::of(kind),
        }
    }

    /// A kind's tilings for a matrix of this size; none where a kind has none.
    fn all(kind: Kind, shape: &Shape, share: SmShare) -> &'static [Tiling] {
        match share {
            SmShare::Whole if shape.fits_l2(kind) => Tiling::of(kind),
            SmShare::Whole => Tiling::of_large(kind),
            SmShare::Half => Tiling::of_half(kind),
        }
    }

    /// Which of them is for the shape; none where another kernel is the quicker one. For what a divided step launches there is no
    /// other in half of each multiprocessor: the last one then takes all that are too many for those before it.
    fn index(tilings: &[Tiling], kind: Kind, shape: &Shape, share: SmShare) -> Option<usize> {
        let is_divided = share == SmShare::Half && matches!(kind, Kind::Qkv | Kind::Residual | Kind::GateUp);
        let last = tilings.len().checked_sub(1).filter(|_| is_divided);
        tilings.iter().position(|tiling| tiling.suits(shape)).or(last)
    }

    /// What a product is launched as; `None` as above.
    pub(super) fn explained(kind: Kind, shape: &Shape, share: SmShare, form: Form) -> Option<Explained> {
        let tilings = Self::all(kind, shape, share);
        let tiling = &tilings[Self::index(tilings, kind, shape, share)?];
        let stages = tiling.stages(shape);
        let Block { rows, tokens } = tiling.block;
        let summed = match tiling.team {
            Team::Tokens { blocks } => {
                format!("all columns, in a cluster of {blocks} that fetches w together")
            }
            Team::Slices { .. } => format!("{} of {} slices of the columns", tiling.own, shape.slices),
        };
        Some(Explained {
            kernel: match tiling.fp8.filter(|_| form.kv_fp8) {
                Some(names) => names[usize::from(form.normed)],
                None => tiling.normed.filter(|_| form.normed).unwrap_or(tiling.kernel),
            },
            grid: tiling.grid(shape, stages),
            work: format!("a block: {rows} rows of w, {tokens} tokens, {summed}; {stages} stages"),
        })
    }

    /// Is there one for so many tokens?
    pub(super) fn there_is(kind: Kind, shape: &Shape, share: SmShare) -> bool {
        Self::index(Self::all(kind, shape, share), kind, shape, share).is_some()
    }

    /// Stages of the ring: as many as a block has blocks of columns, if they fit.
    fn stages(&self, shape: &Shape) -> u32 {
        let fit = (self.shared - self.block.shared(0)) / (self.block.shared(1) - self.block.shared(0));
        let cols = shape.cols.div_ceil(BLOCK_COLS);
        let wanted = match self.team {
            Team::Slices { .. } => cols.div_ceil(shape.slices) * self.own,
            Team::Tokens { .. } => cols,
        };
        // The sums lie over the ring afterwards.
        wanted.min(fit).max(self.block.sum_bytes().div_ceil(self.block.stage_bytes()))
    }

    /// Blocks of a cluster, clusters along the tokens, clusters along the rows.
    fn clusters(&self, shape: &Shape) -> [u32; 3] {
        let (row_tiles, token_tiles) =
            (shape.rows.div_ceil(self.block.rows), shape.tokens.div_ceil(self.block.tokens));
        match self.team {
            Team::Slices { tiles } => {
                let pair = if self.paired { 2 } else { 1 };
                [
                    tiles * shape.slices / self.own * pair,
                    token_tiles.div_ceil(pair),
                    row_tiles.div_ceil(tiles),
                ]
            }
            Team::Tokens { blocks } => [blocks, token_tiles.div_ceil(blocks), row_tiles],
        }
    }

    fn grid(&self, shape: &Shape, stages: u32) -> Grid {
        let [cluster, clusters, rows] = self.clusters(shape);
        // Clusters with the same rows of w are neighbours, so that w comes from memory once.
        Grid::new(clusters * cluster, self.block.threads())
            .rows(rows)
            .cluster(cluster)
            .shared(self.block.shared(stages))
            .dependent()
    }

    /// Is it the quickest for the shape, but for those before it in a list?
    fn suits(&self, shape: &Shape) -> bool {
        let blocks = self.clusters(shape).iter().product::<u32>();
        let holds = shape.slices.is_multiple_of(self.own);
        let (cols, fill) = (self.cols_min..=self.cols_max, self.blocks_min..=self.blocks_max);
        holds && shape.tokens <= self.tokens_max && fill.contains(&blocks) && cols.contains(&shape.cols)
    }

    /// Rows of w that one block fetches at once.
    fn fetched_rows(&self) -> u32 {
        match self.team {
            Team::Slices { .. } if self.paired => self.block.rows / 2,
            Team::Slices { .. } => self.block.rows,
            // In turns where their parts would not be whole groups of the swizzle.
            Team::Tokens { blocks } if self.block.rows.is_multiple_of(8 * blocks) => self.block.rows / blocks,
            Team::Tokens { .. } => self.block.rows,
        }
    }
}

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
pub(super) struct Decode {
    /// For matrices that fit L2, in the order of [`Tiling::of`].
    fitting: Kinds,
    /// For larger ones, in the order of [`Tiling::of_large`].
    large: Kinds,
    /// For half of each multiprocessor, in the order of [`Tiling::of_half`].
    half: Kinds,
}

impl Decode {
    pub(super) fn new(modules: &Modules) -> Result<Decode, CudaError> {
        Ok(Decode {
            fitting: Self::load(modules, Tiling::of)?,
            large: Self::load(modules, Tiling::of_large)?,
            half: Self::load(modules, Tiling::of_half)?,
        })
    }

    fn load(modules: &Modules, tilings: fn(Kind) -> &'static [Tiling]) -> Result<Kinds, CudaError> {
        let load = |module, kind| {
            let load = |tiling: &Tiling| {
                let find = |name| modules.kernel(module, name, tiling.shared);
                let normed = tiling.normed.map(find).transpose()?;
                let in_fp8 = |[kernel, normed]: [_; 2]| {
                    let find = |name| modules.kernel("gemm_decode_qkv_fp8", name, tiling.shared);
                    Ok([find(kernel)?, find(normed)?])
                };
                let fp8 = tiling.fp8.map(in_fp8).transpose()?;
                Ok(Loaded { tiling: *tiling, kernel: find(tiling.kernel)?, normed, fp8 })
            };
            tilings(kind).iter().map(load).collect::<Result<Vec<_>, CudaError>>()
        };
        Ok([
            load("gemm_decode_qkv", Kind::Qkv)?,
            load("gemm_decode_residual", Kind::Residual)?,
            load("gemm_decode_sums", Kind::RankSums)?,
            load("gemm_decode_gate_up", Kind::GateUp)?,
            load("gemm_decode_head", Kind::Head)?,
        ])
    }

    /// The tiling for the shape; none where another kernel is the quicker one.
    pub(super) fn tiling(&self, kind: Kind, shape: &Shape, share: SmShare) -> Option<&Loaded> {
        let index = Tiling::index(Tiling::all(kind, shape, share), kind, shape, share)?;
        let loaded = match share {
            SmShare::Whole if shape.fits_l2(kind) => &self.fitting,
            SmShare::Whole => &self.large,
            SmShare::Half => &self.half,
        };
        loaded.get(kind as usize)?.get(index)
    }

    pub(super) fn launch<E: Epilogue>(
        Loaded { tiling, kernel, normed, fp8 }: &Loaded,
        launcher: &Launcher,
        product: &Product<'_, E>,
    ) -> Result<(), CudaError> {
        let Product { shape, epilogue, .. } = product;
        let (kernel, normed) = match fp8 {
            Some([kernel, normed]) if epilogue.is_fp8() => (kernel, Some(normed)),
            _ => (kernel, normed.as_ref()),
        };
        let kernel = normed.filter(|_| epilogue.is_normed()).unwrap_or(kernel);
        let stages = tiling.stages(shape);
        let grid = tiling.grid(shape, stages);
        let [w, x] = product.maps(Block::new(tiling.fetched_rows(), tiling.block.tokens))?;
        launcher.launch(kernel, grid, [&w, &x, shape, &stages, *epilogue])
    }
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::HOPPER;
    use minisgl_kernels::attention::Set;

    use super::*;
    use crate::declared::threads_of;
    use crate::weight::SLICING;

    #[test]
    fn kernels_are_bound_to_the_threads_that_they_are_launched_with() {
        let kinds = [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head];
        let lists = [Tiling::of, Tiling::of_large, Tiling::of_half];
        for tiling in kinds.into_iter().flat_map(|kind| lists.map(|of| of(kind))).flatten() {
            let in_fp8 = tiling.fp8.into_iter().flatten();
            let all = std::iter::once(tiling.kernel).chain(tiling.normed).chain(in_fp8);
            for name in all {
                assert_eq!(threads_of(HOPPER, name), tiling.block.threads(), "{name}");
            }
        }
    }

    #[test]
    fn half_a_multiprocessor_is_left_beside_attention() {
        // The driver takes 1 KiB a block.
        const MULTIPROCESSOR: u32 = 228 << 10;
        for (head_dim, heads) in [(64, 1), (64, 2), (128, 1)] {
            for fp8 in [false, true] {
                let Set { decode_shared, decode_blocks, .. } = Set::new(true, head_dim, heads, fp8);
                let block = decode_shared + (1 << 10);
                let of_half = decode_blocks / 2 * block;
                assert!(of_half + Tiling::HALF + (1 << 10) <= MULTIPROCESSOR, "{head_dim}, {fp8}");
                assert!(decode_blocks * block <= MULTIPROCESSOR, "{head_dim}, {fp8}");
            }
        }
        for kind in [Kind::Qkv, Kind::Residual, Kind::GateUp] {
            assert!(Tiling::of_half(kind).iter().all(|tiling| tiling.shared <= Tiling::HALF), "{kind:?}");
        }
    }

    /// Of a product with so many rows, columns and tokens, the kernel that the list has for it.
    fn picked(of: fn(Kind) -> &'static [Tiling], kind: Kind, sizes: [u32; 3]) -> Option<&'static str> {
        let [rows, cols, tokens] = sizes;
        let shape =
            Shape { rows, cols, tokens, slices: kind.slices(rows, cols, SLICING.slices(cols as usize)) };
        of(kind).iter().find(|tiling| tiling.suits(&shape)).map(|tiling| tiling.kernel)
    }

    #[test]
    fn blocks_are_as_large_as_leaves_the_device_full() {
        // Qwen3-0.6B's o, and that of Llama's 1B, which has twice the rows.
        let o = |rows, tokens| picked(Tiling::of, Kind::Residual, [rows, 2048, tokens]);
        assert_eq!(
            [64, 128, 192, 256].map(|tokens| o(1024, tokens)),
            [
                Some("decode_residual_64x32"),
                Some("decode_residual_64x64"),
                Some("decode_residual_64x64"),
                Some("decode_residual_128x88"),
            ]
        );
        assert_eq!(
            [32, 64, 128, 192, 256].map(|tokens| o(2048, tokens)),
            [
                Some("decode_residual_64x32"),
                Some("decode_residual_64x64"),
                Some("decode_residual_64x128"),
                Some("decode_residual_64x64_2"),
                Some("decode_residual_64x64_2"),
            ]
        );
        // Of matrices that L2 does not hold: Qwen2.5's 7B and Qwen3-14B.
        let down = |rows, cols| picked(Tiling::of_large, Kind::Residual, [rows, cols, 128]);
        assert_eq!(down(3584, 18_944), Some("decode_residual_128x128"));
        assert_eq!(down(3584, 3584), Some("decode_residual_64x128"));
        assert_eq!(down(4096, 14_336), Some("decode_residual_192x128"));
        let o = |rows, tokens| picked(Tiling::of_large, Kind::Residual, [rows, rows, tokens]);
        assert_eq!(
            [160, 192, 256].map(|tokens| o(3584, tokens)),
            [
                Some("decode_residual_128x96_2"),
                Some("decode_residual_128x96_2"),
                Some("decode_residual_128x128_2"),
            ]
        );
        assert_eq!(
            [136, 192, 256].map(|tokens| o(5120, tokens)),
            [Some("decode_residual_192x144"), Some("decode_residual_192x192"), None]
        );
        assert_eq!(down(5120, 17_408), Some("decode_residual_192x128"));
        // Of two ranks each has half of Qwen3-14B's columns, and of the slices.
        let of_two = |cols, tokens| {
            let shape = Shape { rows: 5120, cols, tokens, slices: 2 };
            let tilings = Tiling::of_large(Kind::RankSums);
            tilings.iter().find(|tiling| tiling.suits(&shape)).map(|tiling| tiling.kernel)
        };
        assert_eq!(
            [64, 128, 136, 192, 256].map(|tokens| of_two(8704, tokens)),
            [
                Some("decode_sums_64x64"),
                Some("decode_sums_128x128"),
                Some("decode_sums_192x72_paired"),
                Some("decode_sums_192x96_paired"),
                Some("decode_sums_192x128_paired"),
            ]
        );
        // q, k and v of Qwen2.5's 7B are 36 heads, those of Qwen3-8B 48.
        let qkv = |heads: u32, cols, tokens| picked(Tiling::of_large, Kind::Qkv, [heads * 128, cols, tokens]);
        assert_eq!(
            [64, 128, 192, 256].map(|tokens| qkv(36, 3584, tokens)),
            [
                Some("pair_qkv_128x32"),
                Some("pair_qkv_128x64"),
                Some("trio_qkv_128x64"),
                Some("trio_qkv_128x88"),
            ]
        );
        assert_eq!([128, 192].map(|tokens| qkv(48, 4096, tokens)), [Some("pair_qkv_128x64"), None]);
        // Gate and up of Qwen3's 1.7B and 8B, Llama's 1B and Qwen2.5's 7B.
        let gate_up = |rows, cols, tokens| picked(Tiling::of_large, Kind::GateUp, [rows, cols, tokens]);
        assert_eq!(gate_up(12_288, 2048, 48), Some("decode_gate_up_64x48"));
        assert_eq!(gate_up(16_384, 2048, 64), Some("decode_gate_up_64x64"));
        assert_eq!(
            [32, 48, 49].map(|tokens| gate_up(24_576, 4096, tokens)),
            [Some("decode_gate_up_64x32"), Some("decode_gate_up_192x48"), None]
        );
        assert_eq!([48, 64].map(|tokens| gate_up(37_888, 3584, tokens)), [None; 2]);
    }

    #[test]
    fn a_tilings_ring_fits_its_share_of_shared_memory_and_holds_the_sums() {
        let kinds = [Kind::Qkv, Kind::Residual, Kind::RankSums, Kind::GateUp, Kind::Head];
        let cases = kinds.into_iter().flat_map(|kind| [64, 192, 3072, 17408].map(|cols| (kind, cols)));
        for (kind, cols) in cases {
            let shape = Shape {
                rows: 1024,
                cols,
                tokens: 1,
                slices: kind.slices(1024, cols, SLICING.slices(cols as usize)),
            };
            for tiling in [Tiling::of, Tiling::of_large, Tiling::of_half].into_iter().flat_map(|of| of(kind))
            {
                let stages = tiling.stages(&shape);
                assert!(tiling.block.shared(stages) <= tiling.shared, "{cols} columns, {tiling:?}");
                assert!(
                    tiling.block.sum_bytes() <= stages * tiling.block.stage_bytes(),
                    "{cols} columns, {tiling:?}"
                );
            }
        }
    }
}
