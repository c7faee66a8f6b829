//! A layer's experts: launches of `experts.cu`.
//!
//! ```text
//!   residual ── logits ──> choose ──> dispatch ──> gate_up ──> down ──> combine ── residual +=, sums of squares
//! ```
//!
//! Grids depend on the number of tokens alone; what the tokens chose is read from memory. So a recorded step does for all choices.
//!
//! Invariant: a token's bits depend on that token alone: each sum has one order, and what its experts give is added in ascending
//! order of their numbers.

use minisgl_core::backend::{Device, Element, ExpertWeights, Purpose, Queue, Step};
use minisgl_core::config::Limits;
use minisgl_core::spec::{self, DecoderSpec, LayerSpec};
use minisgl_core::stats::ExpertsRead;

use super::gemm::RowNorm;
use crate::device::Cuda;
use crate::error::CudaError;
use crate::launch::{Grid, Kernel, Launcher};
use crate::memory::{Address, Buffer};
use crate::param::plain_params;
use crate::weight::Weight;

/// Experts of a layer that the kernels take at most: 8 for each lane of a warp.
pub const COUNT_MAX: u32 = 256;
/// Experts of a token that they take at most.
pub const PER_TOKEN_MAX: u32 = 16;

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;
/// Tokens that a block of the router takes.
const LOGIT_TOKENS: u32 = 4;
/// Up to so many tokens a warp of the router takes one expert: more blocks matter more than reading x less often.
const FEW_TOKENS: u32 = 16;
/// Rows of w that a block of a product takes.
const TILE_ROWS: u32 = 128;
const BLOCK_COLS: u32 = 64;

/// What the kernels of a layer share.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Routing {
    logits: Address,
    scales: Address,
    chosen: Address,
    shares: Address,
    begins: Address,
    pairs: Address,
    tokens: u32,
    experts: u32,
    per_token: u32,
    hidden: u32,
    intermediate: u32,
    stored: u32,
    normalized: u32,
    nobody: u32,
}

plain_params!(Routing, RowNorm);

/// A product's kernels for tiles of so many pairs.
#[derive(Clone, Copy, Debug)]
struct Tile {
    pairs: u32,
    stages: u32,
    gate_up: Kernel,
    down: Kernel,
}

impl Tile {
    fn new(
        cuda: &Cuda,
        [pairs, stages]: [u32; 2],
        gate_up: &'static str,
        down: &'static str,
    ) -> Result<Tile, CudaError> {
        let shared = Self::shared_bytes(pairs, stages);
        let find = |name| cuda.modules().kernel("experts", name, shared);
        Ok(Tile { pairs, stages, gate_up: find(gate_up)?, down: find(down)? })
    }

    fn shared_bytes(pairs: u32, stages: u32) -> u32 {
        stages * (TILE_ROWS + pairs) * BLOCK_COLS * 2
    }

    /// A block for each tile of rows and for as many tiles of pairs as there can be.
    fn grid(&self, rows: u32, routing: &Routing) -> Grid {
        let pairs = routing.tokens * routing.per_token;
        let tiles = tiles_at_most(pairs, routing.experts, self.pairs);
        Grid::new(rows.div_ceil(TILE_ROWS), THREADS)
            .rows(tiles)
            .shared(Self::shared_bytes(self.pairs, self.stages))
            .dependent()
    }
}

/// Tiles of `tile` pairs that as many pairs need at most, dealt out to experts in any way: each expert has a tile that is not
/// full at most.
fn tiles_at_most(pairs: u32, experts: u32, tile: u32) -> u32 {
    let begun = pairs.min(experts);
    begun + (pairs - begun) / tile
}

/// The kernels and what they hand to each other.
#[derive(Debug)]
pub struct Experts {
    logits: [Kernel; 2],
    choose: Kernel,
    dispatch: Kernel,
    /// Narrow ones first.
    tiles: [Tile; 3],
    combine: Kernel,
    /// Addresses; sizes are a layer's and a step's.
    routing: Routing,
    /// `[tokens * per_token, intermediate]` bf16.
    activated: Buffer,
    /// `[tokens * per_token, hidden]` bf16.
    given: Buffer,
    /// Two u64: as [`ExpertsRead`].
    read: Buffer,
}

