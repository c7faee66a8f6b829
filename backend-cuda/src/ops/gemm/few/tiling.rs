//! A kernel for few tokens: what of a product its blocks do, how they work together, and which launches it is the quickest for.

use crate::launch::Grid;
use crate::ops::gemm::product::{Block, Explained, Form};
use crate::ops::gemm::ring::Ring;
use crate::ops::gemm::shape::{BLOCK_COLS, Shape};
use crate::weight::SLICING;

/// How blocks of a product work together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Team {
    /// A cluster shares out the slices of the sum, of this many neighbouring row tiles.
    Slices { tiles: u32 },
    /// So many blocks with neighbouring tiles of tokens fetch w together; each has the whole sum.
    Tokens { blocks: u32 },
    /// The blocks that have a tile's slices meet in memory, where a cluster of two has only what both fetch for each other.
    Apart,
    /// Two blocks with all tokens and an equal share of w's rows, in pieces of so many, fetch tokens together; each has the whole sum.
    Batch { piece: u32 },
}

/// Whom a block has beside itself in its cluster, with a slice in common, so that each fetches a half of what both need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beside {
    Nobody,
    /// Who has the next tokens: both need the same rows of w.
    NextTokens,
    /// Who has the next rows of w: both need the same tokens.
    NextRows,
}

/// A kernel and the launches it is for.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops::gemm) struct Tiling {
    pub(super) kernel: &'static str,
    /// The kernel for [`Epilogue::is_normed`], where that is another one.
    pub(super) normed: Option<&'static str>,
    /// Both for [`Epilogue::is_fp8`], of a module of their own.
    pub(super) fp8: Option<[&'static str; 2]>,
    pub(super) block: Block,
    pub(super) team: Team,
    /// Quickest from this many tokens on,
    pub(super) tokens_min: u32,
    /// up to so many,
    pub(super) tokens_max: u32,
    /// up to so many blocks: where more are needed, larger ones are quicker;
    pub(super) blocks_max: u32,
    /// from so many on: of fewer, whose tiles are large, the multiprocessors that are left idle cost more than the tiles save;
    pub(super) blocks_min: u32,
    /// from so many columns on: of fewer, the way to the first ones and the sums' exchange are most of a block's time, and two
    /// blocks a multiprocessor hide each other's;
    pub(super) cols_min: u32,
    /// and up to so many: of more, clusters that split the sum in memory are quicker.
    pub(super) cols_max: u32,
    /// For sums of so many slices at least.
    pub(super) slices_min: u32,
    /// Slices that a block sums: one, or a pair.
    pub(super) own: u32,
    pub(super) beside: Beside,
    /// Does a whole warpgroup fetch, and give its registers to those that multiply?
    pub(super) dealt: bool,
    /// Bytes of shared memory that a block may take.
    pub(super) shared: u32,
}

impl Tiling {
    /// Two blocks fit a multiprocessor's shared memory.
    pub(super) const HALF: u32 = 112 << 10;
    /// Three do.
    pub(super) const THIRD: u32 = 75 << 10;
    /// One block does. Of a matrix that L2 holds, more bytes on their way are a loss.
    pub(super) const MOST: u32 = 162 << 10;
    /// All that a block can have.
    pub(super) const ALL: u32 = 227 << 10;
    /// The head's blocks are many and short: more of them side by side hide their ends.
    pub(super) const QUARTER: u32 = 56 << 10;
    /// Blocks that an H100 takes at once in clusters of four, which leave some multiprocessors free: one each, and two thirds of that;
    /// one and a half; two.
    pub(super) const ONE_EACH: u32 = 120;
    pub(super) const MANY: u32 = 80;
    /// Nearly as many as the first: tiles of 192 rows are worth the multiprocessors that these leave idle.
    pub(super) const ENOUGH: u32 = 96;
    /// The same in clusters of three: of 120 blocks some wait for others to end.
    pub(super) const OF_THREE: u32 = 117;
    pub(super) const SOME_TWO: u32 = 198;
    pub(super) const TWO_EACH: u32 = 240;
    /// The same, of other blocks.
    pub(in crate::ops::gemm) const SINGLE: u32 = 132;
    pub(super) const TWO_SINGLE: u32 = 264;
    pub(super) const THREE_SINGLE: u32 = 396;
    /// Nearly all of those: with fewer, tiles of 64 tokens a warpgroup are as quick where there are as many tokens.
    pub(super) const FULL: u32 = 124;
    /// Tokens of which `gemm_many.cuh`'s tiles, whose tokens are a multiple of 64, multiply many more than there are.
    const BATCH_MIN: u32 = 129;
    const MANY_COLUMNS: u32 = 8192;
    const FEW_COLUMNS: u32 = 4096;

    /// Tiles of so many rows of w by so many tokens, for up to `tokens_max`; the ring has as many stages as fit `shared`, or as a
    /// block needs. Those below say no more than what differs.
    pub(super) const fn slices(
        kernel: &'static str,
        rows: u32,
        tokens: u32,
        tokens_max: u32,
        shared: u32,
    ) -> Tiling {
        Tiling {
            kernel,
            normed: None,
            fp8: None,
            block: Block::new(rows, tokens),
            team: Team::Slices { tiles: 1 },
            tokens_min: 1,
            tokens_max,
            blocks_max: u32::MAX,
            blocks_min: 0,
            cols_min: 0,
            cols_max: u32::MAX,
            slices_min: 1,
            own: 1,
            beside: Beside::Nobody,
            dealt: false,
            shared,
        }
    }

    /// A slice, with a neighbour that has the next tokens.
    pub(super) const fn paired(kernel: &'static str, rows: u32, tokens: u32, tokens_max: u32) -> Tiling {
        Tiling { beside: Beside::NextTokens, ..Self::slices(kernel, rows, tokens, tokens_max, Self::ALL) }
            .up_to(Self::ONE_EACH)
    }

    /// With one that has the next rows.
    pub(super) const fn rows_paired(kernel: &'static str, rows: u32, tokens: u32, tokens_max: u32) -> Tiling {
        Tiling { beside: Beside::NextRows, ..Self::paired(kernel, rows, tokens, tokens_max) }
    }

    /// The same with all tokens of a batch, where that makes blocks enough.
    pub(super) const fn all_tokens(kernel: &'static str, rows: u32, tokens: u32) -> Tiling {
        Tiling { dealt: true, ..Self::rows_paired(kernel, rows, tokens, tokens) }.from(Self::MANY)
    }

    /// Blocks of 128 rows and so many tokens, a slice each, which meet in memory; with a neighbour that has the next tokens.
    pub(super) const fn apart(kernel: &'static str, tokens: u32) -> Tiling {
        let tiling = Self::paired(kernel, 128, tokens, 2 * tokens);
        let slices_min = SLICING.most;
        Tiling { team: Team::Apart, slices_min, ..tiling }
            .from(Self::FULL)
            .up_to(Self::SINGLE)
            .of_more_columns()
    }

    /// With one that has the next 64 rows.
    pub(super) const fn apart_rows(kernel: &'static str, tokens: u32) -> Tiling {
        let block = Block::new(64, tokens);
        Tiling { block, beside: Beside::NextRows, tokens_max: tokens, ..Self::apart(kernel, tokens) }
    }

    /// The same for launches of few blocks.
    pub(super) const fn up_to(self, blocks_max: u32) -> Tiling {
        Tiling { blocks_max, ..self }
    }

    /// And of more than a few.
    pub(super) const fn from(self, blocks_min: u32) -> Tiling {
        Tiling { blocks_min, ..self }
    }

    /// The same for matrices of many columns, as down's are.
    pub(super) const fn of_many_columns(self) -> Tiling {
        Tiling { cols_min: Self::MANY_COLUMNS, ..self }
    }

    /// And for those of few, as o's are: of more, clusters that split the sum in memory are quicker.
    pub(super) const fn of_few_columns(self) -> Tiling {
        Tiling { cols_max: Self::FEW_COLUMNS, ..self }
    }

    /// Where blocks share out the columns.
    pub(super) const fn of_slices(self) -> Tiling {
        Tiling { slices_min: 2, ..self }
    }

    /// For matrices of more than few columns, where the sums' way through memory is short beside what comes before it.
    pub(super) const fn of_more_columns(self) -> Tiling {
        Tiling { cols_min: Self::FEW_COLUMNS + 1, ..self }
    }

    /// By blocks that sum two slices each.
    pub(super) const fn of_two_slices(self) -> Tiling {
        Tiling { own: 2, ..self }
    }

    /// Two blocks of a cluster have two slices each of 128 rows; of two tiles of tokens at most.
    pub(super) const fn two_slices(kernel: &'static str, tokens: u32) -> Tiling {
        Self::slices(kernel, 128, tokens, 2 * tokens, Self::ALL).of_two_slices().up_to(Self::SINGLE)
    }