/// A layer's experts and what they are applied to.
#[derive(Clone, Copy, Debug)]
pub struct ExpertLayer<'a> {
    /// What they compute.
    pub spec: spec::Experts,
    /// Their weights.
    pub weights: &'a ExpertWeights<Weight>,
    /// `[hidden]` bf16: the scale by column of their norm.
    pub norm: Address,
    /// The scale by row.
    pub row_norm: RowNorm,
    /// `[tokens, hidden]` bf16: what they get, and what their sum is added to.
    pub residual: Address,
    /// `[tokens, ceil(hidden / 64)]` f32: sums of squares of the new residual stream.
    pub sumsq: Address,
}

impl Experts {
    /// For a model's layers with experts; `None` where it has none.
    pub fn new(cuda: &mut Cuda, spec: &DecoderSpec, limits: &Limits) -> Result<Option<Experts>, CudaError> {
        let layers = || spec.layers.iter().filter_map(LayerSpec::experts);
        let most = |of: fn(spec::Experts) -> u32| layers().map(of).max();
        let Some(count) = most(|it| it.count) else { return Ok(None) };
        let per_token = most(|it| it.per_token).unwrap_or(0);
        let pair_width = most(|it| it.per_token * it.intermediate).unwrap_or(0) as usize;
        let (tokens, hidden) = (limits.step_tokens(), spec.dims.hidden);
        let pairs = tokens * per_token as usize;
        let mut words = |words| Ok(cuda.alloc(Purpose::Scratch, Element::Word, words)?.address());
        let routing = Routing {
            logits: words(tokens * count as usize)?,
            scales: words(tokens)?,
            // Two numbers a word, and whole 16 bytes.
            chosen: words(pairs.next_multiple_of(8) / 2)?,
            shares: words(pairs)?,
            begins: words(count as usize + 1)?,
            pairs: words(pairs)?,
            tokens: 0,
            experts: 0,
            per_token: 0,
            hidden,
            intermediate: 0,
            stored: 0,
            normalized: 0,
            nobody: limits.running,
        };
        let read = cuda.alloc(Purpose::Scratch, Element::Word, 4)?;
        cuda.zero(read.address(), read.bytes())?;
        let activated = cuda.alloc(Purpose::Scratch, Element::Activation, tokens * pair_width)?;
        let given = cuda.alloc(Purpose::Scratch, Element::Activation, pairs * hidden as usize)?;
        let find = |name| cuda.modules().kernel("experts", name, 0);
        Ok(Some(Experts {
            logits: [find("experts_logits_1")?, find("experts_logits_4")?],
            choose: find("experts_choose")?,
            dispatch: find("experts_dispatch")?,
            tiles: [
                Tile::new(cuda, [16, 4], "experts_gate_up_16", "experts_down_16")?,
                Tile::new(cuda, [32, 4], "experts_gate_up_32", "experts_down_32")?,
                Tile::new(cuda, [64, 3], "experts_gate_up_64", "experts_down_64")?,
            ],
            combine: find("experts_combine")?,
            routing,
            activated,
            given,
            read,
        }))
    }

    /// Adds to each token's residual stream what its experts give it.
    pub fn launch(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        layer: &ExpertLayer<'_>,
    ) -> Result<(), CudaError> {
        let ExpertLayer { spec, weights, residual, sumsq, .. } = *layer;
        let routing = Routing {
            tokens: step.shape.tokens,
            experts: spec.count,
            per_token: spec.per_token,
            intermediate: spec.intermediate,
            stored: (weights.gate_up.rows() / spec.count as usize) as u32,
            normalized: u32::from(spec.normalized),
            ..self.routing
        };
        self.route(launcher, step, layer, &routing)?;
        let tile = self.tile(&routing);
        let (gate_up, down) = (weights.gate_up.address(), weights.down.address());
        let Experts { activated, given, .. } = self;
        let grid = tile.grid(routing.stored, &routing);
        launcher.launch(&tile.gate_up, grid, [&routing, &gate_up, &residual, activated])?;
        let grid = tile.grid(routing.hidden, &routing);
        launcher.launch(&tile.down, grid, [&routing, &down, activated, given])?;
        let grid =
            Grid::new(routing.tokens, THREADS).rows(routing.hidden.div_ceil(64).div_ceil(WARPS)).dependent();
        launcher.launch(&self.combine, grid, [&routing, given, &residual, &sumsq])
    }

    /// What steps of decode rows alone read so far.
    ///
    /// # Errors
    /// The device's.
    pub fn read(&self, cuda: &mut Cuda) -> Result<ExpertsRead, CudaError> {
        download(cuda, self.read)
    }