    /// A block has two slices of 64 rows, and a multiprocessor to itself: of matrices whose blocks take nearly all of these at once.
    pub(super) const fn two_slices_few(kernel: &'static str, tokens: u32) -> Tiling {
        Self::slices(kernel, 64, tokens, tokens, Self::ALL)
            .of_two_slices()
            .from(Self::FULL)
            .up_to(Self::SINGLE)
    }

    /// With the other kernels of heads: for normed ones, and with keys and values in fp8.
    const fn of_heads(self, [[_, normed], fp8]: [[&'static str; 2]; 2]) -> Tiling {
        Tiling { normed: Some(normed), fp8: Some(fp8), ..self }
    }

    /// A head's 128 rows meet in one cluster.
    pub(super) const fn heads(kernels: [[&'static str; 2]; 2], tokens: u32, tokens_max: u32) -> Tiling {
        let tiling = Self::slices(kernels[0][0], 64, tokens, tokens_max, Self::HALF);
        Tiling { team: Team::Slices { tiles: 2 }, ..tiling }.of_heads(kernels)
    }

    /// Two whole heads, or four, a slice each; a cluster of four has both slices of two neighbouring tiles of tokens.
    pub(super) const fn heads_paired(
        kernels: [[&'static str; 2]; 2],
        tokens: u32,
        tokens_max: u32,
        shared: u32,
    ) -> Tiling {
        let tiling = Self::paired(kernels[0][0], 128, tokens, tokens_max);
        Tiling { shared, ..tiling }.of_heads(kernels)
    }

    /// The same of neighbouring heads.
    pub(super) const fn heads_rows_paired(
        kernels: [[&'static str; 2]; 2],
        tokens: u32,
        tokens_max: u32,
    ) -> Tiling {
        Tiling { beside: Beside::NextRows, ..Self::heads_paired(kernels, tokens, tokens_max, Self::ALL) }
    }

    pub(super) const fn pair(
        kernel: &'static str,
        rows: u32,
        tokens: u32,
        tokens_max: u32,
        shared: u32,
    ) -> Tiling {
        Tiling {
            team: Team::Tokens { blocks: 2 },
            ..Tiling::slices(kernel, rows, tokens, tokens_max, shared)
        }
    }

    /// Two blocks, each of which has all tokens and takes up to so many rows of w at a time.
    pub(super) const fn batch(kernel: &'static str, rows: u32, tokens: u32) -> Tiling {
        let (team, tokens_min) = (Team::Batch { piece: 64 }, Self::BATCH_MIN);
        Tiling { team, tokens_min, dealt: true, ..Tiling::slices(kernel, rows, tokens, tokens, Self::ALL) }
    }

    /// The same for few tokens: where memory bounds, blocks share out rows by halves of what a warpgroup multiplies.
    pub(super) const fn fine_batch(kernel: &'static str, rows: u32, tokens: u32) -> Tiling {
        Tiling { team: Team::Batch { piece: 32 }, tokens_min: 1, ..Self::batch(kernel, rows, tokens) }
    }

    /// The same of 64 rows, for any number of tokens: of few, two blocks fit a multiprocessor.
    pub(super) const fn small_batch(kernel: &'static str, tokens: u32) -> Tiling {
        let shared = if tokens <= 64 { Self::HALF } else { Self::ALL };
        Tiling { tokens_min: 1, shared, ..Self::batch(kernel, 64, tokens) }
    }

    /// A pair of blocks of two whole heads.
    pub(super) const fn head_pair(
        kernels: [[&'static str; 2]; 2],
        tokens: u32,
        tokens_max: u32,
        shared: u32,
    ) -> Tiling {
        Self::pair(kernels[0][0], 128, tokens, tokens_max, shared).of_heads(kernels)
    }

    /// Three such blocks, for matrices of so few heads that there is room for all of them at once.
    pub(super) const fn head_trio(kernels: [[&'static str; 2]; 2], tokens: u32, tokens_max: u32) -> Tiling {
        let team = Team::Tokens { blocks: 3 };
        Tiling { team, ..Self::head_pair(kernels, tokens, tokens_max, Self::ALL) }.up_to(Self::OF_THREE)
    }

    /// What a product of this shape is launched as.
    pub(super) fn explained(&self, shape: &Shape, form: Form) -> Explained {
        let stages = self.stages(shape);
        let Block { rows, tokens } = self.block;
        let summed = match self.team {
            Team::Tokens { blocks } => {
                format!("all columns, in a cluster of {blocks} that fetches w together")
            }
            Team::Batch { .. } => "all columns, in a cluster of 2 that fetches tokens together".into(),
            Team::Slices { .. } => format!("{} of {} slices of the columns", self.own, shape.slices),
            Team::Apart => format!("{} of {} slices of the columns, met in memory", self.own, shape.slices),
        };
        Explained {
            kernel: match self.fp8.filter(|_| form.kv_fp8) {
                Some(names) => names[usize::from(form.normed)],
                None => self.normed.filter(|_| form.normed).unwrap_or(self.kernel),
            },
            grid: self.grid(shape, stages),
            work: format!("a block: {rows} rows of w, {tokens} tokens, {summed}; {stages} stages"),
        }
    }

    /// Stages of the ring: as many as a block has blocks of columns, if they fit.
    pub(super) fn stages(&self, shape: &Shape) -> u32 {
        let cols = shape.cols.div_ceil(BLOCK_COLS);
        let wanted = match self.team {
            Team::Slices { .. } | Team::Apart => cols.div_ceil(shape.slices) * self.own,
            Team::Tokens { .. } | Team::Batch { .. } => cols,
        };
        self.ring().stages(wanted, self.shared)
    }

    pub(super) fn ring(&self) -> Ring {
        Ring::of(self.block)
    }

    /// Blocks of a cluster, clusters along the tokens, clusters along the rows.
    fn clusters(&self, shape: &Shape) -> [u32; 3] {
        let (row_tiles, token_tiles) =
            (shape.rows.div_ceil(self.block.rows), shape.tokens.div_ceil(self.block.tokens));
        let [of_tokens, of_rows] = match self.beside {
            Beside::Nobody => [1, 1],
            Beside::NextTokens => [2, 1],
            Beside::NextRows => [1, 2],
        };
        let parts = shape.slices / self.own;
        match self.team {
            Team::Slices { tiles } => [
                tiles * parts * of_tokens * of_rows,
                token_tiles.div_ceil(of_tokens),
                row_tiles.div_ceil(tiles * of_rows),
            ],
            Team::Apart => {
                [of_tokens * of_rows, parts * token_tiles.div_ceil(of_tokens), row_tiles.div_ceil(of_rows)]
            }
            Team::Tokens { blocks } => [blocks, token_tiles.div_ceil(blocks), row_tiles],
            Team::Batch { piece } => {
                let pieces = shape.rows.div_ceil(piece);
                [2, pieces.div_ceil(pieces.div_ceil(Self::SINGLE)).div_ceil(2), 1]
            }
        }
    }

    pub(super) fn grid(&self, shape: &Shape, stages: u32) -> Grid {
        let [cluster, clusters, rows] = self.clusters(shape);
        // Clusters with the same rows of w are neighbours, so that w comes from memory once.
        Grid::new(clusters * cluster, self.threads())
            .rows(rows)
            .cluster(cluster)
            .shared(self.ring().shared(stages))
            .dependent()
    }

    /// Of a block.
    pub(super) fn threads(&self) -> u32 {
        self.ring().threads() + if self.dealt { 64 } else { 0 }
    }

    /// Do its blocks leave each other sums in memory?
    pub(in crate::ops::gemm) fn meets_in_memory(&self) -> bool {
        self.team == Team::Apart
    }

    /// Is it the quickest for the shape, but for those before it in a list?
    pub(super) fn suits(&self, shape: &Shape) -> bool {
        let blocks = self.clusters(shape).iter().product::<u32>();
        let holds = shape.slices.is_multiple_of(self.own) && shape.slices >= self.slices_min;
        let (cols, fill) = (self.cols_min..=self.cols_max, self.blocks_min..=self.blocks_max);
        let tokens = self.tokens_min..=self.tokens_max;
        holds && tokens.contains(&shape.tokens) && fill.contains(&blocks) && cols.contains(&shape.cols)
    }

    /// The rows of w and the tokens that one block fetches at once.
    pub(super) fn fetched(&self) -> Block {
        let Block { rows, tokens } = self.block;
        match (self.team, self.beside) {
            (Team::Slices { .. } | Team::Apart, Beside::Nobody) => self.block,
            (Team::Slices { .. } | Team::Apart, Beside::NextTokens) => Block::new(rows / 2, tokens),
            (Team::Slices { .. } | Team::Apart, Beside::NextRows) => Block::new(rows, tokens / 2),
            // In turns where their parts would not be whole groups of the swizzle.
            (Team::Tokens { blocks }, _) if rows.is_multiple_of(8 * blocks) => {
                Block::new(rows / blocks, tokens)
            }
            (Team::Tokens { .. }, _) => self.block,
            (Team::Batch { piece }, _) => Block::new(piece, tokens / 2),
        }
    }
}