    /// Which experts each token gets, and which tokens each expert.
    fn route(
        &self,
        launcher: &Launcher,
        step: &Step<Buffer>,
        layer: &ExpertLayer<'_>,
        routing: &Routing,
    ) -> Result<(), CudaError> {
        let (tokens, experts) = (routing.tokens, routing.experts);
        let many = usize::from(tokens > FEW_TOKENS);
        let of_block = WARPS * [1, 4][many];
        let grid =
            Grid::new(experts.div_ceil(of_block), THREADS).rows(tokens.div_ceil(LOGIT_TOKENS)).dependent();
        let router = layer.weights.router.address();
        launcher.launch(
            &self.logits[many],
            grid,
            [routing, &layer.row_norm, &router, &layer.norm, &layer.residual],
        )?;
        let grid = Grid::new(tokens.div_ceil(WARPS), THREADS).dependent();
        let tokens_offset = step.layout.tokens as u32;
        launcher.launch(&self.choose, grid, [routing, &step.batch, &tokens_offset])?;
        let read = if step.shape.is_decode() { self.read.address() } else { Address::NULL };
        launcher.launch(&self.dispatch, Grid::new(experts, THREADS).dependent(), [routing, &read])
    }

    /// The narrowest tile that holds what an expert gets on average, and half as many more.
    fn tile(&self, routing: &Routing) -> &Tile {
        let usual = routing.tokens * routing.per_token * 3 / 2 / routing.experts;
        self.tiles.iter().find(|tile| usual <= tile.pairs).unwrap_or(&self.tiles[2])
    }
}

impl Cuda {
    /// What decode steps read of layers with experts so far, after waiting for all that is enqueued.
    ///
    /// # Errors
    /// The device's.
    pub fn experts_read(&mut self) -> Result<ExpertsRead, CudaError> {
        let experts = self.operations.as_ref().and_then(|operations| operations.experts.as_ref());
        let read = experts.map(|experts| experts.read);
        read.map_or(Ok(ExpertsRead::default()), |read| download(self, read))
    }
}

fn download(cuda: &mut Cuda, read: Buffer) -> Result<ExpertsRead, CudaError> {
    let mut staging = cuda.alloc_pinned(4)?;
    cuda.download(Queue::Compute, read, 4, &mut staging)?;
    let words = cuda.words(&staging)?;
    let wide = |i: usize| u64::from(words[i]) | u64::from(words[i + 1]) << 32;
    Ok(ExpertsRead { layers: wide(0), experts: wide(2) })
}

#[cfg(test)]
mod tests {
    use minisgl_kernels::{HOPPER, PORTABLE};

    use super::*;
    use crate::declared::{assert_declared, constant, threads_of};

    #[test]
    fn both_sides_declare_the_same() {
        assert_declared!(
            &["experts.cu"],
            "Routing",
            Routing {
                logits,
                scales,
                chosen,
                shares,
                begins,
                pairs,
                tokens,
                experts,
                per_token,
                hidden,
                intermediate,
                stored,
                normalized,
                nobody,
            }
        );
        assert_eq!(constant("experts.cu", "LOGIT_TOKENS"), LOGIT_TOKENS);
        assert_eq!(32 * constant("experts.cu", "EXPERTS_A_LANE"), COUNT_MAX);
        let products =
            [16, 32, 64].map(|pairs| [format!("experts_gate_up_{pairs}"), format!("experts_down_{pairs}")]);
        let others =
            ["logits_1", "logits_4", "choose", "dispatch", "combine"].map(|name| format!("experts_{name}"));
        for name in products.into_iter().flatten().chain(others) {
            for set in [HOPPER, PORTABLE] {
                assert_eq!(threads_of(set, &name), THREADS, "{name}");
            }
        }
    }

    #[test]
    fn there_are_blocks_for_every_way_to_deal_pairs_out() {
        for (pairs, experts) in [(1, 8), (8, 128), (64, 8), (100, 7), (2048, 128), (4000, 3)] {
            for tile in [16, 32, 64] {
                let most = tiles_at_most(pairs, experts, tile);
                // One pair for each but the last, which has the rest; and as even as can be.
                let others = (experts - 1).min(pairs - 1);
                let worst = others + (pairs - others).div_ceil(tile);
                let even: u32 = (0..experts)
                    .map(|e| (pairs / experts + u32::from(e < pairs % experts)).div_ceil(tile))
                    .sum();
                assert!(
                    worst.max(even) <= most && most <= pairs,
                    "{pairs} pairs, {experts} experts, tiles of {tile}"
                );
            }
        }
    }
}
